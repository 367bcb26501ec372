"""Builds preference pairs from a data set in its own layout.

  python -m dpop_jax.cli.build_pairs --kind=maths --source=gsm8k/train.jsonl \\
      --out=DIR --num_shots=4 --seed=0

writes DIR/pairs.jsonl (or shards of it), one object with prompt, chosen and
rejected per line, and DIR/manifest.json, which says what they were made of and
what was left out. The folder is what data.train takes.
"""

from absl import flags

from dpop_jax import progress
from dpop_jax.cli import command
from dpop_jax.data import checkers, pair_sets, sampled_answers

_KIND = flags.DEFINE_enum(
  "kind",
  None,
  list(pair_sets.KINDS),
  "maths: GSM8K, MetaMathQA or MATH, one wrong intermediate result per "
  "solution; arc, hellaswag: a pair per wrong choice; sampled: right against "
  "wrong answers that a model gave, see cli.sample_answers.",
  required=True,
)
_SOURCE = flags.DEFINE_string(
  "source",
  None,
  "A .jsonl, .json, .csv or .parquet file (plain or .gz), folder, pattern, or "
  "hub:owner/name:split.",
  required=True,
)
_OUT = flags.DEFINE_string("out", None, "Folder to write to.", required=True)
_NUM_SHARDS = flags.DEFINE_integer(
  "num_shards", 1, "Files to spread the pairs over."
)
_SEED = flags.DEFINE_integer("seed", 0, "Decides shots and corruptions.")
_NUM_SHOTS = flags.DEFINE_integer(
  "num_shots", 0, "Solved examples in front of each question."
)
_SHOTS = flags.DEFINE_enum(
  "shots",
  "per_row",
  ["per_row", "fixed"],
  "Draw other shots for each row, or give all rows the same.",
)
_SHOTS_SOURCE = flags.DEFINE_string(
  "shots_source", None, "Where shots come from, if not from --source."
)
_FORMAT = flags.DEFINE_enum(
  "format", "plain", ["plain", "chat"], "Prompts as text, or as messages."
)
_EVAL_SOURCE = flags.DEFINE_string(
  "eval_source",
  None,
  "Rows of an evaluation; their questions become neither pairs nor shots.",
)
_NUM_EVAL_ROWS = flags.DEFINE_integer(
  "num_eval_rows", 0, "Rows to hold out, for --eval_out."
)
_EVAL_OUT = flags.DEFINE_string(
  "eval_out", None, "Folder for the pairs of the rows that are held out."
)
_STRIP_BRACKETS = flags.DEFINE_bool(
  "strip_brackets", False, "hellaswag: take out [header], [title], [step]."
)
_CHECKER = flags.DEFINE_enum(
  "checker", None, list(checkers.CHECKERS), "sampled: what makes two the same."
)
_MAX_PAIRS = flags.DEFINE_integer(
  "max_pairs_per_question", None, "sampled: most pairs of one prompt; 4."
)
_PAIRING = flags.DEFINE_enum(
  "pairing",
  None,
  ["random", "closest_length"],
  "sampled: which right answer meets which wrong one; random.",
)
_NO_RESULT = flags.DEFINE_enum(
  "no_result",
  None,
  ["skip", "wrong"],
  "sampled: leave out answers without a result, or count them as wrong; skip.",
)
_MAX_CHARACTERS = flags.DEFINE_integer(
  "max_characters", None, "sampled: leave out longer answers."
)
_UNUSABLE = flags.DEFINE_enum(
  "unusable",
  "skip",
  ["skip", "raise"],
  "What to do with rows that give no pair: count them, or stop.",
)


def main() -> None:
  config = pair_sets.BuildConfig(
    kind=_KIND.value,
    source=_SOURCE.value,
    out=_OUT.value,
    num_shards=_NUM_SHARDS.value,
    seed=_SEED.value,
    num_shots=_NUM_SHOTS.value,
    shots=_SHOTS.value,
    shots_source=_SHOTS_SOURCE.value,
    format=_FORMAT.value,
    eval_source=_EVAL_SOURCE.value,
    num_eval_rows=_NUM_EVAL_ROWS.value,
    eval_out=_EVAL_OUT.value,
    strip_brackets=_STRIP_BRACKETS.value,
    sampled=_sampled(),
    unusable=_UNUSABLE.value,
  )
  with _Bar() as bar:
    manifest = pair_sets.build(config, on_row=bar)
  where = _OUT.value.rstrip("/")
  names = [file["file"] for file in manifest["files"]]
  which = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
  print(f"{manifest['num_pairs']:,} pairs in {where}/{which}")
  for reason, count in manifest["skipped"].items():
    print(f"{count:,} left out: {reason}")


def _sampled():
  options = {
    "max_pairs": _MAX_PAIRS.value,
    "pairing": _PAIRING.value,
    "no_result": _NO_RESULT.value,
    "max_characters": _MAX_CHARACTERS.value,
  }
  given = {name: value for name, value in options.items() if value is not None}
  if _CHECKER.value is None:
    if given:
      raise ValueError(
        "--max_pairs_per_question, --pairing, --no_result and --max_characters "
        "are for --kind=sampled with a --checker."
      )
    if _KIND.value == pair_sets.SAMPLED:
      raise ValueError(
        f"--kind=sampled needs --checker={'|'.join(checkers.CHECKERS)}."
      )
    return None
  return sampled_answers.SampledConfig(checker=_CHECKER.value, **given)


class _Bar:
  """A progress bar that begins with the first row."""

  def __init__(self):
    self._bar = None

  def __enter__(self):
    return self

  def __exit__(self, *_):
    if self._bar is not None:
      self._bar.close()

  def __call__(self, done, total):
    if self._bar is None:
      self._bar = progress.Progress("rows", num_steps=total)
    # Small sets are done before anyone looks.
    if done % 100 == 0 or done == total:
      self._bar.update(done)


if __name__ == "__main__":
  command.run(main)
