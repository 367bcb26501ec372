"""Writes down the tokenizer of a run as the files of a Hugging Face folder."""

import json
from typing import Any

from dpop_jax.data import tokenization, tokenizers

# What distinguishes tokenizers: spaces, seams, scripts, and special tokens.
_PROBES = (
  "Once upon a time, there was a little girl.",
  "  two  spaces, a\ttab\n\n and lines \r\n",
  "def f(x):\n    return x**2 + 12345.678",
  "Süße Grüße ☃ ▁ 你好 مرحبا 👋🏽 e\u0301",
  "{bos}a{eos}\n{bos} b {eos}c",
  "<|im_start|>user\nHi<|im_end|>\n[INST] Hi [/INST]",
)


def contents(
  path: str,
  *,
  bos_token: str | None = None,
  eos_token: str | None = None,
  add_bos: bool | None = None,
  chat_template: str | None = None,
) -> dict[str, bytes]:
  """Files that hold the tokenizer of a run, so that nothing need be set again.

  They are those of `tokenizers.export_files`, changed where the config was.

  Args:
    path: `data.tokenizer`.
    bos_token: `data.bos_token`.
    eos_token: `data.eos_token`.
    add_bos: `data.add_bos`.
    chat_template: `data.chat_template`.

  Returns:
    What belongs into each file, by its name in the folder.

  Raises:
    FileNotFoundError: If there is no tokenizer at `path`.
    ValueError: If it cannot be read, or lacks a token.
  """
  tokenizer = tokenizers.load(
    path,
    bos_token=bos_token,
    eos_token=eos_token,
    chat_template=chat_template,
  )
  files = tokenizers.export_files(path)
  written = {name: file.read_bytes() for name, file in files.items()}
  is_new = "tokenizer_config.json" not in written
  has_json = "tokenizer.json" in written
  tokens = {}
  if eos_token is not None or is_new:
    tokens["eos_token"] = tokenizer.eos_token
  if tokenizer.bos_token and (bos_token is not None or is_new):
    tokens["bos_token"] = tokenizer.bos_token
  changes: dict[str, Any] = dict(tokens)
  if is_new:
    changes = tokenizer.special_tokens | changes
    if has_json:
      # Else the model's type decides what is made of tokenizer.json.
      changes["tokenizer_class"] = "PreTrainedTokenizerFast"
  is_bos_set = bos_token is not None or add_bos is not None
  if is_bos_set or (is_new and not has_json):
    begins = tokenization.uses_bos(tokenizer, add_bos)
    changes["add_bos_token"] = begins
    if has_json:
      _change(
        written, "tokenizer.json", post_processor=_beginning(tokenizer, begins)
      )
  if tokens and "special_tokens_map.json" in written:
    _change(written, "special_tokens_map.json", **tokens)
  if chat_template is not None:
    # It goes into chat_template.jinja, and nowhere else may be another.
    written.pop("chat_template.json", None)
    changes["chat_template"] = None
  if changes:
    _change(written, "tokenizer_config.json", **changes)
  config = json.loads(written.get("tokenizer_config.json", b"{}"))
  is_template_said = "chat_template.jinja" in written or (
    config.get("chat_template") is not None
  )
  if chat_template is not None or not is_template_said:
    template = tokenizer.chat_template
    if template is not None:
      written["chat_template.jinja"] = template.encode()
  return written


def check(folder: str, tokenizer: tokenizers.Tokenizer) -> None:
  """Checks that the tokenizer in a folder is this one.

  What `transformers` makes of a tokenizer.json depends on the type of model in
  the config.json beside it, so a copy may turn out to be another tokenizer.

  Args:
    folder: With the files of `contents` and a config.json.
    tokenizer: What they should amount to.

  Raises:
    ValueError: If it is another one.
  """
  copy = tokenizers.load(folder)
  for name in ("eos_id", "bos_id", "chat_template"):
    if getattr(copy, name) != getattr(tokenizer, name):
      raise ValueError(
        f"The tokenizer in {folder} has the {name} {getattr(copy, name)!r}, "
        f"but {tokenizer.name} has {getattr(tokenizer, name)!r}."
      )
  for probe in _PROBES:
    text = probe.replace("{eos}", tokenizer.eos_token)
    text = text.replace("{bos}", tokenizer.bos_token)
    if copy.encode(text) != tokenizer.encode(text):
      raise ValueError(
        f"The tokenizer in {folder} gives other ids than {tokenizer.name} does "
        f"for {text!r}, because `transformers` reads it by the type of the "
        "model; take a tokenizer that was made for this type."
      )


def _change(written, name, **changes):
  """Sets keys of a JSON file; None takes a key away."""
  values = json.loads(written.get(name, b"{}")) | changes
  for key, value in changes.items():
    # What is null in the file itself has a meaning.
    if value is None:
      del values[key]
  written[name] = json.dumps(values, indent=2, ensure_ascii=False).encode()


def _beginning(tokenizer, begins_with_bos):
  """A post-processor, in the terms of tokenizer.json, that adds BOS or not."""
  sequences = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
  token = tokenizer.bos_token
  bos = [{"SpecialToken": {"id": token, "type_id": 0}}] * begins_with_bos
  ids = {"id": token, "ids": [tokenizer.bos_id], "tokens": [token]}
  return {
    "type": "TemplateProcessing",
    "single": [*bos, sequences[0]],
    "pair": [*bos, *sequences],
    "special_tokens": {token: ids} if begins_with_bos else {},
  }
