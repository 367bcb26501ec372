"""Whether a run fits a TPU slice, and how fast it could be, without the slice.

The real compiler compiles the very step that `train` runs, for chips that need
not exist; what it says is what is reported.
"""

import dataclasses
import math
import time
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp

from dpop_jax import config as config_lib
from dpop_jax import logprobs, program, sharding
from dpop_jax.planning import (
  batch_shapes,
  chips,
  collectives,
  compiler,
  flops,
  purposes,
  step_time,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
  """Bytes of one chip's HBM that a step takes.

  Attributes:
    params: The policy, in its stored type.
    optimizer: State of the optimizer, and the step, without what is on hosts.
    reference: The reference, likewise.
    batch: The batch.
    padding: By which the compiler's layouts make these larger.
    temporaries: All else that lives at the worst moment: gradients, what is
      kept for the backward pass, gathered weights; None if it does not fit.
    code: The program itself; None also where none was made.
    host: Not in HBM but in its host's memory: optimizer state and reference
      that are kept there.
  """

  params: int
  optimizer: int
  reference: int
  batch: int
  padding: int = 0
  temporaries: int | None = None
  code: int | None = None
  host: int = 0

  @property
  def arguments(self) -> int:
    """What is there before the step begins."""
    parts = self.params, self.optimizer, self.reference, self.batch
    return sum(parts) + self.padding

  @property
  def total(self) -> int:
    return self.arguments + (self.temporaries or 0) + (self.code or 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moved:
  """What one kind of collective sends, for one reason.

  Attributes:
    kind: As in `collectives.KINDS`.
    axes: Mesh axes that it extends over.
    group_size: Devices that exchange with each other.
    count: Executions in a step.
    num_bytes: That each chip sends in a step, at the least.
    purpose: The reason; empty if the design has none for it.
    op_name: What in the source one of them came from.
  """

  kind: str
  axes: tuple[str, ...]
  group_size: int
  count: int
  num_bytes: float
  purpose: str
  op_name: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """What is known of a step on some slices.

  Attributes:
    fits: Whether it fits into the chips' memory.
    needed_bytes: Per chip: of `memory`, or what the compiler said it would take
      where it gave up.
    memory: Per chip.
    slices: The machine.
    mesh: Size of each mesh axis.
    remat: `model.remat`.
    rows_per_microbatch: Of the batch.
    num_microbatches: Of the largest step.
    batch_size: Pairs of a step.
    batch_source: Where the shapes of the batches come from.
    flops: Of an average step, over all chips.
    moved: By kind, axes and reason, the most bytes first; empty if it does not
      fit.
    bound: Least time of an average step; None if it does not fit.
    compile_seconds: Wall-clock time of the compilation.
    scoring_bytes: Per chip: of what scores the reference before the first step,
      beside the policy; None where nothing does, or the step does not fit.
  """

  fits: bool
  needed_bytes: int
  memory: Memory
  slices: chips.Slices
  mesh: dict[str, int]
  remat: str
  rows_per_microbatch: int
  num_microbatches: int
  batch_size: int
  batch_source: str
  flops: flops.Flops
  moved: tuple[Moved, ...] = ()
  bound: step_time.LowerBound | None = None
  compile_seconds: float = 0.0
  scoring_bytes: int | None = None


def make_plan(
  config: config_lib.Config,
  slices: chips.Slices,
  shapes: batch_shapes.BatchShapes,
  *,
  has_code: bool = True,
) -> Plan:
  """Compiles the train step of a run for some slices.

  Args:
    config: The run.
    slices: The machine.
    shapes: Of its batches.
    has_code: Whether to compile to the end. Otherwise only until all memory is
      laid out, which takes a tenth of the time, or less.

  Raises:
    ValueError: The mesh does not divide the devices, the model or the rows, the
      compiler does not know the slice, or it fails for another reason than
      memory.
  """
  mesh = make_mesh(config, slices)
  made, memory = prepare(config, mesh, shapes)
  rows = config.batch.rows_per_microbatch

  def outcome(make_compile):
    if has_code:
      return compiler.compiled(make_compile(config, slices, shapes))
    return compiler.laid_out(make_compile, config, slices, shapes)

  started = time.perf_counter()
  found = outcome(_compile_train_step)
  seconds = time.perf_counter() - started
  work = shapes.work(rows)
  counted = count_flops(made, config, shapes)
  plan = Plan(
    fits=False,
    needed_bytes=found.hbm_bytes,
    memory=memory,
    slices=slices,
    mesh=dict(mesh.shape),
    remat=config.model.remat,
    rows_per_microbatch=rows,
    num_microbatches=shapes.num_microbatches(rows),
    batch_size=config.batch.batch_size,
    batch_source=shapes.source,
    flops=counted,
    compile_seconds=seconds,
  )
  if found.text is None:
    return plan
  memory = _with_outcome(memory, found)
  scoring = None
  if made.abstract_scored is not None:
    scoring = scoring_bytes(made, outcome(_compile_score_step))
  microbatches = work.positions // (rows * shapes.capacity.tokens)
  moved = collectives.read(
    found.text,
    mesh.size,
    _trip_counts(config, mesh, shapes, microbatches),
    num_slices=slices.num_slices,
  )
  bound = step_time.lower_bound(
    slices,
    list(mesh.devices.flat),
    flops=counted.total,
    hbm_bytes=_least_traffic(config, mesh, memory, made, microbatches),
    moved=moved,
  )
  return dataclasses.replace(
    plan,
    fits=max(memory.total, scoring or 0) <= slices.chip.hbm_bytes,
    scoring_bytes=scoring,
    needed_bytes=memory.total,
    memory=memory,
    moved=_grouped(moved, dict(mesh.shape)),
    bound=bound,
  )


def make_mesh(
  config: config_lib.Config, slices: chips.Slices
) -> jax.sharding.Mesh:
  """The run's mesh over the devices of slices that need not exist.

  Raises:
    ValueError: As `sharding.make_mesh`, or the slice is not known.
  """
  return sharding.make_mesh(config.mesh, chips.devices(slices))


def prepare(
  config: config_lib.Config,
  mesh: jax.sharding.Mesh,
  shapes: batch_shapes.BatchShapes,
) -> tuple[program.Program, Memory]:
  """The program of a run, and what its arguments take of a chip's memory.

  Raises:
    ValueError: The mesh does not divide the model or the rows.
  """
  made = program.make_program(
    config,
    mesh,
    # Of no effect but on the learning rate.
    num_steps=config.run.num_steps or config.optimizer.warmup_steps + 1,
    reference_model=config_lib.reference_model(config),
  )
  state = made.abstract_state
  batch = shapes.empty_batch(config.batch.rows_per_microbatch)
  return made, Memory(
    params=bytes_per_device(state.params),
    optimizer=bytes_per_device((state.step, state.opt_state)),
    reference=bytes_per_device(made.abstract_reference),
    batch=bytes_per_device(program.abstract_batch(made, batch)),
    host=bytes_per_device((state, made.abstract_reference), on_host=True),
  )


def count_flops(
  made: program.Program,
  config: config_lib.Config,
  shapes: batch_shapes.BatchShapes,
) -> flops.Flops:
  """Operations of an average step, over all chips.

  Args:
    made: Of the run, whatever its remat policy and rows.
    config: Of the run.
    shapes: Of its batches.
  """
  reference = made.abstract_reference and config_lib.reference_model(config)
  work = shapes.work(config.batch.rows_per_microbatch)
  return flops.count(config.model, reference, work)


def bytes_per_device(tree: Any, *, on_host: bool = False) -> int:
  """Bytes that abstract arrays with shardings have on each device.

  Args:
    tree: The arrays.
    on_host: Count those in the memory of the devices' hosts, and no others.
  """
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
    if (leaf.sharding.memory_kind == sharding.HOST_MEMORY) == on_host
  )


def scoring_bytes(made: program.Program, found: compiler.Outcome) -> int:
  """Of a chip, what scores the reference, beside the policy."""
  policy = bytes_per_device(made.abstract_state.params)
  return policy + found.hbm_bytes + (found.code_bytes or 0)


def _compile_train_step(config, slices, shapes) -> compiler.Compile:
  made, _ = prepare(config, make_mesh(config, slices), shapes)
  batch = shapes.empty_batch(config.batch.rows_per_microbatch)
  return lambda options: program.compile_step(
    made.train_step, made, made.abstract_state, batch, options
  )


def _compile_score_step(config, slices, shapes) -> compiler.Compile:
  made, _ = prepare(config, make_mesh(config, slices), shapes)
  batch = shapes.empty_batch(config.batch.rows_per_microbatch)
  return lambda options: program.compile_score_step(made, batch, options)


def _with_outcome(memory: Memory, found: compiler.Outcome) -> Memory:
  arguments = found.argument_bytes or memory.arguments
  return dataclasses.replace(
    memory,
    padding=arguments - memory.arguments,
    temporaries=found.hbm_bytes - arguments,
    code=found.code_bytes,
  )


def _trip_counts(config, mesh, shapes, microbatches):
  """Executions of the loops whose number only the data tell."""
  rows = config.batch.rows_per_microbatch // sharding.num_row_shards(mesh)
  scores = rows * shapes.capacity.scores

  def count(op_name: str) -> int:
    if op_name.endswith("train_step)/while"):
      return microbatches
    if "/shard_map/while" in op_name and "/layers/" not in op_name:
      chunk_size = logprobs.default_chunk_size(config.model.hidden_size)
      return -(-scores // min(chunk_size, scores))
    # Attention's blocks, among which nothing is sent.
    return 1

  return count


def _least_traffic(config, mesh, memory, made, microbatches) -> int:
  """Bytes that a chip reads from and writes to HBM in a step, at the least."""
  once = memory.arguments + memory.params + memory.optimizer
  # Layers' weights, gathered and in the activations' type, are read by the
  # forward pass, the backward pass and, unless all is kept, its recomputation.
  passes = 2 if config.model.remat == "none" else 3
  width = jnp.dtype(config.model.dtype).itemsize

  def gathered(params):
    if params is None:
      return 0
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(params["layers"]))
    return count * width // mesh.shape[sharding.TENSOR]

  weights = passes * gathered(made.abstract_state.params)
  weights += gathered(made.abstract_reference)
  return once + microbatches * weights


def _grouped(moved, sizes) -> tuple[Moved, ...]:
  counts, num_bytes, op_names = Counter(), Counter(), {}
  for collective in moved:
    axes = collectives.mesh_axes(collective.group, sizes)
    purpose = purposes.purpose(collective, axes)
    key = (collective.kind, axes, len(collective.group), purpose)
    counts[key] += collective.times
    num_bytes[key] += collective.step_bytes
    op_names.setdefault(key, collective.op_name)
  return tuple(
    Moved(
      kind=kind,
      axes=axes,
      group_size=size,
      count=counts[kind, axes, size, purpose],
      num_bytes=total,
      purpose=purpose,
      op_name=op_names[kind, axes, size, purpose],
    )
    for (kind, axes, size, purpose), total in num_bytes.most_common()
  )
