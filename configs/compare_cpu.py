"""The paper's curves on real pairs, with a small decoder, on a CPU.

  DPOP_SHARED_DATA=DATA python benchmarks/paper_pairs.py --out=runs/paper/data
  python -m dpop_jax.cli.train --config=configs/compare_cpu.py:sft \
    --workdir=runs/paper/sft
  python -m dpop_jax.cli.compare --config=configs/compare_cpu.py:gsm8k \
    --workdir=runs/paper/gsm8k --sweep=loss.name=dpo,ipo,slic_hinge,dpop

One supervised model, of GSM8K's solutions and ARC-Challenge's right choices,
and pairs of either: `gsm8k` (one wrong number) or `arc` (another choice). What
came of it is in docs/compare.md.
"""

import ml_collections

from dpop_jax import config

_FOLDER = "runs/paper"
_MODEL = dict(
  vocab_size=2048,
  hidden_size=128,
  intermediate_size=512,
  num_hidden_layers=4,
  num_attention_heads=4,
  num_key_value_heads=4,
  tie_word_embeddings=True,
)
_STAGES = ("sft", "gsm8k", "arc")
# A step on GSM8K's long answers takes three times as long.
_NUM_STEPS = {"gsm8k": 60, "arc": 100}


def get_config(stage: str = "gsm8k") -> ml_collections.ConfigDict:
  """The run of one stage: "sft", "gsm8k" or "arc"."""
  if stage not in _STAGES:
    raise ValueError(
      f"configs/compare_cpu.py has the stages {', '.join(_STAGES)}, not "
      f"{stage!r}."
    )
  data = dict(
    train=f"{_FOLDER}/data/{stage}_train.jsonl",
    tokenizer=f"{_FOLDER}/data/tokenizer.model",
    max_length=512,
  )
  if stage == "sft":
    return config.config_dict(
      model=_MODEL,
      data=data,
      batch=dict(batch_size=16, row_length=1024),
      loss=dict(name="sft"),
      optimizer=dict(
        name="adamw",
        peak_learning_rate=2e-3,
        schedule="cosine",
        warmup_steps=100,
        max_grad_norm=1.0,
        b2=0.98,
        weight_decay=0.01,
      ),
      run=dict(num_steps=1000, log_every_steps=50),
      checkpoints=dict(save_every_steps=200),
    )
  return config.config_dict(
    model=_MODEL,
    data=data | dict(eval=f"{_FOLDER}/data/{stage}_eval.jsonl"),
    batch=dict(batch_size=8, row_length=1024),
    loss=dict(name="dpop", beta=0.3, dpop_lambda=50.0),
    optimizer=dict(
      name="adamw",
      peak_learning_rate=1e-4,
      schedule="linear",
      warmup_steps=10,
      max_grad_norm=10.0,
    ),
    run=dict(
      num_steps=_NUM_STEPS[stage],
      log_every_steps=10,
      eval_every_steps=_NUM_STEPS[stage] // 4,
      init_from=f"{_FOLDER}/sft",
    ),
  )
