"""From rows to pairs: tasks, those held out, shots, and prompts.

What a row gives depends on the row, the seed and, for its shots, on the set of
rows that they are drawn from. Rows are sorted by their id, which is a hash of
their texts, so neither the order of a file nor how it is split matters.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from dpop_jax.data import few_shot, pair_lists, pair_tasks
from dpop_jax.data.pair_tasks import Task
from dpop_jax.data.preferences import Message

PLAIN, CHAT = "plain", "chat"
UNREADABLE = "unreadable"
IN_EVALUATION = "question_in_evaluation"


class Kind(NamedTuple):
  """How the rows of one layout are read.

  Attributes:
    make_task: A row and the seed to its task; raises `pair_tasks.Unusable`.
    question_of: A row to its question; raises `pair_tasks.Unusable`.
    wording: Of plain prompts.
  """

  make_task: Callable[[Mapping[str, Any], int], Task]
  question_of: Callable[[Mapping[str, Any]], str]
  wording: few_shot.Wording = few_shot.QUESTION


def read_tasks(
  rows: Iterable[tuple[str, Any, str]],
  kind: Kind,
  account: pair_lists.Account,
  *,
  seed: int,
) -> list[Task]:
  """The tasks of all usable rows, by their id.

  Args:
    rows: Of each its place for messages, its value, and why it could not be
      read, if it could not.
    kind: How to read them.
    account: Told of rows and answers that give no pair.
    seed: Decides what the rows leave open.

  Raises:
    ValueError: Something gives no pair and the account refuses it.
  """
  tasks = []
  for place, value, problem in rows:
    if problem:
      account.skip(UNREADABLE, f"{place} cannot be read: {problem}.")
      continue
    try:
      if not isinstance(value, Mapping):
        raise pair_tasks.Unusable(
          pair_tasks.BAD_ROW, f"it should be an object, got {value!r:.80}"
        )
      task = kind.make_task(value, seed)
    except pair_tasks.Unusable as error:
      account.skip(error.reason, f"{place} cannot be used: {error}.")
      continue
    for error in task.problems:
      account.skip(error.reason, f"{place}: {error}.")
    tasks.append(task)
  return sorted(tasks, key=lambda task: task.row_id)


def leave_out(
  tasks: Sequence[Task],
  questions: Iterable[str],
  account: pair_lists.Account,
) -> list[Task]:
  """The tasks that ask none of the questions, nor belong to one of them."""
  asked = set(map(pair_tasks.normalised, questions))
  kept = []
  for task in tasks:
    names = {
      pair_tasks.normalised(text) for text in (task.question, task.group)
    }
    if names & asked:
      account.note(
        IN_EVALUATION,
        f"The question {task.question!r:.80} is one of the evaluation rows.",
      )
    else:
      kept.append(task)
  return kept


def hold_out(
  tasks: Sequence[Task], num_rows: int, *, seed: int
) -> tuple[list[Task], list[Task]]:
  """Splits off evaluation rows; rows of one group are on the same side.

  Args:
    tasks: All of them.
    num_rows: Rows to hold out, of which there may be a few less.
    seed: Decides which groups, together with their own text.

  Returns:
    Tasks to train on, and tasks held out.

  Raises:
    ValueError: There would be nothing on one side.
  """
  if not num_rows:
    return list(tasks), []
  groups: dict[str, list[Task]] = {}
  for task in tasks:
    if task.pairs:
      groups.setdefault(pair_tasks.normalised(task.group), []).append(task)

  def draw(group):
    return hashlib.sha256(f"{seed} {group}".encode()).digest()

  held_out, room = set(), num_rows
  for group in sorted(groups, key=draw):
    if len(groups[group]) <= room:
      held_out.add(group)
      room -= len(groups[group])
    if not room:
      break
  if not held_out or len(held_out) == len(groups):
    raise ValueError(
      f"num_eval_rows={num_rows} leaves nothing to train on or nothing to hold "
      f"out: there are {sum(map(len, groups.values()))} rows of {len(groups)} "
      "questions, and rows of one question stay together."
    )
  sides = [], []
  for task in tasks:
    is_held_out = pair_tasks.normalised(task.group) in held_out
    sides[is_held_out].append(task)
  return sides


def make_shots(
  tasks: Iterable[Task], *, num_shots: int, sampling: str, seed: int
) -> few_shot.Shots:
  """Shots from the tasks, those without pairs included."""
  return few_shot.Shots(
    (
      few_shot.Example(task.row_id, task.question, task.answer, task.group)
      for task in tasks
    ),
    num_shots=num_shots,
    sampling=sampling,
    seed=seed,
  )


def prompt_of(
  task: Task, shots: few_shot.Shots, *, wording: few_shot.Wording, format: str
) -> str | list[Message]:
  """The prompt of a task: as it was given, or its question behind shots.

  Raises:
    ValueError: There are too few shots.
  """
  if task.prompt is not None:
    return task.prompt
  examples = shots.of(task.row_id, task.group)
  if format == CHAT:
    return few_shot.render_chat(examples, task.question)
  return few_shot.render(examples, task.question, wording)


def render(
  task: Task, shots: few_shot.Shots, *, wording: few_shot.Wording, format: str
) -> Iterator[dict[str, Any]]:
  """The pairs of a task, as rows that `preferences` reads.

  Raises:
    ValueError: There are too few shots.
  """
  if not task.pairs:
    return
  prompt = prompt_of(task, shots, wording=wording, format=format)
  for chosen, rejected in task.pairs:
    answers = {"chosen": chosen, "rejected": rejected}
    if not isinstance(prompt, str):
      answers = {
        name: [few_shot.message("assistant", answer.strip())]
        for name, answer in answers.items()
      }
    yield {"prompt": prompt, **answers}


def build_list(
  rows: Sequence[Mapping[str, Any]],
  kind: Kind,
  *,
  num_shots: int,
  seed: int,
  unusable: pair_lists.Policy,
) -> pair_lists.PairList:
  """All plain pairs of rows in memory, sorted by the rows' ids.

  Args:
    rows: In the layout that `kind` reads.
    kind: How to read them.
    num_shots: Solved examples in front of each question, others for each row.
    seed: Decides all that is random.
    unusable: "skip" counts the rows that give no pair, "raise" refuses them.

  Raises:
    ValueError: A row gives no pair and `unusable` is "raise", or there are too
      few rows for `num_shots`.
  """
  account = pair_lists.Account(unusable)
  places = ((f"Row {i}", row, "") for i, row in enumerate(rows))
  tasks = read_tasks(places, kind, account, seed=seed)
  shots = make_shots(
    tasks, num_shots=num_shots, sampling=few_shot.PER_ROW, seed=seed
  )
  pairs = [
    pair
    for task in tasks
    for pair in render(task, shots, wording=kind.wording, format=PLAIN)
  ]
  return pair_lists.PairList(pairs, account.skipped)
