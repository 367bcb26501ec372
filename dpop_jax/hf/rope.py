"""Rotary options of a Hugging Face config, in and out.

`rope_parameters` (or `rope_scaling`, as it was called) holds other keys for
each type of scaling; see transformers' modeling_rope_utils.py.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

from dpop_jax.models import decoder_config

# Where Hugging Face's key is not the field's name.
_FIELDS = {"truncate": "is_truncated"}
# Keys from which fields are worked out, or which say nothing about scaling.
_OTHER_KEYS = {
  "yarn": ("mscale", "mscale_all_dim", "finetuned"),
  "longrope": ("factor",),
}
_KEYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
_REASONS = {
  "dynamic": ", whose frequencies change as the text grows",
  "mrope": ", whose positions are those of images",
}


def check_type(rope_type: str) -> None:
  """Raises ValueError unless the type is supported."""
  if rope_type not in decoder_config.ROPE_TYPES:
    raise ValueError(
      f"config.json has the rope type {rope_type!r}"
      f"{_REASONS.get(rope_type, '')}; supported are "
      f"{', '.join(decoder_config.ROPE_TYPES)}."
    )


def from_hf(
  parameters: Mapping[str, Any],
  *,
  max_position_embeddings: int,
  ignored_options: Collection[str] = (),
) -> decoder_config.RopeScaling:
  """Reads `rope_parameters`.

  Args:
    parameters: For one kind of layers, as transformers completes them, with
      `rope_type`.
    max_position_embeddings: Longest text, from which a factor that is not given
      follows.
    ignored_options: Keys that are not known, and are to be ignored.

  Raises:
    ValueError: A type or key is not supported.
  """
  rope_type = parameters["rope_type"]
  check_type(rope_type)
  needed, optional = decoder_config.ROPE_TYPES[rope_type]
  fields: dict[str, Any] = {"rope_type": rope_type}
  for key, value in parameters.items():
    field = _FIELDS.get(key, key)
    if field in needed + optional:
      fields[field] = tuple(value) if isinstance(value, list) else value
    elif key not in (*_KEYS, *_OTHER_KEYS.get(rope_type, ()), *ignored_options):
      if value is not None and value is not False:
        raise ValueError(
          f"config.json has {key}={value!r} among its rope parameters, which "
          f"rope type {rope_type!r} does not use here; if it does not change "
          f"the model, allow it with --ignore_options={key} (import_hf) or "
          "run.ignored_options."
        )
  if rope_type == "yarn":
    _complete_yarn(fields, parameters, max_position_embeddings)
  elif rope_type == "longrope":
    _complete_longrope(fields, parameters, max_position_embeddings)
  cls = decoder_config.RopeScaling
  return cls(**as_floats(cls, fields))


def as_floats(cls: type, fields: Mapping[str, Any]) -> dict[str, Any]:
  """JSON may have integers where the fields of a dataclass are floats."""
  kinds = {field.name: field.type for field in dataclasses.fields(cls)}

  def convert(name, value):
    if isinstance(value, tuple) and kinds[name] == tuple[float, ...] | None:
      return tuple(map(float, value))
    is_float = kinds[name] in (float, float | None)
    return float(value) if is_float and isinstance(value, int) else value

  return {name: convert(name, value) for name, value in fields.items()}


def to_hf(scaling: decoder_config.RopeScaling) -> dict[str, Any] | None:
  """`rope_scaling` of a config.json; None if nothing is scaled."""
  if scaling.rope_type == "default":
    return None
  keys: dict[str, str] = {field: key for key, field in _FIELDS.items()}
  needed, optional = decoder_config.ROPE_TYPES[scaling.rope_type]
  found: dict[str, Any] = {"rope_type": scaling.rope_type}
  for field in (*needed, *optional):
    value = getattr(scaling, field)
    # transformers takes the long factors when a text is long enough.
    if value is not None and field != "use_long_factor":
      value = list(value) if isinstance(value, tuple) else value
      found[keys.get(field) or field] = value
  return found


def _complete_yarn(fields, parameters, max_position_embeddings):
  if fields.get("factor") is None:
    fields["factor"] = (
      max_position_embeddings / fields["original_max_position_embeddings"]
    )
  for key in ("beta_fast", "beta_slow"):
    # There 0 means that the default holds.
    fields[key] = fields.get(key) or None
  if fields.get("attention_factor") is not None:
    return
  scales = [parameters.get(key) for key in ("mscale", "mscale_all_dim")]
  if all(scales):
    above, below = (
      0.1 * scale * math.log(max(fields["factor"], 1.0)) + 1.0
      for scale in scales
    )
    fields["attention_factor"] = above / below
  elif fields["factor"] < 1.0:
    fields["attention_factor"] = 1.0


def _complete_longrope(fields, parameters, max_position_embeddings):
  if fields.get("attention_factor") is None:
    original = fields["original_max_position_embeddings"]
    factor = parameters.get("factor") or max_position_embeddings / original
    # At a factor of 1 or less nothing is scaled.
    growth = math.log(max(factor, 1.0)) / math.log(original)
    fields["attention_factor"] = math.sqrt(1.0 + growth)
