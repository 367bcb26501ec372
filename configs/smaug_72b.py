"""DPOP of a 72B model of Qwen's shape. Not run: there was no such machine.

  python -m dpop_jax.cli.train --config=configs/smaug_72b.py \
    --workdir=WORKDIR --config.data.train=PAIRS.jsonl \
    --config.data.tokenizer=TOKENIZER_FOLDER \
    --config.run.init_from=START

What the paper (https://arxiv.org/abs/2402.13228v2) says is beta 0.3 and lambda
50, and that Smaug-72B starts from MoMo-72B-lora-1.8.7-DPO, which has Qwen-72B's
shape. Whether all parameters were trained, learning rate, batch size, warm-up,
steps, length and hardware it does not say; those marked as guesses below are of
Bielik v3's published DPOP run (with its own beta 0.1 and lambda 2.5).

Parameters, gradients and Adam's moments are float32 and the reference is
bfloat16, together 18 bytes per parameter or 1.3 TB. 64 chips of 95 GB hold it
with rows to spare: `python -m dpop_jax.cli.plan` with this config and
`--topology=v5p:4x4x4` tells what they need.
"""

import ml_collections

from dpop_jax import config


def get_config() -> ml_collections.ConfigDict:
  """The sections and their keys are documented in dpop_jax/config.py."""
  return config.config_dict(
    # Qwen-72B.
    model=dict(
      vocab_size=152_064,
      hidden_size=8192,
      intermediate_size=24_576,
      num_hidden_layers=80,
      num_attention_heads=64,
      num_key_value_heads=64,
      attention_bias=True,
      rope_theta=1_000_000.0,
      rms_norm_eps=1e-6,
      dtype="bfloat16",
      remat="full",
    ),
    data=dict(
      num_eval_pairs=256,  # A guess.
      max_length=2048,  # A guess.
    ),
    batch=dict(
      batch_size=64,  # A guess: Bielik's.
      row_length=4096,  # A guess; no effect on results.
      rows_per_microbatch=32,
    ),
    # The paper's.
    loss=dict(name="dpop", beta=0.3, dpop_lambda=50.0),
    reference=dict(param_dtype="bfloat16"),
    optimizer=dict(
      name="adamw",  # A guess: Bielik's.
      peak_learning_rate=5e-7,  # A guess: Bielik's, constant after warm-up.
      warmup_steps=50,  # A guess: Bielik's.
      b1=0.9,  # A guess: Bielik's.
      b2=0.95,  # A guess: Bielik's.
      weight_decay=0.0,  # A guess: Bielik's.
      max_grad_norm=1.0,  # A guess: Bielik's.
    ),
    run=dict(
      num_steps=1800,  # A guess: Bielik's.
      eval_every_steps=100,
    ),
    checkpoints=dict(save_every_steps=100),
    # 64 devices; fsdp * data must divide batch.rows_per_microbatch.
    mesh=dict(data=1, fsdp=16, tensor=-1),
  )
