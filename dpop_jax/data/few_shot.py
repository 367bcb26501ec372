"""Few-shot prompts: solved examples before a question, plain or as chat."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from dpop_jax.data.preferences import Message

# The stream of randomness of the shots, apart from any other use of the seed.
_SHOTS = 1

PER_ROW, FIXED = "per_row", "fixed"


class Example(NamedTuple):
  """A question and the answer shown when it serves as a shot.

  Attributes:
    row_id: Of the row it comes from.
    question: What is asked.
    answer: The right answer.
    group: Of no row of the same group it is a shot.
  """

  row_id: int
  question: str
  answer: str
  group: str


class Wording(NamedTuple):
  """What stands in front of a question, and between it and its answer."""

  before: str
  between: str


# It ends with a line break, so that the answer begins with its own first letter
# and not with a space: tokenizers that set a space in front of a text and those
# that do not then both keep prompt and answer apart.
QUESTION = Wording("Question: ", "\nAnswer:\n")
# The answer continues the text, and brings its own space.
CONTINUATION = Wording("", "")


def render(
  shots: Sequence[Example], question: str, wording: Wording = QUESTION
) -> str:
  """The prompt: solved shots with an empty line after each, then the question.

  Question: What is 2 + 2?
  Answer:
  4

  Question: What is 3 + 4?
  Answer:
  """
  before, between = wording
  blocks = [f"{before}{s.question}{between}{s.answer}\n\n" for s in shots]
  return "".join([*blocks, f"{before}{question}{between}"])


def render_chat(shots: Sequence[Example], question: str) -> list[Message]:
  """The prompt as messages: each shot a turn of the user and an answer."""
  messages = []
  for shot in shots:
    messages += [message("user", shot.question)]
    messages += [message("assistant", shot.answer.strip())]
  return [*messages, message("user", question)]


def message(role: str, content: str) -> Message:
  return {"role": role, "content": content}


class Shots:
  """Draws shots for rows from a set of examples.

  What a row gets depends on the set, the seed and the row: neither on the order
  of the examples nor on that of the rows.
  """

  def __init__(
    self,
    examples: Iterable[Example],
    *,
    num_shots: int,
    sampling: str = PER_ROW,
    seed: int,
  ):
    """Of examples that ask the same, one is kept.

    Args:
      examples: Where the shots come from.
      num_shots: Shots of each row.
      sampling: `PER_ROW` draws others for each row; `FIXED` gives all rows the
        same ones, save that a row never gets its own group's.
      seed: Not negative.

    Raises:
      ValueError: `num_shots` or `seed` is negative, or `sampling` unknown.
    """
    if num_shots < 0 or seed < 0:
      raise ValueError(
        "num_shots and seed must not be negative, got "
        f"num_shots={num_shots} and seed={seed}."
      )
    if sampling not in (PER_ROW, FIXED):
      raise ValueError(
        f"shots must be one of {PER_ROW}, {FIXED}, got {sampling!r}."
      )
    self._num_shots, self._sampling, self._seed = num_shots, sampling, seed
    in_order = sorted(examples) if num_shots else []
    unique = {example.question: example for example in in_order}
    self._examples = list(unique.values())

  def of(self, row_id: int, group: str) -> list[Example]:
    """The shots of a row, drawn without replacement.

    Raises:
      ValueError: There are too few examples of other groups.
    """
    if not self._num_shots:
      return []
    stream = [self._seed, _SHOTS]
    if self._sampling == PER_ROW:
      stream = [self._seed, row_id, _SHOTS]
    rng = np.random.default_rng(stream)
    # Some spare ones for the row's own group; if they do not suffice, all
    # examples are gone through.
    count = len(self._examples)
    others = []
    for num_draws in (min(self._num_shots + 4, count), count):
      draws = rng.choice(count, size=num_draws, replace=False) if count else []
      drawn = [self._examples[draw] for draw in draws]
      others = [example for example in drawn if example.group != group]
      if len(others) >= self._num_shots:
        return others[: self._num_shots]
    raise ValueError(
      f"num_shots={self._num_shots} needs as many examples with other "
      f"questions, but there are {len(others)}; ask for fewer shots or give "
      "more rows to draw them from."
    )
