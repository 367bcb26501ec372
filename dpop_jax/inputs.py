"""What a run starts from: its data and its initial parameters."""

import dataclasses

import jax
import jax.numpy as jnp

from dpop_jax import config as config_lib
from dpop_jax import (
  config_values,
  exchange,
  model_folders,
  paths,
  progress,
  sharding,
  steps,
)
from dpop_jax.data import dataset, tokenizers
from dpop_jax.models import decoder


def load_data(config: config_lib.Config, workdir: str) -> dataset.Loaded:
  """The pairs of a run, tokenised once for all its starts.

  Of several processes the first one goes ahead. The others open what it has
  kept, or do the same where they do not see its files.

  Args:
    config: Of the run.
    workdir: Where the tokens are kept unless data.cache_dir says otherwise.

  Raises:
    FileNotFoundError: A file is missing.
    ValueError: As `dataset.load`, or the model's vocabulary is too small.
  """
  data_config = config.data
  if data_config.cache_dir is None:
    cache_dir = str(paths.of(workdir) / "tokens")
    data_config = dataclasses.replace(data_config, cache_dir=cache_dir)
  data = exchange.after_first(
    lambda: dataset.load(
      data_config,
      is_sft=config.loss.name == "sft",
      row_length=config.batch.row_length,
    )
  )
  for name, pairs in (("train", data.train), ("eval", data.eval)):
    largest = int(pairs.tokens.max()) if pairs is not None else 0
    if largest >= config.model.vocab_size:
      raise ValueError(
        f"data.{name} holds token {largest}, but model.vocab_size is "
        f"{config.model.vocab_size}; "
        + (
          "take the tokenizer of the model in run.init_from."
          if config.run.init_from is not None
          else "raise it to the tokenizer's "
          f"{data.report['tokenizer']['vocab_size']} or more."
        )
      )
  return data


def pin_models(config: config_lib.Config) -> config_lib.Config:
  """Makes each `init_from` one checkpoint, that a later one does not displace.

  Otherwise the reference of a resumed run would be another than before where
  the run that it was taken from has gone on.

  Raises:
    ValueError: There is no checkpoint in one of them.
  """
  for name in ("run", "reference"):
    section = getattr(config, name)
    if section.init_from is not None:
      path = model_folders.pin(section.init_from, key=f"{name}.init_from")
      section = dataclasses.replace(section, init_from=path)
      config = dataclasses.replace(config, **{name: section})
  return config


def check_start(config: config_lib.Config) -> None:
  """Checks what policy and reference start from, before anything is written.

  Raises:
    ValueError: `run.init_from` holds another model than it is loaded as, or
      the weights or the tokenizer of a Hugging Face folder do not fit.
  """
  path, ignored = config.run.init_from, config.run.ignored_options
  for folder, model in (
    (path, config.model),
    (config.reference.init_from, config_lib.reference_model(config)),
  ):
    if folder is not None:
      model_folders.check_weights(folder, model, ignored_options=ignored)
  if path is None:
    return
  _check_same_model(config)
  if model_folders.is_hugging_face(path):
    data = config.data
    tokenizer = tokenizers.load(
      data.tokenizer, bos_token=data.bos_token, eos_token=data.eos_token
    )
    model_folders.check_vocabulary(tokenizer, config.model)


def _check_same_model(config):
  """Parameters of one shape are of different models where rope_theta differs.

  A checkpoint that is in no workdir is taken as it is.
  """
  path = config.run.init_from
  try:
    saved = model_folders.architecture(path, config.run.ignored_options)
  except FileNotFoundError:
    return
  saved = config_values.flatten(saved)
  wanted = config_values.flatten(config_lib.to_dict(config)["model"])
  # Not those that an earlier version did not have, nor those left to a default.
  names = saved.keys() & wanted.keys() - {"head_dim", *model_folders.HOW_TO_RUN}
  differences = config_values.differences(
    *({name: model[name] for name in names} for model in (saved, wanted))
  )
  if differences:
    raise ValueError(
      f"run.init_from={path!r} holds another model than the config's section "
      f"`model`: {'; '.join(differences)}."
    )


def initial_params(
  config: config_lib.Config, mesh: jax.sharding.Mesh
) -> steps.Params:
  """The start of the policy: fresh, or what `run.init_from` holds.

  Raises:
    FileNotFoundError: It has no weights.
    ValueError: They are of another model.
  """
  if config.run.init_from is None:
    key = jax.random.key(config.run.seed)
    return decoder.make_params(key, config.model, mesh)
  return _load(config, config.run.init_from, config.model, mesh)


def load_reference(
  config: config_lib.Config,
  mesh: jax.sharding.Mesh,
  *,
  initial: steps.Params | None = None,
) -> steps.Params:
  """The reference's parameters.

  Args:
    config: Of the run.
    mesh: Where they go.
    initial: `initial_params`, if they are there already: what is the same model
      is read only once.

  Raises:
    FileNotFoundError: There are no weights.
    ValueError: They are of another model.
  """
  params = _reference(config, mesh, initial)
  if config.reference.host_offload:
    # Copied, so that what stays on the devices is not the policy's, which the
    # first step is free to overwrite.
    params = jax.tree.map(
      lambda x, place: jax.device_put(x, place, may_alias=False),
      params,
      sharding.on_host(params),
    )
  return params


def _reference(config, mesh, initial):
  model = config_lib.reference_model(config)
  if config.reference.init_from is not None:
    return _load(config, config.reference.init_from, model, mesh)
  if initial is None:
    initial = initial_params(config, mesh)
  if model.param_dtype == config.model.param_dtype:
    return initial
  dtype = jnp.dtype(model.param_dtype)
  return jax.tree.map(lambda x: x.astype(dtype), initial)


def _load(config, path, model, mesh):
  with progress.Transfer("weights", is_shown=jax.process_index() == 0) as bar:
    return model_folders.load_params(
      path,
      model,
      mesh,
      ignored_options=config.run.ignored_options,
      progress=bar,
    )
