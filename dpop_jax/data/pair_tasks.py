"""What a row of a data set gives: a question and answers to it, or a reason."""

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from dpop_jax.data.preferences import Message

BAD_ROW = "bad_row"


class Unusable(ValueError):
  """Why a row, or an answer of it, gives no pair.

  Attributes:
    reason: A few words under which such rows are counted.
  """

  def __init__(self, reason: str, detail: str):
    super().__init__(detail)
    self.reason = reason


class Task(NamedTuple):
  """A question with its pairs, and what it shows as a shot.

  Attributes:
    row_id: The same for the same row, wherever it stands; see `id_of`.
    question: What is asked.
    answer: What it shows as a shot.
    pairs: A chosen and a rejected answer each; all of one prompt.
    problems: Why there are fewer pairs than there might be.
    group: Rows of one group are never shots of each other, nor split between
      training and evaluation.
    prompt: The prompt, if the answers were made for it; None to make it of the
      question and shots.
  """

  row_id: int
  question: str
  answer: str
  pairs: tuple[tuple[str, str], ...]
  problems: tuple[Unusable, ...]
  group: str
  prompt: str | list[Message] | None = None


def id_of(*texts: str) -> int:
  """An integer of 64 bits for the texts that a row consists of.

  It depends on nothing else: not on the file, its format or the row's place.
  """
  digest = hashlib.sha256()
  for text in texts:
    content = text.encode("utf-8", "surrogatepass")
    digest.update(len(content).to_bytes(8, "little") + content)
  return int.from_bytes(digest.digest()[:8], "little")


def normalised(question: str) -> str:
  """Equal for questions that differ in case and spaces at most."""
  return " ".join(question.split()).casefold()


def required_text(row: Mapping[str, Any], *keys: str) -> str:
  """The text under the first of `keys` that the row has.

  Raises:
    Unusable: There is none, or it is empty or no text.
  """
  key = next((key for key in keys if row.get(key) is not None), None)
  if key is None:
    names = " or ".join(f"`{key}`" for key in keys)
    raise Unusable(
      BAD_ROW,
      f"it should have {names}, and has "
      f"{', '.join(map(str, row)) or 'nothing'}",
    )
  text = row[key]
  if not isinstance(text, str) or not text.strip():
    raise Unusable(
      BAD_ROW, f"`{key}` should be a text that is not empty, got {text!r:.80}"
    )
  return text
