"""Preference pairs from multiple-choice questions: one per wrong choice.

A question with the choices A to D, of which B is right, gives three pairs. They
share the prompt and the chosen answer, which are then computed once (see
`forests`). The choices are not listed in the prompt; the answer is the text of
the choice, not its label.

References:
  Clark et al., 2018, https://arxiv.org/abs/1803.05457 (ARC). The number of
  pairs is that of Pal et al., 2024, https://arxiv.org/abs/2402.13228v2: 3,357
  for the training part of ARC-Challenge. Their prompt's wording is not
  published.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dpop_jax.data import pair_builder, pair_lists, pair_tasks

# Why a wrong choice gives no pair.
SAME_AS_ANSWER = "wrong_choice_same_as_answer"


class Question(NamedTuple):
  """A question, the texts of its choices, their labels, and the right one's."""

  text: str
  choices: tuple[str, ...]
  labels: tuple[str, ...]
  answer: int


def parse_arc(row: Mapping[str, Any]) -> Question:
  """Reads a row of ARC.

  Args:
    row: "question"; "choices" with the lists "text" and "label", of any length
      from two on; "answerKey", one of the labels, which may be letters or
      digits.

  Raises:
    pair_tasks.Unusable: Something is missing or does not fit together.
  """
  question = pair_tasks.required_text(row, "question")
  choices = row.get("choices")
  if not isinstance(choices, Mapping):
    raise _bad(f"`choices` should hold the lists text and label: {choices!r}")
  texts, labels = (_as_list(choices.get(key)) for key in ("text", "label"))
  if not texts or not labels or len(texts) != len(labels) or len(texts) < 2:
    raise _bad(
      "`choices` should hold two or more texts and as many labels, got "
      f"{texts!r} and {labels!r}"
    )
  check_choices(texts)
  # Digits may come as numbers.
  labels = [str(label) for label in labels]
  key = str(row.get("answerKey"))
  if labels.count(key) != 1:
    raise _bad(
      f"`answerKey` should be one of the labels {labels}, each given once, got "
      f"{row.get('answerKey')!r}"
    )
  return Question(question, tuple(texts), tuple(labels), labels.index(key))


def make_arc_task(row: Mapping[str, Any], seed: int = 0) -> pair_tasks.Task:
  """A pair for each wrong choice of a row of ARC, in the order of the choices.

  Args:
    row: As `parse_arc` reads it.
    seed: Nothing here is random.

  Raises:
    pair_tasks.Unusable: As `parse_arc`.
  """
  del seed
  question = parse_arc(row)
  return task_of(question.text, question.choices, question.answer)


ARC = pair_builder.Kind(
  make_arc_task, lambda row: pair_tasks.required_text(row, "question")
)


def build_arc_pairs(
  rows: Sequence[Mapping[str, Any]],
  *,
  num_shots: int,
  seed: int,
  unusable: pair_lists.Policy,
) -> pair_lists.PairList:
  """As `pair_builder.build_list`, of rows that `parse_arc` reads."""
  return pair_builder.build_list(
    rows, ARC, num_shots=num_shots, seed=seed, unusable=unusable
  )


def task_of(
  question: str,
  choices: Sequence[str],
  answer: int,
  *,
  answers: Sequence[str] | None = None,
) -> pair_tasks.Task:
  """The right choice against each wrong one.

  Args:
    question: What is asked.
    choices: As the row has them.
    answer: Which of them is right.
    answers: The same as they follow the prompt; None for `choices`.
  """
  answers = choices if answers is None else answers
  pairs, problems = [], []
  for i, text in enumerate(answers):
    if i == answer:
      continue
    if text == answers[answer]:
      problems.append(
        pair_tasks.Unusable(
          SAME_AS_ANSWER,
          f"it has the wrong choice {text!r}, which is also its right one",
        )
      )
    else:
      pairs.append((answers[answer], text))
  return pair_tasks.Task(
    row_id=pair_tasks.id_of(question, *choices, str(answer)),
    question=question,
    answer=answers[answer],
    pairs=tuple(pairs),
    problems=tuple(problems),
    group=question,
  )


def check_choices(texts: Sequence[Any]) -> None:
  """Raises pair_tasks.Unusable unless all are texts that are not empty."""
  if not all(isinstance(text, str) and text.strip() for text in texts):
    raise _bad(f"every choice should be a text, not empty, got {list(texts)!r}")


def _as_list(value):
  """Of a column of a table, which may hold an array or, in CSV, text."""
  if isinstance(value, str) or value is None:
    return []
  try:
    return list(value)
  except TypeError:
    return []


def _bad(detail):
  return pair_tasks.Unusable(pair_tasks.BAD_ROW, detail)
