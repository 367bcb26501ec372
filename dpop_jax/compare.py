"""Trains several settings from one model on one set, and compares them.

A workdir holds a folder for each setting and seed, `NAME_seed0`, with all that
a run leaves, and finished.json once it has reached its end; tokens/, compiled/
and reference/, which all runs share; and the report.
"""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from dpop_jax import (
  atomic_files,
  checkpoints,
  config_values,
  folder_locks,
  inputs,
  metric_writers,
  saved_config,
  sharding,
  train,
)
from dpop_jax import config as config_lib
from dpop_jax import paths as paths_lib
from dpop_jax import questions as questions_lib
from dpop_jax import study as study_lib
from dpop_jax.models import decoder

_FINISHED, _EXACT_MATCH = "finished.json", "exact_match.json"
# What may differ from the config of a run that is there already. Of the data,
# it is the tokens that are compared.
_FREE_TO_CHANGE = (*saved_config.HOW_TO_RUN, "data.")
# Largest difference of the first log-probs, relative to them or to 1: rounding
# where the rows are packed otherwise.
_START_TOLERANCE = 1e-2


class Stopped(InterruptedError):
  """The process was asked to stop (SIGTERM), and has saved."""


def compare(
  configs: Mapping[str, config_lib.Config],
  workdir: str,
  *,
  seeds: Sequence[int],
  questions: questions_lib.Questions | None = None,
  options: Mapping[str, Any] | None = None,
  example: Mapping[str, str] | None = None,
) -> study_lib.Study:
  """Trains each setting with each seed, unless that is done.

  What an earlier call finished is not done again, and a run it was stopped or
  killed in continues. A run that becomes non-finite is a failure of its own and
  does not stop the others.

  Args:
    configs: A setting each, by name, with one `run.init_from` and the same
      held-out pairs. Their seeds and folders of caches are set here.
    workdir: Folder of everything.
    seeds: Each setting is trained once with each.
    questions: What to ask the reference and every trained model, or None.
    options: What the report should tell beside the settings.
    example: A pair that it should show.

  Raises:
    Stopped: The process was asked to stop.
    ValueError: The configs have no reference or no held-out pairs in common, an
      earlier call finished a run with other settings, or another process is at
      work in the folder.
    FloatingPointError: Every run has become non-finite.
  """
  _check(configs, seeds)
  folder = paths_lib.local(workdir, "--workdir")
  paths_lib.check_folder(folder, "--workdir")
  # Two at once would take each other's runs for killed ones.
  with folder_locks.alone_in(folder, "comparing"):
    return _compare(configs, folder, seeds, questions, options, example)


def _compare(configs, folder, seeds, questions, options, example):
  configs = {
    name: inputs.pin_models(_with_caches(config, folder))
    for name, config in configs.items()
  }
  loaded = {}
  runs, failures = [], []
  for i, seed in enumerate(seeds):
    for j, (name, config) in enumerate(configs.items(), start=1):
      section = dataclasses.replace(config.run, seed=seed)
      config = dataclasses.replace(config, run=section)
      place = folder / f"{name}_seed{seed}"
      print(
        f"[{i * len(configs) + j}/{len(seeds) * len(configs)}] {place.name}",
        flush=True,
      )
      _check_unchanged(config, place, loaded)
      reason = _finish(config, place)
      if reason is not None:
        failures.append(study_lib.Failure(name, seed, reason))
        continue
      runs.append(
        study_lib.Run(
          setting=name,
          seed=seed,
          records=_records(place),
          exact_match=_exact_match(config, place, questions),
        )
      )
  if not runs:
    raise FloatingPointError(f"No run reached its end: {failures[0].reason}")
  _check_one_start(runs)
  first = next(iter(configs.values()))
  return study_lib.Study(
    settings=_settings(configs),
    reference=study_lib.Reference(
      metrics=runs[0].records[0],
      exact_match=_exact_match(first, folder, questions, is_reference=True),
    ),
    runs=tuple(runs),
    failures=tuple(failures),
    options=options or {},
    num_questions=0 if questions is None else len(questions.prompts),
    example=example,
  )


def _check(configs: Mapping[str, config_lib.Config], seeds: Sequence[int]):
  if not seeds or len(set(seeds)) < len(seeds):
    raise ValueError(
      f"--seeds must be different numbers, at least one; got {list(seeds)}."
    )
  for name, config in configs.items():
    if config.run.init_from is None:
      raise ValueError(
        f"{name} has no run.init_from; set it to the model that all runs start "
        "from and are compared with."
      )
    if config.data.eval is None and not config.data.num_eval_pairs:
      raise ValueError(
        f"{name} holds no pairs out to compare on; set data.eval or "
        "data.num_eval_pairs."
      )


def _with_caches(
  config: config_lib.Config, folder: pathlib.Path
) -> config_lib.Config:
  """What all runs need alike is made once, in folders of the comparison.

  Pairs are tokenised, programs compiled, and the reference's log-probs computed
  for all of them; those of a reference that is kept on the hosts are computed
  in every step. What the config names stays.
  """
  data, run, reference = config.data, config.run, config.reference
  if data.cache_dir is None:
    data = dataclasses.replace(data, cache_dir=str(folder / "tokens"))
  if run.compilation_cache_dir is None:
    run = dataclasses.replace(
      run, compilation_cache_dir=str(folder / "compiled")
    )
  if reference.cache_dir is None and not reference.host_offload:
    reference = dataclasses.replace(
      reference, cache_dir=str(folder / "reference")
    )
  return dataclasses.replace(config, data=data, run=run, reference=reference)


def _check_unchanged(config, place, loaded) -> None:
  """Raises ValueError if a run in `place` is not what the report would say.

  Args:
    config: Of the run.
    place: Its folder.
    loaded: The data that was loaded so far, which is added to.
  """
  is_finished = (place / _FINISHED).exists()
  if not is_finished and checkpoints.newest(str(place)) is None:
    return
  check_settings(config, str(place))
  key = config.data, config.batch.row_length
  if key not in loaded:
    loaded[key] = inputs.load_data(config, str(place))
  saved_config.check_same_data(loaded[key], str(place))


def check_settings(config: config_lib.Config, workdir: str) -> None:
  """Raises ValueError if the run in `workdir` has other settings than these."""
  saved = saved_config.load(workdir)
  differences = config_values.differences(
    *(config_lib.to_dict(one) for one in (saved, config))
  )
  other = [d for d in differences if not d.startswith(_FREE_TO_CHANGE)]
  if other:
    raise ValueError(
      f"{workdir} was trained with other settings; use another --workdir or "
      f"undo: {'; '.join(other)}."
    )


def _finish(config: config_lib.Config, place: pathlib.Path) -> str | None:
  """Trains unless that is done; why it never will be, if it will not."""
  done = place / _FINISHED
  if not done.exists():
    reason = None
    try:
      result = train.train(config, str(place))
      if not result.is_complete:
        raise Stopped(
          f"Asked to stop in {place.name}; the same command continues there."
        )
    except FloatingPointError as error:
      reason = str(error)
      print(reason, flush=True)
    atomic_files.write_text(done, json.dumps({"failure": reason}) + "\n")
  return json.loads(done.read_text())["failure"]


def _records(place: pathlib.Path) -> tuple[dict[str, Any], ...]:
  records = metric_writers.read_metrics(place)
  return tuple(record for record in records if record["split"] == "eval")


def _exact_match(
  config: config_lib.Config,
  place: pathlib.Path,
  questions: questions_lib.Questions | None,
  *,
  is_reference: bool = False,
) -> float | None:
  """Asks the trained model, or the reference, unless that was done."""
  if questions is None:
    return None
  asked = {"questions": questions.digest()}
  if is_reference:
    asked["run.init_from"] = config.run.init_from
  done = place / _EXACT_MATCH
  with contextlib.suppress(FileNotFoundError):
    known = json.loads(done.read_text())
    if {key: known.get(key) for key in asked} == asked:
      return known["exact_match"]
  mesh = sharding.make_mesh(config.mesh)
  if is_reference:
    params = inputs.initial_params(config, mesh)
  else:
    abstract = decoder.abstract_params(config.model, mesh)
    params = checkpoints.load_params(str(place), abstract)
  found = questions_lib.exact_match(params, config, questions)
  name = "the reference" if is_reference else place.name
  print(f"{name}: exact match {found:.3f}", flush=True)
  atomic_files.write_text(done, json.dumps(asked | {"exact_match": found}))
  return found


def _check_one_start(runs: Sequence[study_lib.Run]) -> None:
  """Before its first step every run is the reference, on the same pairs."""
  first = runs[0]
  for run in runs:
    for metric in (study_lib.CHOSEN_LOGP, study_lib.REJECTED_LOGP):
      expected, found = (r.records[0][metric] for r in (first, run))
      if abs(found - expected) > _START_TOLERANCE * max(1.0, abs(expected)):
        raise ValueError(
          f"The runs cannot be compared: {metric} begins at {expected:.6g} in "
          f"{first.setting} with seed {first.seed}, and at {found:.6g} in "
          f"{run.setting} with seed {run.seed}. They need one run.init_from "
          "and the same held-out pairs."
        )


def _settings(
  configs: Mapping[str, config_lib.Config],
) -> tuple[study_lib.Setting, ...]:
  """The settings with all options of their loss and whatever else differs."""
  flats = {
    name: config_values.flatten(config_lib.to_dict(config))
    for name, config in configs.items()
  }
  first = next(iter(flats.values()))
  differing = [
    key
    for key in first
    if any(flat[key] != first[key] for flat in flats.values())
  ]
  settings = []
  for name, flat in flats.items():
    keys = [key for key in flat if key.startswith("loss.") or key in differing]
    values = {
      key: str(flat[key]) if isinstance(flat[key], list) else flat[key]
      for key in sorted(keys, key=lambda key: not key.startswith("loss."))
      if flat[key] is not None or not key.startswith("loss.")
    }
    settings.append(study_lib.Setting(name=name, values=values))
  return tuple(settings)
