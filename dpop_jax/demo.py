"""The demo: one corpus, one supervised model, several losses, one report."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dpop_jax import (
  atomic_files,
  config_values,
  generate,
  metric_writers,
  report,
  saved_config,
  train,
)
from dpop_jax import config as config_lib
from dpop_jax import paths as paths_lib
from dpop_jax import study as study_lib
from dpop_jax.data import arithmetic, jsonl, tokenization, tokenizers

LOSSES = ("dpo", "ipo", "slic", "dpop")
_ACCURACY_FILE = "exact_match.json"
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
    InterruptedError: The process was asked to stop (SIGTERM), and has saved.
    ValueError: An earlier call finished a run with other settings.
  """
  folder = paths_lib.local(workdir, "--workdir")
  corpus = arithmetic.ArithmeticConfig()
  paths = arithmetic.write_corpus(corpus, folder / "corpus")
  questions = jsonl.read(str(paths["questions_eval"]))
  tokenizer = tokenizers.load(str(paths["tokenizer"]))

  def configure(stage: str, seed: int) -> config_lib.Config:
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
        "run.seed": seed,
      },
    )

  def finish(config, name: str) -> float:
    """Trains unless that is done, and returns the exact match."""
    done = folder / name / _ACCURACY_FILE
    if not done.exists():
      print(f"{name}:", flush=True)
      result = train.train(config, str(folder / name))
      if not result.is_complete:
        raise InterruptedError(
          f"The demo was asked to stop in {name}; run it again to continue."
        )
      accuracy = exact_match(result.params, config, tokenizer, questions)
      atomic_files.write_text(done, json.dumps({"exact_match": accuracy}))
    check_settings(config, str(folder / name))
    accuracy = json.loads(done.read_text())["exact_match"]
    print(f"{name}: exact match {accuracy:.3f}", flush=True)
    return accuracy

  configs = {"sft": configure("sft", seed=0)}
  sft_accuracy = finish(configs["sft"], "sft")
  runs = []
  for loss in losses:
    for seed in seeds:
      name = f"{loss}_seed{seed}"
      configs[loss] = configure(loss, seed)
      accuracy = finish(configs[loss], name)
      records = [
        record
        for record in metric_writers.read_metrics(folder / name)
        if record["split"] == "eval"
      ]
      runs.append(
        study_lib.Run(
          loss=loss, seed=seed, records=tuple(records), exact_match=accuracy
        )
      )
  # Before its first step every run is the supervised model.
  reference = study_lib.Reference(
    metrics=runs[0].records[0], exact_match=sft_accuracy
  )
  study = study_lib.Study(
    settings=_settings(corpus, configs),
    reference=reference,
    runs=tuple(runs),
    num_questions=len(questions),
    example=jsonl.read(str(paths["pairs_eval"]))[0],
  )
  return report.write(study, folder)["report.html"]


def check_settings(config: config_lib.Config, workdir: str) -> None:
  """Raises ValueError if a finished run is not what the report would say."""
  saved = saved_config.load(workdir)
  differences = config_values.differences(
    *(
      _shown(config_lib.to_dict(c), ("model", "loss", "optimizer", "batch"))
      for c in (saved, config)
    )
  )
  if differences:
    raise ValueError(
      f"{workdir} was trained with other settings; use another --workdir or "
      f"undo: {'; '.join(differences)}."
    )


def exact_match(params, config, tokenizer, questions) -> float:
  """Share of questions whose greedy answer ends in the right number."""
  prompts = [
    tokenization.encode_prompt(
      question["prompt"], tokenizer, add_bos=config.data.add_bos
    )
    for question in questions
  ]
  answers = generate.generate(
    params,
    config.model,
    prompts,
    generate.SamplingConfig(max_new_tokens=_MAX_NEW_TOKENS),
    eos_id=tokenizer.eos_id,
    batch_size=256,
  )
  right = [
    arithmetic.final_answer(tokenizer.decode(answer)) == question["answer"]
    for answer, question in zip(answers, questions, strict=True)
  ]
  return sum(right) / len(right)


def _settings(
  corpus: arithmetic.ArithmeticConfig, configs: Mapping[str, config_lib.Config]
) -> dict:
  """What the report says about how its numbers came about."""
  settings = {"corpus": dataclasses.asdict(corpus)}
  for stage, config in configs.items():
    sections = ("loss", "optimizer", "batch") + ("model",) * (stage == "sft")
    settings[stage] = _shown(config_lib.to_dict(config), sections)
  return settings


def _shown(values: Mapping[str, Any], sections: Sequence[str]) -> dict:
  shown = {name: values[name] for name in sections}
  return shown | {"num_steps": values["run"]["num_steps"]}
