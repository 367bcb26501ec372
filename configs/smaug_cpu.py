"""Smaug's mixture at the size of a laptop: the walk of docs/recipe.md, once.

  python -m dpop_jax.cli.train --config=configs/smaug_cpu.py:sft \
    --workdir=runs/smaug_sft --config.run.init_from=MODEL_FOLDER
  python -m dpop_jax.cli.train --config=configs/smaug_cpu.py \
    --workdir=runs/smaug --config.run.init_from=runs/smaug_sft

trains a small Hugging Face model, with its own tokenizer, on the chosen answers
of the three sets in runs/pairs, and then on the pairs with DPOP. The last
section of docs/recipe.md has the commands that build the sets, and what came of
it.
"""

import ml_collections

from dpop_jax import config

_SETS = ("metamath", "arc", "hellaswag")
# About as many of each, of GSM8K's, ARC-Challenge's and half of HellaSwag's
# validation pairs.
_WEIGHTS = (0.2, 0.4, 0.1)
_STAGES = ("sft", "dpop")


def get_config(stage: str = "dpop") -> ml_collections.ConfigDict:
  """The run of one stage: "sft" or "dpop"."""
  if stage not in _STAGES:
    raise ValueError(
      f"configs/smaug_cpu.py has the stages {', '.join(_STAGES)}, not "
      f"{stage!r}."
    )
  is_sft = stage == "sft"
  return config.config_dict(
    model=dict(dtype="float32"),
    data=dict(
      train=tuple(f"runs/pairs/{name}" for name in _SETS),
      weights=_WEIGHTS,
      # The same in both stages.
      num_eval_pairs=128,
      max_length=512,
    ),
    batch=dict(batch_size=8, row_length=1024),
    loss=(
      dict(name="sft")
      if is_sft
      else dict(name="dpop", beta=0.3, dpop_lambda=50.0)
    ),
    optimizer=dict(
      name="adamw",
      peak_learning_rate=1e-3 if is_sft else 1e-4,
      schedule="cosine" if is_sft else "linear",
      warmup_steps=20 if is_sft else 10,
      max_grad_norm=1.0,
    ),
    run=dict(
      num_steps=200 if is_sft else 100,
      log_every_steps=40 if is_sft else 5,
      eval_every_steps=None if is_sft else 25,
    ),
    checkpoints=dict(save_every_steps=100 if is_sft else 10),
  )
