"""Tokenizers of Hugging Face folders."""

import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from dpop_jax.data import tokenizers

# The usual names, for a tokenizer.json with nothing beside it that names them.
_EOS_TOKENS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")
_BOS_TOKENS = ("<s>", "<|begin_of_text|>", "<bos>")


class HuggingFaceTokenizer(tokenizers.Tokenizer):
  """A fast tokenizer of `transformers`."""

  def __init__(
    self,
    path: str,
    *,
    bos_token: str | None,
    eos_token: str | None,
    chat_template: str | None,
  ):
    self.name = path
    self._tokenizer: Any = _load_hugging_face(path)
    vocabulary = self._tokenizer.get_vocab()
    special = self._tokenizer.get_added_vocab()
    eos_token = (
      eos_token
      or self._tokenizer.eos_token
      or next((token for token in _EOS_TOKENS if token in special), None)
    )
    self._set_eos(eos_token, vocabulary.get)
    is_bos_given = bos_token is not None
    bos_token = (
      bos_token
      or self._tokenizer.bos_token
      or next((token for token in _BOS_TOKENS if token in special), None)
    )
    self._set_bos(bos_token, vocabulary.get)
    # So that text and templates know them as special as well.
    self._tokenizer.eos_token = self.eos_token
    if self.bos_id is not None:
      self._tokenizer.bos_token = self.bos_token
    self.vocab_size = max(vocabulary.values()) + 1
    beginning = self._tokenizer("a")["input_ids"][:1]
    self.adds_bos = is_bos_given or beginning == [self.bos_id]
    self.chat_template = chat_template or _own_template(self._tokenizer)

  def encode_all(self, texts: Sequence[str]) -> list[tokenizers.Ids]:
    if not texts:
      return []
    return self._tokenizer(
      list(texts),
      add_special_tokens=False,
      return_attention_mask=False,
      return_token_type_ids=False,
      verbose=False,
    )["input_ids"]

  def decode(self, ids: Sequence[int]) -> str:
    return self._tokenizer.decode(
      [int(i) for i in ids],
      skip_special_tokens=False,
      clean_up_tokenization_spaces=False,
    )

  def _unknown_id(self):
    return self._tokenizer.unk_token_id


def _load_hugging_face(path):
  # Else it says at every start that PyTorch, which nobody needs, is missing.
  os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
  import transformers

  root = pathlib.Path(path)
  try:
    if root.is_dir() and (root / "tokenizer_config.json").is_file():
      return transformers.AutoTokenizer.from_pretrained(
        path, local_files_only=True
      )
    file = root / "tokenizer.json" if root.is_dir() else root
    special = {}
    if root.is_dir() and (root / "special_tokens_map.json").is_file():
      text = (root / "special_tokens_map.json").read_text(encoding="utf-8")
      special = json.loads(text)
    return transformers.PreTrainedTokenizerFast(
      tokenizer_file=str(file), **_token_texts(special)
    )
  # A broken tokenizer.json is a bare Exception of the Rust library.
  except Exception as error:
    raise ValueError(
      f"data.tokenizer {path} cannot be read: {' '.join(str(error).split())}"
    ) from error


def _token_texts(special: dict[str, Any]) -> dict[str, str]:
  texts = {
    key: token["content"] if isinstance(token, dict) else token
    for key, token in special.items()
  }
  return {k: texts[k] for k in ("bos_token", "eos_token") if texts.get(k)}


def _own_template(tokenizer):
  try:
    return tokenizer.get_chat_template()
  # No template, or several of which none is the default.
  except ValueError:
    return None
