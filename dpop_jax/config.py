"""From a config file to frozen dataclasses; nobody else knows ConfigDict.

A config file's sections and keys are the dataclasses below and their fields.
Unknown keys, missing keys and wrong types are errors that name the key as it is
written in the file or on the command line (`--config.loss.beta=0.1`).
"""

import dataclasses
import functools
import math
import operator
import typing
from collections.abc import Callable, Mapping
from typing import Any

import jax
import ml_collections
import numpy as np

from dpop_jax import checkpoints as checkpoints_lib
from dpop_jax import (
  config_values,
  losses,
  model_folders,
  optim,
  sharding,
  steps,
)
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
    init_from: What the policy starts from, and the reference unless
      `reference.init_from` says otherwise: a Hugging Face folder, what
      `import_hf` wrote, or another run's workdir; None for fresh parameters.
    ignored_options: Of a Hugging Face folder's config.json, options that are
      not known here and may be ignored.
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
  ignored_options: tuple[str, ...] = ()
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
class ReferenceConfig:
  """The frozen reference, where it is not just what the policy starts from.

  Attributes:
    init_from: Its folder, see `run.init_from`; may hold another model, with the
      same tokenizer. None for the one that the policy starts from.
    param_dtype: Its weights as stored, "float32" or "bfloat16"; None for
      model.param_dtype.
    host_offload: Keep its layers' matrices in the memory of the devices'
      hosts; a layer is fetched when its turn comes.
    cache_dir: Folder where the reference's log-probs are kept, shared by runs:
      they are computed once, before the first step, and the reference is freed.
      None scores it in every step.
  """

  init_from: str | None = None
  param_dtype: str | None = None
  host_offload: bool = False
  cache_dir: str | None = None

  def __post_init__(self):
    if self.host_offload and self.cache_dir is not None:
      raise ValueError(
        "reference.cache_dir frees the reference before the first step, so "
        "there is nothing for reference.host_offload to keep; set one of them."
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Everything that decides what a run does; one section a field."""

  model: decoder.DecoderConfig
  data: dataset.DataConfig
  batch: plan.BatchConfig
  loss: LossConfig
  optimizer: optim.OptimizerConfig
  run: RunConfig
  reference: ReferenceConfig = ReferenceConfig()
  checkpoints: checkpoints_lib.CheckpointConfig = (
    checkpoints_lib.CheckpointConfig()
  )
  mesh: sharding.MeshConfig = sharding.MeshConfig()

  def __post_init__(self):
    if self.loss.name != "sft":
      return
    for field in dataclasses.fields(self.reference):
      value = getattr(self.reference, field.name)
      if value != field.default:
        raise ValueError(
          f"reference.{field.name} is {value!r}, but loss.name='sft' has no "
          f"reference; leave it out ({field.default})."
        )


def config_dict(**sections: Any) -> ml_collections.ConfigDict:
  """What a config file returns: its sections, and all other keys at defaults.

  ConfigDict lets the command line override only keys that are there, so all of
  them are. A `model` section without sizes stands for the model of
  `run.init_from`.

  Args:
    **sections: The keys of each section that are not to be at their defaults.

  Raises:
    ValueError: A key is unknown, or a section is none.
  """
  # Typed, so that a value on the command line is read as that type.
  hole = ml_collections.config_dict.placeholder
  values = config_values.fill(Config, sections, hole)
  given = sections.get("model", {})
  if not _has_sizes(given):
    holes = config_values.holes(decoder.DecoderConfig, hole)
    for name in {*model_folders.HOW_TO_RUN, *given} & holes.keys():
      is_section = isinstance(holes[name], dict)
      value = given[name] if is_section else values["model"][name]
      holes[name] = holes[name] | value if is_section else value
    values["model"] = holes
  return ml_collections.ConfigDict(values)


def from_config_dict(config: ml_collections.ConfigDict) -> Config:
  """Checks a config file's values and freezes them.

  A model and a tokenizer that are not given are those of `run.init_from`.

  Raises:
    ValueError: A key is unknown, missing or of the wrong type, a value is out
      of range, or `run.init_from` holds no model of a supported kind or another
      than the section `model`; the sentence names the key.
    FileNotFoundError: There is nothing in `run.init_from`.
  """
  values = config.to_dict()
  model, run = values.get("model", {}), values.get("run", {})
  if not isinstance(model, Mapping) or not isinstance(run, Mapping):
    return from_dict(values)
  path = run.get("init_from")
  if not _has_sizes(model):
    if path is None:
      raise ValueError(
        "Config key model.vocab_size is missing, and so are the other sizes of "
        "the model; set them, or set run.init_from to a folder that holds one."
      )
    values["model"] = _model_of(path, model, run.get("ignored_options") or ())
  else:
    # Holes of a file without sizes, whose sizes came from the command line.
    values["model"] = {
      name: _without_holes(value) if isinstance(value, Mapping) else value
      for name, value in model.items()
      if value is not None or name in model_folders.HOW_TO_RUN
    }
  data = values.get("data", {})
  if path is not None and data.get("tokenizer", "") is None:
    values["data"] = data | {"tokenizer": model_folders.tokenizer(path)}
  return from_dict(values)


def from_dict(values: Mapping[str, Any]) -> Config:
  """The config of which `to_dict` gave these values, also by way of JSON.

  Raises:
    ValueError: A key is unknown, missing or of the wrong type, or a value is
      out of range; the sentence names the key.
  """
  return config_values.build(Config, values)


def to_dict(config: Config) -> dict[str, Any]:
  """Plain numbers, strings, lists and dicts, for JSON."""
  return dataclasses.asdict(config)


def reference_model(config: Config) -> decoder.DecoderConfig:
  """What the reference is: the policy's model, or that of its own folder.

  Raises:
    ValueError: `reference.init_from` holds no model of a supported kind.
    FileNotFoundError: There is nothing in `reference.init_from`.
  """
  model, path = config.model, config.reference.init_from
  if path is not None:
    values = model_folders.architecture(path, config.run.ignored_options)
    how = config_values.flatten(dataclasses.asdict(model))
    if values["rope_scaling"]["rope_type"] != model.rope_scaling.rope_type:
      del how[model_folders.USE_LONG_FACTOR]
    model = config_values.build(
      decoder.DecoderConfig, _run_as(values, how), "model."
    )
  dtype = config.reference.param_dtype or model.param_dtype
  return dataclasses.replace(model, param_dtype=dtype)


def _has_sizes(model: Mapping[str, Any]) -> bool:
  return any(
    model.get(field.name) is not None
    for field in dataclasses.fields(decoder.DecoderConfig)
    if field.default is dataclasses.MISSING
  )


def _without_holes(section):
  return {name: value for name, value in section.items() if value is not None}


def _model_of(path, given, ignored_options):
  """The `model` section of a folder, with what is given beside its sizes."""
  values = model_folders.architecture(path, ignored_options)
  given = {
    k: v for k, v in config_values.flatten(given).items() if v is not None
  }
  full = config_values.flatten(
    dataclasses.asdict(config_values.build(decoder.DecoderConfig, values))
  )
  changed = [
    f"model.{key} is {value} instead of {full.get(key)}"
    for key, value in given.items()
    if key not in model_folders.HOW_TO_RUN and full.get(key) != value
  ]
  if changed:
    raise ValueError(
      f"The model in run.init_from={path!r} is another: {'; '.join(changed)}. "
      "Leave these out."
    )
  return _run_as(values, given)


def _run_as(values, given):
  """Sets the keys of a `model` section that say how it is run."""
  for key in model_folders.HOW_TO_RUN:
    if given.get(key) is not None:
      *sections, name = key.split(".")
      section = functools.reduce(operator.getitem, sections, values)
      section[name] = given[key]
  return values


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
  zeros = np.zeros((1, 2), np.float32)
  # Op by op, each would be compiled by itself.
  pair_losses = jax.jit(make_objective(config).pair_losses)
  return float(pair_losses(zeros, zeros, np.ones((1, 2), np.int32))[0])
