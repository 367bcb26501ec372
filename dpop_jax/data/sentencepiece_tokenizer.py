"""Tokenizers of SentencePiece files."""

import pathlib
import re
from collections.abc import Sequence

from dpop_jax.data import tokenizers


class SentencePieceTokenizer(tokenizers.Tokenizer):
  """A SentencePiece model; sequences begin with BOS if the model has one."""

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
        f"data.tokenizer {file} is not a SentencePiece model."
      ) from error
    model = self._model
    self.vocab_size = model.vocab_size()

    def find(piece):
      index = model.piece_to_id(piece)
      return index if model.id_to_piece(index) == piece else None

    def piece(index):
      return model.id_to_piece(index) if index >= 0 else None

    self._set_eos(eos_token or piece(model.eos_id()), find)
    self._set_bos(bos_token or piece(model.bos_id()), find)
    self.adds_bos = self.bos_id is not None
    self.chat_template = chat_template
    self._special = {
      model.id_to_piece(i): i
      for i in range(self.vocab_size)
      if model.is_control(i)
    }
    self._special[self.eos_token] = self.eos_id
    if self.bos_id is not None:
      self._special[self.bos_token] = self.bos_id
    self._special_pattern = re.compile(
      "(" + "|".join(map(re.escape, self._special)) + ")"
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
    for part in self._special_pattern.split(text):
      if part in self._special:
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
