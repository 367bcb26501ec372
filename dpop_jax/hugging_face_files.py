"""What a Hugging Face folder holds beside its weights, kept for an export.

A run and an import keep it in their folder, so that they can be exported when
what they came from is gone:

  config.json              of the model they came from, if it was such a folder
  generation_config.json   likewise
  dtypes.json              of its tensors
  tokenizer.json, ...      the tokenizer, with what the run changed about it
"""

import collections
import json
from typing import Any, NamedTuple

from etils import epath

from dpop_jax import config_values, model_folders, paths
from dpop_jax.data import dataset, tokenizer_export, tokenizers
from dpop_jax.hf import families, weights
from dpop_jax.models import decoder

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
_DTYPES = "dtypes.json"
_DTYPE_KEYS = ("torch_dtype", "dtype")
_TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


class Dtypes(NamedTuple):
  """Of the tensors of a checkpoint.

  Attributes:
    usual: Name of the dtype that most have.
    others: Those of other tensors, by tensor.
  """

  usual: str
  others: dict[str, str]


def keep(
  folder: epath.PathLike,
  *,
  init_from: str | None,
  data: dataset.DataConfig | None,
) -> None:
  """Fills a folder; what is there already is replaced.

  Args:
    folder: A workdir's or an import's `hugging_face`.
    init_from: The folder that the model comes from; None if from nowhere.
    data: What the run does with the tokenizer; None for an import, which takes
      the one that comes with the model.

  Raises:
    FileNotFoundError: There is no tokenizer where `data` says.
    ValueError: A file of what it comes from is broken.
  """
  target = paths.of(folder)
  target.mkdir(parents=True, exist_ok=True)
  generation: dict[str, Any] = {}
  if init_from is not None:
    source = model_folders.hugging_face_files(init_from)
    if (source / CONFIG).exists():
      paths.copy_files([CONFIG], source, target)
    generation = model_folders.read_json(source / GENERATION_CONFIG) or {}
    if not generation and data is not None:
      # transformers generates by these where there is no such file.
      config = model_folders.read_json(source / CONFIG) or {}
      generation = {k: config.get(k) for k in _TOKEN_KEYS}
      generation = {k: v for k, v in generation.items() if v is not None}
    dtypes = dtypes_of(source)
    if model_folders.is_hugging_face(init_from):
      dtypes = stored_dtypes(source)
    if dtypes is not None:
      _write_json(target / _DTYPES, dtypes._asdict())
  if data is not None:
    names = ("bos_token", "eos_token", "chat_template")
    options = {name: getattr(data, name) for name in names}
    tokenizer = tokenizers.load(data.tokenizer, **options)
    generation = _with_tokens(generation, tokenizer)
    files = tokenizer_export.contents(
      data.tokenizer, add_bos=data.add_bos, **options
    )
  else:
    path = init_from and model_folders.tokenizer(init_from)
    files = tokenizer_export.contents(path) if path else {}
  for name, content in files.items():
    (target / name).parent.mkdir(parents=True, exist_ok=True)
    (target / name).write_bytes(content)
  if generation:
    _write_json(target / GENERATION_CONFIG, generation)


def write(folder: epath.PathLike, kept: epath.PathLike) -> None:
  """Writes all but the weights and config.json to an export's folder.

  Args:
    folder: The export's.
    kept: What `keep` has filled, or a folder that is not there.
  """
  root = paths.of(kept)
  files = paths.files_below(kept) if root.exists() else []
  names = [str(paths.of(file).relative_to(root)) for file in files]
  names = [name for name in names if name not in (CONFIG, _DTYPES)]
  paths.copy_files(names, kept, folder)


def dtypes_of(kept: epath.PathLike) -> Dtypes | None:
  """Dtypes of the checkpoint that a model came from; None if from none."""
  values = model_folders.read_json(paths.of(kept) / _DTYPES)
  return None if values is None else Dtypes(**values)


def stored_dtypes(folder: epath.PathLike) -> Dtypes:
  """Dtypes of the tensors in a Hugging Face folder.

  Raises:
    ValueError: It has no weights that can be read.
  """
  names = {name: dtype.name for name, dtype in weights.dtypes(folder).items()}
  if not names:
    raise ValueError(
      f"None of the tensors in {paths.of(folder)} is of float32, float16 or "
      "bfloat16; if the model is quantized, dequantize it with the tool that "
      "made it."
    )
  ((usual, _),) = collections.Counter(names.values()).most_common(1)
  return Dtypes(usual, {n: d for n, d in names.items() if d != usual})


def config_of(
  kept: epath.PathLike, values: dict[str, Any], *, dtype: str
) -> dict[str, Any]:
  """Content of an export's config.json.

  That of the model it came from, or for a model from nowhere what the first
  family that computes it would say.

  Args:
    kept: What `keep` has filled, or a folder that is not there.
    values: Of our own config.json.
    dtype: Name of the dtype of most weights.

  Raises:
    ValueError: No family computes it.
  """
  written = model_folders.read_json(paths.of(kept) / CONFIG)
  if written is not None:
    keys = [key for key in _DTYPE_KEYS if key in written] or _DTYPE_KEYS[:1]
    return written | dict.fromkeys(keys, dtype)
  config = config_values.build(decoder.DecoderConfig, values["model"], "model.")
  longest = values.get("data", {}).get("max_length")
  written = families.to_hf(config)
  written.setdefault(
    "max_position_embeddings", longest or values["batch"]["row_length"]
  )
  tokens = model_folders.read_json(paths.of(kept) / GENERATION_CONFIG) or {}
  return written | {_DTYPE_KEYS[0]: dtype} | tokens


def _with_tokens(generation, tokenizer):
  """Generation ends at the token that the run's answers end with."""
  ends = generation.get("eos_token_id")
  ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
  if tokenizer.eos_id not in ends:
    ends = [tokenizer.eos_id, *ends]
  tokens = {"eos_token_id": ends[0] if len(ends) == 1 else ends}
  if tokenizer.bos_id is not None:
    generation = {"bos_token_id": tokenizer.bos_id} | generation
  return generation | tokens


def _write_json(file, values):
  file.write_text(json.dumps(values, indent=2) + "\n")
