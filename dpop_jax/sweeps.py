"""Which settings a comparison holds: from text to configs.

  expand(base, ["loss.name=dpo,dpop", "loss.beta=0.1,0.3"], [])

is the grid of both, four configs that are `base` but for these keys.
"""

import ast
import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dpop_jax import config as config_lib
from dpop_jax import config_values, name_lists

_LOSS = "loss.name"
# What all runs have in common, so that they can be compared.
_FIXED = (
  "run.init_from",
  "reference.",
  "data.eval",
  "data.num_eval_pairs",
  "data.holdout_seed",
)
_MOST_CHARACTERS = 100


def expand(
  base: config_lib.Config, sweeps: Sequence[str], settings: Sequence[str]
) -> dict[str, config_lib.Config]:
  """The configs of a comparison, by a name that is also good for a folder.

  Options of the loss that another loss does not have are left out where that
  other loss is set: those of `base`, and in the grid those that are swept. What
  is then the same is there once.

  Args:
    base: What is not swept.
    sweeps: Each a key with values, `loss.beta=0.1,0.3`: all combinations.
    settings: Each keys with one value, `loss.name=ipo,loss.beta=0.1`: one more
      config.

  Returns:
    `base` alone if neither is given.

  Raises:
    ValueError: A text is not of this form; a key is unknown, or one that would
      make runs incomparable; a value is of the wrong type or out of range; or
      no config has an option that is swept.
  """
  flat = config_values.flatten(config_lib.to_dict(base))
  grid = [_sweep(text, flat) for text in sweeps]
  listed = [_setting(text, flat) for text in settings]
  keys = [key for key, _ in grid]
  if repeated := sorted({key for key in keys if keys.count(key) > 1}):
    raise ValueError(
      f"--sweep={repeated[0]}=... is given twice; give all its values at once."
    )
  configs = []
  if grid or not listed:
    for values in itertools.product(*(values for _, values in grid)):
      changes = dict(zip(keys, values, strict=True))
      configs.append(_changed(base, _used(changes, flat)))
  configs += [_changed(base, changes) for changes in listed]
  for key in keys:
    if not any(_has(config, key) for config in configs):
      names = sorted({config.loss.name for config in configs})
      raise ValueError(
        f"--sweep={key}=...: {key} is an option of none of the losses "
        f"({name_lists.listed(names)}); leave it out."
      )
  return {name_of(config, base): config for config in configs}


def name_of(config: config_lib.Config, base: config_lib.Config) -> str:
  """Its loss with options, and where else it differs from the base.

  A name does not depend on what else is compared, so that more can be compared
  later in the same folder.
  """
  differences = {
    key: value
    for key, value in _flat(config).items()
    if value != _flat(base).get(key)
    and not key.startswith("loss.")
    and key != "run.seed"
  }
  options = config_lib.LOSSES[config.loss.name].options
  parts = [config.loss.name]
  parts += [f"{name}{_text(getattr(config.loss, name))}" for name in options]
  parts += [f"{key}{_text(value)}" for key, value in differences.items()]
  name = "_".join(parts)
  safe = re.sub(r"[^A-Za-z0-9._+-]+", "-", name)[:_MOST_CHARACTERS]
  if safe != name:
    # Two values may have been made the same.
    digest = hashlib.sha256(json.dumps(differences, sort_keys=True).encode())
    safe += f"_{digest.hexdigest()[:8]}"
  return safe


def _flat(config):
  return config_values.flatten(config_lib.to_dict(config))


def _sweep(text: str, flat: Mapping[str, Any]) -> tuple[str, list[Any]]:
  key, _, values = text.partition("=")
  texts = [value.strip() for value in values.split(",")]
  if not all(texts):
    raise ValueError(
      f"--sweep takes a key and its values, loss.beta=0.1,0.3; got {text!r}."
    )
  return key.strip(), [_value(key.strip(), value, flat) for value in texts]


def _setting(text: str, flat: Mapping[str, Any]) -> dict[str, Any]:
  changes = {}
  for part in text.split(","):
    key, equals, value = (piece.strip() for piece in part.partition("="))
    if not equals or not value:
      raise ValueError(
        "--setting takes keys with one value each, "
        f"loss.name=ipo,loss.beta=0.1; got {text!r}."
      )
    changes[key] = _value(key, value, flat)
  return changes


def _value(key: str, text: str, flat: Mapping[str, Any]) -> Any:
  """The value that a text means for a key; of the wrong type, maybe."""
  if key == "run.seed":
    raise ValueError("The seeds of a comparison are given as --seeds=0,1,2.")
  if key.startswith(_FIXED):
    raise ValueError(
      f"{key} is the same for all runs of a comparison, which start from one "
      "model and are measured on the same pairs; compare once for each value."
    )
  if key in flat and isinstance(flat[key], str):
    return text
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text


def _used(changes: Mapping[str, Any], flat: Mapping[str, Any]) -> dict:
  """Without the options that the loss of these changes does not have."""
  loss = config_lib.LOSSES.get(changes.get(_LOSS, flat[_LOSS]))
  if loss is None:
    return dict(changes)
  every = {
    name for known in config_lib.LOSSES.values() for name in known.options
  }
  unused = {f"loss.{name}" for name in every - set(loss.options)}
  return {key: value for key, value in changes.items() if key not in unused}


def _changed(
  base: config_lib.Config, changes: Mapping[str, Any]
) -> config_lib.Config:
  values = config_lib.to_dict(base)
  # The base's own options are its own loss's.
  loss = config_lib.LOSSES.get(changes.get(_LOSS, base.loss.name))
  if loss is not None:
    for name in config_lib.LOSSES[base.loss.name].options:
      if name not in loss.options:
        values["loss"][name] = None
  for key, value in changes.items():
    *sections, name = key.split(".")
    section = values
    for part in sections:
      # What is no section is reported as an unknown key.
      section = section.setdefault(part, {})
      if not isinstance(section, dict):
        raise ValueError(
          f"Config key {key} is within {part}, which is a value."
        )
    section[name] = value
  config = config_lib.from_dict(values)
  if config.loss.name == "sft":
    raise ValueError(
      "loss.name='sft' learns from single answers; a comparison is of losses "
      "that learn from pairs."
    )
  return config


def _has(config: config_lib.Config, key: str) -> bool:
  is_option = key.startswith("loss.") and key != _LOSS
  return not is_option or _flat(config)[key] is not None


def _text(value: Any) -> str:
  return f"{value:.12g}" if isinstance(value, float) else str(value)
