"""DPOP of a 7B model of Llama-2's shape. Not run: there was no such machine.

  python -m dpop_jax.cli.train --config=configs/smaug_7b.py \
    --workdir=WORKDIR --config.data.train=PAIRS.jsonl \
    --config.data.tokenizer=TOKENIZER_FOLDER \
    --config.run.init_from=START

What the paper (https://arxiv.org/abs/2402.13228v2) says is beta 0.3 and lambda
50, and that one of its models is Llama-2-7B-Chat. Learning rate, batch size,
warm-up, length and hardware it does not say; those marked as guesses below are
of VinePPO's published DPOP runs on GSM8K (beta 0.3 and lambda 50 as well), or,
for warm-up in steps, of Bielik v3's.

Parameters, gradients, Adam's moments and the reference are float32, together 20
bytes per parameter or 135 GB: 8 devices of 32 GB, or fewer and larger ones.
"""

import ml_collections

from dpop_jax import config


def get_config() -> ml_collections.ConfigDict:
  """The sections and their keys are documented in dpop_jax/config.py."""
  return config.config_dict(
    # Llama-2-7B.
    model=dict(
      vocab_size=32_000,
      hidden_size=4096,
      intermediate_size=11_008,
      num_hidden_layers=32,
      num_attention_heads=32,
      num_key_value_heads=32,
      rope_theta=10_000.0,
      rms_norm_eps=1e-5,
      dtype="bfloat16",
      remat="full",
    ),
    data=dict(
      num_eval_pairs=256,  # A guess.
      max_length=1024,  # A guess.
    ),
    batch=dict(
      batch_size=64,  # A guess: VinePPO's.
      row_length=2048,  # A guess; no effect on results.
      rows_per_microbatch=8,
    ),
    # The paper's.
    loss=dict(name="dpop", beta=0.3, dpop_lambda=50.0),
    optimizer=dict(
      name="adamw",  # A guess.
      peak_learning_rate=1e-6,  # A guess: VinePPO's.
      warmup_steps=50,  # A guess: Bielik's. VinePPO has 3 % of all steps.
      weight_decay=0.0,  # A guess: VinePPO's.
      max_grad_norm=1.0,  # A guess: VinePPO's.
    ),
    run=dict(
      num_epochs=3.0,  # A guess: VinePPO's.
      eval_every_steps=100,
    ),
    checkpoints=dict(save_every_steps=100),
    # 1, 2, 4 or 8 devices; more need a larger batch.rows_per_microbatch.
    mesh=dict(data=1, fsdp=-1, tensor=1),
  )
