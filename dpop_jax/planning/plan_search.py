"""Plans of a run for all ways to lay it out on some slices, the likely first.

Not all of them are compiled: not those whose arguments, gradients and block
inputs alone are larger than the memory; nor those that keep or compute more at
once than one that did not fit, or would not fit if the rest of their memory
grew with what they keep as that of others did; nor those that are slower than
enough that fit: by their operations alone, or if the estimate of their time
were as far off as that of others. The rest are, in the order of the estimate,
until their memory is laid out; code is made of none.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

from dpop_jax import config as config_lib
from dpop_jax import program, sharding
from dpop_jax.models import decoder_config
from dpop_jax.planning import batch_shapes, chips, plan

# From what keeps least; one that does not fit rules out those behind it.
_REMATS = ("full", "dots", "none")
_ROWS_PER_SHARD = (1, 2, 4, 8, 16)
_WIDTH = 2  # Bytes of bfloat16.
# What cannot be faster than so many that fit is not looked at.
NUM_BEST = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
  """One way to run a config.

  Attributes:
    config: With another mesh, remat policy and number of rows.
    memory: Of the arguments.
    state_bytes: Of memory, per chip: of the arguments and the gradients.
    kept_bytes: Likewise, of what the layers keep at the least.
    compute_seconds: Of a step, at the least: of its operations at peak.
    estimate_seconds: Of a step, to tell likely layouts from others.
  """

  config: config_lib.Config
  memory: plan.Memory
  state_bytes: int
  kept_bytes: int
  compute_seconds: float
  estimate_seconds: float

  @property
  def least_bytes(self) -> int:
    """What it takes for sure."""
    return self.state_bytes + self.kept_bytes

  @property
  def mesh(self) -> tuple[int, int, int]:
    mesh = self.config.mesh
    return mesh.data, mesh.fsdp, mesh.tensor

  def rules_out(self, other: "Layout") -> bool:
    """Whether the other one takes more memory for sure."""
    rows = [x.config.batch.rows_per_microbatch for x in (self, other)]
    remats = [_REMATS.index(x.config.model.remat) for x in (self, other)]
    return (
      self.mesh == other.mesh and rows[0] <= rows[1] and remats[0] <= remats[1]
    )


def layouts(
  config: config_lib.Config,
  slices: chips.Slices,
  shapes: batch_shapes.BatchShapes,
) -> list[Layout]:
  """All layouts that divide the model and the chips, the likeliest first.

  Raises:
    ValueError: There is none, or the slice is not known.
  """
  devices = chips.devices(slices)
  found = []
  for sizes in _mesh_sizes(len(devices), slices.num_slices):
    mesh_config = sharding.MeshConfig(**sizes)
    mesh = sharding.make_mesh(mesh_config, devices)
    num_shards = sharding.num_row_shards(mesh)
    on_mesh = _with(config, mesh_config, config.model.remat, num_shards)
    try:
      program.check(
        on_mesh, mesh, reference_model=config_lib.reference_model(config)
      )
    except ValueError:
      continue
    made, memory = plan.prepare(on_mesh, mesh, shapes)
    most = -(-shapes.num_rows // num_shards)
    for per_shard, remat in itertools.product(_ROWS_PER_SHARD, _REMATS):
      # More rows than there are would only be padding.
      if per_shard > 1 and per_shard > most:
        continue
      candidate = _with(config, mesh_config, remat, per_shard * num_shards)
      found.append(_layout(candidate, slices, shapes, made, memory))
  if not found:
    raise ValueError(
      f"No mesh over the {len(devices)} chips divides the model's hidden size, "
      "heads, MLP and vocabulary; choose another topology."
    )
  return sorted(found, key=lambda layout: layout.estimate_seconds)


def search(
  candidates: Sequence[Layout],
  slices: chips.Slices,
  shapes: batch_shapes.BatchShapes,
  *,
  max_compiles: int,
) -> Iterator[tuple[Layout, plan.Plan | None]]:
  """Compiles layouts in their order, as far as they can fit.

  Args:
    candidates: From `layouts`.
    slices: The machine.
    shapes: Of the batches.
    max_compiles: After so many compilations it ends.

  Yields:
    Each layout before it is compiled, with None, and then with its plan.
  """
  too_large: list[Layout] = []
  laid_out: list[tuple[Layout, int]] = []
  least_seconds: list[float] = []
  # Of these, over what they were estimated at.
  ratios: list[float] = []
  num_compiles = 0
  for layout in candidates:
    if num_compiles == max_compiles:
      return
    least_bytes = max(layout.least_bytes, _likely_bytes(layout, laid_out))
    if least_bytes > slices.chip.hbm_bytes or any(
      other.rules_out(layout) for other in too_large
    ):
      continue
    seconds = max(
      layout.compute_seconds, layout.estimate_seconds * min(ratios, default=0.0)
    )
    if sum(other <= seconds for other in least_seconds) >= NUM_BEST:
      continue
    yield layout, None
    found = plan.make_plan(layout.config, slices, shapes, has_code=False)
    num_compiles += 1
    laid_out.append((layout, found.needed_bytes))
    if not found.fits:
      too_large.append(layout)
    elif found.bound is not None:
      least_seconds.append(found.bound.seconds)
      ratios.append(found.bound.seconds / layout.estimate_seconds)
    yield layout, found


def _likely_bytes(
  layout: Layout, laid_out: Sequence[tuple[Layout, int]]
) -> int:
  """What a layout takes by the likeness of others, which are on any mesh.

  Args:
    layout: To be judged.
    laid_out: Others, and what they took.
  """
  likely = [
    # All else shrinks at most in proportion to what is kept.
    rest * min(1.0, layout.kept_bytes / other.kept_bytes)
    + max(0, layout.kept_bytes - other.kept_bytes)
    for other, num_bytes in laid_out
    if other.config.model.remat == layout.config.model.remat
    and (rest := num_bytes - other.state_bytes) > 0
  ]
  return layout.state_bytes + int(min(likely, default=layout.kept_bytes))


def best_first(plans: Sequence[plan.Plan]) -> list[plan.Plan]:
  """By the least time of a step; what does not fit comes last."""

  def key(found: plan.Plan):
    seconds = found.bound.seconds if found.bound else float("inf")
    return (not found.fits, seconds, found.needed_bytes)

  return sorted(plans, key=key)


def _mesh_sizes(num_devices: int, num_slices: int) -> Iterator[dict[str, int]]:
  for tensor in range(1, num_devices + 1):
    if num_devices % tensor:
      continue
    for fsdp in range(1, num_devices // tensor + 1):
      data, rest = divmod(num_devices // tensor, fsdp)
      if not rest and data % num_slices == 0:
        yield dict(data=data, fsdp=fsdp, tensor=tensor)


def _with(config, mesh, remat, rows) -> config_lib.Config:
  return dataclasses.replace(
    config,
    mesh=mesh,
    model=dataclasses.replace(config.model, remat=remat),
    batch=dataclasses.replace(config.batch, rows_per_microbatch=rows),
  )


def _layout(config, slices, shapes, made, memory) -> Layout:
  mesh, model = config.mesh, config.model
  rows = config.batch.rows_per_microbatch
  positions = rows // (mesh.data * mesh.fsdp) * shapes.capacity.tokens
  kept = model.num_hidden_layers * positions * _kept_bytes(model, mesh.tensor)
  compute = plan.count_flops(made, config, shapes).total
  compute /= slices.num_chips * slices.chip.peak_flops
  return Layout(
    config=config,
    memory=memory,
    # Gradients are of the parameters' type and shape.
    state_bytes=memory.arguments + memory.params,
    kept_bytes=kept,
    compute_seconds=compute,
    estimate_seconds=_estimate(
      config, slices, shapes, made, memory, positions, compute
    ),
  )


def _kept_bytes(model: decoder_config.DecoderConfig, tensor: int) -> int:
  """What a layer keeps of a token at the least, on each device."""
  hidden = _WIDTH * model.hidden_size
  if model.remat == "full":
    return hidden
  heads = model.num_attention_heads + 2 * model.num_key_value_heads
  wide = heads * model.head_width
  if model.num_experts is None:
    wide += 2 * model.intermediate_size
  return 3 * hidden + _WIDTH * wide // tensor


def _estimate(
  config, slices, shapes, made, memory, positions, compute
) -> float:
  """Seconds of a step, for the order only."""
  model, mesh, chip = config.model, config.mesh, slices.chip
  rows = config.batch.rows_per_microbatch
  has_reference = made.abstract_reference is not None
  work = shapes.work(rows)
  microbatches = work.positions // (rows * shapes.capacity.tokens)
  passes = 3 + has_reference + (model.remat != "none")
  whole = memory.params / 4 * _WIDTH * mesh.fsdp  # On one part of `tensor`.
  weights = passes * whole * (mesh.fsdp - 1) / mesh.fsdp
  sums = 4 + 2 * has_reference + (model.remat == "full")
  activations = model.num_hidden_layers * positions * model.hidden_size
  activations *= 2 * sums * _WIDTH * (mesh.tensor - 1) / mesh.tensor
  sent = microbatches * (weights + activations)
  if mesh.data > slices.num_slices:
    sent += microbatches * 2 * memory.params
  links = sum(slices.links) * chip.link_bandwidth
  seconds = max(compute, sent / links if links else 0.0)
  if slices.num_slices > 1 and chip.dcn_bandwidth:
    seconds = max(seconds, microbatches * memory.params / chip.dcn_bandwidth)
  # Of two that are limited by the same, the one that sends less.
  return seconds + 0.1 * (sent / links if links else 0.0)
