"""DPOP of a pretrained Hugging Face model, on a CPU or a single accelerator.

  python -m dpop_jax.cli.train --config=configs/finetune_cpu.py \
    --workdir=runs/finetune --config.run.init_from=MODEL_FOLDER \
    --config.data.train=PAIRS.jsonl
  python -m dpop_jax.cli.export_hf --workdir=runs/finetune --out=TRAINED_FOLDER

The section `model` has no sizes: they, and the tokenizer, are those of
MODEL_FOLDER. Policy, Adam's moments and gradients are float32, which is 16
bytes per parameter; the reference beside it is another 4.
"""

import ml_collections

from dpop_jax import config


def get_config() -> ml_collections.ConfigDict:
  """The sections and their keys are documented in dpop_jax/config.py."""
  return config.config_dict(
    model=dict(dtype="float32"),
    data=dict(num_eval_pairs=16, max_length=512),
    batch=dict(batch_size=8, row_length=1024),
    loss=dict(name="dpop", beta=0.3, dpop_lambda=50.0),
    optimizer=dict(
      name="adamw",
      peak_learning_rate=1e-5,
      warmup_steps=2,
      max_grad_norm=1.0,
    ),
    run=dict(num_steps=20, log_every_steps=5),
    checkpoints=dict(save_every_steps=10),
  )
