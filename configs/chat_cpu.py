"""DPOP on real chat pairs, a small decoder from scratch, on a CPU.

  python -m dpop_jax.cli.train --config=configs/chat_cpu.py \
    --workdir=runs/chat --config.data.train=PAIRS.json \
    --config.data.tokenizer=TOKENIZER_FOLDER

PAIRS.json holds conversations with a chosen and a rejected reply, in the
ShareGPT or the message-list layout; the tokenizer is any Hugging Face folder of
up to 50,304 tokens, rendered by the built-in ChatML-like template.
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
      chat_template="chatml",
      num_eval_pairs=16,
      max_length=512,
    ),
    batch=dict(batch_size=4, row_length=2048),
    loss=dict(name="dpop", beta=0.1, dpop_lambda=5.0),
    optimizer=dict(
      name="adamw",
      peak_learning_rate=1e-4,
      warmup_steps=10,
      max_grad_norm=1.0,
    ),
    run=dict(num_steps=50, log_every_steps=5, eval_every_steps=25),
    checkpoints=dict(save_every_steps=10),
  )
