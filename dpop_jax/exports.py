"""From a checkpoint of ours to a Hugging Face folder."""

import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import logging

from dpop_jax import (
  checkpoints,
  config_values,
  hugging_face_files,
  model_folders,
  name_lists,
  paths,
  progress,
  sharding,
  whole_folders,
)
from dpop_jax.data import tokenizer_export, tokenizers
from dpop_jax.hf import families, names, weights
from dpop_jax.models import decoder

DTYPES = ("float32", "bfloat16", "float16")
_FLOAT16_MAX = 65_504


class Exported(NamedTuple):
  """What was written.

  Attributes:
    family: As Hugging Face's `model_type` names it.
    step: Of the checkpoint's folder.
    dtype: That most weights were written in.
  """

  family: str
  step: str
  dtype: str


def export_hf(
  source: str,
  out: str,
  *,
  mesh: sharding.MeshConfig,
  dtype: str | None = None,
  max_file_bytes: int = 5_000_000_000,
) -> Exported:
  """Makes a folder that `transformers` loads.

  It holds safetensors files with their index, config.json,
  generation_config.json and the tokenizer. Called by all processes alike.

  Args:
    source: A workdir, or the folder of one of its steps, or an import.
    out: The folder to make.
    mesh: Devices that hold the model meanwhile.
    dtype: Of all weights; None for those of the model that the run started
      from, and for model.param_dtype if that was none of Hugging Face.
    max_file_bytes: Of each file of weights, unless one tensor is larger.

  Raises:
    FileExistsError: There is something in `out`.
    FileNotFoundError: There is nothing in `source`.
    ValueError: There is no checkpoint, no model of Hugging Face computes what
      this one does, an argument is out of range, or float16 does not hold a
      weight.
  """
  if dtype is not None and dtype not in DTYPES:
    raise ValueError(
      f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}."
    )
  if max_file_bytes < 1:
    raise ValueError(
      f"A file of weights must hold a byte at least, got {max_file_bytes}."
    )
  if model_folders.is_hugging_face(source):
    raise ValueError(
      f"{source} is a Hugging Face folder already; expected a workdir."
    )
  checkpoint = checkpoints.newest(source)
  if checkpoint is None:
    raise ValueError(
      f"There is no complete checkpoint in {source}; expected a workdir, the "
      "folder of one of its steps, or an import."
    )
  kept = model_folders.hugging_face_files(checkpoint)
  values = model_folders.our_config(checkpoint)
  config = config_values.build(decoder.DecoderConfig, values["model"], "model.")
  stored = hugging_face_files.dtypes_of(kept)
  usual = dtype or (stored.usual if stored else config.param_dtype)
  others = stored.others if stored and dtype is None else {}
  written = hugging_face_files.config_of(kept, values, dtype=usual)
  family = families.name_of(written)
  parts = names.parts(config, family)
  devices = sharding.make_mesh(mesh)
  config.check_mesh(devices)
  with whole_folders.new(out) as folder:
    params = checkpoints.load_params(
      checkpoint, decoder.abstract_params(config, devices)
    )
    if "float16" in (usual, *others.values()):
      _check_float16(params)
    is_primary = jax.process_index() == 0
    with progress.Transfer("weights", is_shown=is_primary) as bar:
      weights.save(
        params,
        parts,
        folder,
        dtype={part.name: others.get(part.name, usual) for part in parts},
        max_file_bytes=max_file_bytes,
        progress=bar,
      )
    if is_primary:
      hugging_face_files.write(folder, kept)
      # Last: says that the folder is complete.
      text = json.dumps(written, indent=2) + "\n"
      (folder / hugging_face_files.CONFIG).write_text(text)
      _check_tokenizer(str(folder), checkpoint)
  return Exported(family, paths.of(checkpoint).name, usual)


def _check_float16(params):
  """Raises ValueError if a weight would become infinite."""
  largest = jax.device_get(
    jax.jit(lambda tree: jax.tree.map(lambda x: jnp.abs(x).max(), tree))(params)
  )
  beyond = [
    f"{jax.tree_util.keystr(path, simple=True, separator='/')} up to {x:.4g}"
    for path, x in jax.tree.leaves_with_path(largest)
    if x > _FLOAT16_MAX
  ]
  if beyond:
    raise ValueError(
      f"float16 holds numbers up to {_FLOAT16_MAX:,}, but there are weights "
      f"beyond in {name_lists.listed(beyond)}; export with --dtype=bfloat16."
    )


def _check_tokenizer(folder, checkpoint):
  """Warns if `transformers` would make another tokenizer of the same files."""
  kept = model_folders.tokenizer(checkpoint)
  if kept is None:
    return
  try:
    tokenizer_export.check(folder, tokenizers.load(kept))
  except ValueError as error:
    logging.warning("The weights are exported, but: %s", error)
