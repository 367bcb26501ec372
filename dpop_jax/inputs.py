"""What a run starts from: its data and its initial parameters."""

import dataclasses
import pathlib

import jax

from dpop_jax import checkpoints, steps
from dpop_jax import config as config_lib
from dpop_jax.data import dataset
from dpop_jax.models import decoder


def load_data(config: config_lib.Config, workdir: str) -> dataset.Loaded:
  """The pairs of a run, tokenised once for all its starts.

  Args:
    config: Of the run.
    workdir: Where the tokens are kept unless data.cache_dir says otherwise.

  Raises:
    FileNotFoundError: A file is missing.
    ValueError: As `dataset.load`, or the model's vocabulary is too small.
  """
  data_config = config.data
  if data_config.cache_dir is None:
    cache_dir = str(pathlib.Path(workdir) / "tokens")
    data_config = dataclasses.replace(data_config, cache_dir=cache_dir)
  data = dataset.load(
    data_config,
    is_sft=config.loss.name == "sft",
    row_length=config.batch.row_length,
  )
  for name, pairs in (("train", data.train), ("eval", data.eval)):
    largest = int(pairs.tokens.max()) if pairs is not None else 0
    if largest >= config.model.vocab_size:
      raise ValueError(
        f"data.{name} holds token {largest}, but model.vocab_size is "
        f"{config.model.vocab_size}; raise it to the tokenizer's "
        f"{data.report['tokenizer']['vocab_size']} or more."
      )
  return data


def pin_initial_params(config: config_lib.Config) -> config_lib.Config:
  """Makes `run.init_from` one checkpoint, that a later one does not displace.

  Otherwise the reference of a resumed run would be another than before where
  the run that it was taken from has gone on.

  Raises:
    ValueError: There is no checkpoint in `run.init_from`.
  """
  path = config.run.init_from
  if path is None:
    return config
  pinned = checkpoints.newest(path)
  if pinned is None:
    raise ValueError(
      f"There is no complete checkpoint in run.init_from={path!r}; expected "
      "the workdir of another run."
    )
  run = dataclasses.replace(config.run, init_from=pinned)
  return dataclasses.replace(config, run=run)


def initial_params(
  config: config_lib.Config, mesh: jax.sharding.Mesh
) -> steps.Params:
  """The start of the policy, and the reference: fresh or `run.init_from`'s.

  Raises:
    ValueError: The checkpoint is of another model.
  """
  if config.run.init_from is None:
    key = jax.random.key(config.run.seed)
    return decoder.make_params(key, config.model, mesh)
  return checkpoints.load_params(
    config.run.init_from, decoder.abstract_params(config.model, mesh)
  )
