"""The least time that a step can take on chips of published rates.

Nothing overlaps perfectly and nothing runs at its peak, so a real step takes
longer, often twice as long; but no step is faster.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from dpop_jax.planning import chips, collectives


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowerBound:
  """Seconds that each part of the machine is busy in a step at the least.

  Attributes:
    compute: Matrix units, at peak.
    hbm: Memory, at peak: arguments are read and results written once, gathered
      weights read in each pass.
    ici: The busiest direction of the links between chips.
    dcn: The network between slices; None where its rate is not published.
    dcn_bytes: That a chip sends to other slices.
  """

  compute: float
  hbm: float
  ici: float
  dcn: float | None
  dcn_bytes: float = 0.0

  @property
  def seconds(self) -> float:
    """Of a step in which all of that overlaps."""
    return max(self.compute, self.hbm, self.ici, self.dcn or 0.0)

  @property
  def limit(self) -> str:
    """Which of them it is."""
    parts = ("compute", "hbm", "ici", "dcn")
    return max(parts, key=lambda name: getattr(self, name) or 0.0)


def lower_bound(
  slices: chips.Slices,
  devices: Sequence[Any],
  *,
  flops: int,
  hbm_bytes: int,
  moved: Sequence[collectives.Collective],
) -> LowerBound:
  """Adds up what a step does.

  Args:
    slices: The machine.
    devices: Of the flattened mesh.
    flops: Operations of a step, over all chips.
    hbm_bytes: Bytes that one chip reads and writes in a step.
    moved: The collectives of a step.
  """
  chip = slices.chip
  # Seconds that the links of each direction are busy.
  busy = [0.0] * len(slices.shape)
  between_slices = 0.0
  for collective in moved:
    members = [devices[index] for index in collective.group]
    first = members[0]
    local = [d for d in members if _slice(d) == _slice(first)]
    inside, between = _split(collective, len(local))
    between_slices += between
    directions = [
      axis
      for axis in range(len(slices.shape))
      if len({device.coords[axis] for device in local}) > 1
    ]
    num_links = sum(slices.links[axis] for axis in directions)
    for axis in directions:
      busy[axis] += inside / (num_links * chip.link_bandwidth)
  dcn = 0.0
  if between_slices:
    rate = chip.dcn_bandwidth
    dcn = None if rate is None else between_slices / rate
  return LowerBound(
    compute=flops / (slices.num_chips * chip.peak_flops),
    hbm=hbm_bytes / chip.hbm_bandwidth,
    ici=max(busy),
    dcn=dcn,
    dcn_bytes=between_slices,
  )


def _slice(device) -> int:
  return getattr(device, "slice_index", None) or 0


def _split(
  collective: collectives.Collective, num_local: int
) -> tuple[float, float]:
  """Bytes a step that a chip sends to its own slice, and to others.

  A collective over several slices is first done within each of them, so that
  what goes to the others is split over the chips of the slice.
  """
  count = len(collective.group)
  if num_local == count:
    return collective.step_bytes, 0.0
  if num_local == 1 or collective.kind == "collective-permute":
    return 0.0, collective.step_bytes
  num_slices = count / num_local
  whole = collective.num_bytes
  if collective.kind == "all-gather":
    whole *= count
  share = 2 if collective.kind == "all-reduce" else 1
  inside = share * whole * (num_local - 1) / num_local
  between = share * whole / num_local * (num_slices - 1) / num_slices
  return inside * collective.times, between * collective.times
