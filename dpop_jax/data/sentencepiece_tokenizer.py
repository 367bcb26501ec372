"""Tokenizers of SentencePiece files."""

import pathlib
import re
from collections.abc import Sequence

from dpop_jax.data import tokenizer_folders, tokenizers


class SentencePieceTokenizer(tokenizers.Tokenizer):
  """A SentencePiece model, and tokens that a Hugging Face folder adds to it.

  Text between special tokens is encoded by SentencePiece. Sequences begin with
  BOS if there is one and the folder does not say otherwise.
  """

  def __init__(
    self,
    path: str,
    *,
    bos_token: str | None,
    eos_token: str | None,
    chat_template: str | None,
  ):
    import sentencepiece

    self.name = path
    file = pathlib.Path(path)
    file = file / "tokenizer.model" if file.is_dir() else file
    try:
      self._model = sentencepiece.SentencePieceProcessor(model_file=str(file))
    except (RuntimeError, OSError) as error:
      raise ValueError(
        f"data.tokenizer {file} is not a SentencePiece model; if it is one of "
        "tiktoken, as Llama 3's, give a folder with tokenizer.json."
      ) from error
    model = self._model
    self.text_vocab_size = model.vocab_size()
    settings = tokenizer_folders.read(pathlib.Path(path))
    added = {token.text: token for token in settings.added_tokens}
    self.vocab_size = max(
      model.vocab_size(), *(token.index + 1 for token in added.values()), 0
    )

    def find(piece):
      if piece in added:
        return added[piece].index
      index = model.piece_to_id(piece)
      return index if model.id_to_piece(index) == piece else None

    def piece(index):
      return model.id_to_piece(index) if index >= 0 else None

    tokens = settings.tokens
    self._set_eos(
      eos_token or tokens.get("eos_token") or piece(model.eos_id()), find
    )
    own_bos = tokens.get("bos_token", piece(model.bos_id()))
    self._set_bos(bos_token or own_bos, find)
    self.adds_bos = self.bos_id is not None and (
      bos_token is not None or settings.adds_bos is not False
    )
    self.chat_template = chat_template or settings.chat_template
    self.num_templates = settings.num_templates
    self.special_tokens = {key: text for key, text in tokens.items() if text}
    names = [self.eos_token, *self.special_tokens.values(), *added]
    names += [self.bos_token] if self.bos_token else []
    self._special = {
      model.id_to_piece(i): i
      for i in range(model.vocab_size())
      if model.is_control(i)
    }
    self._special |= {
      name: index for name in names if (index := find(name)) is not None
    }
    self._takes_space_before = {
      text for text, token in added.items() if token.takes_space_before
    }
    self._takes_space_behind = {
      text for text, token in added.items() if token.takes_space_behind
    }
    # Of two that begin alike, the longer one is meant.
    longest_first = sorted(self._special, key=len, reverse=True)
    self._special_pattern = re.compile(
      "(" + "|".join(map(re.escape, longest_first)) + ")"
    )

  def encode_all(self, texts: Sequence[str]) -> list[tokenizers.Ids]:
    plain = [i for i, t in enumerate(texts) if not self._holds_special(t)]
    encoded = iter(self._model.encode([texts[i] for i in plain]))
    is_plain = set(plain)
    return [
      next(encoded) if i in is_plain else self._encode_with_special(text)
      for i, text in enumerate(texts)
    ]

  def decode(self, ids: Sequence[int]) -> str:
    text, segment = "", []
    special = {index: token for token, index in self._special.items()}
    for index in map(int, ids):
      if index in special:
        text += self._decode_segment(segment, text) + special[index]
        segment = []
      else:
        segment.append(index)
    return text + self._decode_segment(segment, text)

  def _unknown_id(self):
    return self._model.unk_id()

  def _holds_special(self, text):
    return self._special_pattern.search(text) is not None

  def _encode_with_special(self, text):
    ids = []
    # Every other part is a special token.
    parts = self._special_pattern.split(text)
    for i in range(1, len(parts), 2):
      if parts[i] in self._takes_space_before:
        parts[i - 1] = parts[i - 1].rstrip()
      if parts[i] in self._takes_space_behind:
        parts[i + 1] = parts[i + 1].lstrip()
    for i, part in enumerate(parts):
      if i % 2:
        ids.append(self._special[part])
      elif part and ids in ([], [self.bos_id]):
        ids.extend(self._model.encode(part))
      elif part:
        ids.extend(self.encode_continuations([part])[0])
    return ids

  def _decode_segment(self, ids, before):
    if not ids:
      return ""
    if before in ("", self.bos_token):
      return self._model.decode(ids)
    # As the first of a text, a segment would lose a space it begins with.
    sentinel, sentinel_ids = self._sentinels[0]
    return self._model.decode(sentinel_ids + ids)[len(sentinel) :]
