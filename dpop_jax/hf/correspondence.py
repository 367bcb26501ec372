"""How tensors of a folder and parameters correspond, and whether they do."""

import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from dpop_jax import name_lists
from dpop_jax.hf import names, safetensors_files


def by_name(parts: Iterable[names.Part]) -> dict[str, list[names.Part]]:
  """Parts of each tensor, from its first row to its last."""
  found: dict[str, list[names.Part]] = {}
  for part in parts:
    found.setdefault(part.name, []).append(part)
  for of_name in found.values():
    of_name.sort(key=lambda part: part.offset)
  return found


def tensor_shapes(parts: Iterable[names.Part]) -> dict[str, tuple[int, ...]]:
  """Of each tensor that the parts make up, by name."""
  return {
    name: (
      sum(part.tensor_shape[0] for part in of_name),
      *of_name[0].tensor_shape[1:],
    )
    for name, of_name in by_name(parts).items()
  }


def check_parts(
  parts: Sequence[names.Part], arrays: Mapping[tuple[str, ...], Any]
) -> None:
  """Raises ValueError unless every element of every array has one place."""
  homeless = [
    "/".join(path)
    for path, array in arrays.items()
    if not isinstance(array.sharding, jax.NamedSharding)
  ]
  if homeless:
    raise ValueError(
      "Each parameter needs a NamedSharding; there is none for "
      f"{name_lists.listed(homeless)}."
    )
  found: dict[tuple[str, ...], dict[tuple[int, ...], tuple[int, ...]]] = {}
  for part in parts:
    found.setdefault(part.path, {})[part.index] = part.shape
  told = [f"{'/'.join(p)} is no parameter" for p in found if p not in arrays]
  for path, array in arrays.items():
    places = found.get(path, {(): None})
    num_leading = len(next(iter(places)))
    leading, shape = array.shape[:num_leading], array.shape[num_leading:]
    indices = set(itertools.product(*map(range, leading)))
    if set(places) != indices or set(places.values()) != {shape}:
      told.append(f"{'/'.join(path)} {list(array.shape)} is not made up")
  for name, of_name in by_name(parts).items():
    ends = itertools.accumulate(part.tensor_shape[0] for part in of_name)
    offsets = [part.offset for part in of_name]
    columns = {part.tensor_shape[1:] for part in of_name}
    if offsets != [0, *ends][: len(offsets)] or len(columns) > 1:
      told.append(f"{name} is not made up")
  if told:
    raise ValueError(
      "Hugging Face's tensors and the parameters do not correspond: "
      f"{name_lists.listed(told)}."
    )


def check_tensors(
  folder: str | os.PathLike,
  tensors: Mapping[str, safetensors_files.Tensor],
  parts: Sequence[names.Part],
  is_ignorable: Callable[[str], bool],
) -> None:
  """Raises ValueError unless the folder has the parts' tensors and no more."""
  shapes = tensor_shapes(parts)
  common = [name for name in shapes if name in tensors]
  differences = {
    "missing in the folder": (n for n in shapes if n not in tensors),
    "only in the folder": (
      n for n in tensors if n not in shapes and not is_ignorable(n)
    ),
    "of another shape": (
      f"{n} {list(tensors[n].shape)} instead of {list(shapes[n])}"
      for n in common
      if tensors[n].shape != shapes[n]
    ),
    f"of a dtype other than {', '.join(safetensors_files.DTYPES)}": (
      f"{n} {tensors[n].dtype}"
      for n in common
      if tensors[n].dtype not in safetensors_files.DTYPES
    ),
  }
  found = {kind: list(names) for kind, names in differences.items()}
  told = [
    f"{kind}: {name_lists.listed(names)}"
    for kind, names in found.items()
    if names
  ]
  if told:
    raise ValueError(
      f"The weights in {folder} are not those that its config asks for; "
      f"{'; '.join(told)}."
    )
