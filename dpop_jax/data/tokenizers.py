"""Tokenizers of Hugging Face folders and SentencePiece files, behind one face.

In both kinds the text of a special token stands for that token, so that prompts
which come with a chat layout already written out are read as meant.
"""

import abc
import functools
import pathlib
from collections.abc import Callable, Sequence

from dpop_jax.data import chat_templates

Ids = list[int]

# What a folder may hold that says how text becomes ids.
_FILES = (
  "added_tokens.json",
  "chat_template.jinja",
  "chat_template.json",
  "config.json",
  "merges.txt",
  "special_tokens_map.json",
  "tokenizer.json",
  "tokenizer.model",
  "tokenizer_config.json",
  "vocab.json",
  "vocab.txt",
)
# In front of an answer, to encode it as a continuation. The first is a private
# character, which no merge of a vocabulary knows.
_SENTINELS = ("\ue000", "\n", "=", "|", ";", "0", "a")


def files(path: str) -> tuple[pathlib.Path, ...]:
  """The files that decide what the tokenizer at `path` does, in a fixed order.

  Raises:
    FileNotFoundError: If `path` is no tokenizer.
  """
  root = pathlib.Path(path)
  if root.is_file():
    return (root,)
  found = tuple(root / name for name in _FILES if (root / name).is_file())
  if not {"tokenizer.json", "tokenizer_config.json", "tokenizer.model"} & {
    file.name for file in found
  }:
    raise FileNotFoundError(
      "data.tokenizer should be a Hugging Face folder with tokenizer.json, "
      "such a file, or a SentencePiece .model file on this machine; there is "
      f"none at {path!r}."
    )
  return found


def load(
  path: str,
  *,
  bos_token: str | None = None,
  eos_token: str | None = None,
  chat_template: str | None = None,
) -> "Tokenizer":
  """Loads a tokenizer from this machine; nothing is fetched.

  Args:
    path: A Hugging Face folder, a tokenizer.json, or a SentencePiece .model
      file.
    bos_token: Text of the token that begins a sequence, instead of its own.
    eos_token: Text of the token that ends a sequence, instead of its own.
    chat_template: A Jinja template, instead of the tokenizer's own: its text,
      the path of a file, or the name "chatml".

  Raises:
    FileNotFoundError: If there is no tokenizer at `path`.
    ValueError: If it cannot be read, a token is not in its vocabulary, or
      nothing says which token ends a sequence.
  """
  names = {file.name for file in files(path)}
  is_sentencepiece = path.endswith(".model") or (
    not names & {"tokenizer.json", "tokenizer_config.json"}
    and "tokenizer.model" in names
    and pathlib.Path(path).is_dir()
  )
  # Both import this module, for what they have in common.
  if is_sentencepiece:
    from dpop_jax.data import sentencepiece_tokenizer

    kind = sentencepiece_tokenizer.SentencePieceTokenizer
  else:
    from dpop_jax.data import hugging_face_tokenizer

    kind = hugging_face_tokenizer.HuggingFaceTokenizer
  return kind(
    path,
    bos_token=bos_token,
    eos_token=eos_token,
    chat_template=chat_templates.read(chat_template),
  )


class Tokenizer(abc.ABC):
  """Text to ids and back.

  Attributes:
    name: Where it was loaded from.
    vocab_size: One more than the largest id.
    bos_id: Begins a sequence; None if there is no such token.
    eos_id: Ends a sequence.
    bos_token: Text of `bos_id`, "" if None.
    eos_token: Text of `eos_id`.
    adds_bos: Whether sequences begin with BOS unless the user says otherwise.
    chat_template: Jinja text, or None.
  """

  name: str
  vocab_size: int
  bos_id: int | None
  eos_id: int
  bos_token: str
  eos_token: str
  adds_bos: bool
  chat_template: str | None

  @abc.abstractmethod
  def encode_all(self, texts: Sequence[str]) -> list[Ids]:
    """Ids of each text, no BOS or EOS added."""

  @abc.abstractmethod
  def decode(self, ids: Sequence[int]) -> str:
    """Text of ids, that of special tokens included."""

  def encode(self, text: str) -> Ids:
    """Ids of a text, no BOS or EOS added."""
    return self.encode_all([text])[0]

  def encode_continuations(self, texts: Sequence[str]) -> list[Ids]:
    """Ids of texts that go on where others end.

    Llama's tokenizers put a space before whatever they encode. Behind a
    sentinel they do not, and the sentinel's ids are cut off.

    Raises:
      ValueError: If every sentinel merges with the beginning of a text.
    """
    if not self._prepends_space:
      return self.encode_all(texts)
    results: dict[int, Ids] = {}
    missing = list(range(len(texts)))
    for sentinel, sentinel_ids in self._sentinels:
      length = len(sentinel_ids)
      encoded = self.encode_all([sentinel + texts[i] for i in missing])
      for i, ids in zip(missing, encoded, strict=True):
        if ids[:length] == sentinel_ids:
          results[i] = ids[length:]
      missing = [i for i in missing if i not in results]
      if not missing:
        return [results[i] for i in range(len(texts))]
    raise ValueError(
      f"The tokenizer {self.name} cannot encode {texts[missing[0]][:40]!r} as "
      "the continuation of a text."
    )

  def render(
    self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool
  ) -> str:
    """Text of a conversation by the chat template.

    Args:
      messages: With `role` and `content`.
      add_generation_prompt: Whether to go on to where an answer begins.

    Raises:
      ValueError: If there is no template, or it refuses the conversation.
    """
    if self.chat_template is None:
      raise ValueError(
        f"The tokenizer {self.name} has no chat template to write messages "
        'with; set data.chat_template to one, for example to "chatml".'
      )
    return chat_templates.render(
      self.chat_template,
      messages,
      add_generation_prompt=add_generation_prompt,
      bos_token=self.bos_token,
      eos_token=self.eos_token,
    )

  def _set_eos(self, token: str | None, find: Callable[[str], int | None]):
    """Sets `eos_token`, as given or found, and `eos_id`, as `find` finds it."""
    if token is None:
      raise ValueError(
        f"The tokenizer {self.name} does not say which token ends a sequence; "
        "set data.eos_token to the text of that token."
      )
    index = find(token)
    if index is None:
      raise ValueError(
        f"data.eos_token {token!r} is not in the vocabulary of {self.name}."
      )
    self.eos_token, self.eos_id = token, index

  def _set_bos(self, token: str | None, find: Callable[[str], int | None]):
    """Sets `bos_token` and `bos_id`; there may be none."""
    self.bos_token, self.bos_id = token or "", None
    if token is None:
      return
    self.bos_id = find(token)
    if self.bos_id is None:
      raise ValueError(
        f"data.bos_token {token!r} is not in the vocabulary of {self.name}."
      )

  @abc.abstractmethod
  def _unknown_id(self) -> int | None:
    """Id for what the vocabulary lacks."""

  @functools.cached_property
  def _sentinels(self):
    encoded = [(text, self.encode(text)) for text in _SENTINELS]
    # Two unknown characters in a row become one id, so a sentinel must be
    # known.
    return [(t, ids) for t, ids in encoded if self._unknown_id() not in ids]

  @functools.cached_property
  def _prepends_space(self):
    for sentinel, sentinel_ids in self._sentinels:
      for text in ("a", "1", "("):
        ids = self.encode(sentinel + text)
        length = len(sentinel_ids)
        if ids[:length] == sentinel_ids and ids[length:] != self.encode(text):
          return True
    return False
