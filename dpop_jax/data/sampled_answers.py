"""Pairs from sampled answers to questions whose answer can be checked.

Of the answers to one prompt, each right one may be paired with each wrong one;
what is right is up to a checker. This is how most preference data for maths is
made today; the answers differ from their first words on, unlike those of
`maths`.
"""

import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from dpop_jax.data import checkers, pair_lists, pair_tasks
from dpop_jax.data.pair_tasks import Task, Unusable
from dpop_jax.data.preferences import Message

# Why a question gives no pair, or an answer is left out.
ALL_RIGHT = "all_answers_right"
ALL_WRONG = "all_answers_wrong"
NO_ANSWER = "answer_without_a_result"
TOO_LONG = "answer_too_long"
REPEATED = "answer_repeated"

RANDOM, CLOSEST = "random", "closest_length"
SKIP, WRONG = "skip", "wrong"
_PAIRING = 2  # The stream of randomness.


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampledConfig:
  """How sampled answers are checked and paired.

  Attributes:
    checker: A key of `checkers.CHECKERS`.
    max_pairs: Most pairs of one prompt. Pairs are drawn so that answers are
      used about equally often.
    pairing: "random", or "closest_length" to take the pairs first whose answers
      are of similar length, so that length tells nothing.
    no_result: What an answer is that comes to no result, such as one that was
      cut off: "skip" leaves it out, "wrong" counts it as wrong.
    max_characters: Longer answers are left out; None for all.
  """

  checker: str
  max_pairs: int = 4
  pairing: str = RANDOM
  no_result: str = SKIP
  max_characters: int | None = None

  def __post_init__(self):
    for name, choices in (
      ("checker", tuple(checkers.CHECKERS)),
      ("pairing", (RANDOM, CLOSEST)),
      ("no_result", (SKIP, WRONG)),
    ):
      if getattr(self, name) not in choices:
        raise ValueError(
          f"{name} must be one of {', '.join(choices)}, got "
          f"{getattr(self, name)!r}."
        )
    for name in ("max_pairs", "max_characters"):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}.")


class _Question(NamedTuple):
  """The answers to one prompt, with the place of its first row."""

  place: str
  prompt: str | list[Message]
  expected: str
  answers: list[str]


def read_tasks(
  rows: Iterable[tuple[str, Any, str]],
  config: SampledConfig,
  account: pair_lists.Account,
  *,
  seed: int,
) -> list[Task]:
  """A task for each prompt that has right and wrong answers, by its id.

  Args:
    rows: As for `pair_builder.read_tasks`. A row has "prompt" (text or
      messages), "expected" (a right answer, in words or as its result) and
      "answer", one text, or "answers", a list of them. Rows of one prompt need
      not stand together.
    config: How to check and pair.
    account: Told of what gives no pair.
    seed: Decides which pairs.

  Raises:
    ValueError: Something gives no pair and the account refuses it.
  """
  questions: dict[str, _Question] = {}
  for place, value, problem in rows:
    try:
      if problem:
        raise Unusable("unreadable", f"it is not JSON ({problem})")
      _add(questions, place, value, config)
    except Unusable as error:
      account.skip(error.reason, f"{place} cannot be used: {error}.")
  tasks = []
  for question in questions.values():
    try:
      tasks.append(_task_of(question, config, account, seed))
    except Unusable as error:
      # Not the row's mistake, so it is no reason to stop.
      account.note(error.reason, f"{question.place} gives no pair: {error}.")
  return sorted(tasks, key=lambda task: task.row_id)


def _add(questions, place, row, config):
  if not isinstance(row, Mapping):
    raise Unusable(pair_tasks.BAD_ROW, f"it should be an object, got {row!r}")
  prompt, expected = row.get("prompt"), row.get("expected")
  if not prompt or not isinstance(prompt, str | list):
    raise Unusable(
      pair_tasks.BAD_ROW, f"`prompt` should be text or messages, got {prompt!r}"
    )
  if isinstance(expected, int | float) and not isinstance(expected, bool):
    expected = str(expected)
  if not isinstance(expected, str) or not expected.strip():
    raise Unusable(
      pair_tasks.BAD_ROW,
      f"`expected` should be the right answer, got {expected!r}",
    )
  answers = row.get("answers", [row.get("answer")])
  if not isinstance(answers, list) or not all(
    isinstance(answer, str) for answer in answers
  ):
    raise Unusable(
      pair_tasks.BAD_ROW, "it should have a text `answer` or a list `answers`"
    )
  result = checkers.expected(config.checker, expected)
  key = json.dumps(prompt, sort_keys=True, ensure_ascii=False)
  question = questions.setdefault(key, _Question(place, prompt, result, []))
  if question.expected != result:
    raise Unusable(
      pair_tasks.BAD_ROW,
      f"its prompt is that of {question.place}, which expects "
      f"{question.expected!r} instead of {result!r}",
    )
  question.answers.extend(answers)


def _task_of(question, config, account, seed):
  text = question.prompt
  if not isinstance(text, str):
    text = json.dumps(text, sort_keys=True, ensure_ascii=False)
  right, wrong = [], []
  for answer in sorted(set(question.answers)):
    result = checkers.CHECKERS[config.checker](answer)
    if not answer.strip() or (result is None and config.no_result == SKIP):
      account.note(NO_ANSWER, f"{question.place}: {answer!r:.60} says nothing.")
    elif config.max_characters and len(answer) > config.max_characters:
      account.note(TOO_LONG, f"{question.place} has a longer answer.")
    elif result == question.expected:
      right.append(answer)
    else:
      wrong.append(answer)
  num_repeated = len(question.answers) - len(set(question.answers))
  for _ in range(num_repeated):
    account.note(REPEATED, f"{question.place} has equal answers.")
  if not right or not wrong:
    raise Unusable(
      ALL_RIGHT if right else ALL_WRONG,
      "it has no wrong answer" if right else "it has no right answer",
    )
  row_id = pair_tasks.id_of(text)
  rng = np.random.default_rng([seed, row_id, _PAIRING])
  pairs = itertools.islice(_pairs(right, wrong, config, rng), config.max_pairs)
  return Task(row_id, text, right[0], tuple(pairs), (), text, question.prompt)


def _pairs(right, wrong, config, rng) -> Iterator[tuple[str, str]]:
  """Pairs in the order in which they are taken, no answer twice before all."""
  order = [(r, w) for r in range(len(right)) for w in range(len(wrong))]
  order = [order[i] for i in rng.permutation(len(order))]
  if config.pairing == CLOSEST:
    order.sort(key=lambda pair: abs(len(right[pair[0]]) - len(wrong[pair[1]])))
  uses_right, uses_wrong = [0] * len(right), [0] * len(wrong)
  for _ in range(len(order)):
    # The first of those whose answers were used least; the sort is stable.
    r, w = min(order, key=lambda p: uses_right[p[0]] + uses_wrong[p[1]])
    order.remove((r, w))
    uses_right[r] += 1
    uses_wrong[w] += 1
    yield right[r], wrong[w]
