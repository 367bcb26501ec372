"""Prompts whose answers can be checked, for a model to answer.

The layouts are those of the builders, or a plain one:

  maths   GSM8K, MetaMathQA or MATH; the final answer is expected
  arc     the choices are listed in the prompt; the right one's label is
  plain   {"prompt": text or messages, "expected": "72"}
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from dpop_jax.data import (
  few_shot,
  final_answers,
  maths,
  multiple_choice,
  pair_builder,
  pair_lists,
  pair_sets,
  pair_tasks,
)
from dpop_jax.data.pair_tasks import Task
from dpop_jax.data.preferences import Message

KINDS = ("maths", "arc", "plain")


class Question(NamedTuple):
  """A prompt and the answer that is expected."""

  prompt: str | list[Message]
  expected: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuestionConfig:
  """Which questions, and how they are asked.

  Attributes:
    kind: One of `KINDS`.
    source: As `pair_sets.BuildConfig.source`.
    num_questions: Most questions, drawn by their own text; None for all.
    num_shots: Solved examples in front of each question, of the same source.
    shots: "per_row" or "fixed", see `few_shot.Shots`.
    format: "plain" text or "chat" messages.
    seed: Decides the shots.
  """

  kind: str
  source: str
  num_questions: int | None = None
  num_shots: int = 0
  shots: str = few_shot.PER_ROW
  format: str = pair_builder.PLAIN
  seed: int = 0

  def __post_init__(self):
    if self.kind not in KINDS:
      raise ValueError(
        f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}."
      )
    if self.num_questions is not None and self.num_questions < 1:
      raise ValueError(
        f"num_questions must be at least 1, got {self.num_questions}."
      )
    if self.kind == "plain" and (
      self.num_shots or self.format != pair_builder.PLAIN
    ):
      raise ValueError(
        "num_shots and format are of no use with kind='plain', whose prompts "
        "are taken as they are."
      )


class QuestionSet(NamedTuple):
  """Questions in a fixed order, and what they were made of.

  Attributes:
    questions: By the ids of their rows.
    description: For a manifest: options, source and what was left out.
  """

  questions: list[Question]
  description: dict[str, Any]


def load(config: QuestionConfig) -> QuestionSet:
  """Reads the questions.

  Raises:
    FileNotFoundError: There is no such source.
    ValueError: It cannot be used, or holds no question with a known answer.
  """
  source = pair_sets.read_source(config.source)
  account = pair_lists.Account("skip")
  make = {"maths": _maths_task, "arc": _arc_task, "plain": _plain_task}
  kind = pair_builder.Kind(make[config.kind], maths.question_of)
  tasks = pair_builder.read_tasks(
    source.places(), kind, account, seed=config.seed
  )
  if not tasks:
    raise ValueError(
      f"{config.source}: none of its {len(source.rows)} rows is a question of "
      f"the kind {config.kind!r} ({dict(account.skipped)}). "
      f"{account.first_example()}".rstrip()
    )
  shots = pair_builder.make_shots(
    tasks, num_shots=config.num_shots, sampling=config.shots, seed=config.seed
  )
  questions = []
  for task in tasks[: config.num_questions]:
    # The one "pair" is the expected answer.
    ((expected, _),) = task.pairs
    prompt = pair_builder.prompt_of(
      task, shots, wording=few_shot.QUESTION, format=config.format
    )
    questions.append(Question(prompt, expected))
  content = json.dumps(questions, ensure_ascii=False)
  options = dataclasses.asdict(config)
  del options["source"]
  return QuestionSet(
    questions,
    {
      "source": source.description,
      "questions": options,
      "num_questions": len(questions),
      "questions_sha256": hashlib.sha256(content.encode()).hexdigest(),
      "skipped": dict(account.skipped.most_common()),
    },
  )


def _maths_task(row: Mapping[str, Any], seed: int) -> Task:
  task = maths.make_task(row, seed)
  final = final_answers.find(task.answer)
  assert final is not None
  return task._replace(pairs=((final.text, ""),), problems=())


def _arc_task(row: Mapping[str, Any], seed: int) -> Task:
  del seed
  question = multiple_choice.parse_arc(row)
  choices = zip(question.labels, question.choices, strict=True)
  lines = [question.text, *(f"{label}. {text}" for label, text in choices)]
  text = "\n".join(lines)
  label = question.labels[question.answer]
  return Task(
    pair_tasks.id_of(text), text, label, ((label, ""),), (), question.text
  )


def _plain_task(row: Mapping[str, Any], seed: int) -> Task:
  del seed
  prompt, expected = row.get("prompt"), row.get("expected")
  if not prompt or not isinstance(prompt, str | list):
    raise pair_tasks.Unusable(
      pair_tasks.BAD_ROW, f"`prompt` should be text or messages, got {prompt!r}"
    )
  if expected is None or not str(expected).strip():
    raise pair_tasks.Unusable(
      pair_tasks.BAD_ROW, f"`expected` should be an answer, got {expected!r}"
    )
  text = str(prompt)
  return Task(
    pair_tasks.id_of(text), text, "", ((str(expected), ""),), (), text, prompt
  )
