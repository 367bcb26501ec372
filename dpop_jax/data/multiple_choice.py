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

from dpop_jax.data import few_shot, pair_lists

# Why a row, or a wrong choice, gives no pair.
BAD_ROW = "bad_row"
SAME_AS_ANSWER = "wrong_choice_same_as_answer"


class Question(NamedTuple):
  """A question, the text of the right choice, and those of the wrong ones."""

  text: str
  answer: str
  wrong_choices: tuple[str, ...]


def parse_arc(row: Mapping[str, Any]) -> Question:
  """Reads a row of ARC.

  Args:
    row: "question"; "choices" with the lists "text" and "label", of any length
      from two on; "answerKey", one of the labels, which may be letters or
      digits.

  Raises:
    ValueError: Something is missing or does not fit together.
  """
  question, choices = row.get("question"), row.get("choices")
  if not isinstance(question, str) or not question.strip():
    raise ValueError(
      f"'question' must be a text that is not empty, got {question!r}."
    )
  if not isinstance(choices, Mapping):
    raise ValueError(
      f"'choices' must hold the lists 'text' and 'label', got {choices!r}."
    )
  texts, labels = choices.get("text"), choices.get("label")
  if (
    not isinstance(texts, list)
    or not isinstance(labels, list)
    or len(texts) != len(labels)
    or len(texts) < 2
  ):
    raise ValueError(
      "'choices' must hold two or more texts and as many labels, got "
      f"{texts!r} and {labels!r}."
    )
  if not all(isinstance(text, str) and text.strip() for text in texts):
    raise ValueError(f"Every choice must be a text, not empty, got {texts!r}.")
  # Digits may come as numbers.
  labels = [str(label) for label in labels]
  key = str(row.get("answerKey"))
  if labels.count(key) != 1:
    raise ValueError(
      f"'answerKey' must be one of the labels {labels}, each given once, got "
      f"{row.get('answerKey')!r}."
    )
  answer = labels.index(key)
  wrong_choices = [text for i, text in enumerate(texts) if i != answer]
  return Question(question, texts[answer], tuple(wrong_choices))


def build_arc_pairs(
  rows: Sequence[Mapping[str, Any]],
  *,
  num_shots: int,
  seed: int,
  unusable: pair_lists.Policy,
) -> pair_lists.PairList:
  """A pair for each wrong choice of each question, in the order of the file.

  Args:
    rows: Rows as `parse_arc` reads them. A row's id is its index.
    num_shots: Questions with their right answers in front of each question, the
      same for all pairs of a question.
    seed: Decides the shots.
    unusable: "skip" counts what gives no pair, "raise" refuses it.

  Raises:
    ValueError: A row or a choice gives no pair and `unusable` is "raise", or
      there are too few rows for `num_shots`.
  """
  built = pair_lists.PairList(unusable)
  questions: dict[int, Question] = {}
  for row_id, row in enumerate(rows):
    try:
      questions[row_id] = parse_arc(row)
    except ValueError as error:
      built.skip(BAD_ROW, f"Row {row_id} cannot be used: {error}")
  examples = [
    few_shot.Example(question.text, question.answer)
    for question in questions.values()
  ]
  for row_id, question in questions.items():
    shots = few_shot.sample_shots(
      examples, question.text, row_id=row_id, num_shots=num_shots, seed=seed
    )
    prompt = few_shot.render(shots, question.text)
    for wrong_choice in question.wrong_choices:
      if wrong_choice == question.answer:
        built.skip(
          SAME_AS_ANSWER,
          f"Row {row_id} has the wrong choice {wrong_choice!r}, which is also "
          "its right one.",
        )
        continue
      built.add(prompt=prompt, chosen=question.answer, rejected=wrong_choice)
  return built
