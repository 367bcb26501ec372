"""From a config file to frozen dataclasses; nobody else knows ConfigDict.

A config file's sections and keys are the dataclasses below and their fields.
Unknown keys, missing keys and wrong types are errors that name the key as it is
written in the file or on the command line (`--config.loss.beta=0.1`).
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import ml_collections

from dpop_jax import checkpoints as checkpoints_lib
from dpop_jax import losses, optim, sharding, steps
from dpop_jax.data import dataset, plan
from dpop_jax.models import decoder


class _Loss(typing.NamedTuple):
  """How a loss is called, and the options of the `loss` section it needs."""

  function: Callable[..., Any]
  options: tuple[str, ...]
  takes_reference: bool = True
  takes_lengths: bool = False


LOSSES = {
  "dpop": _Loss(losses.dpop_loss, ("beta", "dpop_lambda")),
  "dpo": _Loss(losses.dpo_loss, ("beta",)),
  "cdpo": _Loss(losses.conservative_dpo_loss, ("beta", "label_smoothing")),
  "ipo": _Loss(losses.ipo_loss, ("beta",)),
  "ipo_mean": _Loss(
    losses.length_normalised_ipo_loss, ("beta",), takes_lengths=True
  ),
  "slic_hinge": _Loss(losses.slic_hinge_loss, ("beta",)),
  "slic": _Loss(
    losses.slic_likelihood_loss,
    ("delta", "likelihood_weight"),
    takes_reference=False,
  ),
  "sft": _Loss(losses.sft_loss, (), takes_reference=False),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
  """Which loss, and its hyper-parameters; those it does not have stay None.

  Attributes:
    name: A key of LOSSES.
    beta: Tie to the reference (dpop, dpo, cdpo, ipo, ipo_mean, slic_hinge).
    dpop_lambda: Weight of the penalty (dpop).
    label_smoothing: Share of pairs taken to be labelled wrongly (cdpo).
    delta: Margin in nats (slic).
    likelihood_weight: Weight of the chosen answer's likelihood (slic).
  """

  name: str
  beta: float | None = None
  dpop_lambda: float | None = None
  label_smoothing: float | None = None
  delta: float | None = None
  likelihood_weight: float | None = None

  def __post_init__(self):
    if self.name not in LOSSES:
      raise ValueError(
        f"loss.name must be one of {', '.join(LOSSES)}; got {self.name!r}."
      )
    for field in dataclasses.fields(self)[1:]:
      value = getattr(self, field.name)
      is_needed = field.name in LOSSES[self.name].options
      if is_needed and value is None:
        raise ValueError(
          f"loss.name={self.name!r} needs loss.{field.name}; set it."
        )
      if not is_needed and value is not None:
        raise ValueError(
          f"loss.{field.name} is {value}, but loss.name={self.name!r} does not "
          "use it; leave it out (None)."
        )
    is_positive = lambda value: 0 < value < math.inf
    is_weight = lambda value: 0 <= value < math.inf
    for name, is_valid, expected in (
      ("beta", is_positive, "positive"),
      ("dpop_lambda", is_weight, "0 or more"),
      ("label_smoothing", lambda value: 0 <= value < 0.5, "in [0, 0.5)"),
      ("delta", is_positive, "positive"),
      ("likelihood_weight", is_weight, "0 or more"),
    ):
      value = getattr(self, name)
      if value is not None and not is_valid(value):
        raise ValueError(f"loss.{name} must be {expected}, got {value}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
  """How long, and what happens on the way.

  Attributes:
    num_steps: Updates of the whole run; None for `num_epochs`.
    num_epochs: Passes over the data instead, rounded up to whole updates.
    seed: Of fresh parameters and of the order of the pairs.
    init_from: A workdir whose newest parameters are the policy's and the
      reference's start; None for fresh ones.
    log_every_steps: Steps between two records of training metrics.
    eval_every_steps: Steps between two evaluations on held-out pairs; None for
      only before the first and after the last step.
    compilation_cache_dir: Where compiled programs are kept for the next start;
      None for nowhere.
  """

  num_steps: int | None = None
  num_epochs: float | None = None
  seed: int = 0
  init_from: str | None = None
  log_every_steps: int = 10
  eval_every_steps: int | None = None
  compilation_cache_dir: str | None = None

  def __post_init__(self):
    if (self.num_steps is None) == (self.num_epochs is None):
      raise ValueError(
        "Set one of run.num_steps and run.num_epochs, and leave the other "
        f"None; got {self.num_steps} and {self.num_epochs}."
      )
    for name in (
      "num_steps",
      "num_epochs",
      "log_every_steps",
      "eval_every_steps",
    ):
      value = getattr(self, name)
      if value is not None and not 0 < value < math.inf:
        raise ValueError(f"run.{name} must be positive, got {value}.")
    # JAX takes a key from 32 bits and drops the others without a word.
    if not 0 <= self.seed < 2**32:
      raise ValueError(
        f"run.seed must be at least 0 and below 2**32, got {self.seed}."
      )

  def steps_for(self, num_pairs: int, batch_size: int) -> int:
    """Updates of the run, given the size of the data set."""
    if self.num_steps is not None:
      return self.num_steps
    return math.ceil(self.num_epochs * num_pairs / batch_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Everything that decides what a run does; one section a field."""

  model: decoder.DecoderConfig
  data: dataset.DataConfig
  batch: plan.BatchConfig
  loss: LossConfig
  optimizer: optim.OptimizerConfig
  run: RunConfig
  checkpoints: checkpoints_lib.CheckpointConfig = (
    checkpoints_lib.CheckpointConfig()
  )
  mesh: sharding.MeshConfig = sharding.MeshConfig()


def config_dict(**sections: Any) -> ml_collections.ConfigDict:
  """What a config file returns: its sections, and all other keys at defaults.

  ConfigDict lets the command line override only keys that are there, so all of
  them are.

  Args:
    **sections: The keys of each section that are not to be at their defaults.

  Raises:
    ValueError: A key is unknown, or a section is none.
  """
  return ml_collections.ConfigDict(_fill(Config, sections, ""))


def _fill(cls: type, values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
  _check_known(cls, values, prefix)
  filled = {}
  for field in dataclasses.fields(cls):
    hint = typing.get_type_hints(cls)[field.name]
    if dataclasses.is_dataclass(hint):
      section = values.get(field.name, {})
      key = f"{prefix}{field.name}"
      _check_is_section(section, key)
      filled[field.name] = _fill(typing.cast(type, hint), section, f"{key}.")
      continue
    has_default = field.default is not dataclasses.MISSING
    value = values.get(field.name, field.default if has_default else None)
    # A typed hole, so that a value on the command line is read as that type.
    filled[field.name] = (
      ml_collections.config_dict.placeholder(_options(hint)[0])
      if value is None
      else value
    )
  return filled


def from_config_dict(config: ml_collections.ConfigDict) -> Config:
  """Checks a config file's values and freezes them.

  Raises:
    ValueError: A key is unknown, missing or of the wrong type, or a value is
      out of range; the sentence names the key.
  """
  return from_dict(config.to_dict())


def from_dict(values: Mapping[str, Any]) -> Config:
  """The config of which `to_dict` gave these values, also by way of JSON.

  Raises:
    ValueError: As `from_config_dict`.
  """
  return _build(Config, values, "")


def to_dict(config: Config) -> dict[str, Any]:
  """Plain numbers, strings, lists and dicts, for JSON."""
  return dataclasses.asdict(config)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
  """What differs between two results of `to_dict`, as `key: old -> new`."""
  old, new = _flatten(old), _flatten(new)
  missing = object()
  return [
    f"{key}: {old.get(key, 'not set')} -> {new.get(key, 'not set')}"
    for key in sorted(old.keys() | new.keys())
    if old.get(key, missing) != new.get(key, missing)
  ]


def make_objective(config: LossConfig) -> steps.Objective:
  """The loss with its hyper-parameters, as the train step calls it."""
  loss = LOSSES[config.name]
  options = {name: getattr(config, name) for name in loss.options}

  def pair_losses(policy, reference, lengths):
    arguments = [policy[..., 0], policy[..., 1]]
    if config.name == "sft":
      arguments = arguments[:1]
    if loss.takes_reference:
      arguments += [reference[..., 0], reference[..., 1]]
    if loss.takes_lengths:
      arguments += [lengths[..., 0], lengths[..., 1]]
    return loss.function(*arguments, **options)

  return steps.Objective(
    pair_losses=pair_losses,
    is_sft=config.name == "sft",
    beta=config.beta or 1.0,
  )


def initial_loss(config: LossConfig) -> float | None:
  """The loss where policy and reference are equal: ln 2 for DPO and DPOP.

  None for losses without a reference, which say nothing about it.
  """
  if not LOSSES[config.name].takes_reference:
    return None
  zeros = jnp.zeros((1, 2))
  lengths = jnp.ones((1, 2), jnp.int32)
  return float(make_objective(config).pair_losses(zeros, zeros, lengths)[0])


def _build(cls: type, values: Mapping[str, Any], prefix: str) -> Any:
  _check_known(cls, values, prefix)
  hints = typing.get_type_hints(cls)
  arguments = {}
  for field in dataclasses.fields(cls):
    key = f"{prefix}{field.name}"
    value = values.get(field.name)
    is_required = field.default is dataclasses.MISSING
    # A hole of a required key that nobody filled counts as missing.
    if field.name in values and not (is_required and value is None):
      arguments[field.name] = _convert(hints[field.name], value, key)
    elif is_required:
      raise ValueError(
        f"Config key {key} is missing; set it in the config file or by "
        f"--config.{key}=..."
      )
  return cls(**arguments)


def _check_is_section(value: Any, key: str) -> None:
  if not isinstance(value, Mapping):
    raise ValueError(
      f"Config key {key} must be a section of keys, got {value!r}."
    )


def _check_known(cls: type, values: Mapping[str, Any], prefix: str) -> None:
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
    return _build(typing.cast(type, hint), value, f"{key}.")
  options = _options(hint)
  for option in options:
    if option is type(None):
      if value is None:
        return None
    elif typing.get_origin(option) is tuple:
      item = typing.get_args(option)[0]
      if isinstance(value, list | tuple) and all(
        isinstance(v, item) for v in value
      ):
        return tuple(value)
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


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  flat = {}
  for key, value in values.items():
    if isinstance(value, Mapping):
      flat |= _flatten(value, f"{prefix}{key}.")
    else:
      flat[prefix + key] = list(value) if isinstance(value, tuple) else value
  return flat
