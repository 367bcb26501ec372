r"""GSM8K and ARC-Challenge pairs, held-out ones and all that goes with them.

  DPOP_SHARED_DATA=DATA python benchmarks/paper_pairs.py --out=runs/paper/data

or, without that folder, with --gsm8k=train.jsonl and
--arc=ARC-Challenge-train.jsonl. Writes what docs/compare.md trains on:

  gsm8k_train.jsonl, gsm8k_eval.jsonl   pairs, one wrong intermediate result
  arc_train.jsonl, arc_eval.jsonl       pairs, one per wrong choice
  sft_train.jsonl                       the chosen answers to the questions of
                                        both training sets
  tokenizer.model                       byte pairs of these, digits one by one

The questions of the evaluation sets are in none of the training files.
"""

import os
import pathlib

from absl import app, flags

from dpop_jax.data import (
  arithmetic,
  jsonl,
  maths,
  multiple_choice,
  pair_builder,
)

_SHARED = pathlib.Path(os.environ.get("DPOP_SHARED_DATA", "."))
_GSM8K = flags.DEFINE_string(
  "gsm8k", str(_SHARED / "gsm8k/train.jsonl"), "GSM8K's training file."
)
_ARC = flags.DEFINE_string(
  "arc",
  str(_SHARED / "arc/ARC-Challenge-train.jsonl"),
  "ARC-Challenge's training file.",
)
_OUT = flags.DEFINE_string("out", None, "Folder to write to.", required=True)
_NUM_EVAL_PAIRS = flags.DEFINE_integer(
  "num_eval_pairs", 128, "Pairs held out of each set, at least."
)
_VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 2048, "Of the tokenizer.")


def main(_):
  out = pathlib.Path(_OUT.value)
  supervised = {}
  for name, path, kind in (
    ("gsm8k", _GSM8K.value, maths.KIND),
    ("arc", _ARC.value, multiple_choice.ARC),
  ):
    rows = jsonl.read(path)
    built = pair_builder.build_list(
      rows, kind, num_shots=0, seed=0, unusable="skip"
    )
    pairs = _in_order(built.pairs, map(kind.question_of, rows))
    evaluation, train = _split(pairs, _NUM_EVAL_PAIRS.value)
    for split, rows in {"train": train, "eval": evaluation}.items():
      jsonl.write(out / f"{name}_{split}.jsonl", rows)
      print(f"{len(rows):,} pairs in {out}/{name}_{split}.jsonl")
    supervised |= {row["prompt"]: row["chosen"] for row in train}
  rows = [
    {"prompt": prompt, "completion": completion}
    for prompt, completion in supervised.items()
  ]
  jsonl.write(out / "sft_train.jsonl", rows)
  print(f"{len(rows):,} answers in {out}/sft_train.jsonl")
  arithmetic.train_tokenizer(
    [row["prompt"] + row["completion"] for row in rows],
    out / "tokenizer.model",
    vocab_size=_VOCAB_SIZE.value,
  )


def _in_order(pairs, questions):
  """The pairs in the order of their questions, which the prompts hold."""
  places = {}
  for place, question in enumerate(questions):
    places.setdefault(f"Question: {question}\nAnswer:\n", place)
  return sorted(pairs, key=lambda pair: places[pair["prompt"]])


def _split(rows, num_first):
  """The first rows, with all others of their prompts, and the rest."""
  prompts = {row["prompt"] for row in rows[:num_first]}
  first = [row for row in rows if row["prompt"] in prompts]
  return first, [row for row in rows if row["prompt"] not in prompts]


if __name__ == "__main__":
  app.run(main)
