"""What a remat policy saves in memory and costs in computation.

  python benchmarks/remat.py

Compiles and runs the train step of `program` on full rows with each policy, in
turns, on one device. For each it prints temporaries as the compiler counts them
(gradients included), the operations that the backward pass makes a second time
as `planning.flops` counts them, and CPU-seconds of a step
(`time.process_time`): the median, least and most. The last line is JSON.
"""

import json
import statistics
import time
from typing import Any

import jax
import numpy as np
from absl import app, flags

from dpop_jax import config as config_lib
from dpop_jax import optim, program, sharding, steps
from dpop_jax.data import dataset, plan
from dpop_jax.models import decoder
from dpop_jax.planning import batch_shapes, flops

_LAYERS = flags.DEFINE_integer("num_hidden_layers", 8, "Of the model.")
_HIDDEN = flags.DEFINE_integer("hidden_size", 256, "Of the model.")
_ROW_LENGTH = flags.DEFINE_integer("row_length", 512, "Tokens of a row.")
_ROWS = flags.DEFINE_integer("rows", 4, "Rows of a step.")
_REPETITIONS = flags.DEFINE_integer(
  "repetitions", 5, "Steps of each policy.", lower_bound=1
)


def main(_) -> None:
  runs = {name: _Run(name) for name in decoder.REMAT_POLICIES}
  # The first step of each, in which memory is taken, does not count.
  for number in range(_REPETITIONS.value + 1):
    for run in runs.values():
      run.step(is_counted=number > 0)
  print("remat  temporaries, MB  recomputed  CPU-s of a step (least to most)")
  results = {name: run.result() for name, run in runs.items()}
  for name, found in results.items():
    print(
      f"{name:<6} {found['temporary_bytes'] / 1e6:>15.1f}  "
      f"{found['recomputed']:>9.1%}  {found['seconds']:.2f} "
      f"({found['seconds_min']:.2f} to {found['seconds_max']:.2f})"
    )
  print(json.dumps(results))


class _Run:
  """A policy's compiled step and its state."""

  def __init__(self, remat: str):
    config = _config(remat)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    made = program.make_program(config, mesh, num_steps=100)
    shapes = batch_shapes.of_config(config)
    batch = shapes.empty_batch(config.batch.rows_per_microbatch)
    tokens = np.arange(batch.tokens.size).reshape(batch.tokens.shape)
    length = config.batch.row_length
    batch = batch._replace(
      tokens=(tokens * 7 % config.model.vocab_size).astype(np.int32),
      positions=np.broadcast_to(
        np.arange(length, dtype=np.int32), batch.tokens.shape
      ).copy(),
      visible_until=np.full(batch.tokens.shape, length, np.int32),
      score_positions=np.broadcast_to(
        np.arange(length, dtype=np.int32), batch.score_positions.shape
      ).copy(),
      num_scores=np.full(batch.num_scores.shape, length, np.int32),
      pair_weights=np.ones(batch.pair_weights.shape, np.float32),
    )
    self._step = program.compile_step(
      made.train_step, made, made.abstract_state, batch
    )
    self._batch = program.put_batch(made, batch)
    key = jax.random.key(0)
    params = decoder.make_params(key, config.model, mesh)
    self._reference = decoder.make_params(key, config.model, mesh)
    zero = jax.device_put(np.int32(0), made.abstract_state.step.sharding)
    self._state = steps.State(zero, params, made.init_opt_state(params))
    work = shapes.work(config.batch.rows_per_microbatch)
    self._flops = flops.count(config.model, config.model, work)
    self._seconds: list[float] = []

  def step(self, *, is_counted: bool) -> None:
    started = time.process_time()
    self._state, _ = jax.block_until_ready(
      self._step(self._state, self._reference, self._batch, np.int32(1))
    )
    if is_counted:
      self._seconds.append(time.process_time() - started)

  def result(self) -> dict[str, Any]:
    memory: Any = self._step.memory_analysis()
    others = self._flops.total - self._flops.recomputation
    return {
      "temporary_bytes": memory.temp_size_in_bytes,
      "recomputed": self._flops.recomputation / others,
      "seconds": statistics.median(self._seconds),
      "seconds_min": min(self._seconds),
      "seconds_max": max(self._seconds),
    }


def _config(remat: str) -> config_lib.Config:
  hidden = _HIDDEN.value
  return config_lib.Config(
    model=decoder.DecoderConfig(
      vocab_size=4096,
      hidden_size=hidden,
      intermediate_size=4 * hidden,
      num_hidden_layers=_LAYERS.value,
      num_attention_heads=hidden // 64,
      num_key_value_heads=hidden // 64,
      remat=remat,
    ),
    data=dataset.DataConfig(train="-", tokenizer="-"),
    batch=plan.BatchConfig(
      batch_size=_ROWS.value,
      row_length=_ROW_LENGTH.value,
      rows_per_microbatch=_ROWS.value,
    ),
    loss=config_lib.LossConfig(name="dpop", beta=0.3, dpop_lambda=50.0),
    optimizer=optim.OptimizerConfig(name="adamw", peak_learning_rate=1e-6),
    run=config_lib.RunConfig(num_steps=100),
  )


if __name__ == "__main__":
  app.run(main)
