"""The sets of pairs that `build_pairs` makes of a source, and their options."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import dpop_jax
from dpop_jax import paths
from dpop_jax.data import (
  few_shot,
  hellaswag,
  kept_folders,
  maths,
  multiple_choice,
  pair_builder,
  pair_files,
  pair_lists,
  pair_tasks,
  sampled_answers,
  sources,
  worked_texts,
)
from dpop_jax.data.pair_tasks import Task
from dpop_jax.data.sampled_answers import SampledConfig

SAMPLED = "sampled"
KINDS = ("maths", "arc", "hellaswag", SAMPLED)

# Called with the rows done, and with all rows there are.
Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BuildConfig:
  """What to build, of what, and how.

  Attributes:
    kind: One of `KINDS`.
    source: A file, folder, pattern or hub name, as `sources.resolve` takes; for
      "maths" also a .txt file, see `worked_texts`.
    out: The folder to write to.
    num_shards: Files to spread the pairs over.
    seed: Decides all that is random, together with a row's own text.
    num_shots: Solved examples in front of each question.
    shots: "per_row" or "fixed", see `few_shot.Shots`.
    shots_source: Where the shots come from, in the same layout; None for the
      rows that are trained on.
    format: "plain" text or "chat" messages.
    eval_source: Rows of an evaluation, in the same layout: their questions are
      neither built nor used as shots.
    num_eval_rows: Rows to hold out, written to `eval_out`; rows of one question
      stay together, so there may be a few less.
    eval_out: The folder for those.
    strip_brackets: Whether HellaSwag's marks are taken out.
    sampled: For the kind "sampled", how answers are checked and paired.
    unusable: "skip" counts what gives no pair, "raise" refuses it.
  """

  kind: str
  source: str
  out: str
  num_shards: int = 1
  seed: int = 0
  num_shots: int = 0
  shots: str = few_shot.PER_ROW
  shots_source: str | None = None
  format: str = pair_builder.PLAIN
  eval_source: str | None = None
  num_eval_rows: int = 0
  eval_out: str | None = None
  strip_brackets: bool = False
  sampled: SampledConfig | None = None
  unusable: pair_lists.Policy = "skip"

  def __post_init__(self):
    for name, choices in (
      ("kind", KINDS),
      ("shots", (few_shot.PER_ROW, few_shot.FIXED)),
      ("format", (pair_builder.PLAIN, pair_builder.CHAT)),
    ):
      if getattr(self, name) not in choices:
        raise ValueError(
          f"{name} must be one of {', '.join(choices)}, got "
          f"{getattr(self, name)!r}."
        )
    for name, least in (
      ("num_shards", 1),
      ("seed", 0),
      ("num_shots", 0),
      ("num_eval_rows", 0),
    ):
      if getattr(self, name) < least:
        raise ValueError(
          f"{name} must be at least {least}, got {getattr(self, name)}."
        )
    if (self.num_eval_rows > 0) != (self.eval_out is not None):
      raise ValueError(
        "num_eval_rows and eval_out go together: rows to hold out, and the "
        f"folder for them; got {self.num_eval_rows} and {self.eval_out!r}."
      )
    if self.eval_out is not None and self.eval_out == self.out:
      raise ValueError(
        f"out and eval_out must be two folders, got {self.out!r} twice."
      )
    if self.num_shots == 0 and self.shots_source is not None:
      raise ValueError("shots_source is of no use with num_shots=0.")
    if self.num_shots == 0 and self.shots != few_shot.PER_ROW:
      raise ValueError(f"shots={self.shots!r} is of no use with num_shots=0.")
    if self.strip_brackets and self.kind != "hellaswag":
      raise ValueError("strip_brackets is for the kind 'hellaswag' only.")
    self._check_sampled()

  def _check_sampled(self):
    if (self.kind == SAMPLED) != (self.sampled is not None):
      raise ValueError(
        "The kind 'sampled', and no other, takes a checker; got "
        f"kind={self.kind!r} with {self.sampled}."
      )
    if self.kind != SAMPLED:
      return
    for name, value in (
      ("num_shots", 0),
      ("eval_source", None),
      ("format", pair_builder.PLAIN),
    ):
      if getattr(self, name) != value:
        raise ValueError(
          f"{name} is of no use with kind='sampled': its prompts are what the "
          "answers were sampled for."
        )


class Source(NamedTuple):
  """Rows in memory, and where they come from, for a manifest."""

  rows: list[sources.Row]
  description: list[dict[str, Any]]

  def places(
    self, on_row: Progress = lambda done, total: None
  ) -> Iterator[tuple[str, Any, str]]:
    """Rows as `pair_builder.read_tasks` takes them."""
    for done, row in enumerate(self.rows):
      on_row(done, len(self.rows))
      # Where the file lies does not matter to a manifest.
      yield f"{_name(row.source)} row {row.number}", row.value, row.problem
    on_row(len(self.rows), len(self.rows))


def build(
  config: BuildConfig, *, on_row: Progress = lambda done, total: None
) -> dict[str, Any]:
  """Writes pairs and manifests, and returns the manifest of `out`.

  Raises:
    FileNotFoundError: There is no such source.
    ValueError: It cannot be used, or nothing in it gives a pair; or there is a
      file where a folder is to be written.
  """
  for name in ("out", "eval_out"):
    if getattr(config, name) is not None:
      paths.check_folder(getattr(config, name), name)
  source = read_source(config.source)
  try:
    return _build(config, source, on_row)
  except ValueError as error:
    raise ValueError(f"{config.source}: {error}") from error


def _build(config, source, on_row):
  account = pair_lists.Account(config.unusable)
  others: dict[str, Any] = {}
  tasks = _tasks_of(config, source, account, on_row)
  evaluation = []
  if config.eval_source is not None:
    read = read_source(config.eval_source)
    others["eval_source"] = read.description
    evaluation = _questions(read.rows, _kind(config))
    tasks = pair_builder.leave_out(tasks, evaluation, account)
  num_usable = sum(bool(task.pairs) for task in tasks)
  if not num_usable:
    reasons = dict(account.skipped) or "it is empty"
    raise ValueError(
      f"none of its {len(source.rows)} rows gives a pair of the kind "
      f"{config.kind!r} ({reasons}). {account.first_example()}".rstrip()
    )
  train, held_out = pair_builder.hold_out(
    tasks, config.num_eval_rows, seed=config.seed
  )
  examples = train
  if config.shots_source is not None:
    read = read_source(config.shots_source)
    others["shots_source"] = read.description
    questions = [*evaluation, *(task.question for task in held_out)]
    examples = pair_builder.leave_out(
      _tasks_of(config, read, pair_lists.Account("skip")),
      [*questions, *(task.group for task in held_out)],
      pair_lists.Account("skip"),
    )
  shots = pair_builder.make_shots(
    examples,
    num_shots=config.num_shots,
    sampling=config.shots,
    seed=config.seed,
  )
  options = {
    name: value
    for name, value in dataclasses.asdict(config).items()
    if name not in ("source", "out", "eval_out", "eval_source", "shots_source")
  }
  wording = few_shot.QUESTION
  if config.kind != SAMPLED:
    wording = _kind(config).wording

  def write(folder, name, tasks):
    tasks = [task for task in tasks if task.pairs]
    return pair_files.write(
      folder,
      tasks,
      lambda task: pair_builder.render(
        task, shots, wording=wording, format=config.format
      ),
      num_shards=config.num_shards if name == "train" else 1,
      manifest=lambda written: {
        "source": source.description,
        **others,
        "set": name,
        "options": options,
        "num_rows": len(source.rows),
        "num_rows_with_pairs": len(tasks),
        **written,
        "skipped": dict(account.skipped.most_common()),
        "skipped_examples": account.examples,
        "dpop_jax_version": dpop_jax.__version__,
      },
    )

  if config.eval_out is not None:
    write(config.eval_out, "eval", held_out)
  return write(config.out, "train", train)


def _kind(config) -> pair_builder.Kind:
  if config.kind == "hellaswag":
    return hellaswag.kind(strip_brackets=config.strip_brackets)
  return {"maths": maths.KIND, "arc": multiple_choice.ARC}[config.kind]


def _tasks_of(
  config: BuildConfig,
  source: Source,
  account: pair_lists.Account,
  on_row: Progress = lambda done, total: None,
) -> list[Task]:
  places = source.places(on_row)
  if config.sampled is not None:
    return sampled_answers.read_tasks(
      places, config.sampled, account, seed=config.seed
    )
  return pair_builder.read_tasks(
    places, _kind(config), account, seed=config.seed
  )


def _questions(rows, kind):
  """The questions of evaluation rows, all of which have to be known."""
  questions = []
  for row in rows:
    try:
      if not isinstance(row.value, dict):
        raise pair_tasks.Unusable(pair_tasks.BAD_ROW, row.problem or "no row")
      questions.append(kind.question_of(row.value))
    except pair_tasks.Unusable as error:
      raise ValueError(
        f"eval_source: the question of {row.place} is not known ({error}), so "
        "it cannot be kept out."
      ) from error
  return questions


def read_source(source: str) -> Source:
  """All rows of what `BuildConfig.source` may be.

  Raises:
    FileNotFoundError: There is no such file.
    ValueError: It cannot be read.
  """
  rows, description = [], []
  names = (source,) if source.endswith(".txt") else sources.resolve(source)
  for name in names:
    read = worked_texts.read if name.endswith(".txt") else sources.read
    of_file = list(read(name))
    rows += of_file
    if name.startswith(sources.HUB_PREFIX):
      content = hashlib.sha256()
      for row in of_file:
        text = json.dumps(row.value, sort_keys=True, default=str)
        content.update(text.encode())
      digest = content.hexdigest()
    else:
      digest = kept_folders.digest(name)
    description.append(
      {
        "file": _name(name),
        "sha256": digest,
        "num_rows": len(of_file),
      }
    )
  return Source(rows, description)


def _name(source):
  """Of a file without its folders; of a data set on the hub in full."""
  if source.startswith(sources.HUB_PREFIX):
    return source
  return source.rpartition("/")[2]
