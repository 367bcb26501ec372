"""DPOP of a 34B model of Yi's shape. Not run: there was no such machine.

  python -m dpop_jax.cli.train --config=configs/smaug_34b.py \
    --workdir=WORKDIR --config.data.train=PAIRS.jsonl \
    --config.data.tokenizer=TOKENIZER_FOLDER \
    --config.run.init_from=START

What the paper (https://arxiv.org/abs/2402.13228v2) says is beta 0.3 and lambda
50, and that Smaug-34B starts from a fine-tuned Yi-34B. The rest it does not
say; those marked as guesses below are as in smaug_72b.py.

Parameters, gradients and Adam's moments are float32 and the reference is
bfloat16, together 18 bytes per parameter or 620 GB: 32 chips of 95 GB or 64 of
32 GB, as `python -m dpop_jax.cli.plan` tells with this config and
`--topology=v5p:4x4x2` or `--topology=v6e:8x8`.
"""

import ml_collections

from dpop_jax import config


def get_config() -> ml_collections.ConfigDict:
  """The sections and their keys are documented in dpop_jax/config.py."""
  return config.config_dict(
    # Yi-34B.
    model=dict(
      vocab_size=64_000,
      hidden_size=7168,
      intermediate_size=20_480,
      num_hidden_layers=60,
      num_attention_heads=56,
      num_key_value_heads=8,
      rope_theta=5_000_000.0,
      rms_norm_eps=1e-5,
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
    # 32 or 64 devices.
    mesh=dict(data=1, fsdp=16, tensor=-1),
  )
