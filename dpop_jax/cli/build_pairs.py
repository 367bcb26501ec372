"""Builds preference pairs from a file of solved questions.

  python -m dpop_jax.cli.build_pairs --kind=maths --source=gsm8k/train.jsonl \\
      --out=DIR --num_shots=4 --seed=0

writes DIR/pairs.jsonl, one object with prompt, chosen and rejected per line,
and DIR/manifest.json, which says what they were made from and what was left
out.
"""

import hashlib
import json

from absl import flags

import dpop_jax
from dpop_jax import atomic_files, paths
from dpop_jax.cli import command
from dpop_jax.data import jsonl, kept_folders, maths, multiple_choice

_BUILDERS = {
  "maths": maths.build_pairs,
  "arc": multiple_choice.build_arc_pairs,
}

_KIND = flags.DEFINE_enum(
  "kind",
  None,
  list(_BUILDERS),
  "maths: solutions marked like GSM8K's, one wrong intermediate result each; "
  "arc: multiple choice, a pair per wrong choice.",
  required=True,
)
_SOURCE = flags.DEFINE_string(
  "source", None, "The .jsonl or .jsonl.gz file to read.", required=True
)
_OUT = flags.DEFINE_string(
  "out", None, "The folder to write pairs.jsonl to.", required=True
)
_NUM_SHOTS = flags.DEFINE_integer(
  "num_shots", 0, "Solved examples in front of each question.", lower_bound=0
)
_SEED = flags.DEFINE_integer(
  "seed", 0, "Decides shots and corruptions.", lower_bound=0
)
_UNUSABLE = flags.DEFINE_enum(
  "unusable",
  "skip",
  ["skip", "raise"],
  "What to do with rows that give no pair: count them, or stop.",
)


def build(
  *, kind: str, source: str, out: str, num_shots: int, seed: int, unusable: str
) -> dict:
  """Writes the pairs and the manifest, and returns the manifest.

  Raises:
    FileNotFoundError: There is no file `source`.
    ValueError: It cannot be used, or nothing in it gives a pair.
  """
  rows = jsonl.read(source)
  try:
    built = _BUILDERS[kind](
      rows, num_shots=num_shots, seed=seed, unusable=unusable
    )
  except ValueError as error:
    raise ValueError(f"{source}: {error}") from error
  if not built.pairs:
    reasons = dict(built.skipped) or "it is empty"
    raise ValueError(
      f"{source}: none of its {len(rows)} rows gives a pair of the kind "
      f"{kind!r} ({reasons})."
    )
  text = jsonl.dumps(built.pairs)
  manifest = {
    "source": {
      "file": paths.of(source).name,
      "sha256": kept_folders.digest(source),
      "num_rows": len(rows),
    },
    "options": {
      "kind": kind,
      "num_shots": num_shots,
      "seed": seed,
      "unusable": unusable,
    },
    "num_pairs": len(built.pairs),
    "skipped": dict(built.skipped),
    "pairs_sha256": hashlib.sha256(text.encode()).hexdigest(),
    "dpop_jax_version": dpop_jax.__version__,
  }
  out_dir = paths.of(out)
  atomic_files.write_text(out_dir / "pairs.jsonl", text)
  atomic_files.write_text(
    out_dir / "manifest.json", json.dumps(manifest, indent=2) + "\n"
  )
  return manifest


def main() -> None:
  manifest = build(
    kind=_KIND.value,
    source=_SOURCE.value,
    out=_OUT.value,
    num_shots=_NUM_SHOTS.value,
    seed=_SEED.value,
    unusable=_UNUSABLE.value,
  )
  print(f"{manifest['num_pairs']:,} pairs in {_OUT.value}/pairs.jsonl")
  for reason, count in manifest["skipped"].items():
    print(f"{count:,} left out: {reason}")


if __name__ == "__main__":
  command.run(main)
