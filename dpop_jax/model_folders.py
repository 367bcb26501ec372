"""Folders that hold a model: Hugging Face's, an import's, or a run's workdir.

The latter two lie on disk as

  config.json         its section `model` says what the model is
  checkpoints/        the parameters, by step
  hugging_face/       what an export needs beside them: see `exports`
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Collection
from typing import Any

import jax
from etils import epath

from dpop_jax import checkpoints, paths
from dpop_jax.data import tokenizers
from dpop_jax.hf import families, names, weights
from dpop_jax.models import decoder

CONFIG_NAME = "config.json"
HUGGING_FACE = "hugging_face"
USE_LONG_FACTOR = "rope_scaling.use_long_factor"
# Keys of a section `model` that are not about what model it is.
HOW_TO_RUN = (*families.HOW_TO_RUN, USE_LONG_FACTOR)


def pin(path: str, *, key: str) -> str:
  """The one checkpoint that `path` means now, that no later one displaces.

  Args:
    path: A folder that holds a model.
    key: Of the config, for errors.

  Raises:
    ValueError: It holds none.
  """
  # As text of one form: with and without a slash behind, it is one run.
  path = str(paths.of(path))
  if is_hugging_face(path):
    return path
  pinned = checkpoints.newest(path)
  if pinned is None:
    raise ValueError(
      f"There is no complete checkpoint in {key}={path!r}; expected a Hugging "
      "Face folder or the workdir of another run."
    )
  return pinned


def is_hugging_face(path: str) -> bool:
  """Whether it is a folder that `transformers` reads."""
  values = read_json(paths.of(path) / CONFIG_NAME)
  return bool(values) and bool({"model_type", "architectures"} & values.keys())


def root(path: str) -> epath.Path:
  """The workdir or import that a folder of it, such as one step's, is in."""
  folder = paths.of(path)
  if (folder / checkpoints.PARAMS).exists():
    return folder.parent.parent
  if folder.name == checkpoints.FOLDER:
    return folder.parent
  return folder


def architecture(
  path: str, ignored_options: Collection[str] = ()
) -> dict[str, Any]:
  """What model a folder holds: fields of a DecoderConfig, without HOW_TO_RUN.

  Args:
    path: A folder that holds a model, or the folder of one of its steps.
    ignored_options: See `families.from_hf`.

  Raises:
    FileNotFoundError: There is no such folder, or nothing in it says.
    ValueError: The model is of no supported kind.
  """
  if is_hugging_face(path):
    fields = hugging_face_model(path, ignored_options)[1]
    scaling = dataclasses.asdict(fields["rope_scaling"])
    return fields | {"rope_scaling": scaling}
  model = our_config(path)["model"]
  return {k: v for k, v in model.items() if k not in HOW_TO_RUN}


def our_config(path: str) -> dict[str, Any]:
  """The config.json of a run or an import; its section `model` is there.

  Raises:
    FileNotFoundError: There is none.
  """
  values = read_json(root(path) / CONFIG_NAME) or {}
  if not isinstance(values.get("model"), dict):
    raise FileNotFoundError(
      f"Nothing in {path!r} says what model it holds; expected a Hugging Face "
      f"folder, or a workdir with its {CONFIG_NAME}."
    )
  return values


def hugging_face_model(
  path: str, ignored_options: Collection[str] = ()
) -> tuple[str, dict[str, Any]]:
  """Family and DecoderConfig fields of a Hugging Face folder.

  Raises:
    FileNotFoundError: It has no config.json.
    ValueError: The model is of no supported kind.
  """
  file = paths.of(path) / CONFIG_NAME
  values = read_json(file)
  if values is None:
    raise FileNotFoundError(f"There is no {CONFIG_NAME} in {path!r}.")
  try:
    return families.from_hf(values, ignored_options=ignored_options)
  except ValueError as error:
    raise ValueError(f"{file}: {error}") from error


def check_weights(
  path: str,
  config: decoder.DecoderConfig,
  *,
  ignored_options: Collection[str] = (),
) -> None:
  """Checks what a Hugging Face folder's headers say, before much is done.

  Raises:
    ValueError: The weights are broken, or those of another model.
  """
  if not is_hugging_face(path):
    return
  family, _ = hugging_face_model(path, ignored_options)
  is_ignorable = functools.partial(names.is_ignorable, config=config)
  parts = names.parts(config, family)
  weights.check(path, parts, is_ignorable=is_ignorable)
  embedding, copy = "model.embed_tokens.weight", "lm_head.weight"
  if not config.tie_word_embeddings or copy not in weights.dtypes(path):
    return
  # `transformers` does not tie what differs, whatever config.json says.
  if not weights.are_equal(path, embedding, copy):
    raise ValueError(
      f"{CONFIG_NAME} in {path} has tie_word_embeddings, but {copy} differs "
      f"from {embedding}; set tie_word_embeddings to false there."
    )


def check_vocabulary(
  tokenizer: tokenizers.Tokenizer, config: decoder.DecoderConfig
) -> None:
  """Raises ValueError if text can have tokens that the model has not.

  Special tokens do not count, for nobody writes those of another use.
  """
  size = tokenizer.text_vocab_size
  if size > config.vocab_size:
    raise ValueError(
      f"The tokenizer {tokenizer.name} has {size} tokens for text, but the "
      f"model's vocab_size is {config.vocab_size}: they belong to different "
      "models."
    )


def load_params(
  path: str,
  config: decoder.DecoderConfig,
  mesh: jax.sharding.Mesh,
  *,
  ignored_options: Collection[str] = (),
  progress: Callable[[int], None] = lambda num_bytes: None,
) -> dict:
  """The parameters of a folder, on the mesh, in `config.param_dtype`.

  Of a Hugging Face folder each process reads what its own devices hold; see
  `check_weights` first.

  Raises:
    FileNotFoundError: There are no weights.
    ValueError: They are broken, or those of another model.
  """
  abstract = decoder.abstract_params(config, mesh)
  if not is_hugging_face(path):
    return checkpoints.load_params(path, abstract)
  family, _ = hugging_face_model(path, ignored_options)
  return weights.load(
    path,
    names.parts(config, family),
    abstract,
    is_ignorable=functools.partial(names.is_ignorable, config=config),
    progress=progress,
  )


def hugging_face_files(path: str) -> epath.Path:
  """The folder in which there may be a model's Hugging Face files."""
  if is_hugging_face(path):
    return paths.of(path)
  return root(path) / HUGGING_FACE


def tokenizer(path: str) -> str | None:
  """The folder of the tokenizer that came with a model, if one did."""
  folder = str(hugging_face_files(path))
  try:
    tokenizers.files(folder)
  except FileNotFoundError:
    return None
  return folder


def read_json(file: epath.Path) -> dict[str, Any] | None:
  """The object in a file of a model's folder; None if there is no such file.

  Raises:
    ValueError: There is something else in it.
  """
  if not file.exists():
    return None
  try:
    values = json.loads(file.read_text())
  except ValueError as error:
    raise ValueError(f"{file} is not JSON: {error}.") from error
  if not isinstance(values, dict):
    raise ValueError(f"{file} should hold an object, got {values!r}.")
  return values
