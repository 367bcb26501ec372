"""What is done is not done again; what was killed goes on; all is compared."""

import dataclasses
import fcntl
import json
import os
import shutil
import subprocess
import sys
from unittest import mock

import pytest
import tiny_runs

from dpop_jax import (
  checkpoints,
  compare,
  metric_writers,
  questions,
  reference_cache,
  report,
  saved_config,
  sweeps,
  train,
)

NAMES = ("dpo_beta0.3", "dpop_beta0.3_dpop_lambda50")


pytestmark = pytest.mark.usefixtures("one_device_and_shared_compilations")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def base(folder):
  data = tiny_runs.write_data(folder)
  return tiny_runs.make_config(
    data,
    run__init_from=tiny_runs.write_model(folder / "model"),
    run__num_steps=4,
    run__eval_every_steps=2,
    mesh__data=1,
    mesh__fsdp=1,
    mesh__tensor=1,
  )


@pytest.fixture(scope="module")
def configs(base):
  return sweeps.expand(base, ["loss.name=dpo,dpop"], [])


@pytest.fixture(scope="module")
def asked(folder):
  rows = [{"prompt": "ab", "answer": "c"}, {"prompt": "ba", "answer": "e"}]
  path = tiny_runs.write_rows(folder / "questions.jsonl", rows)
  return questions.load(path, checker="exact", max_new_tokens=3)


@pytest.fixture(scope="module")
def scored():
  """Of every batch that the reference scored: whether it was to check."""
  return []


@pytest.fixture(scope="module")
def done(configs, asked, scored, tmp_path_factory):
  """A workdir with both losses and two seeds, and the study of it."""
  workdir = tmp_path_factory.mktemp("compared")
  call = reference_cache._Scorer.__call__

  def count(scorer, plan, step):
    scored.append(plan.reference_logps is not None)
    return call(scorer, plan, step)

  with mock.patch.object(reference_cache._Scorer, "__call__", count):
    study = compare.compare(
      configs, str(workdir), seeds=[0, 1], questions=asked
    )
  return workdir, study


@pytest.fixture
def copy(done, tmp_path):
  workdir = tmp_path / "copy"
  shutil.copytree(done[0], workdir)
  return workdir


def no_training():
  return mock.patch.object(train, "train", side_effect=AssertionError)


def same(left, right):
  return left.summary() == right.summary()


def test_each_setting_is_trained_with_each_seed_and_all_is_reported(
  done, tmp_path
):
  workdir, study = done
  assert [(run.setting, run.seed) for run in study.runs] == [
    (name, seed) for seed in (0, 1) for name in NAMES
  ]
  assert all(run.steps == (0, 2, 4) for run in study.runs)
  # The same data in another order is another run.
  finals = [run.final["logps/chosen"] for run in study.runs]
  assert len(set(finals)) == 4
  assert [setting.values for setting in study.settings] == [
    {"loss.name": "dpo", "loss.beta": 0.3},
    {"loss.name": "dpop", "loss.beta": 0.3, "loss.dpop_lambda": 50.0},
  ]
  assert study.num_questions == 2
  written = report.write(study, tmp_path)
  found = json.loads(written["report.json"].read_text())
  chosen = found["settings"][NAMES[0]]["final"]["chosen_logratio"]
  ends = [
    metric_writers.read_metrics(workdir / f"{NAMES[0]}_seed{s}")[-1]
    for s in (0, 1)
  ]
  assert chosen["by_seed"] == pytest.approx(
    [end["logratios/chosen"] for end in ends], abs=1e-5
  )
  assert chosen["min"] < chosen["mean"] < chosen["max"]


def test_runs_share_tokens_and_what_is_compiled(done):
  workdir, _ = done
  # The pairs as one entry, and no run has its own.
  assert len([p for p in (workdir / "tokens").iterdir() if p.is_dir()]) == 1
  assert not list(workdir.glob("*_seed*/tokens"))


def test_the_reference_is_scored_once_for_all_runs(done, scored):
  workdir, _ = done
  # Of 16 pairs to train on and 4 held out, each set is one batch.
  assert scored.count(False) == 2
  assert len(list((workdir / "reference").glob("*/key.json"))) == 2
  # Every start checks some batches of both sets.
  assert scored.count(True) >= 4 * 2


def test_results_are_those_of_a_reference_in_the_step(done, configs, tmp_path):
  config = configs[NAMES[1]]
  assert config.reference.cache_dir is None
  train.train(replaced(config, "run", seed=1), str(tmp_path))
  alone, compared = (
    metric_writers.read_metrics(place)
    for place in (tmp_path, done[0] / f"{NAMES[1]}_seed1")
  )
  assert [r["step"] for r in alone] == [r["step"] for r in compared]
  for one, other in zip(alone, compared, strict=True):
    for name in ("logps/chosen", "logratios/rejected", "dpop/penalty", "loss"):
      assert other[name] == pytest.approx(one[name], rel=1e-5, abs=1e-5)


def test_runs_from_before_there_was_a_cache_are_done(copy, done, configs):
  for path in copy.glob("*_seed*/config.json"):
    saved = json.loads(path.read_text())
    assert saved["reference"]["cache_dir"] == str(done[0] / "reference")
    saved["reference"]["cache_dir"] = None
    path.write_text(json.dumps(saved))
  shutil.rmtree(copy / "reference")
  with no_training():
    again = compare.compare(configs, str(copy), seeds=[0, 1])
  assert [run.records for run in again.runs] == [
    run.records for run in done[1].runs
  ]


@pytest.mark.parametrize(
  "given", [dict(cache_dir="kept"), dict(host_offload=True)]
)
def test_what_the_config_says_of_the_reference_stays(base, given, tmp_path):
  config = replaced(base, "reference", **given)
  assert compare._with_caches(config, tmp_path).reference == config.reference


def test_the_same_call_again_does_nothing(done, configs, asked):
  workdir, study = done
  with (
    no_training(),
    mock.patch.object(questions, "exact_match", side_effect=AssertionError),
  ):
    again = compare.compare(
      configs, str(workdir), seeds=[0, 1], questions=asked
    )
  assert same(again, study)


def test_more_settings_and_fewer_seeds_train_what_is_new(done, copy, base):
  more = sweeps.expand(base, ["loss.name=dpo,ipo"], [])

  def as_another_run(config, workdir):
    shutil.copytree(done[0] / f"{NAMES[0]}_seed1", workdir)
    saved_config.save(config, workdir)
    return train.Result(4, True, None, {})

  with mock.patch.object(train, "train", side_effect=as_another_run) as trained:
    study = compare.compare(more, str(copy), seeds=[1])
  ((config, place),) = [call.args for call in trained.call_args_list]
  assert (config.loss.name, config.run.seed) == ("ipo", 1)
  assert place == str(copy / "ipo_beta0.3_seed1")
  assert study.seeds == (1,) and study.num_questions == 0


def test_a_run_that_was_stopped_or_killed_goes_on(done, configs, copy):
  place = copy / f"{NAMES[1]}_seed1"
  shutil.rmtree(place)
  after_two = mock.Mock(side_effect=[False, True])
  with (
    mock.patch.object(checkpoints.Preemption, "requested", after_two),
    pytest.raises(compare.Stopped, match="Asked to stop in dpop.*_seed1"),
  ):
    compare.compare(configs, str(copy), seeds=[0, 1])
  assert not (place / "finished.json").exists()
  # What a kill leaves is the same: a checkpoint, and no word of an end.
  with mock.patch.object(train, "train", side_effect=train.train) as trained:
    study = compare.compare(configs, str(copy), seeds=[0, 1])
  assert len(trained.call_args_list) == 1
  records = metric_writers.read_metrics(place)
  assert [r["step"] for r in records if r["split"] == "eval"] == [0, 2, 4]
  expected, found = (
    s.summary()["settings"][NAMES[1]]["curves"] for s in (done[1], study)
  )
  assert found == expected


def test_a_run_that_becomes_non_finite_does_not_stop_the_others(configs, copy):
  place = copy / f"{NAMES[0]}_seed1"
  shutil.rmtree(place)
  error = FloatingPointError("The update of step 3 is not finite.")
  with mock.patch.object(train, "train", side_effect=error):
    study = compare.compare(configs, str(copy), seeds=[0, 1])
  assert study.failures == ((NAMES[0], 1, str(error)),)
  assert len(study.runs) == 3
  # It would be so again.
  place.mkdir(exist_ok=True)
  shutil.copy(copy / f"{NAMES[0]}_seed0" / "config.json", place)
  with (
    no_training(),
    mock.patch.object(compare, "check_settings"),
  ):
    assert same(compare.compare(configs, str(copy), seeds=[0, 1]), study)


def test_nothing_that_ended_is_an_error(configs, tmp_path):
  error = FloatingPointError("Not finite.")
  with (
    mock.patch.object(train, "train", side_effect=error),
    pytest.raises(FloatingPointError, match="No run reached its end"),
  ):
    compare.compare(configs, str(tmp_path), seeds=[0])


def replaced(config, section, **changes):
  value = dataclasses.replace(getattr(config, section), **changes)
  return dataclasses.replace(config, **{section: value})


@pytest.mark.parametrize(
  "section, changes, message",
  [
    ("run", dict(num_steps=9), "run.num_steps: 4 -> 9"),
    ("run", dict(eval_every_steps=1), "run.eval_every_steps: 2 -> 1"),
    ("optimizer", dict(peak_learning_rate=1.0), "0.01 -> 1.0"),
    ("data", dict(max_pairs=9), "trained on other data than data.train"),
  ],
)
def test_a_run_of_other_settings_is_not_reported(
  done, configs, section, changes, message
):
  changed = {n: replaced(c, section, **changes) for n, c in configs.items()}
  with no_training(), pytest.raises(ValueError, match=message):
    compare.compare(changed, str(done[0]), seeds=[0])


def test_what_does_not_change_results_may_change(done, configs, asked):
  workdir, study = done
  changed = {
    name: replaced(config, "checkpoints", save_every_steps=5)
    for name, config in configs.items()
  }
  with no_training():
    again = compare.compare(
      changed, str(workdir), seeds=[0, 1], questions=asked
    )
  assert same(again, study)


def test_other_questions_are_asked_again(copy, configs, asked):
  other = asked._replace(max_new_tokens=2)
  with (
    no_training(),
    mock.patch.object(questions, "exact_match", return_value=0.5) as ask,
  ):
    study = compare.compare(configs, str(copy), seeds=[0], questions=other)
  # Two runs and the reference.
  assert ask.call_count == 3 and study.reference.exact_match == 0.5


def test_runs_that_did_not_begin_alike_are_not_compared(copy, configs):
  path = copy / f"{NAMES[1]}_seed0" / "metrics.jsonl"
  first, *others = path.read_text().splitlines()
  record = json.loads(first)
  record["logps/rejected"] += 1.0
  path.write_text("\n".join([json.dumps(record), *others]) + "\n")
  with (
    no_training(),
    pytest.raises(
      ValueError, match="cannot be compared: logps/rejected begins at"
    ),
  ):
    compare.compare(configs, str(copy), seeds=[0])


@pytest.mark.parametrize(
  "section, changes, message",
  [
    ("run", dict(init_from=None), "has no run.init_from"),
    ("data", dict(num_eval_pairs=0), "holds no pairs out"),
  ],
)
def test_without_a_common_measure_nothing_is_begun(
  configs, tmp_path, section, changes, message
):
  changed = {n: replaced(c, section, **changes) for n, c in configs.items()}
  with pytest.raises(ValueError, match=message):
    compare.compare(changed, str(tmp_path), seeds=[0])
  assert list(tmp_path.iterdir()) == []


def test_two_processes_do_not_compare_in_one_folder(done, configs):
  with (
    (done[0] / "lock").open("w") as file,
    pytest.raises(ValueError, match="Another process is comparing in"),
  ):
    fcntl.flock(file, fcntl.LOCK_EX)
    compare.compare(configs, str(done[0]), seeds=[0, 1])


@pytest.mark.parametrize("seeds", [[], [0, 0]])
def test_seeds_are_different_numbers(configs, tmp_path, seeds):
  with pytest.raises(ValueError, match="--seeds must be different numbers"):
    compare.compare(configs, str(tmp_path), seeds=seeds)


@pytest.mark.parametrize(
  "row, message",
  [
    ({"prompt": "ab"}, "Row 1 of .* should have `prompt` and `answer`"),
    ({"prompt": "ab", "answer": "none"}, "is none to the checker 'number'"),
  ],
)
def test_questions_that_cannot_be_checked_are_refused(tmp_path, row, message):
  path = tiny_runs.write_rows(tmp_path / "q.jsonl", [row])
  with pytest.raises(ValueError, match=message):
    questions.load(path, checker="number", max_new_tokens=3)


def test_the_command_tells_a_bad_sweep_in_one_sentence(base, tmp_path):
  from dpop_jax import config as config_lib

  sections = config_lib.to_dict(base)
  path = tmp_path / "small.py"
  path.write_text(
    "from dpop_jax import config\n"
    f"def get_config():\n  return config.config_dict(**{sections!r})\n"
  )
  found = subprocess.run(
    [
      *(sys.executable, "-m", "dpop_jax.cli.compare"),
      *(f"--config={path}", f"--workdir={tmp_path}/out"),
      "--sweep=loss.bta=1,2",
    ],
    capture_output=True,
    text=True,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
  )
  assert found.returncode == 1
  assert found.stderr == (
    "Error: Unknown config key loss.bta; did you mean loss.beta?\n"
  )
  assert not (tmp_path / "out").exists()
