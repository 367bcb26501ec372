"""Tokenizers of Hugging Face folders."""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

from dpop_jax.data import tokenizer_folders, tokenizers

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
    settings = tokenizer_folders.read(pathlib.Path(path))
    self._tokenizer: Any = _load_hugging_face(path, settings)
    vocabulary = self._tokenizer.get_vocab()
    for token in settings.added_tokens:
      index = vocabulary.get(token.text, token.index)
      if index != token.index:
        raise ValueError(
          f"data.tokenizer {path} says that {token.text!r} has the id "
          f"{token.index}, but it is loaded as {index}; make its files agree."
        )
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
    self.text_vocab_size = 1 + max(
      (i for token, i in vocabulary.items() if token not in special), default=-1
    )
    beginning = self._tokenizer("a")["input_ids"][:1]
    self.adds_bos = is_bos_given or beginning == [self.bos_id]
    self.chat_template = chat_template or settings.chat_template
    self.num_templates = settings.num_templates
    self.special_tokens = dict(self._tokenizer.special_tokens_map)

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


def _load_hugging_face(path, settings):
  # Else it says at every start that PyTorch, which nobody needs, is missing.
  os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
  import transformers

  root = pathlib.Path(path)
  try:
    if root.is_dir() and not (
      (root / "tokenizer.json").is_file()
      and not (root / "tokenizer_config.json").is_file()
    ):
      return transformers.AutoTokenizer.from_pretrained(
        path,
        local_files_only=True,
        # Else it asks whoever sits at the terminal.
        trust_remote_code=False,
      )
    file = root / "tokenizer.json" if root.is_dir() else root
    tokens = {key: text for key, text in settings.tokens.items() if text}
    return transformers.PreTrainedTokenizerFast(
      tokenizer_file=str(file), **tokens
    )
  # A broken tokenizer.json is a bare Exception of the Rust library.
  except Exception as error:
    raise ValueError(
      f"data.tokenizer {path} cannot be read: {' '.join(str(error).split())}"
    ) from error
