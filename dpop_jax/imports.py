"""From a Hugging Face folder to a checkpoint of ours."""

import dataclasses
import json
from collections.abc import Collection

import jax

from dpop_jax import (
  checkpoints,
  hugging_face_files,
  model_folders,
  progress,
  sharding,
  whole_folders,
)
from dpop_jax.data import tokenizers
from dpop_jax.models import decoder


def import_hf(
  source: str,
  out: str,
  *,
  mesh: sharding.MeshConfig,
  param_dtype: str | None = None,
  ignored_options: Collection[str] = (),
) -> decoder.DecoderConfig:
  """Makes a folder that a run can start from (`run.init_from`).

  It holds the parameters as an Orbax checkpoint, what the model is, and what an
  export needs. Called by all processes alike; each reads what its devices hold.

  Args:
    source: A Hugging Face folder.
    out: The folder to make.
    mesh: Devices that hold the model meanwhile.
    param_dtype: Of the weights as stored; None for that of the source, and for
      float32 where that is float16.
    ignored_options: Options of its config.json that may be ignored although
      they are not known here.

  Returns:
    What the model is.

  Raises:
    FileExistsError: There is something in `out`.
    FileNotFoundError: The source is not there, or incomplete.
    ValueError: The model is of no supported kind, its weights are broken or not
      those that its config.json describes, or its tokenizer has tokens that it
      has no embeddings for.
  """
  _, fields = model_folders.hugging_face_model(source, ignored_options)
  if param_dtype is None:
    usual = hugging_face_files.stored_dtypes(source).usual
    param_dtype = "bfloat16" if usual == "bfloat16" else "float32"
  config = decoder.DecoderConfig(**fields, param_dtype=param_dtype)
  tokenizer = model_folders.tokenizer(source)
  if tokenizer is not None:
    model_folders.check_vocabulary(tokenizers.load(tokenizer), config)
  model_folders.check_weights(source, config, ignored_options=ignored_options)
  devices = sharding.make_mesh(mesh)
  config.check_mesh(devices)
  with whole_folders.new(out) as folder:
    is_primary = jax.process_index() == 0
    # Before the weights: what is wrong with these is seen at once.
    if is_primary:
      hugging_face_files.keep(
        folder / model_folders.HUGGING_FACE, init_from=source, data=None
      )
    with progress.Transfer("weights", is_shown=is_primary) as bar:
      params = model_folders.load_params(
        source, config, devices, ignored_options=ignored_options, progress=bar
      )
    checkpoints.save_params(str(folder), params)
    if is_primary:
      # Last: says that the folder is complete.
      text = json.dumps({"model": dataclasses.asdict(config)}, indent=2)
      (folder / model_folders.CONFIG_NAME).write_text(text + "\n")
  return config
