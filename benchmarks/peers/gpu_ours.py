"""dpop_jax's train step on the pairs of an order (see `meter`), on a GPU."""

import time

import jax
import jax.numpy as jnp
import meter as meter_lib
import numpy as np

import dpop_jax
from benchmarks.suite_parts import gpu_work
from dpop_jax import pairs as pairs_lib
from dpop_jax import program as program_lib
from dpop_jax import sharding, steps
from dpop_jax.data import dataset
from dpop_jax.models import decoder

# Of the product that gives the card's rate: (rows, inner, columns).
_PRODUCT, _SMALL_PRODUCT = 8192, 256
_PRODUCTS, _TRIALS = 20, 5


def main() -> None:
  meter = meter_lib.Meter()
  order = meter.order
  shape = gpu_work.SHAPES[order["shape"]]
  load = gpu_work.LOADS[order["shape"], order["load"]]
  config = gpu_work.config(shape, load)
  device = jax.devices()[0]
  rate = _product_rate(_PRODUCT if device.platform == "gpu" else _SMALL_PRODUCT)
  mesh = sharding.make_mesh(sharding.MeshConfig(), [device])
  program = program_lib.make_program(config, mesh, num_steps=load.updates)
  plan = load.plan(
    dataset.TokenPairs.of(pairs_lib.TokenPair(*parts) for parts in meter.pairs)
  )
  params = decoder.make_params(jax.random.key(0), config.model, mesh)
  step = program_lib.compile_step(
    program.train_step, program, program.abstract_state, plan.empty_batch()
  )
  reference = None
  if shape.is_reference_cached:
    _score_reference(program, params, plan)
  else:
    reference = jax.tree.map(jnp.copy, params)
  zero = jax.device_put(np.int32(0), program.abstract_state.step.sharding)
  state = steps.State(zero, params, program.init_opt_state(params))
  # The state is donated: nothing else may keep what it began with.
  del params
  for number in range(load.updates):
    planned = plan.step(number)
    batch = program_lib.put_batch(program, planned.batch)
    count = np.int32(planned.num_microbatches)
    state, report = jax.block_until_ready(step(state, reference, batch, count))
    meter.end_update()
    meter.add_loss(report.metrics["loss"].mean())
    meter.count_answer_tokens(planned.num_answer_tokens)
  memory = step.memory_analysis()
  peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
  meter.write(
    versions={"dpop_jax": dpop_jax.__version__, "jax": jax.__version__},
    settings={
      "batch.row_length": load.row_length,
      "rows' length": plan.capacity.tokens,
      "batch.rows_per_microbatch": load.rows,
      "model.remat": shape.remat,
      "model.dtype": config.model.dtype,
      "model.param_dtype": config.model.param_dtype,
      "optimizer.name": shape.optimizer,
      "reference.cache_dir is set": shape.is_reference_cached,
    },
    device=device.device_kind,
    gpu_peak_bytes=peak,
    planned_bytes=memory.argument_size_in_bytes + memory.temp_size_in_bytes,
    product_flops_per_second=rate,
  )


def _score_reference(program, params, plan) -> None:
  """Gives the plan the log-probs of these parameters, row by row of a step."""
  score = program_lib.compile_score_step(program, plan.empty_batch())
  found = []
  for number in range(plan.num_steps):
    batch, layout = plan.step(number).batch, plan.layout(number)
    logps = []
    for index in range(len(batch.tokens)):
      part = batch.map(lambda x: x[index : index + 1])  # noqa: B023
      logps.append(score(params, program_lib.put_batch(program, part)))
    by_row = np.concatenate(jax.device_get(logps))
    spans = [layout.row_pairs(i) for i in range(len(layout.row_ends))]
    found.append(
      np.concatenate(
        [row[: s.stop - s.start] for row, s in zip(by_row, spans, strict=False)]
      )
    )
  plan.reference_logps = lambda step, _: found[step]


def _product_rate(size: int) -> float:
  """FLOPs a second of bfloat16 products of squares; the best of some trials."""
  square = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
  product = jax.jit(jnp.matmul)
  jax.block_until_ready(product(square, square))
  best = 0.0
  for _ in range(_TRIALS):
    start, result = time.perf_counter(), square
    for _ in range(_PRODUCTS):
      result = product(result, square)
    jax.block_until_ready(result)
    best = max(best, _PRODUCTS * 2 * size**3 / (time.perf_counter() - start))
  return best


if __name__ == "__main__":
  main()
