"""Tunix' DPOTrainer on the pairs of an order (see `meter`)."""

import importlib.metadata

import jax
import meter as meter_lib
import numpy as np
import optax
from flax import nnx
from tunix.models.qwen3 import model as qwen3
from tunix.sft.dpo import dpo_trainer

# Lengths are rounded up to this.
_MULTIPLE = 64


def main() -> None:
  meter = meter_lib.Meter()
  order, sizes = meter.order, meter.order["model"]
  config = qwen3.ModelConfig(
    num_layers=sizes["num_hidden_layers"],
    vocab_size=sizes["vocab_size"],
    embed_dim=sizes["hidden_size"],
    hidden_dim=sizes["intermediate_size"],
    num_heads=sizes["num_attention_heads"],
    head_dim=sizes["head_dim"],
    num_kv_heads=sizes["num_key_value_heads"],
    rope_theta=10_000,
    norm_eps=1e-6,
    use_tied_embedding=False,
    remat_config=qwen3.RematConfig.NONE,
    dtype=jax.numpy.float32,
    param_dtype=jax.numpy.float32,
  )
  policy, reference = (qwen3.Qwen3(config, rngs=nnx.Rngs(0)) for _ in range(2))
  accumulated = order["pairs"] // order["microbatch_pairs"]
  settings = dict(
    max_prompt_length=_longest(meter, (0,)),
    max_response_length=_longest(meter, (1, 2)),
    gradient_accumulation_steps=accumulated if accumulated > 1 else None,
    beta=order["beta"],
  )
  trainer = dpo_trainer.DPOTrainer(
    policy,
    reference,
    optax.adamw(order["learning_rate"], weight_decay=0.0),
    dpo_trainer.DPOTrainingConfig(
      eval_every_n_steps=10**9, max_steps=meter.num_updates, **settings
    ),
  )
  log_metrics = trainer._log_metrics

  def log(loss, *args, **kwargs):
    meter.add_loss(loss)
    return log_metrics(loss, *args, **kwargs)

  trainer._log_metrics = log
  trainer.train(_batches(meter, policy, settings))
  meter.write(
    versions={
      "tunix": importlib.metadata.version("google-tunix"),
      "jax": jax.__version__,
    },
    settings=settings | {"microbatch_pairs": order["microbatch_pairs"]},
  )


def _longest(meter, parts):
  longest = max(len(pair[part]) for pair in meter.pairs for part in parts)
  return meter_lib.round_up(longest, _MULTIPLE)


def _batches(meter, policy, settings):
  """Padded as `TrainingInput` asks: prompts on the left, answers on the right.

  As the trainer asks for the next batch only after it has started the step on
  the last one, waiting for the policy here waits for that step.
  """
  size = meter.order["microbatch_pairs"]
  for first in range(0, len(meter.pairs), size):
    if first and first % meter.order["pairs"] == 0:
      jax.block_until_ready(nnx.state(policy))
      meter.end_update()
    columns = []
    for part in range(3):
      name = "response" if part else "prompt"
      columns += _padded(
        [pair[part] for pair in meter.pairs[first : first + size]],
        settings[f"max_{name}_length"],
        is_left=not part,
      )
    meter.count_answer_tokens(columns[3].sum() + columns[5].sum())
    names = [
      f"{name}_{kind}"
      for name in ("prompt", "chosen", "rejected")
      for kind in ("ids", "mask")
    ]
    yield dpo_trainer.TrainingInput(**dict(zip(names, columns, strict=True)))
  jax.block_until_ready(nnx.state(policy))
  meter.end_update()


def _padded(sequences, length, *, is_left):
  ids = np.zeros((len(sequences), length), np.int32)
  mask = np.zeros_like(ids)
  for i, sequence in enumerate(sequences):
    place = slice(length - len(sequence), None)
    if not is_left:
      place = slice(len(sequence))
    ids[i, place] = sequence
    mask[i, place] = 1
  return ids, mask


if __name__ == "__main__":
  main()
