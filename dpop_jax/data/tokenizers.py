"""Tokenizers of Hugging Face folders and SentencePiece files, behind one face.

In both kinds the text of a special token stands for that token, so that prompts
which come with a chat layout already written out are read as meant.
"""

import abc
import functools
import pathlib
from collections.abc import Callable, Sequence

from dpop_jax import paths
from dpop_jax.data import chat_templates, kept_folders

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
_TEMPLATES = "additional_chat_templates"
# Of which there must be one.
_VOCABULARIES = {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"}
# In front of an answer, to encode it as a continuation. The first is a private
# character, which no merge of a vocabulary knows.
_SENTINELS = ("\ue000", "\n", "=", "|", ";", "0", "a")


def files(path: str) -> tuple[pathlib.Path, ...]:
  """The files that decide what the tokenizer at `path` does, in a fixed order.

  Raises:
    FileNotFoundError: If `path` is no tokenizer.
  """
  root = _on_this_machine(path)
  if root.is_file():
    return (root,)
  found = tuple(root / name for name in _FILES if (root / name).is_file())
  if not _VOCABULARIES & {file.name for file in found}:
    raise FileNotFoundError(
      "data.tokenizer should be a Hugging Face folder with tokenizer.json, "
      "such a file, or a SentencePiece .model file; there is none at "
      f"{path!r}."
    )
  return found


def export_files(path: str) -> dict[str, pathlib.Path]:
  """The files that a copy of the tokenizer at `path` needs.

  Args:
    path: As for `load`.

  Returns:
    Each file by the name that it has in a Hugging Face folder, so that of a
    file is tokenizer.model or tokenizer.json. A model's config.json is not
    among them.

  Raises:
    FileNotFoundError: If `path` is no tokenizer.
  """
  found = files(path)
  root = _on_this_machine(path)
  if root.is_file():
    is_sentencepiece = path.endswith(".model")
    return {"tokenizer.model" if is_sentencepiece else "tokenizer.json": root}
  templates = sorted((root / _TEMPLATES).glob("*.jinja"))
  return {
    file.relative_to(root).as_posix(): file
    for file in (*found, *templates)
    if file.name != "config.json"
  }


@functools.cache
def _copied(path: str) -> pathlib.Path:
  """Of a remote file or folder: that which is copied to this machine."""
  root = paths.of(path)
  if root.is_file():
    return kept_folders.copy_of([root.name], root.parent) / root.name
  prefix = f"{path.rstrip('/')}/"
  names = (file.removeprefix(prefix) for file in paths.files_below(path))
  wanted = (n for n in names if n in _FILES or n.startswith(_TEMPLATES))
  return kept_folders.copy_of(sorted(wanted), root)


def _on_this_machine(path: str) -> pathlib.Path:
  # Libraries of C read files of the system.
  return _copied(path) if paths.is_remote(path) else pathlib.Path(path)


def load(
  path: str,
  *,
  bos_token: str | None = None,
  eos_token: str | None = None,
  chat_template: str | None = None,
) -> "Tokenizer":
  """Loads a tokenizer; nothing is fetched from the hub.

  SentencePiece itself reads a tokenizer.model that has no tokenizer.json beside
  it, for what `transformers` makes of one gives other ids for many texts; the
  special tokens, BOS and the chat template are those of the folder's other
  files. `transformers` reads everything else.

  Args:
    path: A Hugging Face folder, a tokenizer.json, or a SentencePiece .model
      file; of what is in a bucket, a copy on this machine is used.
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
    "tokenizer.model" in names and "tokenizer.json" not in names
  )
  # Both import this module, for what they have in common.
  if is_sentencepiece:
    from dpop_jax.data import sentencepiece_tokenizer

    kind = sentencepiece_tokenizer.SentencePieceTokenizer
  else:
    from dpop_jax.data import hugging_face_tokenizer

    kind = hugging_face_tokenizer.HuggingFaceTokenizer
  tokenizer = kind(
    str(_on_this_machine(path)),
    bos_token=bos_token,
    eos_token=eos_token,
    chat_template=chat_templates.read(chat_template),
  )
  tokenizer.name = path
  return tokenizer


class Tokenizer(abc.ABC):
  """Text to ids and back.

  Attributes:
    name: Where it was loaded from.
    vocab_size: One more than the largest id.
    text_vocab_size: The same without tokens that were added to the vocabulary,
      which are of special use.
    bos_id: Begins a sequence; None if there is no such token.
    eos_id: Ends a sequence.
    bos_token: Text of `bos_id`, "" if None.
    eos_token: Text of `eos_id`.
    adds_bos: Whether sequences begin with BOS unless the user says otherwise.
    chat_template: Jinja text, or None.
    special_tokens: Text of special tokens for templates, by the names they have
      there.
    num_templates: How many templates it has of its own, none of which need be
      the default.
  """

  name: str
  vocab_size: int
  text_vocab_size: int
  bos_id: int | None
  eos_id: int
  bos_token: str
  eos_token: str
  adds_bos: bool
  chat_template: str | None
  special_tokens: dict[str, str] = {}
  num_templates: int = 0

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
    if self.chat_template is None and self.num_templates:
      raise ValueError(
        f"None of the chat templates of {self.name} is the default; write the "
        "one to use into a file and name that in data.chat_template."
      )
    if self.chat_template is None:
      raise ValueError(
        f"The tokenizer {self.name} has no chat template to write messages "
        'with; set data.chat_template to one, for example to "chatml".'
      )
    return chat_templates.render(
      self.chat_template,
      messages,
      add_generation_prompt=add_generation_prompt,
      special_tokens=self.special_tokens
      | {"bos_token": self.bos_token, "eos_token": self.eos_token},
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
