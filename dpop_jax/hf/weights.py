"""Weights of Hugging Face folders, streamed to and from parameters on a mesh.

A tensor goes in bands of rows. Every process reads the part of a band that its
own devices hold and puts it there as it lies in the file; the devices split,
transpose and cast it and write it into arrays that were born sharded. Export is
the same in the other direction. So a host needs memory for a few bands (and to
export, for one tensor), never for a model.
"""

import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from dpop_jax import paths
from dpop_jax.hf import bands, correspondence, names, safetensors_files

PyTree = Any  # Of jax.Array, or of jax.ShapeDtypeStruct where it is abstract.

# What a band takes on all devices of a process together. There are up to four
# at a time, two being read and two on the devices; they should be small beside
# the largest tensor, too.
_BAND_BYTES = 4 * 2**20
_BANDS_PER_TENSOR = 8
_CODES = {dtype: code for code, dtype in safetensors_files.DTYPES.items()}


def load(
  folder: str | os.PathLike,
  parts: Sequence[names.Part],
  abstract_params: PyTree,
  *,
  is_ignorable: Callable[[str], bool] = lambda name: False,
  progress: Callable[[int], None] = lambda num_bytes: None,
) -> PyTree:
  """The weights in a folder as parameters; called by all processes alike.

  Everything that headers tell is checked before any weight is read.

  Args:
    folder: Local or remote, with safetensors files.
    parts: Where each tensor lies in the parameters.
    abstract_params: Nested dicts of `jax.ShapeDtypeStruct` with a NamedSharding
      each; weights are cast to the dtype asked for here.
    is_ignorable: Whether a tensor of the folder may be left out, by name.
    progress: Is told the bytes of weights that this process has read since it
      was told last.

  Raises:
    ValueError: The folder has no weights that can be read (see
      `safetensors_files.tensors`), the tensors are not those of the parts, or
      the parts do not make up the parameters.
  """
  tensors = safetensors_files.tensors(folder)
  wanted = _by_path(abstract_params)
  correspondence.check_parts(parts, wanted)
  correspondence.check_tensors(folder, tensors, parts, is_ignorable)
  num_elements = {
    n: math.prod(s) for n, s in correspondence.tensor_shapes(parts).items()
  }
  limit = _band_limit(
    n * _dtype(tensors[name]).itemsize for name, n in num_elements.items()
  )
  arrays = _by_path(_zeros(abstract_params))
  buffers = _Buffers()
  under_way = None
  # In the order of the files, which disks and buckets read fastest.
  place = lambda part: (*tensors[part.name][::3], part.offset)
  for file, parts_of_file in itertools.groupby(
    sorted(parts, key=place), key=lambda part: tensors[part.name].file
  ):
    with safetensors_files.OpenFile(paths.of(folder) / file) as open_file:
      for part in parts_of_file:
        tensor = tensors[part.name]
        layout = bands.layout(part, wanted[part.path].sharding)
        row_bytes = _row_bytes_on_devices(part, layout, _dtype(tensor))
        for band in bands.ranges(part, layout, row_bytes, limit):
          rectangles = bands.rectangles(part, layout, band)
          pieces = _read(open_file, tensor, set(rectangles.values()), buffers)
          progress(sum(piece.nbytes for piece in pieces.values()))
          # Only now the buffer that comes next is surely no longer needed.
          jax.block_until_ready(under_way)
          on_devices = {d: pieces[r] for d, r in rectangles.items()}
          under_way = arrays[part.path] = bands.write(
            arrays[part.path],
            bands.assemble(on_devices, part, layout),
            bands.position(part, layout, band),
            layout=layout,
          )
  jax.block_until_ready(under_way)
  return _like(abstract_params, arrays)


def check(
  folder: str | os.PathLike,
  parts: Sequence[names.Part],
  *,
  is_ignorable: Callable[[str], bool],
) -> None:
  """Raises the ValueErrors of `load` that the headers of a folder tell."""
  tensors = safetensors_files.tensors(folder)
  correspondence.check_tensors(folder, tensors, parts, is_ignorable)


def dtypes(folder: str | os.PathLike) -> dict[str, np.dtype]:
  """Of each tensor in a folder, by name; those that can be read.

  Raises:
    ValueError: See `safetensors_files.tensors`.
  """
  return {
    name: _dtype(tensor)
    for name, tensor in safetensors_files.tensors(folder).items()
    if tensor.dtype in safetensors_files.DTYPES
  }


def are_equal(folder: str | os.PathLike, name: str, other: str) -> bool:
  """Whether two tensors of a folder are there and bit by bit the same."""
  tensors = safetensors_files.tensors(folder)
  if not {name, other} <= tensors.keys():
    return False
  one, two = tensors[name], tensors[other]
  with (
    safetensors_files.OpenFile(paths.of(folder) / one.file) as first,
    safetensors_files.OpenFile(paths.of(folder) / two.file) as second,
  ):
    return first.equals(one, second, two)


def save(
  params: PyTree,
  parts: Sequence[names.Part],
  folder: str | os.PathLike,
  *,
  dtype: DTypeLike | Mapping[str, DTypeLike],
  max_file_bytes: int = 5_000_000_000,
  progress: Callable[[int], None] = lambda num_bytes: None,
) -> None:
  """Writes parameters as a model's safetensors files, and an index if several.

  Called by all processes alike. The first one writes, and may still do so when
  the others are done.

  Args:
    params: Nested dicts of arrays with a NamedSharding each.
    parts: Where each tensor lies in the parameters.
    folder: Local or remote; exists.
    dtype: Of all tensors, or of each one by name.
    max_file_bytes: Of weights; a file is only larger if one tensor is.
    progress: Is told the bytes of weights that were gathered since it was told
      last.

  Raises:
    ValueError: The parts do not make up the parameters, or a dtype is none of
      float32, float16 and bfloat16.
  """
  arrays = _by_path(params)
  correspondence.check_parts(parts, arrays)
  is_writer = jax.process_index() == 0
  shapes = correspondence.tensor_shapes(parts)
  entries = {
    name: (_code(name, dtype), shape) for name, shape in shapes.items()
  }
  num_bytes = {
    name: math.prod(shape) * safetensors_files.DTYPES[code].itemsize
    for name, (code, shape) in entries.items()
  }
  limit = _band_limit(num_bytes.values())
  parts_of = correspondence.by_name(parts)
  files = _files(num_bytes, max_file_bytes)
  for file, names_of_file in files.items():
    # Wider numbers first, so that each lies at a multiple of its size.
    width = lambda name: safetensors_files.DTYPES[entries[name][0]].itemsize
    names_of_file.sort(key=width, reverse=True)
    data = (
      rows
      for name in names_of_file
      for part in parts_of[name]
      for rows in _gather(
        arrays[part.path],
        part,
        safetensors_files.DTYPES[entries[name][0]],
        limit,
        progress,
      )
    )
    if is_writer:
      safetensors_files.write(
        paths.of(folder) / file, {n: entries[n] for n in names_of_file}, data
      )
    for _ in data:  # Takes part in what the first process gathers.
      pass
  if is_writer and len(files) > 1:
    index = {
      "metadata": {
        "total_parameters": sum(map(math.prod, shapes.values())),
        "total_size": sum(num_bytes.values()),
      },
      "weight_map": {name: file for file in files for name in files[file]},
    }
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (paths.of(folder) / safetensors_files.INDEX).write_text(text)


class _Buffers:
  """Two host buffers in turns: one is read into while the other is used."""

  def __init__(self):
    self._buffers = [np.empty(0, np.uint8)] * 2

  def next(self, num_bytes: int) -> np.ndarray:
    self._buffers.reverse()
    if self._buffers[0].size < num_bytes:
      self._buffers[0] = np.empty(num_bytes, np.uint8)
    return self._buffers[0][:num_bytes]


def _read(
  open_file: safetensors_files.OpenFile,
  tensor: safetensors_files.Tensor,
  rectangles: set[bands.Rectangle],
  buffers: _Buffers,
) -> dict[bands.Rectangle, np.ndarray]:
  """Each rectangle's elements; neighbours are read as one rectangle."""
  dtype = _dtype(tensor)
  buffer = buffers.next(sum(map(_volume, rectangles)) * dtype.itemsize)
  pieces = {}
  by_rows = itertools.groupby(sorted(rectangles), key=lambda r: r[0])
  for _, group in by_rows:
    group = list(group)
    box = tuple(
      (min(first), max(last))
      for first, last in (
        zip(*axis, strict=True) for axis in zip(*group, strict=True)
      )
    )
    is_filled = _volume(box) == sum(map(_volume, group))
    for outer, members in (
      [(box, group)] if is_filled else ((r, [r]) for r in group)
    ):
      size = _volume(outer) * dtype.itemsize
      shape = [last - first for first, last in outer]
      whole = buffer[:size].view(dtype).reshape(shape)
      buffer = buffer[size:]
      open_file.read(tensor, outer, whole)
      for member in members:
        index = tuple(
          slice(first - start, last - start)
          for (first, last), (start, _) in zip(member, outer, strict=True)
        )
        pieces[member] = whole[index]
  return pieces


def _gather(
  array: jax.Array,
  part: names.Part,
  dtype: np.dtype,
  limit: int,
  progress: Callable[[int], None],
) -> Iterator[np.ndarray]:
  """A part's rows on the first process, nothing on the others."""
  layout = bands.layout(part, array.sharding)  # pyright: ignore
  shards = layout.num_row_shards(part)
  num_rows, *columns = part.tensor_shape
  is_writer = jax.process_index() == 0
  # A band has rows of all shards, so the file's order needs the whole part.
  shape = (shards, num_rows // shards, *columns)
  rows = np.empty(shape if is_writer else 0, dtype)
  row_bytes = math.prod(columns) * dtype.itemsize
  row_bytes *= shards * len(layout.band_sharding.addressable_devices)
  done = 0
  for band in bands.ranges(part, layout, row_bytes, limit):
    gathered = bands.gather(
      array,
      bands.position(part, layout, band),
      layout=layout,
      length=band[1] - band[0],
      shape=part.tensor_shape,
      dtype=dtype,
    )
    # Elsewhere, too, before the next: a queue of bands would fill the devices.
    jax.block_until_ready(gathered)
    length = gathered.shape[0] // shards
    if is_writer:
      host = np.asarray(gathered.addressable_data(0))
      rows[:, done : done + length] = host.reshape(shards, length, *columns)
    done += length
    progress(gathered.nbytes)
  if is_writer:
    yield rows


def _files(
  num_bytes: Mapping[str, int], max_file_bytes: int
) -> dict[str, list[str]]:
  """Names of the files, and of the tensors in each."""
  groups: list[list[str]] = [[]]
  total = 0
  for name, size in num_bytes.items():
    if groups[-1] and total + size > max_file_bytes:
      groups.append([])
      total = 0
    groups[-1].append(name)
    total += size
  if len(groups) == 1:
    return {safetensors_files.SINGLE: groups[0]}
  return {
    f"model-{number:05d}-of-{len(groups):05d}.safetensors": group
    for number, group in enumerate(groups, start=1)
  }


def _zeros(abstract_params: PyTree) -> PyTree:
  shardings = jax.tree.map(lambda array: array.sharding, abstract_params)
  make = lambda: jax.tree.map(
    lambda array: jnp.zeros(array.shape, array.dtype), abstract_params
  )
  return jax.jit(make, out_shardings=shardings)()


def _by_path(tree: PyTree) -> dict[tuple[str, ...], Any]:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {tuple(key.key for key in path): leaf for path, leaf in leaves}


def _like(tree: PyTree, arrays: Mapping[tuple[str, ...], Any]) -> PyTree:
  return jax.tree_util.tree_map_with_path(
    lambda path, _: arrays[tuple(key.key for key in path)], tree
  )


def _row_bytes_on_devices(
  part: names.Part, layout: bands.Layout, dtype: np.dtype
) -> int:
  sharding = layout.band_sharding
  columns = sharding.shard_shape(part.tensor_shape)[1:]
  return math.prod(columns) * dtype.itemsize * len(sharding.addressable_devices)


def _band_limit(num_bytes: Iterable[int]) -> int:
  return min(_BAND_BYTES, max(num_bytes) // _BANDS_PER_TENSOR)


def _volume(rectangle: bands.Rectangle) -> int:
  return math.prod(last - first for first, last in rectangle)


def _dtype(tensor: safetensors_files.Tensor) -> np.dtype:
  return safetensors_files.DTYPES[tensor.dtype]


def _code(name: str, dtype: DTypeLike | Mapping[str, DTypeLike]) -> str:
  wanted = jnp.dtype(dtype[name] if isinstance(dtype, Mapping) else dtype)
  if wanted not in _CODES:
    raise ValueError(
      f"{name} cannot be saved as {wanted}; choose one of "
      f"{', '.join(str(known) for known in _CODES)}."
    )
  return _CODES[wanted]
