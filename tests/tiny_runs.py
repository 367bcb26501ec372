"""Runs that take a second: files of a few rows, a tokenizer of 14 characters.

Not a test itself.
"""

import copy
import json
import pathlib

import jax

from dpop_jax import config as config_lib
from dpop_jax import sharding
from dpop_jax.hf import families, names, weights
from dpop_jax.models import decoder

# Ids in this order: `?` for unknown, `^` begins and `$` ends a sequence.
CHARACTERS = "?^$ abcdefghij"
PAIRS = [
  {"prompt": p, "chosen": f"{c}{c}", "rejected": f"{c}{r}"}
  for p in ("ab", "ba", "abc", "cab", "bb")
  for c, r in (("c", "d"), ("e", "f"), ("g", "h"), ("i", "j"))
]
# Everything but the paths.
SECTIONS = {
  "model": dict(
    vocab_size=16,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
  ),
  "data": dict(bos_token="^", eos_token="$", num_eval_pairs=4),
  "batch": dict(batch_size=4, row_length=32, rows_per_microbatch=4),
  "loss": dict(name="dpop", beta=0.3, dpop_lambda=50.0),
  "optimizer": dict(name="adamw", peak_learning_rate=1e-2, warmup_steps=2),
  "run": dict(num_steps=8, log_every_steps=2, eval_every_steps=4),
  "checkpoints": dict(save_every_steps=3),
  "mesh": dict(data=2, fsdp=2, tensor=2),
}


def write_rows(path: pathlib.Path, rows) -> str:
  """Writes JSON lines, and returns the path as text."""
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(path)


def write_tokenizer(path: pathlib.Path) -> str:
  """Writes a tokenizer with one id per character."""
  import tokenizers

  vocabulary = {character: i for i, character in enumerate(CHARACTERS)}
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(vocabulary, unk_token="?")
  )
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
  tokenizer.decoder = tokenizers.decoders.Fuse()
  tokenizer.save(str(path))
  return str(path)


def write_data(folder: pathlib.Path) -> dict[str, str]:
  """The paths of the `data` section, of files that are written here."""
  return {
    "train": write_rows(folder / "pairs.jsonl", PAIRS),
    "tokenizer": write_tokenizer(folder / "tokenizer.json"),
  }


def make_sections(data: dict[str, str], **changes) -> dict:
  """The sections above with the data's paths and changed keys, by `a__b`."""
  sections = copy.deepcopy(SECTIONS)
  sections["data"] |= data
  for name, value in changes.items():
    section, key = name.split("__")
    sections.setdefault(section, {})[key] = value
  if "loss__name" in changes:
    options = ("beta", "dpop_lambda")
    used = config_lib.LOSSES[changes["loss__name"]].options
    for option in options:
      if option not in used:
        del sections["loss"][option]
  return sections


def make_config(data: dict[str, str], **changes) -> config_lib.Config:
  """A config of these sections."""
  return config_lib.from_dict(make_sections(data, **changes))


def write_model(folder: pathlib.Path, seed: int = 0, **changes) -> str:
  """Writes a Hugging Face folder of a fresh model with the tokenizer above."""
  config = decoder.DecoderConfig(
    **SECTIONS["model"] | {"initializer_range": 0.3} | changes
  )
  mesh = sharding.make_mesh(sharding.MeshConfig())
  params = decoder.make_params(jax.random.key(seed), config, mesh)
  folder.mkdir()
  hf_config = families.to_hf(config) | {"max_position_embeddings": 64}
  (folder / "config.json").write_text(json.dumps(hf_config))
  weights.save(
    params,
    names.parts(config, families.from_hf(hf_config)[0]),
    folder,
    dtype=config.param_dtype,
  )
  write_tokenizer(folder / "tokenizer.json")
  tokens = {
    "bos_token": "^",
    "eos_token": "$",
    "tokenizer_class": "PreTrainedTokenizerFast",
  }
  (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
  return str(folder)
