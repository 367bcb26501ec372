"""The paper's argument on a laptop: `make demo`, or

  python -m dpop_jax.cli.demo --config=configs/demo.py --workdir=runs/demo

One small decoder learns sums in several steps (`sft`), and each loss then
trains it on pairs whose rejected answer has one wrong digit in an intermediate
result. Files and `init_from` are filled in by the demo, which makes the corpus.
"""

import ml_collections

from dpop_jax import config

_MODEL = dict(
  vocab_size=192,
  hidden_size=96,
  intermediate_size=384,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=4,
)
_LOSSES = {
  "sft": dict(name="sft"),
  "dpo": dict(name="dpo", beta=0.3),
  "ipo": dict(name="ipo", beta=0.3),
  "slic": dict(name="slic_hinge", beta=0.3),
  "dpop": dict(name="dpop", beta=0.3, dpop_lambda=50.0),
}


def get_config(stage: str = "dpop") -> ml_collections.ConfigDict:
  """The run of one stage: "sft", or a loss: "dpo", "ipo", "slic", "dpop"."""
  if stage not in _LOSSES:
    raise ValueError(
      f"configs/demo.py has the stages {', '.join(_LOSSES)}, not {stage!r}."
    )
  if stage == "sft":
    return config.config_dict(
      model=_MODEL,
      batch=dict(batch_size=32, row_length=2304),
      loss=_LOSSES[stage],
      optimizer=dict(
        name="adamw",
        peak_learning_rate=3e-3,
        schedule="cosine",
        warmup_steps=100,
        max_grad_norm=1.0,
        b2=0.98,
        weight_decay=0.01,
      ),
      run=dict(num_steps=600, log_every_steps=50),
    )
  return config.config_dict(
    model=_MODEL,
    batch=dict(batch_size=16, row_length=1664),
    loss=_LOSSES[stage],
    optimizer=dict(
      name="adamw",
      peak_learning_rate=1e-4,
      schedule="linear",
      warmup_steps=10,
      max_grad_norm=10.0,
    ),
    run=dict(num_steps=150, log_every_steps=10, eval_every_steps=25),
  )
