"""The demo: one corpus, one supervised model, and a comparison of losses."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dpop_jax import checkpoints, compare, config_values, report, sweeps, train
from dpop_jax import config as config_lib
from dpop_jax import paths as paths_lib
from dpop_jax import questions as questions_lib
from dpop_jax.data import arithmetic, jsonl

LOSSES = ("dpo", "ipo", "slic", "dpop")
# Longest answer: five lines of up to nine characters, "Answer 123", EOS.
_MAX_NEW_TOKENS = 64


def run(
  workdir: str,
  config_of: Callable[[str, Mapping[str, Any]], config_lib.Config],
  *,
  seeds: Sequence[int],
  losses: Sequence[str] = LOSSES,
) -> pathlib.Path:
  """Makes the corpus, trains everything and writes the report.

  What an earlier call finished is not done again, and a run it was stopped in
  continues.

  Args:
    workdir: Folder of everything.
    config_of: Stage ("sft" or a loss) and values of some keys to a config.
    seeds: Each loss is trained once with each.
    losses: Which.

  Returns:
    The path of report.html.

  Raises:
    compare.Stopped: The process was asked to stop (SIGTERM), and has saved.
    ValueError: An earlier call finished a run with other settings.
  """
  folder = paths_lib.local(workdir, "--workdir")
  corpus = arithmetic.ArithmeticConfig()
  paths = arithmetic.write_corpus(corpus, folder / "corpus")

  def configure(stage: str) -> config_lib.Config:
    is_sft = stage == "sft"
    return config_of(
      stage,
      {
        "data.train": str(paths["sft_train" if is_sft else "pairs_train"]),
        "data.eval": None if is_sft else str(paths["pairs_eval"]),
        "data.tokenizer": str(paths["tokenizer"]),
        "data.cache_dir": str(folder / "tokens"),
        "run.compilation_cache_dir": str(folder / "compiled"),
        "run.init_from": None if is_sft else str(folder / "sft"),
        "run.seed": 0,
      },
    )

  sft = configure("sft")
  supervise(sft, str(folder / "sft"))
  configs = {loss: configure(loss) for loss in losses}
  base = configs[losses[-1]]
  study = compare.compare(
    {sweeps.name_of(config, base): config for config in configs.values()},
    str(folder),
    seeds=seeds,
    questions=ask(jsonl.read(str(paths["questions_eval"]))),
    options={
      "corpus": dataclasses.asdict(corpus),
      **{
        name: _shown(config) for name, config in {"sft": sft, **configs}.items()
      },
    },
    example=jsonl.read(str(paths["pairs_eval"]))[0],
  )
  return report.write(study, folder)["report.html"]


def supervise(config: config_lib.Config, workdir: str) -> None:
  """Trains the supervised model, unless that is done.

  Raises:
    compare.Stopped: The process was asked to stop.
    ValueError: It was trained with other settings.
  """
  if checkpoints.newest(workdir) is not None:
    compare.check_settings(config, workdir)
  print("sft", flush=True)
  if not train.train(config, workdir).is_complete:
    raise compare.Stopped(
      "Asked to stop in the supervised stage; the same command continues there."
    )


def ask(rows: Sequence[Mapping[str, str]]) -> questions_lib.Questions:
  """The corpus's questions, answered by the number in the last line."""
  return questions_lib.Questions(
    prompts=[row["prompt"] for row in rows],
    answers=[row["answer"] for row in rows],
    final=arithmetic.final_answer,
    max_new_tokens=_MAX_NEW_TOKENS,
    batch_size=256,
  )


def _shown(config: config_lib.Config) -> dict:
  """What the report says about how its numbers came about."""
  values = config_lib.to_dict(config)
  sections = ("loss", "optimizer", "batch")
  shown = {name: values[name] for name in sections}
  if config.loss.name == "sft":
    shown["model"] = values["model"]
  shown["run.num_steps"] = values["run"]["num_steps"]
  given = config_values.flatten(shown)
  return {key: value for key, value in given.items() if value is not None}
