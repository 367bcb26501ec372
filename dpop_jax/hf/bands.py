"""Bands of a tensor's rows, and how devices take them in and give them out.

A shard of an array is a rectangle of the tensor that it corresponds to, and all
shards are equally large. A band is the same rows of each of these rectangles,
so that all devices can work on it at once, without talking to each other:

                  columns of shard 0 | of shard 1
  shard 0    row 0 |   band 0        |   band 0
             row 1 |   band 1        |   band 1
  shard 1    row 2 |   band 0        |   band 0
             row 3 |   band 1        |   band 1
"""

import dataclasses
import functools
import math
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from dpop_jax.hf import names, safetensors_files

# For each axis of a tensor, which part of it.
Rectangle = tuple[safetensors_files.Range, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
  """How arrays, and bands of their tensors, are split over a mesh.

  Attributes:
    mesh: All devices.
    spec: Of the array, with an entry for each axis.
    axes: As in `names.Part`, of the axes behind the leading ones.
  """

  mesh: jax.sharding.Mesh
  spec: P
  axes: tuple[tuple[int, ...], ...]

  @property
  def num_leading(self) -> int:
    """Axes of the array that the tensor does not have."""
    return len(self.spec) - sum(map(len, self.axes))

  @property
  def row_axis(self) -> int:
    """The axis of the array that the bands cut."""
    return self.num_leading + self.axes[0][0]

  @property
  def band_sharding(self) -> jax.NamedSharding:
    first = (self.num_leading + merged[0] for merged in self.axes)
    return jax.NamedSharding(self.mesh, P(*(self.spec[i] for i in first)))

  @property
  def block_spec(self) -> P:
    """Of a band with the array's axes, without the leading ones."""
    return P(*self.spec[self.num_leading :])

  def num_row_shards(self, part: names.Part) -> int:
    shape = part.tensor_shape
    return shape[0] // self.band_sharding.shard_shape(shape)[0]


def layout(part: names.Part, sharding: jax.NamedSharding) -> Layout:
  """Of the array that a part lies in.

  Raises:
    ValueError: A shard of the array is no rectangle of the tensor.
  """
  num_axes = len(part.index) + len(part.shape)
  spec = (*sharding.spec, *[None] * (num_axes - len(sharding.spec)))
  found = Layout(sharding.mesh, P(*spec), part.axes)  # pyright: ignore
  may_split = {found.num_leading + merged[0] for merged in part.axes}
  for axis, names_of_mesh in enumerate(spec):
    if names_of_mesh is not None and axis not in may_split:
      raise ValueError(
        f"Axis {axis} of {'/'.join(part.path)} is split over {names_of_mesh}, "
        f"but then a device holds no rectangle of {part.name}; split another."
      )
  return found


def ranges(
  part: names.Part, layout: Layout, row_bytes: int, limit: int
) -> Iterator[safetensors_files.Range]:
  """The bands of a part, as ranges of the array's `row_axis` on a shard.

  They are equally long but for the last, so two shapes at most are compiled.

  Args:
    part: Of a tensor.
    layout: Its array's.
    row_bytes: What a row of the tensor takes wherever it is needed.
    limit: Bytes that a band may take, unless a single head takes more.
  """
  size = part.shape[part.axes[0][0]] // layout.num_row_shards(part)
  length = max(1, limit // (row_bytes * _rows(part)))
  length = math.ceil(size / math.ceil(size / length))
  for first in range(0, size, length):
    yield first, min(first + length, size)


def rectangles(
  part: names.Part, layout: Layout, band: safetensors_files.Range
) -> dict[jax.Device, Rectangle]:  # pyright: ignore
  """What each device of this process holds of a band, in the whole tensor."""
  shape = part.tensor_shape
  first, last = (i * _rows(part) for i in band)
  shards = layout.band_sharding.addressable_devices_indices_map(shape)
  found = {}
  for device, index in shards.items():
    (row, _), *columns = (
      s.indices(n)[:2] for s, n in zip(index or (), shape, strict=True)
    )
    row += part.offset
    found[device] = ((row + first, row + last), *columns)
  return found


def assemble(
  pieces: dict[jax.Device, np.ndarray],  # pyright: ignore
  part: names.Part,
  layout: Layout,
) -> jax.Array:
  """A band, for `write`, from what each device of this process holds of it."""
  sharding = layout.band_sharding
  shard_shape = sharding.shard_shape(part.tensor_shape)
  piece = next(iter(pieces.values()))
  shape = tuple(
    n * whole // shard
    for n, whole, shard in zip(
      piece.shape, part.tensor_shape, shard_shape, strict=True
    )
  )
  arrays = jax.device_put(list(pieces.values()), list(pieces))
  return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def position(
  part: names.Part, layout: Layout, band: safetensors_files.Range
) -> np.ndarray:
  """int32 [axes of the array]; where a band begins in every shard."""
  found = np.zeros(len(layout.spec), np.int32)
  found[: layout.num_leading] = part.index
  found[layout.row_axis] = band[0]
  return found


def write(
  array: jax.Array, band: jax.Array, position: np.ndarray, *, layout: Layout
) -> jax.Array:
  """The array, donated, with a band as it lies in the tensor where it belongs.

  Args:
    array: Of parameters.
    band: See `assemble`.
    position: Where the band begins.
    layout: The array's.
  """
  sizes = array.sharding.shard_shape(array.shape)[layout.num_leading :]
  # Two programs: on CPUs a transpose is several times slower when it is fused.
  block = _transposed(band, sizes, layout)
  is_on_cpus = layout.mesh.devices.flat[0].platform == "cpu"
  return _compiled_update(is_on_cpus)(array, block, position, layout)


@functools.partial(jax.jit, static_argnames=("sizes", "layout"))
def _transposed(band, sizes, layout):
  """With the array's axes behind the leading ones; `sizes` are a shard's."""

  def transpose(band):
    split = []
    for merged, rows in zip(layout.axes, band.shape, strict=True):
      inner = [sizes[axis] for axis in merged[1:]]
      split += [rows // math.prod(inner), *inner]
    return band.reshape(split).transpose(np.argsort(_order(layout)))

  return jax.shard_map(
    transpose,
    mesh=layout.mesh,
    in_specs=layout.band_sharding.spec,
    out_specs=layout.block_spec,
    check_vma=False,
  )(band)


@functools.cache
def _compiled_update(is_on_cpus: bool):
  # XLA's CPU compiler would turn a bfloat16 update into float32 and back, for
  # which it goes through the whole array for every band.
  skip_float32 = {"xla_disable_hlo_passes": "float-normalization-bf16"}
  return jax.jit(
    _updated,
    static_argnames=("layout",),
    donate_argnames=("array",),
    compiler_options=skip_float32 if is_on_cpus else None,
  )


def _updated(array, block, position, layout):
  def update(array, block, position):
    block = block.astype(array.dtype)
    block = block.reshape((1,) * layout.num_leading + block.shape)
    return jax.lax.dynamic_update_slice(array, block, tuple(position))

  return jax.shard_map(
    update,
    mesh=layout.mesh,
    in_specs=(layout.spec, layout.block_spec, P()),
    out_specs=layout.spec,
    check_vma=False,
  )(array, block, position)


def gather(
  array: jax.Array,
  position: np.ndarray,
  *,
  layout: Layout,
  length: int,
  shape: tuple[int, ...],
  dtype: np.dtype,
) -> jax.Array:
  """A band as it lies in the tensor, whole on every device.

  Args:
    array: Of parameters.
    position: Where the band begins.
    layout: The array's.
    length: Of the band, on a shard's `row_axis`.
    shape: Of the part of the tensor.
    dtype: Of the tensor.

  Returns:
    [row shards * rows, ...]: the rows of the first shard, then of the second.
  """
  sizes = list(array.sharding.shard_shape(array.shape))
  sizes[: layout.num_leading] = [1] * layout.num_leading
  sizes[layout.row_axis] = length
  columns = layout.band_sharding.shard_shape(shape)[1:]
  # Two programs, as in `write`.
  block = _sliced(array, position, tuple(sizes), layout, dtype)
  return _gathered(block, columns, layout)


@functools.partial(jax.jit, static_argnames=("sizes", "layout", "dtype"))
def _sliced(array, position, sizes, layout, dtype):
  def slice_on_devices(array, position):
    block = jax.lax.dynamic_slice(array, tuple(position), sizes)
    return block.reshape(sizes[layout.num_leading :]).astype(dtype)

  return jax.shard_map(
    slice_on_devices,
    mesh=layout.mesh,
    in_specs=(layout.spec, P()),
    out_specs=layout.block_spec,
    check_vma=False,
  )(array, position)


@functools.partial(jax.jit, static_argnames=("columns", "layout"))
def _gathered(block, columns, layout):
  def gather_on_devices(block):
    band = block.transpose(_order(layout)).reshape(-1, *columns)
    for axis, over in enumerate(layout.band_sharding.spec):
      if over is not None:
        band = jax.lax.all_gather(band, over, axis=axis, tiled=True)
    return band

  return jax.shard_map(
    gather_on_devices,
    mesh=layout.mesh,
    in_specs=layout.block_spec,
    out_specs=P(),
    check_vma=False,
  )(block)


def _rows(part: names.Part) -> int:
  """Rows of the tensor for one index of the array's `row_axis`."""
  return math.prod(part.shape[i] for i in part.axes[0][1:])


def _order(layout: Layout) -> list[int]:
  return [axis for merged in layout.axes for axis in merged]
