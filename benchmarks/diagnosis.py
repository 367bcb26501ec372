r"""Does what inspect_pairs sees in one forward pass say how DPO will fail?

  python benchmarks/diagnosis.py --workdir=runs/diagnosis --seed=0

trains the demo's model on the demo's sums, makes pairs of several kinds from
such sums, lets `dpop_jax.inspection` read them with the model, trains DPO on
each, and ranks both: by what was seen before, and by how far the log-prob of
held-out chosen answers has fallen. The kinds:

  somewhere  the demo's: one wrong digit in one intermediate result
  early      the same in the first one
  late       the same in the last one
  every      the same in every one: several edits
  number     every digit of one intermediate result is wrong
  carried    one wrong digit in the first one, and all that follows from it
  other      the answer to another question: high edit distance
  answer     one wrong digit in the final answer: hardly anything behind it

each from the model at the end of supervised training (`full`) and after a third
of it (`half`). What an earlier call has finished is not done again. The last
line is JSON, which is also WORKDIR/diagnosis.json.
"""

import importlib.util
import json
import pathlib

import numpy as np
from absl import app, flags, logging

from dpop_jax import atomic_files, metric_writers, sharding, train
from dpop_jax import config as config_lib
from dpop_jax.data import arithmetic, dataset, jsonl
from dpop_jax.inspection import condition as condition_lib
from dpop_jax.inspection import forward

# Supervised steps.
_STAGES = {"full": 750, "half": 250}
_BATCH_SIZE = 16
_NUM_TRAIN_PAIRS, _NUM_EVAL_PAIRS, _NUM_READ = 1920, 256, 256
_ROW_LENGTH = 1664

_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of everything.", required=True
)
_SEED = flags.DEFINE_integer(
  "seed", 0, "Of corpus, pairs, supervised and preference training."
)
_CONFIG = flags.DEFINE_string(
  "config", "configs/demo.py", "File whose get_config takes the stage."
)
_LEARNING_RATE = flags.DEFINE_float("learning_rate", 3e-4, "Of DPO.")
_NUM_STEPS = flags.DEFINE_integer("num_steps", 100, "Of DPO.")
_SETTINGS = flags.DEFINE_list(
  "settings", None, "Such as full_early; all, if not given."
)


def _wrong_digit(rng, number: str, place: int | None = None) -> str:
  if place is None:
    place = int(rng.integers(len(number)))
  digits = [
    digit
    for digit in "0123456789"
    if digit != number[place] and not (place == 0 and digit == "0")
  ]
  wrong = digits[rng.integers(len(digits))]
  return number[:place] + wrong + number[place + 1 :]


def _wrong_result(rng, line: str) -> str:
  left, result = line.rsplit("=", 1)
  return f"{left}={_wrong_digit(rng, result)}"


def _early(lines, example, config, rng):
  return [_wrong_result(rng, lines[0]), *lines[1:]]


def _late(lines, example, config, rng):
  # The last two lines are the last addition and the answer.
  i = len(lines) - 3
  return [*lines[:i], _wrong_result(rng, lines[i]), *lines[i + 1 :]]


def _somewhere(lines, example, config, rng):
  return arithmetic.corrupt("\n".join(lines), rng).split("\n")


def _every(lines, example, config, rng):
  return [*(_wrong_result(rng, line) for line in lines[:-2]), *lines[-2:]]


def _number(lines, example, config, rng):
  i = int(rng.integers(len(lines) - 2))
  left, result = lines[i].rsplit("=", 1)
  for place in range(len(result)):
    result = _wrong_digit(rng, result, place)
  return [*lines[:i], f"{left}={result}", *lines[i + 1 :]]


def _carried(lines, example, config, rng):
  first = _wrong_result(rng, lines[0])
  total = int(first.rsplit("=", 1)[1])
  return [first, *arithmetic.solution((total, *example.terms[2:]))]


def _other(lines, example, config, rng):
  other = arithmetic.draw_sum(config, arithmetic.TRAIN, rng)
  return other.completion.split("\n")


def _answer(lines, example, config, rng):
  number = lines[-1].removeprefix("Answer ")
  return [*lines[:-1], f"Answer {_wrong_digit(rng, number)}"]


_KINDS = {
  "early": _early,
  "late": _late,
  "somewhere": _somewhere,
  "every": _every,
  "number": _number,
  "carried": _carried,
  "other": _other,
  "answer": _answer,
}


def _pair_row(config, split, row_id, kind) -> dict[str, str]:
  is_eval = split == arithmetic.EVAL
  rng = np.random.default_rng(
    [config.seed, 7, list(_KINDS).index(kind), is_eval, row_id]
  )
  example = arithmetic.draw_sum(config, split, rng)
  lines = arithmetic.solution(example.terms)
  return {
    "prompt": example.prompt,
    "chosen": example.completion,
    "rejected": "\n".join(_KINDS[kind](lines, example, config, rng)),
  }


class _Study:
  """One supervised run and what is made of it."""

  def __init__(self, folder: pathlib.Path, seed: int, config_file: str):
    self._folder, self._seed = folder, seed
    spec = importlib.util.spec_from_file_location("demo_config", config_file)
    self._stages = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(self._stages)
    self._corpus = arithmetic.ArithmeticConfig(seed=seed)
    self._paths = arithmetic.write_corpus(self._corpus, folder / "corpus")

  def _configure(self, stage: str, values: dict) -> config_lib.Config:
    config = self._stages.get_config(stage)
    config.update_from_flattened_dict(
      {
        "data.tokenizer": str(self._paths["tokenizer"]),
        "run.seed": self._seed,
        "run.compilation_cache_dir": str(self._folder / "compiled"),
        **values,
      }
    )
    return config_lib.from_config_dict(config)

  def train_supervised(self) -> None:
    config = self._configure(
      "sft",
      {
        "data.train": str(self._paths["sft_train"]),
        "run.num_steps": max(_STAGES.values()),
        "checkpoints.save_every_steps": min(_STAGES.values()),
        "checkpoints.keep": len(_STAGES) + 2,
      },
    )
    if not _is_done(self._folder / "sft", max(_STAGES.values())):
      train.train(config, str(self._folder / "sft"))

  def _pairs(self, kind: str, split: str) -> str:
    path = self._folder / "pairs" / f"{kind}_{split}.jsonl"
    count = {
      arithmetic.TRAIN: _NUM_TRAIN_PAIRS,
      arithmetic.EVAL: _NUM_EVAL_PAIRS,
    }[split]
    if not path.exists():
      rows = [_pair_row(self._corpus, split, i, kind) for i in range(count)]
      jsonl.write(path, rows)
    return str(path)

  def _start(self, stage: str) -> str:
    return str(self._folder / "sft" / "checkpoints" / str(_STAGES[stage]))

  def predict(self, stage: str, kind: str) -> dict[str, float]:
    """What inspect_pairs sees of the pairs to train on."""
    model = forward.load(self._start(stage), mesh=sharding.MeshConfig())
    data = dataset.DataConfig(
      train=self._pairs(kind, arithmetic.TRAIN),
      tokenizer=str(self._paths["tokenizer"]),
      max_pairs=_NUM_READ,
    )
    loaded = dataset.load(data, is_sft=False, row_length=_ROW_LENGTH)
    pairs = list(loaded.train)
    logps = forward.token_logps(model, pairs, row_length=_ROW_LENGTH)
    return scores(condition_lib.measure(pairs, logps))

  def fall(self, stage: str, kind: str) -> dict[str, float]:
    """Trains DPO; log-ratios on held-out pairs at the end, in nats."""
    name = f"dpo_{_LEARNING_RATE.value:g}_{_NUM_STEPS.value}"
    workdir = self._folder / name / f"{stage}_{kind}"
    config = self._configure(
      "dpo",
      {
        "data.train": self._pairs(kind, arithmetic.TRAIN),
        "data.eval": self._pairs(kind, arithmetic.EVAL),
        "run.init_from": self._start(stage),
        "run.num_steps": _NUM_STEPS.value,
        "run.eval_every_steps": None,
        "batch.batch_size": _BATCH_SIZE,
        "optimizer.peak_learning_rate": _LEARNING_RATE.value,
      },
    )
    if not _is_done(workdir, _NUM_STEPS.value):
      train.train(config, str(workdir))
    last = [
      record
      for record in metric_writers.read_metrics(workdir)
      if record["split"] == "eval"
    ][-1]
    return {
      "chosen": last["logratios/chosen"],
      "rejected": last["logratios/rejected"],
    }


def _is_done(workdir: pathlib.Path, step: int) -> bool:
  return (workdir / "checkpoints" / str(step)).is_dir()


def scores(condition: condition_lib.Condition) -> dict[str, float]:
  """What might rank settings, each the larger the more DPO should fail."""
  down = condition.push_down_of_pairs().mean()
  up = condition.push_up_of_pairs().mean()
  return {
    "share_of_tokens": float(condition.is_pushed_down.mean()),
    "push_down": float(down),
    "net_push_down": float(down - up),
    "share_of_push": float(down / (down + up)),
    "look_ahead_fall": float(condition.falls.mean()),
  }


def spearman(a, b) -> float:
  """Rank correlation; equal values share the mean of their ranks."""
  ranks = []
  for values in (np.asarray(a), np.asarray(b)):
    less = (values[None] < values[:, None]).sum(axis=1)
    equal = (values[None] == values[:, None]).sum(axis=1)
    ranks.append(less + (equal - 1) / 2)
  return float(np.corrcoef(*ranks)[0, 1])


def main(_) -> None:
  logging.set_verbosity(logging.WARNING)
  folder = pathlib.Path(_WORKDIR.value)
  study = _Study(folder, _SEED.value, _CONFIG.value)
  study.train_supervised()
  settings = _SETTINGS.value or [
    f"{stage}_{kind}" for kind in _KINDS for stage in _STAGES
  ]
  rows = {}
  for setting in settings:
    stage, kind = setting.split("_")
    rows[setting] = {
      "predicted": study.predict(stage, kind),
      "real": study.fall(stage, kind),
    }
  names = list(next(iter(rows.values()))["predicted"])
  print(
    "setting          chosen  rejected " + " ".join(f"{n:>16}" for n in names)
  )
  for setting, row in sorted(
    rows.items(), key=lambda item: item[1]["real"]["chosen"]
  ):
    real = row["real"]
    print(
      f"{setting:15} {real['chosen']:7.2f} {real['rejected']:9.2f} "
      + " ".join(f"{row['predicted'][name]:16.3f}" for name in names)
    )
  falls = [-row["real"]["chosen"] for row in rows.values()]
  correlations = {
    name: spearman([row["predicted"][name] for row in rows.values()], falls)
    for name in names
  }
  for name, value in correlations.items():
    print(f"Spearman of {name} and fall: {value:.2f}")
  result = {"seed": _SEED.value, "settings": rows, "spearman": correlations}
  atomic_files.write_text(
    folder / "diagnosis.json", json.dumps(result, indent=2) + "\n"
  )
  print(json.dumps(result))


if __name__ == "__main__":
  app.run(main)
