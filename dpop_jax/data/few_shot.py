"""Few-shot prompts: solved examples of the same file in front of a question."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# The stream of randomness of the shots, apart from any other use of the seed.
_SHOTS = 1


class Example(NamedTuple):
  """A question and the answer shown when it serves as a shot."""

  question: str
  answer: str


def render(shots: Sequence[Example], question: str) -> str:
  """The prompt: solved shots with an empty line after each, then the question.

    Question: What is 2 + 2?
    Answer:
    4

    Question: What is 3 + 4?
    Answer:

  It ends with a line break, so that the answer begins with its own first letter
  and not with a space: tokenizers that set a space in front of a text and those
  that do not then both keep prompt and answer apart.
  """
  blocks = [
    f"Question: {shot.question}\nAnswer:\n{shot.answer}\n\n" for shot in shots
  ]
  return "".join([*blocks, f"Question: {question}\nAnswer:\n"])


def sample_shots(
  examples: Sequence[Example],
  question: str,
  *,
  row_id: int,
  num_shots: int,
  seed: int,
) -> list[Example]:
  """Shots for a question, drawn without replacement.

  They depend on the arguments alone, so rows may be built in any order.

  Args:
    examples: Where the shots come from.
    question: What is asked. Examples that ask the same, the row itself among
      them, would give the answer away and are never drawn.
    row_id: Which row this is; other rows get other shots.
    num_shots: How many.
    seed: Not negative.

  Raises:
    ValueError: There are fewer than `num_shots` other questions, or `num_shots`
      or `seed` is negative.
  """
  if num_shots < 0 or seed < 0:
    raise ValueError(
      "num_shots and seed must not be negative, got "
      f"num_shots={num_shots} and seed={seed}."
    )
  if num_shots == 0:
    return []
  rng = np.random.default_rng([seed, row_id, _SHOTS])
  # One spare for the row itself and some for repeats, which are rare; if they
  # do not suffice, all examples are gone through.
  for num_draws in (min(num_shots + 4, len(examples)), len(examples)):
    draws = rng.choice(len(examples), size=num_draws, replace=False)
    others = [
      examples[draw] for draw in draws if examples[draw].question != question
    ]
    if len(others) >= num_shots:
      return others[:num_shots]
  raise ValueError(
    f"num_shots={num_shots} needs as many examples with other questions, but "
    f"there are {len(others)}; ask for fewer shots or give a longer file."
  )
