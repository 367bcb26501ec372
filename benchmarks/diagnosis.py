r"""Does what inspect_pairs sees in one forward pass say how DPO will fail?

  python benchmarks/diagnosis.py --workdir=runs/diagnosis0 --seed=0

trains the demo's model on the demo's sums, makes pairs of several kinds from
such sums (see diagnosis_pairs.py), lets `dpop_jax.inspection` read them with
the model, trains DPO on each, with several draws of pairs, and ranks both: by
what was seen before, and by how far the log-prob of held-out chosen answers has
fallen. A setting is a kind of pairs and a model: `full`, the supervised one, or
`half`, after a third of its steps. Beside it stands how well the falls of one
half of the draws rank those of the other half, since nothing can foretell what
does not repeat itself.

What an earlier call has finished is not done again. The last line is JSON,
which is also WORKDIR/diagnosis.json.
"""

import importlib.util
import json
import pathlib

import diagnosis_pairs
import diagnosis_steps
import diagnosis_training
import numpy as np
from absl import app, flags, logging

from dpop_jax import atomic_files, sharding, train
from dpop_jax import config as config_lib
from dpop_jax.data import arithmetic, dataset, jsonl
from dpop_jax.inspection import condition as condition_lib
from dpop_jax.inspection import forward, head_step

# Supervised steps.
_STAGES = {"full": 750, "half": 250}
_BATCH_SIZE, _ROW_LENGTH = 16, 1023
_EVAL_STEPS = (10, 20, 30, 40)
_NUM_EVAL_PAIRS, _NUM_READ, _NUM_STEPPED = 128, 192, 96

_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of everything.", required=True
)
_SEED = flags.DEFINE_integer(
  "seed", 0, "Of the corpus, all pairs and the supervised training."
)
_CONFIG = flags.DEFINE_string(
  "config", "configs/demo.py", "File whose get_config takes the stage."
)
_LEARNING_RATE = flags.DEFINE_float("learning_rate", 5e-5, "Of DPO.")
_NUM_DRAWS = flags.DEFINE_integer(
  "num_draws", 2, "Sets of pairs of each setting, an even number."
)
_SETTINGS = flags.DEFINE_list(
  "settings", None, "Such as full_early; all, if not given."
)


class _Study:
  """The supervised models of one seed and what is made of them."""

  def __init__(self, folder: pathlib.Path, seed: int, config_file: str):
    self._folder, self._seed = folder, seed
    spec = importlib.util.spec_from_file_location("demo_config", config_file)
    self._stages = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(self._stages)
    self._corpus = arithmetic.ArithmeticConfig(seed=seed)
    self._paths = arithmetic.write_corpus(self._corpus, folder / "corpus")
    self._trainer = diagnosis_training.Trainer(
      self._configure(
        "dpo",
        {
          "data.train": "-",
          "run.num_steps": max(_EVAL_STEPS),
          "optimizer.peak_learning_rate": _LEARNING_RATE.value,
          "optimizer.schedule": "constant",
          "optimizer.warmup_steps": 5,
          "batch.batch_size": _BATCH_SIZE,
          "batch.row_length": _ROW_LENGTH,
          "batch.rows_per_microbatch": 2,
        },
      )
    )

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

  def supervise(self, stage: str) -> str:
    """Trains a model to start from, unless that is done."""
    num_steps = _STAGES[stage]
    workdir = self._folder / f"sft{num_steps}"
    if not (workdir / "checkpoints" / str(num_steps)).is_dir():
      values = {
        "data.train": str(self._paths["sft_train"]),
        "run.num_steps": num_steps,
      }
      train.train(self._configure("sft", values), str(workdir))
    return str(workdir)

  def _pairs(self, kind: str, draw: int) -> dataset.Loaded:
    """Pairs to train on, of one draw, and those held out for all draws."""
    num_train = _BATCH_SIZE * max(_EVAL_STEPS)
    paths = {}
    for split, count, number in (
      (arithmetic.TRAIN, num_train, draw),
      (arithmetic.EVAL, _NUM_EVAL_PAIRS, 0),
    ):
      paths[split] = self._folder / "pairs" / f"{kind}_{split}_{number}.jsonl"
      if not paths[split].exists():
        rows = [
          diagnosis_pairs.pair_row(self._corpus, split, kind, number, i)
          for i in range(count)
        ]
        jsonl.write(paths[split], rows)
    data = dataset.DataConfig(
      train=str(paths[arithmetic.TRAIN]),
      eval=str(paths[arithmetic.EVAL]),
      tokenizer=str(self._paths["tokenizer"]),
    )
    return dataset.load(data, is_sft=False, row_length=_ROW_LENGTH)

  def predict(self, stage: str, kind: str) -> dict[str, float]:
    """What inspect_pairs sees of the pairs, and what a first step does."""
    path = self._folder / "predicted" / f"{stage}_{kind}.json"
    if not path.exists():
      model = forward.load(self.supervise(stage), mesh=sharding.MeshConfig())
      loaded = self._pairs(kind, 0)
      pairs, held_out = list(loaded.train)[:_NUM_READ], list(loaded.eval)
      logps = forward.token_logps(model, pairs, row_length=_ROW_LENGTH)
      found = scores(condition_lib.measure(pairs, logps))
      found["head_step"] = head_step.fall(model, pairs, row_length=_ROW_LENGTH)
      found["whole_step"] = diagnosis_steps.fall(
        model, pairs[:_NUM_STEPPED], held_out[:_NUM_STEPPED]
      )
      atomic_files.write_text(path, json.dumps(found))
    return json.loads(path.read_text())

  def falls(self, stage: str, kind: str, draw: int) -> list[dict[str, float]]:
    """Trains DPO; metrics on held-out pairs after each of _EVAL_STEPS."""
    name = f"dpo_{_LEARNING_RATE.value:g}"
    path = self._folder / name / f"{stage}_{kind}_{draw}.json"
    if not path.exists():
      loaded = self._pairs(kind, draw)
      found = self._trainer.train(
        self._trainer.load(self.supervise(stage)),
        loaded.train,
        loaded.eval,
        seed=draw,
        eval_steps=_EVAL_STEPS,
      )
      atomic_files.write_text(path, json.dumps(found))
    found = json.loads(path.read_text())
    return [found[str(step)] for step in _EVAL_STEPS]


def scores(condition: condition_lib.Condition) -> dict[str, float]:
  """What might rank settings, each the larger the more DPO should fail."""
  down = condition.push_down_of_pairs().mean()
  up = condition.push_up_of_pairs().mean()
  return {
    "push_down": float(down),
    "net_push": float(down - up),
    "push_share": float(down / (down + up)),
    "token_share": float(condition.is_pushed_down.mean()),
    "look_ahead": float(condition.falls.mean()),
  }


def spearman(a, b) -> float:
  """Rank correlation; equal values share the mean of their ranks."""
  ranks = []
  for values in (np.asarray(a), np.asarray(b)):
    less = (values[None] < values[:, None]).sum(axis=1)
    equal = (values[None] == values[:, None]).sum(axis=1)
    ranks.append(less + (equal - 1) / 2)
  return float(np.corrcoef(*ranks)[0, 1])


def _report(settings, predicted, curves) -> dict:
  """Prints the tables; what they hold.

  Args:
    settings: Names.
    predicted: Of each setting, values by name.
    curves: [settings, draws, steps]; falls in nats.
  """
  falls = curves.mean(axis=1)
  names = list(predicted[0])
  print("falls after steps " + ", ".join(map(str, _EVAL_STEPS)))
  for i in np.argsort(-falls[:, -1]):
    print(
      f"{settings[i]:15} "
      + " ".join(f"{value:7.3f}" for value in falls[i])
      + "  draws "
      + " ".join(f"{value:7.3f}" for value in curves[i, :, -1])
      + "  "
      + " ".join(f"{name} {predicted[i][name]:.3f}" for name in names)
    )
  correlations = {}
  for group in ("all", *_STAGES):
    chosen = [
      i
      for i, name in enumerate(settings)
      if group == "all" or name.startswith(group)
    ]
    if len(chosen) < 3:
      continue
    of_group = {}
    for s, step in enumerate(_EVAL_STEPS):
      halves = [curves[chosen, h::2, s].mean(axis=1) for h in (0, 1)]
      of_group[step] = {"repeats": spearman(*halves)} | {
        name: spearman([predicted[i][name] for i in chosen], falls[chosen, s])
        for name in names
      }
      if group == "all":
        # What a column that knows nothing else would reach.
        stages = [settings[i].startswith("half") for i in chosen]
        of_group[step]["stage_alone"] = spearman(stages, falls[chosen, s])
      print(
        f"Spearman, {group} {len(chosen)}, step {step}: "
        + ", ".join(f"{name} {v:.2f}" for name, v in of_group[step].items())
      )
    correlations[group] = of_group
  return {
    "falls": dict(zip(settings, curves.tolist(), strict=True)),
    "predicted": dict(zip(settings, predicted, strict=True)),
    "spearman": correlations,
  }


def main(_) -> None:
  logging.set_verbosity(logging.WARNING)
  folder = pathlib.Path(_WORKDIR.value)
  study = _Study(folder, _SEED.value, _CONFIG.value)
  settings = _SETTINGS.value or [
    f"{stage}_{kind}" for stage in _STAGES for kind in diagnosis_pairs.KINDS
  ]
  predicted, curves = [], []
  for setting in settings:
    stage, kind = setting.split("_")
    predicted.append(study.predict(stage, kind))
    curves.append(
      [
        [-m["logratios/chosen"] for m in study.falls(stage, kind, draw)]
        for draw in range(_NUM_DRAWS.value)
      ]
    )
  result = {
    "seed": _SEED.value,
    "learning_rate": _LEARNING_RATE.value,
    **_report(settings, predicted, np.array(curves)),
  }
  atomic_files.write_text(
    folder / "diagnosis.json", json.dumps(result, indent=2) + "\n"
  )
  print(json.dumps(result))


if __name__ == "__main__":
  app.run(main)
