"""The config and the data of a run, beside its checkpoints: what made them."""

import contextlib
import json
from typing import Any

from dpop_jax import (
  atomic_files,
  checkpoints,
  config_values,
  exchange,
  paths,
)
from dpop_jax import config as config_lib
from dpop_jax.data import dataset

FILE_NAME = "config.json"
# Hashes of the token pairs.
DATA_FILE_NAME = "data.json"
# How a run is carried out, and where; it is the same run however.
HOW_TO_RUN = (
  "mesh.",
  "checkpoints.",
  "model.remat",
  # Only how the pairs of an update are split over devices and time.
  "batch.rows_per_microbatch",
  "optimizer.host_offload",
  "reference.host_offload",
  "reference.cache_dir",
  "run.log_every_steps",
  "run.compilation_cache_dir",
)
# What may change between two starts of a run without making it another run.
_FREE_TO_CHANGE = (
  *HOW_TO_RUN,
  "data.cache_dir",
  "run.num_steps",
  "run.num_epochs",
  "run.eval_every_steps",
)


def save(config: config_lib.Config, workdir: str) -> None:
  """Writes `workdir`/config.json, whole or not at all."""
  text = json.dumps(config_lib.to_dict(config), indent=2)
  atomic_files.write_text(paths.of(workdir) / FILE_NAME, text + "\n")


def load(workdir: str) -> config_lib.Config:
  """The config that the run in `workdir` was last started with.

  Raises:
    ValueError: There is no run, or its config is not one of this version.
  """
  path = paths.of(workdir) / FILE_NAME
  try:
    return config_lib.from_dict(_read(path))
  except FileNotFoundError:
    raise ValueError(
      f"There is no run in {workdir}: expected its {FILE_NAME} there."
    ) from None
  except ValueError as error:
    raise ValueError(f"{path} cannot be used: {error}") from error


def check_started_alike(config: config_lib.Config, **others: Any) -> None:
  """Checks that all processes of this run have the same config and code.

  Args:
    config: Of this process.
    others: What else should be the same; what JSON can say.

  Raises:
    ValueError: They do not.
  """
  values = config_values.flatten(config_lib.to_dict(config))
  exchange.check_equal(values | others)


def check_same_run(config: config_lib.Config, workdir: str) -> list[str]:
  """What differs from the config of the run that is to be continued.

  A run without a complete checkpoint has nothing to continue and may be
  replaced by any other.

  Args:
    config: Of this start.
    workdir: Of the run.

  Returns:
    `key: old -> new`, for keys that are free to change.

  Raises:
    ValueError: Something else differs, so that it would be another run.
  """
  path = paths.of(workdir) / FILE_NAME
  paths.check_folder(workdir, "--workdir")
  if checkpoints.newest(workdir) is None:
    return []
  if not path.exists():
    raise ValueError(
      f"{workdir} holds checkpoints without the {FILE_NAME} that made them; "
      "use another --workdir."
    )
  try:
    old = _read(path)
  except ValueError as error:
    raise ValueError(f"{path} cannot be used: {error}") from error
  # Keys that the version which wrote it did not have are at their defaults.
  with contextlib.suppress(ValueError):
    old = config_lib.to_dict(config_lib.from_dict(old))
  differences = config_values.differences(old, config_lib.to_dict(config))
  other = [d for d in differences if not d.startswith(_FREE_TO_CHANGE)]
  if other:
    raise ValueError(
      f"{workdir} holds a run with another config; use another --workdir or "
      f"undo: {'; '.join(other)}."
    )
  return differences


def check_same_data(data: dataset.Loaded, workdir: str) -> None:
  """Checks that the run to be continued was trained on these very tokens.

  Which pairs a step sees follows from them, so with others it would neither
  be the same run nor, after a shuffle, see every pair once.

  Raises:
    ValueError: They differ.
  """
  path = paths.of(workdir) / DATA_FILE_NAME
  if not path.exists() or checkpoints.newest(workdir) is None:
    return
  changed = [
    f"data.{name}"
    for name, digest in digests(data).items()
    if _read(path).get(name) != digest
  ]
  if changed:
    raise ValueError(
      f"The run in {workdir} was trained on other data than "
      f"{', '.join(changed)} now gives; use another --workdir, or bring back "
      "the files, tokenizer and library versions it began with."
    )


def save_data(data: dataset.Loaded, workdir: str) -> None:
  """Writes `workdir`/data.json for `check_same_data`."""
  text = json.dumps(digests(data), indent=2)
  atomic_files.write_text(paths.of(workdir) / DATA_FILE_NAME, text + "\n")


def digests(data: dataset.Loaded) -> dict[str, str | None]:
  """Hashes of the pairs to train on and of those held out, if there are any."""
  return {
    "train": data.train.digest(),
    "eval": None if data.eval is None else data.eval.digest(),
  }


def _read(path):
  values = json.loads(path.read_text(encoding="utf-8"))
  if not isinstance(values, dict):
    raise ValueError(f"it should hold an object, got {values!r}.")
  return values
