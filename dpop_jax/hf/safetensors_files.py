"""Safetensors files, local and remote, read and written piece by piece.

A file is the length of its header in 8 bytes, a header in JSON

  {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, ...}

and the tensors' bytes, row by row. A model is one file, or several and an index
that says which tensor lies where.

The library of the same name (0.8) falls short of this: it opens local files
alone; it reads a slice without reading its whole tensor only through a memory
map, whose pages count as resident memory; and it writes only what lies in
memory as a whole.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from etils import epath

from dpop_jax import name_lists, paths

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# What can be read and written; other types only need to be stepped over.
DTYPES = {
  "F32": jnp.dtype("float32"),
  "F16": jnp.dtype("float16"),
  "BF16": jnp.dtype("bfloat16"),
}
_OTHER_SIZES = {
  **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 1),
  **dict.fromkeys(("U16", "I16"), 2),
  **dict.fromkeys(("U32", "I32"), 4),
  **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
_LENGTH_BYTES = 8
# No model comes near it, so a longer header is no header.
_MAX_HEADER_BYTES = 100_000_000
# A disk reads pages, so shorter runs save nothing.
_MIN_RUN_BYTES = 4096
# Of whole rows, of which only some columns are kept.
_SCRATCH_BYTES = 2**20
# What a remote file returns at once, beside the array that it is copied to.
_REMOTE_PIECE_BYTES = 4 * 2**20

Range = tuple[int, int]  # First index and the one after the last.


class Tensor(NamedTuple):
  """Where a tensor lies.

  Attributes:
    file: Name of the file in its folder.
    dtype: As the file spells it; a key of DTYPES, or one that cannot be read.
    shape: Sizes of the axes.
    start: Byte of the file at which the tensor begins.
  """

  file: str
  dtype: str
  shape: tuple[int, ...]
  start: int


def tensors(folder: str | os.PathLike) -> dict[str, Tensor]:
  """All tensors of a model folder, by name; reads only headers.

  Raises:
    ValueError: There are no weights, or only pickled ones; a file of the index
      is missing; or a file is truncated or otherwise broken.
  """
  path = paths.of(folder)
  if not path.exists():
    raise ValueError(f"There is no folder {path} to read weights from.")
  if (path / SINGLE).exists():
    return _header(path / SINGLE)
  if not (path / INDEX).exists():
    raise ValueError(_no_weights(path))
  weight_map = _weight_map(path / INDEX)
  files = sorted(set(weight_map.values()))
  missing = [file for file in files if not (path / file).exists()]
  if missing:
    raise ValueError(
      f"{INDEX} in {path} names files that are not there: "
      f"{name_lists.listed(missing)}; copy or download them again."
    )
  headers = {file: _header(path / file) for file in files}
  homeless = [n for n, file in weight_map.items() if n not in headers[file]]
  if homeless:
    told = (f"{name} in {weight_map[name]}" for name in homeless)
    raise ValueError(
      f"{INDEX} in {path} names tensors that are not in their files: "
      f"{name_lists.listed(told)}; the index belongs to other files."
    )
  found = {name: t for header in headers.values() for name, t in header.items()}
  return found | {name: headers[f][name] for name, f in weight_map.items()}


class OpenFile:
  """One file whose tensors are read in rectangles; a context manager."""

  def __init__(self, path: str | os.PathLike):
    self._path = paths.of(path)
    self._stack = contextlib.ExitStack()
    self._file = self._stack.enter_context(self._path.open("rb"))
    is_remote = "://" in os.fspath(self._path)
    self._descriptor = None if is_remote else self._file.fileno()

  def __enter__(self) -> "OpenFile":
    return self

  def __exit__(self, *_) -> None:
    self._stack.close()

  def read(
    self, tensor: Tensor, ranges: Sequence[Range], out: np.ndarray
  ) -> None:
    """Reads a rectangle of a tensor.

    Args:
      tensor: One of this file, of a dtype in DTYPES.
      ranges: For each axis, which part of it.
      out: C-contiguous, of the tensor's dtype and the rectangle's shape.
    """
    self._read(tensor.start, tensor.shape, ranges, out)

  def equals(self, tensor: Tensor, other: "OpenFile", copy: Tensor) -> bool:
    """Whether a tensor of this file has the bytes of one of another file."""
    if (tensor.dtype, tensor.shape) != (copy.dtype, copy.shape):
      return False
    size = math.prod(tensor.shape) * DTYPES[tensor.dtype].itemsize
    for start in range(0, size, _SCRATCH_BYTES):
      pieces = np.empty((2, min(_SCRATCH_BYTES, size - start)), np.uint8)
      self._read_bytes(tensor.start + start, pieces[0])
      other._read_bytes(copy.start + start, pieces[1])
      if not np.array_equal(pieces[0], pieces[1]):
        return False
    return True

  def _read(self, at, shape, ranges, out) -> None:
    if not ranges:
      return self._read_bytes(at, out)
    (first, last), inner = ranges[0], ranges[1:]
    row_bytes = math.prod(shape[1:]) * out.itemsize
    if all((0, n) == r for n, r in zip(shape[1:], inner, strict=True)):
      return self._read_bytes(at + first * row_bytes, out)
    is_long = _run_bytes(shape, ranges, out) >= _MIN_RUN_BYTES
    if len(shape) > 2 or (self._descriptor is not None and is_long):
      for row in range(first, last):
        self._read(at + row * row_bytes, shape[1:], inner, out[row - first])
      return None
    # A request for each short run would cost more than the bytes between them.
    step = max(1, _SCRATCH_BYTES // row_bytes)
    scratch = np.empty((min(step, last - first), *shape[1:]), out.dtype)
    kept = tuple(slice(*r) for r in inner)
    for row in range(first, last, step):
      rows = scratch[: last - row]
      self._read_bytes(at + row * row_bytes, rows)
      out[row - first : row - first + len(rows)] = rows[:, *kept]
    return None

  def _read_bytes(self, at: int, out: np.ndarray) -> None:
    view = out.reshape(-1).view(np.uint8)
    while view.size:
      if self._descriptor is not None:
        count = os.preadv(self._descriptor, [view], at)  # pyright: ignore
      else:
        self._file.seek(at)
        data = self._file.read(min(view.size, _REMOTE_PIECE_BYTES))
        count = len(data)
        view[:count] = np.frombuffer(data, np.uint8)
      if not count:
        raise ValueError(f"{self._path} became shorter while it was read.")
      at, view = at + count, view[count:]


def write(
  path: str | os.PathLike,
  shapes: Mapping[str, tuple[str, tuple[int, ...]]],
  data: Iterable[np.ndarray],
) -> None:
  """Writes one file; if that fails there is none.

  Args:
    path: In a folder that exists.
    shapes: The dtype, a key of DTYPES, and the shape of each tensor, by name,
      in the order in which they come. Readers need numbers at multiples of
      their size, so wider types should come first.
    data: The tensors' elements in order, in arrays of any length.
  """
  header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
  end = 0
  for name, (dtype, shape) in shapes.items():
    start, end = end, end + math.prod(shape) * DTYPES[dtype].itemsize
    header[name] = {
      "dtype": dtype,
      "shape": list(shape),
      "data_offsets": [start, end],
    }
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % _LENGTH_BYTES)
  path = paths.of(path)
  # In a bucket to move is to copy.
  is_remote = paths.is_remote(path)
  temporary = path if is_remote else path.parent / f".{path.name}.partial"
  try:
    with temporary.open("wb") as file:
      file.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
      written = 0
      for array in data:
        written += array.nbytes
        file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    assert written == end, (written, end)
    if not is_remote:
      temporary.replace(path)
  except BaseException as error:
    temporary.unlink(missing_ok=True)
    # A full disk does not say which one it is.
    if isinstance(error, OSError) and error.filename is None:
      error.filename = os.fspath(path)
    raise


def _run_bytes(shape, ranges, out) -> int:
  """Bytes of the rectangle that lie together in the file."""
  run = out.itemsize
  for size, (first, last) in zip(shape[::-1], ranges[::-1], strict=True):
    run *= last - first
    if last - first < size:
      break
  return run


def _no_weights(path: epath.Path) -> str:
  names = sorted(child.name for child in path.iterdir())
  if any(n.startswith("pytorch_model") and ".bin" in n for n in names):
    return (
      f"The weights in {path} are pickles (pytorch_model*.bin), which can run "
      "any code when they are opened; convert them where PyTorch is installed: "
      "load the model with transformers and call "
      "save_pretrained(folder, safe_serialization=True)."
    )
  return (
    f"There are no weights in {path}: expected {SINGLE} or {INDEX}, found "
    f"{name_lists.listed(names) or 'nothing'}."
  )


def _weight_map(path: epath.Path) -> dict[str, str]:
  try:
    weight_map = json.loads(path.read_text())["weight_map"]
    if all(isinstance(file, str) for file in weight_map.values()):
      return weight_map
  except (ValueError, KeyError, TypeError, AttributeError):
    pass
  raise ValueError(
    f"{path} is not an index of weights: expected JSON with a weight_map from "
    "tensors to files."
  )


def _header(path: epath.Path) -> dict[str, Tensor]:
  size = path.stat().length
  with path.open("rb") as file:
    start = file.read(_LENGTH_BYTES)
    length = int.from_bytes(start, "little")
    begin = _LENGTH_BYTES + length
    if start == b"version ":
      raise ValueError(
        f"{path} is a pointer of Git LFS instead of the file; run `git lfs "
        "pull` where it comes from."
      )
    if size <= _LENGTH_BYTES or length > _MAX_HEADER_BYTES:
      raise ValueError(f"{path} is not a safetensors file: it has no header.")
    if begin > size:
      raise _truncated(path, f"at least {begin}", size)
    text = file.read(length)
  try:
    entries = json.loads(text)
    entries.pop("__metadata__", None)
    places = sorted((*_offsets(e), name) for name, e in entries.items())
  except (ValueError, KeyError, TypeError, AttributeError):
    raise ValueError(
      f"{path} has a broken header; copy or download the file again."
    ) from None
  found, end = {}, 0
  for first, last, name in places:
    dtype, shape = entries[name]["dtype"], tuple(entries[name]["shape"])
    if first != end:
      raise ValueError(
        f"{path} has a broken header: {name} begins at byte {first} of the "
        f"data, where byte {end} was expected."
      )
    width = DTYPES[dtype].itemsize if dtype in DTYPES else None
    width = width or _OTHER_SIZES.get(dtype)
    if width and last - first != math.prod(shape) * width:
      raise ValueError(
        f"{path} has a broken header: {name}, {dtype} {list(shape)}, needs "
        f"{math.prod(shape) * width} bytes and is given {last - first}."
      )
    found[name] = Tensor(path.name, dtype, shape, begin + first)
    end = last
  if size < begin + end:
    raise _truncated(path, begin + end, size)
  if size > begin + end:
    raise ValueError(
      f"{path} has {size} bytes, but its header accounts for {begin + end}; "
      "copy or download it again."
    )
  return found


def _offsets(entry: Mapping[str, Any]) -> Range:
  """Of a header's entry, which is checked; raises what a broken one may."""
  first, last = entry["data_offsets"]
  numbers = (first, last, *entry["shape"])
  if not all(type(n) is int and n >= 0 for n in numbers) or last < first:
    raise ValueError("not sizes and positions")
  if not isinstance(entry["dtype"], str):
    raise TypeError("not a dtype")
  return first, last


def _truncated(path: epath.Path, expected: Any, size: int) -> ValueError:
  return ValueError(
    f"{path} is truncated: it should have {expected} bytes and has {size}; "
    "copy or download it again."
  )
