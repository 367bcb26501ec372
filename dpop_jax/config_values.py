"""Between dataclasses and plain values: checked on the way in, named in errors.

A section is a dataclass, and so may be the field of one. Unknown keys, missing
keys and wrong types are errors that name the key as a user writes it.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

Hole = Callable[[type], Any]


def fill(
  cls: type, values: Mapping[str, Any], hole: Hole, prefix: str = ""
) -> dict[str, Any]:
  """All keys of a section: those given, and the others at their defaults.

  Args:
    cls: The dataclass of the section.
    values: Keys that are not to be at their defaults.
    hole: Makes what stands for a value that is not there, of a type.
    prefix: Of the keys in errors.

  Raises:
    ValueError: A key is unknown, or a section is none.
  """
  check_known(cls, values, prefix)
  filled = {}
  for field, hint in _fields(cls):
    key = f"{prefix}{field.name}"
    if dataclasses.is_dataclass(hint):
      section = values.get(field.name, {})
      _check_is_section(section, key)
      filled[field.name] = fill(
        typing.cast(type, hint), section, hole, f"{key}."
      )
      continue
    has_default = field.default is not dataclasses.MISSING
    value = values.get(field.name, field.default if has_default else None)
    filled[field.name] = hole(_first_type(hint)) if value is None else value
  return filled


def holes(cls: type, hole: Hole) -> dict[str, Any]:
  """All keys of a section, each with a hole."""
  return {
    field.name: holes(typing.cast(type, hint), hole)
    if dataclasses.is_dataclass(hint)
    else hole(_first_type(hint))
    for field, hint in _fields(cls)
  }


def build(cls: type, values: Mapping[str, Any], prefix: str = "") -> Any:
  """The dataclass of plain values, also of those that came by way of JSON.

  Raises:
    ValueError: A key is unknown, missing or of the wrong type, or the dataclass
      refuses its value.
  """
  check_known(cls, values, prefix)
  arguments = {}
  for field, hint in _fields(cls):
    key = f"{prefix}{field.name}"
    value = values.get(field.name)
    is_required = field.default is dataclasses.MISSING
    # A hole of a required key that nobody filled counts as missing.
    if field.name in values and not (is_required and value is None):
      arguments[field.name] = _convert(hint, value, key)
    elif is_required:
      raise ValueError(
        f"Config key {key} is missing; set it in the config file or by "
        f"--config.{key}=..."
      )
  return cls(**arguments)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
  """What differs between two trees of values, as `key: old -> new`."""
  old, new = flatten(old), flatten(new)
  missing = object()
  return [
    f"{key}: {old.get(key, 'not set')} -> {new.get(key, 'not set')}"
    for key in sorted(old.keys() | new.keys())
    if old.get(key, missing) != new.get(key, missing)
  ]


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Leaves by their whole key; tuples as lists, as JSON has them."""
  flat = {}
  for key, value in values.items():
    if isinstance(value, Mapping):
      flat |= flatten(value, f"{prefix}{key}.")
    else:
      flat[prefix + key] = list(value) if isinstance(value, tuple) else value
  return flat


def _fields(cls):
  hints = typing.get_type_hints(cls)
  return [(field, hints[field.name]) for field in dataclasses.fields(cls)]


def _first_type(hint):
  first = _options(hint)[0]
  return typing.get_origin(first) or first


def _check_is_section(value: Any, key: str) -> None:
  if not isinstance(value, Mapping):
    raise ValueError(
      f"Config key {key} must be a section of keys, got {value!r}."
    )


def check_known(cls: type, values: Mapping[str, Any], prefix: str) -> None:
  names = [field.name for field in dataclasses.fields(cls)]
  for key in values:
    if key not in names:
      close = difflib.get_close_matches(key, names, n=1)
      hint = (
        f"did you mean {prefix}{close[0]}?"
        if close
        else f"known here are {', '.join(names)}."
      )
      raise ValueError(f"Unknown config key {prefix}{key}; {hint}")


def _options(hint: Any) -> tuple[Any, ...]:
  """The types a field may have."""
  is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
  return typing.get_args(hint) if is_union else (hint,)


def _convert(hint: Any, value: Any, key: str) -> Any:
  """The value as the field's type, if it is of that type already."""
  if dataclasses.is_dataclass(hint):
    _check_is_section(value, key)
    return build(typing.cast(type, hint), value, f"{key}.")
  options = _options(hint)
  for option in options:
    if option is type(None):
      if value is None:
        return None
    elif typing.get_origin(option) is tuple:
      item = typing.get_args(option)[0]
      # Whole numbers stand for floats, as elsewhere.
      kinds = (float, int) if item is float else item
      if isinstance(value, list | tuple) and all(
        isinstance(v, kinds) and not isinstance(v, bool) for v in value
      ):
        return tuple(map(item, value))
    elif option is float:
      if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif option is int:
      if isinstance(value, int) and not isinstance(value, bool):
        return value
    elif isinstance(value, option):
      return value
  names = " or ".join(
    "None" if option is type(None) else getattr(option, "__name__", str(option))
    for option in options
  )
  raise ValueError(
    f"Config key {key} must be {names}, got {value!r} ({type(value).__name__})."
  )
