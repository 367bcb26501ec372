"""DPOP on real GSM8K pairs, a small decoder from scratch, on a CPU.

  python -m dpop_jax.cli.build_pairs --kind=maths --source=GSM8K/train.jsonl \
    --out=runs/gsm8k_pairs --num_shots=4
  python -m dpop_jax.cli.train --config=configs/gsm8k_cpu.py \
    --workdir=runs/gsm8k --config.data.train=runs/gsm8k_pairs/pairs.jsonl \
    --config.data.tokenizer=TOKENIZER_FOLDER

GSM8K/train.jsonl is the original file with its `<<48/2=24>>` annotations, the
tokenizer any Hugging Face folder of up to 50,304 tokens. A model that has
learned nothing yet has nothing to forget, so this shows the machinery at work,
not the paper's effect; for that see configs/demo.py.
"""

import ml_collections

from dpop_jax import config


def get_config() -> ml_collections.ConfigDict:
  """The sections and their keys are documented in dpop_jax/config.py."""
  return config.config_dict(
    model=dict(
      vocab_size=50_304,
      hidden_size=128,
      intermediate_size=384,
      num_hidden_layers=4,
      num_attention_heads=4,
      num_key_value_heads=2,
      tie_word_embeddings=True,
    ),
    data=dict(
      num_eval_pairs=32,
    ),
    batch=dict(batch_size=8, row_length=2048),
    loss=dict(name="dpop", beta=0.3, dpop_lambda=50.0),
    optimizer=dict(
      name="adamw",
      peak_learning_rate=1e-4,
      warmup_steps=10,
      max_grad_norm=1.0,
    ),
    run=dict(num_steps=50, log_every_steps=5, eval_every_steps=25),
    checkpoints=dict(save_every_steps=10),
  )
