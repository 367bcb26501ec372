"""The mesh, and the one table that says what is split over it."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import PartitionSpec as P

DATA, FSDP, TENSOR = "data", "fsdp", "tensor"
MESH_AXES = (DATA, FSDP, TENSOR)
# JAX's name for memory of the machine that a device is plugged into.
HOST_MEMORY = "pinned_host"
# Mesh axes that the rows of a batch are split over.
ROW_AXES = (DATA, FSDP)

# Logical axis of a parameter -> mesh axis it is split over.
AXIS_RULES = (
  ("layers", None),
  ("embed", FSDP),
  ("vocab", TENSOR),
  ("heads", TENSOR),
  ("kv_heads", TENSOR),
  ("head_dim", None),
  ("mlp", TENSOR),
  ("experts", None),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """Devices along each mesh axis; one of them may be -1 to take the rest.

  Attributes:
    data: Rows are split, parameters are not.
    fsdp: Rows and parameters are split.
    tensor: Heads, MLP and vocabulary are split.
  """

  data: int = 1
  fsdp: int = -1
  tensor: int = 1

  def __post_init__(self):
    sizes = dataclasses.astuple(self)
    if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
      raise ValueError(
        "mesh.data, mesh.fsdp and mesh.tensor must be positive, at most one of "
        f"them -1 to take the rest of the devices; got {sizes}."
      )


def make_mesh(
  config: MeshConfig,
  devices: Sequence[jax.Device] | None = None,  # pyright: ignore
) -> jax.sharding.Mesh:
  """The mesh `(data, fsdp, tensor)` over all devices.

  Of several TPU slices, `data` goes over them: only gradients cross the slow
  network between slices.

  Args:
    config: Sizes of the axes.
    devices: All devices of all processes, if not given.

  Raises:
    ValueError: The sizes do not multiply to the number of devices, or one
      slice would hold a part of a copy of the parameters.
  """
  devices = list(jax.devices() if devices is None else devices)
  sizes = dataclasses.astuple(config)
  fixed = math.prod(size for size in sizes if size != -1)
  shape = tuple(len(devices) // fixed if s == -1 else s for s in sizes)
  if math.prod(shape) != len(devices):
    raise ValueError(
      f"mesh.data, mesh.fsdp, mesh.tensor = {sizes} do not divide the "
      f"{len(devices)} devices that there are; set one of them to -1 to let it "
      "take the rest."
    )
  # Explicit axes, the default of jax 0.10, do not work with Linen's Embed.
  types = (jax.sharding.AxisType.Auto,) * len(shape)
  slices = _slices(devices)
  data, *rest = shape
  if data % len(slices):
    raise ValueError(
      f"mesh.data ({data}) must be a multiple of the number of slices "
      f"({len(slices)}): between slices only gradients may travel."
    )
  # The rows of one slice stay together, so that fsdp and tensor never leave it.
  # An axis may take a part of a direction of the slice: 32 x 2 of 8 x 8 chips.
  parts = [
    mesh_utils.create_device_mesh(
      (data // len(slices), *rest), part, allow_split_physical_axes=True
    )
    for part in slices
  ]
  return jax.sharding.Mesh(np.concatenate(parts), MESH_AXES, axis_types=types)


def _slices(devices: Sequence[Any]) -> list[list[Any]]:
  """Devices by the TPU slice that they are of; others are all of one."""
  slices: dict[int, list[Any]] = {}
  for device in devices:
    is_tpu = device.platform == "tpu"
    index = (getattr(device, "slice_index", None) or 0) if is_tpu else 0
    slices.setdefault(index, []).append(device)
  return [slices[index] for index in sorted(slices)]


def on_host(tree: Any) -> Any:
  """Shardings of a tree of arrays whose layers are to be in host memory.

  The rest stays on the devices: embeddings, which are needed as a whole, so
  that nothing would be won, and what is named `scale` or `bias`, which is small
  (and the TPU compiler does not slice a layer's vector out of host memory).

  Args:
    tree: Arrays, abstract or not, with `NamedSharding`s.
  """

  def place(path, x):
    names = [jax.tree_util.keystr((key,), simple=True) for key in path]
    if "layers" not in names or names[-1] in ("scale", "bias"):
      return x.sharding
    return x.sharding.with_memory_kind(HOST_MEMORY)

  return jax.tree_util.tree_map_with_path(place, tree)


def is_on_host(x: jax.Array) -> bool:
  """Inside of a jitted function: whether an argument is in host memory."""
  return jax.typeof(x).memory_space == jax.memory.Space.Host


def fetched(x: jax.Array) -> jax.Array:
  """Inside of a jitted function: the array in the device's own memory."""
  if not is_on_host(x):
    return x
  return jax.device_put(x, jax.memory.Space.Device)


def put_back(x: jax.Array) -> jax.Array:
  """Inside of a jitted function: the array in the memory of its hosts."""
  return jax.device_put(x, jax.memory.Space.Host)


def check_host_memory(device: Any, key: str) -> None:
  """Raises ValueError, naming a key, if a device cannot use host memory."""
  kinds = [memory.kind for memory in device.addressable_memories()]
  if HOST_MEMORY not in kinds:
    raise ValueError(
      f"{key} is set, but the {device.platform} devices of this machine cannot "
      f"use its memory: they have {', '.join(kinds)} and no {HOST_MEMORY}. "
      "Leave it at False."
    )


def num_row_shards(mesh: jax.sharding.Mesh) -> int:
  """Number of pieces that the rows of a batch are split into."""
  return math.prod(mesh.shape[axis] for axis in ROW_AXES)


def active_row_shards() -> int:
  """The same for the mesh in use; 1 without a mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  return math.prod(mesh.shape[axis] for axis in active_axes(*ROW_AXES))


def active_axes(*names: str) -> tuple[str, ...]:
  """Those of our mesh axes that the mesh in use has; () without a mesh."""
  axes = jax.sharding.get_abstract_mesh().axis_names
  return tuple(name for name in names if name in axes)


def split_axes(*names: str) -> tuple[str, ...]:
  """Those of the active axes that have several devices.

  A collective over one device is no communication, but the CPU's compiler
  copies its operands all the same, into another layout and back.
  """
  mesh = jax.sharding.get_abstract_mesh()
  return tuple(name for name in active_axes(*names) if mesh.shape[name] > 1)


def active_platform() -> str | None:
  """Of the devices of the active mesh: "cpu", "gpu" or "tpu"; None without."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return None if device is None else device.platform


def per_device(function: Callable, *, in_specs, out_specs) -> Callable:
  """Runs a function on every device's own shards; plainly where it has all.

  Collectives in the function name their axes with `split_axes`.
  """
  if active_axes(*MESH_AXES) != MESH_AXES or not split_axes(*MESH_AXES):
    return function
  return jax.shard_map(
    function, in_specs=in_specs, out_specs=out_specs, check_vma=False
  )


def constrain_rows(x: jax.Array) -> jax.Array:
  """Keeps `[rows, ...]` split by rows, so that weights are gathered instead."""
  if active_axes(*MESH_AXES) != MESH_AXES:
    return x
  return jax.lax.with_sharding_constraint(x, P(ROW_AXES))
