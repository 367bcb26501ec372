"""Compile time of the train step against depth.

  python benchmarks/compile_time.py

Traces, lowers and compiles the train step of `program` for models of some
depths, in turns, and prints CPU-seconds (`time.process_time`). As layers are
scanned, depth should change little. Nothing is computed and nothing is read.
The last line is JSON; `ratio` is the deepest model's trace + lower + compile
over the shallowest one's, by medians.
"""

import json
import statistics
import time

import jax
import jax.numpy as jnp
from absl import app, flags

from dpop_jax import config as config_lib
from dpop_jax import optim, program, sharding
from dpop_jax.data import dataset, packing, plan
from dpop_jax.models import decoder

_LAYERS = flags.DEFINE_multi_integer(
  "num_hidden_layers", [4, 32], "Depths to compare."
)
_HIDDEN = flags.DEFINE_integer("hidden_size", 64, "Width of the models.")
_REMAT = flags.DEFINE_enum(
  "remat", "none", list(decoder.REMAT_POLICIES), "As in the model section."
)
_ROW_LENGTH = flags.DEFINE_integer("row_length", 256, "Tokens of a row.")
_MICROBATCHES = flags.DEFINE_integer("microbatches", 2, "Of an update.")
_REPETITIONS = flags.DEFINE_integer(
  "repetitions", 3, "Compilations of each depth.", lower_bound=1
)

_PHASES = ("trace", "lower", "compile")


def main(_) -> None:
  # What is found in a cache was not compiled.
  jax.config.update("jax_enable_compilation_cache", False)
  seconds = {depth: [] for depth in _LAYERS.value}
  # The first round, in which JAX itself warms up, does not count.
  for number in range(_REPETITIONS.value + 1):
    for depth in seconds:
      spent = _compile(depth)
      if number:
        seconds[depth].append(spent)
  print("layers   trace   lower  compile   total (min to max), CPU-s")
  results, totals = {}, {}
  for depth, spent in seconds.items():
    medians = [statistics.median(column) for column in zip(*spent, strict=True)]
    sums = [sum(phases) for phases in spent]
    totals[depth] = statistics.median(sums)
    results[depth] = dict(zip(_PHASES, medians, strict=True)) | {
      "total": totals[depth],
      "total_min": min(sums),
      "total_max": max(sums),
    }
    print(
      f"{depth:6} {medians[0]:7.2f} {medians[1]:7.2f} {medians[2]:8.2f} "
      f"{totals[depth]:7.2f} ({min(sums):.2f} to {max(sums):.2f})"
    )
  ratio = totals[max(totals)] / totals[min(totals)]
  print(f"deepest over shallowest: {ratio:.2f}")
  print(json.dumps({"layers": results, "ratio": ratio}))


def _compile(num_layers: int) -> tuple[float, ...]:
  """CPU-seconds of each phase."""
  jax.clear_caches()
  config = _config(num_layers)
  mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  the_program = program.make_program(config, mesh, num_steps=1)
  capacity = packing.Capacity(_ROW_LENGTH.value, 64, 32, 4)
  rows = packing.empty_rows((_MICROBATCHES.value, 1), capacity)
  batch = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=the_program.batch_sharding
    ),
    rows,
  )
  arguments = (
    the_program.abstract_state,
    the_program.abstract_reference,
    batch,
    jax.ShapeDtypeStruct((), jnp.int32),
  )
  marks = [time.process_time()]
  with jax.set_mesh(mesh):
    traced = the_program.train_step.trace(*arguments)
    marks.append(time.process_time())
    lowered = traced.lower()
    marks.append(time.process_time())
    lowered.compile()
    marks.append(time.process_time())
  return tuple(
    end - start for start, end in zip(marks, marks[1:], strict=False)
  )


def _config(num_layers: int) -> config_lib.Config:
  return config_lib.Config(
    model=decoder.DecoderConfig(
      vocab_size=512,
      hidden_size=_HIDDEN.value,
      intermediate_size=2 * _HIDDEN.value,
      num_hidden_layers=num_layers,
      num_attention_heads=2,
      num_key_value_heads=1,
      remat=_REMAT.value,
    ),
    # Named because the config wants it; never opened.
    data=dataset.DataConfig(train="none", tokenizer="none"),
    batch=plan.BatchConfig(batch_size=1, row_length=_ROW_LENGTH.value),
    loss=config_lib.LossConfig(name="dpop", beta=0.3, dpop_lambda=50.0),
    optimizer=optim.OptimizerConfig(name="adamw", peak_learning_rate=1e-4),
    run=config_lib.RunConfig(num_steps=1),
  )


if __name__ == "__main__":
  app.run(main)
