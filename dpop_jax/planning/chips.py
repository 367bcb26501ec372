"""TPU chips by their published rates, and slices of them that need not exist.

Rates are those of https://cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e,
read in 2026. The bandwidth of a link is what these give for all links of a chip
and both directions, divided by twice the number of links; for v4 it is of
Jouppi et al., 2023, https://arxiv.org/abs/2304.01433. The network of v6e is on
those editions of its page that compare it with v5e: 25.6 Tbit/s for the 256
chips of a pod, four cards of 200 Gbit/s for the eight of a host. For that of v4
no page gives a rate.
"""

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any

# What the TPU compiler wants to hear on a machine without one: it must neither
# look for a TPU nor ask the cloud which one it is on, and other processes may
# use the compiler at the same time.
_ENVIRONMENT = {
  "JAX_PLATFORMS": "cpu",
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """One kind of chip.

  Attributes:
    name: As in `v5p:4x4x4`.
    peak_flops: bfloat16 operations a second.
    hbm_bytes: What the compiler lets a program use: 31.25 of a v6e's 32 GiB.
    hbm_bandwidth: Bytes a second.
    torus_dimensions: Directions in which a chip has two neighbours.
    link_bandwidth: Bytes a second to one neighbour, one way.
    dcn_bandwidth: Bytes a second to other slices, one way; None where it is not
      published.
    ring_multiple: A direction of a slice closes to a ring if the slice has a
      multiple of so many chips along it (v4 and v5p: along all directions).
    compiler_options: Of `get_topology_desc`.
  """

  name: str
  peak_flops: float
  hbm_bytes: int
  hbm_bandwidth: float
  torus_dimensions: int
  link_bandwidth: float
  dcn_bandwidth: float | None
  ring_multiple: int
  compiler_options: dict[str, Any] = dataclasses.field(default_factory=dict)


_GIB = 2**30
CHIPS = {
  chip.name: chip
  for chip in (
    Chip(
      name="v4",
      peak_flops=275e12,
      hbm_bytes=int(30.75 * _GIB),
      hbm_bandwidth=1200e9,
      torus_dimensions=3,
      link_bandwidth=50e9,
      dcn_bandwidth=None,
      ring_multiple=4,
      # Both cores of a chip as one device, as on a real one.
      compiler_options={"chip_config_name": "megacore"},
    ),
    Chip(
      name="v5e",
      peak_flops=197e12,
      hbm_bytes=int(15.75 * _GIB),
      hbm_bandwidth=800.0 * _GIB,
      torus_dimensions=2,
      link_bandwidth=400e9 / 8,
      # 6.4 Tbit/s for the 256 chips of a pod.
      dcn_bandwidth=6.4e12 / 8 / 256,
      ring_multiple=16,
    ),
    Chip(
      name="v5p",
      peak_flops=459e12,
      hbm_bytes=int(95.74 * _GIB),
      hbm_bandwidth=2575.0 * _GIB,
      torus_dimensions=3,
      link_bandwidth=1200e9 / 12,
      dcn_bandwidth=50e9 / 8,
      ring_multiple=4,
    ),
    Chip(
      name="v6e",
      peak_flops=918e12,
      hbm_bytes=int(31.25 * _GIB),
      hbm_bandwidth=1638e9,
      torus_dimensions=2,
      link_bandwidth=800e9 / 8,
      # 25.6 Tbit/s for the 256 chips of a pod.
      dcn_bandwidth=25.6e12 / 8 / 256,
      ring_multiple=16,
    ),
  )
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slices:
  """Some slices of one kind, joined by a data-centre network.

  Attributes:
    chip: Of all of them.
    shape: Chips along each direction of a slice.
    num_slices: How many slices.
  """

  chip: Chip
  shape: tuple[int, ...]
  num_slices: int = 1

  @property
  def num_chips(self) -> int:
    return math.prod(self.shape) * self.num_slices

  @property
  def topology(self) -> str:
    """As the user writes it."""
    return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

  @property
  def accelerator_type(self) -> str:
    """Google Cloud's name for one of them; v4 and v5p count cores."""
    count = math.prod(self.shape)
    if self.chip.torus_dimensions == 3:
      return f"{self.chip.name}-{2 * count}"
    return f"{self.chip.name.replace('v5e', 'v5litepod')}-{count}"

  @property
  def links(self) -> tuple[int, ...]:
    """Links of a chip along each direction; of a chip at the end of a line."""
    multiple = self.chip.ring_multiple
    if self.chip.torus_dimensions == 3:
      is_ring = all(size % multiple == 0 for size in self.shape)
      is_closed = [is_ring] * len(self.shape)
    else:
      is_closed = [size % multiple == 0 for size in self.shape]
    return tuple(
      0 if size == 1 else 1 + closed
      for size, closed in zip(self.shape, is_closed, strict=True)
    )


def parse(topology: str, num_slices: int = 1) -> Slices:
  """Reads `v5p:4x4x4`.

  Raises:
    ValueError: The chip is not known, or its slices have other shapes.
  """
  name, _, shape = topology.partition(":")
  if name not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
    raise ValueError(
      f"--topology should be a chip ({', '.join(CHIPS)}) and the shape of its "
      f"slice, like v5p:4x4x4 or v5e:16x16; got {topology!r}."
    )
  chip = CHIPS[name]
  sizes = tuple(map(int, shape.split("x")))
  if len(sizes) != chip.torus_dimensions:
    raise ValueError(
      f"A slice of {name} has {chip.torus_dimensions} directions, like "
      f"{name}:{'x'.join('4' * chip.torus_dimensions)}; got {topology!r}."
    )
  if num_slices < 1:
    raise ValueError(f"--num_slices must be at least 1, got {num_slices}.")
  return Slices(chip=chip, shape=sizes, num_slices=num_slices)


def prepare_environment() -> None:
  """Lets the TPU compiler run without a TPU; to be called before JAX is."""
  for name, value in _ENVIRONMENT.items():
    os.environ.setdefault(name, value)


def devices(slices: Slices) -> Sequence[Any]:
  """The devices of a machine that is not there, to compile for.

  Raises:
    ValueError: The TPU compiler is not installed, or knows no such slice.
  """
  if importlib.util.find_spec("libtpu") is None:
    raise ValueError(
      "Compiling for a TPU needs its compiler, libtpu, which is not installed; "
      'run pip install "dpop_jax[tpu]".'
    )
  prepare_environment()
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", slices.accelerator_type)
  # Reads the environment when it is imported.
  import jax
  from jax.experimental import topologies

  options = dict(slices.chip.compiler_options)
  if slices.num_slices > 1:
    options["num_slices"] = slices.num_slices
  try:
    description = topologies.get_topology_desc(
      platform="tpu", topology_name=slices.topology, **options
    )
  except jax.errors.JaxRuntimeError as error:
    reason = str(error).splitlines()[0]
    raise ValueError(
      f"The TPU compiler has no slice {slices.topology}: {reason}"
    ) from error
  return description.devices
