"""The loop: it resumes, stops, checks itself, and says why."""

import fcntl
import json
import logging
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import textwrap
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs

from dpop_jax import (
  checkpoints,
  evaluate,
  inputs,
  metric_writers,
  program,
  reference_cache,
  saved_config,
  sharding,
  steps,
  train,
  training_log,
)
from dpop_jax import config as config_lib
from dpop_jax.models import decoder

TESTS_DIR = pathlib.Path(__file__).parent


pytestmark = pytest.mark.usefixtures("one_device_and_shared_compilations")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return tiny_runs.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def make_config(data):
  def make_config(**changes):
    mesh = dict(mesh__data=1, mesh__fsdp=1, mesh__tensor=1)
    return tiny_runs.make_config(data, **mesh | changes)

  return make_config


@pytest.fixture(scope="module")
def run(make_config, tmp_path_factory):
  """One uninterrupted run, its workdir, and the names of all it compiled."""
  workdir = str(tmp_path_factory.mktemp("run"))
  compiled = []

  class Handler(logging.Handler):
    def emit(self, record):
      message = record.getMessage()
      if message.startswith("Finished XLA compilation of "):
        compiled.append(message.split()[4])

  handler = Handler()
  logger = logging.getLogger("jax._src.dispatch")
  logger.addHandler(handler)
  logger.propagate = False
  with jax.log_compiles():
    result = train.train(make_config(), workdir)
  logger.propagate = True
  logger.removeHandler(handler)
  return result, workdir, compiled


def records(workdir, split):
  return {
    record["step"]: record
    for record in metric_writers.read_metrics(workdir)
    if record["split"] == split
  }


def saved_steps(workdir):
  folder = pathlib.Path(workdir) / "checkpoints"
  return sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit())


def assert_same_bits(actual, expected):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for a, b in zip(
    jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b), strict=True)


def assert_steps_come_once(workdir):
  written = [
    (r["split"], r["step"]) for r in metric_writers.read_metrics(workdir)
  ]
  assert len(written) == len(set(written))


def assert_same_metrics(actual, expected, **tolerances):
  """All but the speed."""
  actual, expected = (
    {
      (record["split"], record["step"]): {
        name: value
        for name, value in record.items()
        if not name.startswith(("perf/", "split"))
      }
      for record in metric_writers.read_metrics(workdir)
    }
    for workdir in (actual, expected)
  )
  if tolerances:
    assert actual.keys() == expected.keys()
    expected = {
      key: pytest.approx(values, **tolerances)
      for key, values in expected.items()
    }
  assert actual == expected


def test_a_run_leaves_its_config_metrics_and_newest_checkpoints(
  run, make_config
):
  result, workdir, _ = run
  assert (result.step, result.is_complete) == (8, True)
  assert saved_config.load(workdir) == make_config()
  # Every 3 steps and the last, of which two are kept.
  assert saved_steps(workdir) == [6, 8]
  assert list(records(workdir, "train")) == [2, 4, 6, 8]
  last = records(workdir, "train")[8]
  assert last["learning_rate"] == pytest.approx(1e-2)
  assert last["epoch"] == 2.0  # 8 * 4 pairs of 16.
  assert 0 < last["perf/packing_fill"] <= 1 < last["perf/sharing"]


def test_held_out_pairs_are_evaluated_at_step_0_and_at_intervals(run):
  result, workdir, _ = run
  evaluations = records(workdir, "eval")
  assert list(evaluations) == [0, 4, 8]
  assert evaluations[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
  assert evaluations[0]["logratios/chosen"] == 0.0
  assert evaluations[8]["loss"] < evaluations[4]["loss"] < math.log(2)
  for name, value in result.eval_metrics.items():
    assert evaluations[8][name] == value, name


def test_the_train_step_is_compiled_once(run):
  _, _, compiled = run
  assert compiled.count("jit(train_step)") == 1
  assert compiled.count("jit(eval_step)") == 1


def test_a_finished_run_is_evaluated_and_left_as_it_is(run, make_config):
  result, workdir, _ = run
  before = (pathlib.Path(workdir) / "metrics.jsonl").read_text()
  again = train.train(make_config(), workdir)
  assert (again.step, again.is_complete) == (8, True)
  assert_same_bits(again.params, result.params)
  assert again.eval_metrics == result.eval_metrics
  assert (pathlib.Path(workdir) / "metrics.jsonl").read_text() == before


def test_evaluation_of_a_workdir_is_that_of_the_loop(run, make_config):
  result, workdir, _ = run
  assert evaluate.evaluate_run(make_config(), workdir) == result.eval_metrics


def test_a_killed_run_ends_with_the_same_bits(
  run, data, tmp_path, one_device_and_shared_compilations
):
  result, _, _ = run
  workdir = tmp_path / "killed"
  sections = tiny_runs.make_sections(
    data, mesh__data=1, mesh__fsdp=1, mesh__tensor=1
  )
  code = f"""
    import os, pathlib, signal, time
    import jax
    from dpop_jax import config, sharding, train
    from dpop_jax.data import plan

    for name, value in {one_device_and_shared_compilations!r}.items():
      jax.config.update(name, value)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    make_mesh, make_step = sharding.make_mesh, plan.Plan.step
    sharding.make_mesh = lambda c: make_mesh(c, jax.devices()[:1])

    def make_step_or_die(self, step, rows):
      # The input of step 6 is prepared while step 5 is running.
      if self._is_shuffled and step == 5:
        while not pathlib.Path({str(workdir)!r}, "checkpoints", "3").exists():
          time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
      return make_step(self, step, rows)

    plan.Plan.step = make_step_or_die
    train.train(config.from_dict({sections!r}), {str(workdir)!r})
  """
  done = subprocess.run(
    [sys.executable, "-c", textwrap.dedent(code)],
    cwd=TESTS_DIR.parent,
    # As in these tests, or else everything is compiled again.
    env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"},
    capture_output=True,
    text=True,
  )
  assert done.returncode == -signal.SIGKILL, done.stderr
  assert saved_steps(workdir) == [3]
  resumed = train.train(config_lib.from_dict(sections), str(workdir))
  assert resumed.is_complete and resumed.step == 8
  assert_same_bits(resumed.params, result.params)
  assert resumed.eval_metrics == result.eval_metrics
  assert_steps_come_once(workdir)
  assert list(records(workdir, "train")) == [2, 4, 6, 8]
  assert_same_metrics(workdir, run[1])


def test_on_sigterm_the_run_saves_stops_and_can_go_on(
  run, make_config, tmp_path, capsys
):
  result, _, _ = run
  workdir = str(tmp_path)
  add = training_log.TrainingLog.add

  def add_and_terminate(self, step, *rest):
    add(self, step, *rest)
    if step == 5:
      os.kill(os.getpid(), signal.SIGTERM)

  with mock.patch.object(training_log.TrainingLog, "add", add_and_terminate):
    stopped = train.train(make_config(), workdir)
  assert (stopped.step, stopped.is_complete) == (5, False)
  assert "Asked to stop: saved step 5." in capsys.readouterr().err
  assert saved_steps(workdir) == [3, 5]
  assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
  resumed = train.train(make_config(), workdir)
  assert "Continuing from step 5." in capsys.readouterr().err
  assert_same_bits(resumed.params, result.params)
  assert_steps_come_once(workdir)
  # Step 5, of which no record was written, is in that of step 6.
  assert_same_metrics(workdir, run[1])


def test_two_runs_at_once_in_one_workdir_are_refused(run_copy, make_config):
  config = pathlib.Path(run_copy, "config.json")
  before = config.stat().st_mtime_ns
  with (
    pathlib.Path(run_copy, "lock").open("w") as file,
    pytest.raises(ValueError, match="Another process is training in .*copy; "),
  ):
    fcntl.flock(file, fcntl.LOCK_EX)
    train.train(make_config(), run_copy)
  assert config.stat().st_mtime_ns == before
  # Whoever held it has ended.
  assert train.train(make_config(), run_copy).is_complete


@pytest.fixture
def run_copy(run, tmp_path):
  """A workdir to spoil."""
  copy = tmp_path / "copy"
  shutil.copytree(run[1], copy)
  return str(copy)


def test_another_config_is_refused_with_what_differs(run_copy, make_config):
  before = saved_config.load(run_copy)
  with pytest.raises(ValueError) as error:
    train.train(make_config(loss__beta=0.1, run__log_every_steps=1), run_copy)
  assert str(error.value) == (
    f"{run_copy} holds a run with another config; use another --workdir or "
    "undo: loss.beta: 0.3 -> 0.1."
  )
  assert saved_config.load(run_copy) == before
  assert saved_steps(run_copy) == [6, 8]


def test_keys_that_are_free_to_change_may_change(run_copy, make_config, capsys):
  config = make_config(
    run__num_steps=9,
    run__log_every_steps=3,
    run__eval_every_steps=None,
    checkpoints__keep=1,
  )
  # These would have to be compiled.
  other = make_config(
    batch__rows_per_microbatch=2, model__remat="full", mesh__tensor=2
  )
  assert len(saved_config.check_same_run(other, run_copy)) == 3
  result = train.train(config, run_copy)
  assert (result.step, result.is_complete) == (9, True)
  assert saved_steps(run_copy) == [9]
  assert list(records(run_copy, "train")) == [2, 4, 6, 8, 9]
  assert list(records(run_copy, "eval")) == [0, 4, 8, 9]
  shown = capsys.readouterr().err
  assert "Changed since the last start: run.num_steps: 8 -> 9" in shown
  assert saved_config.load(run_copy) == config


def test_keys_that_an_earlier_version_did_not_have_are_no_difference(
  run_copy, make_config
):
  path = pathlib.Path(run_copy) / "config.json"
  values = json.loads(path.read_text())
  del values["data"]["weights"], values["reference"]
  path.write_text(json.dumps(values))
  assert saved_config.check_same_run(make_config(), run_copy) == []
  with pytest.raises(ValueError, match=r"undo: optimizer.b1: None -> 0.8\.$"):
    saved_config.check_same_run(make_config(optimizer__b1=0.8), run_copy)


def test_without_a_checkpoint_there_is_nothing_to_protect(
  run_copy, make_config
):
  shutil.rmtree(pathlib.Path(run_copy) / "checkpoints")
  other = make_config(loss__beta=0.1)
  assert saved_config.check_same_run(other, run_copy) == []


def test_a_reference_that_is_another_model_is_noticed_at_step_0(
  make_config, tmp_path
):
  def start(*arguments):
    state, reference = start_as_it_should(*arguments)
    return state, jax.tree.map(lambda x: x * 1.5, reference)

  start_as_it_should = train._start
  with (
    mock.patch.object(train, "_start", start),
    pytest.raises(ValueError, match=r"first loss is \d.* instead of 0.693147"),
  ):
    train.train(make_config(), str(tmp_path))
  assert saved_steps(tmp_path) == []


@pytest.mark.parametrize(
  ("changes", "loss", "is_accepted"),
  [
    ({}, math.log(2) + 0.9e-4, True),
    ({"model__dtype": "bfloat16"}, math.log(2) + 0.9e-3, True),
    ({}, math.log(2) - 1.1e-4, False),
    ({}, math.nan, False),
    ({"loss__name": "ipo"}, (1 / 0.6) ** 2 * (1 + 0.9e-4), True),
    ({"loss__name": "ipo"}, (1 / 0.6) ** 2 * (1 + 1.1e-4), False),
    ({"loss__name": "sft"}, 3.0, True),
  ],
)
def test_the_first_loss_is_that_of_equal_models(
  make_config, changes, loss, is_accepted
):
  config = make_config(**changes)
  if is_accepted:
    training_log.check_initial_loss(config, loss)
  else:
    with pytest.raises(ValueError, match="The first loss is"):
      training_log.check_initial_loss(config, loss)


def test_parameters_that_are_not_finite_are_not_trained(make_config, tmp_path):
  make_params = decoder.make_params

  def make_bad_params(*arguments):
    params = make_params(*arguments)
    scale = params["final_norm"]["scale"]
    return params | {"final_norm": {"scale": scale.at[3].set(jnp.inf)}}

  with (
    mock.patch.object(decoder, "make_params", make_bad_params),
    pytest.raises(FloatingPointError) as error,
  ):
    train.train(make_config(), str(tmp_path))
  assert str(error.value) == (
    "The state after step 0 is not finite: params/final_norm/scale. That is "
    "what the run starts from; check run.init_from."
  )
  assert saved_steps(tmp_path) == []


@pytest.mark.parametrize(
  ("field", "poisoned_step", "message"),
  [
    # The next step computes with it.
    ("params", 4, "The update of step 5 is not finite: "),
    # Step 6 is to be saved, and nothing has been computed with it yet.
    ("params", 6, "The state after step 6 is not finite: params/embedding. "),
    ("opt_state", 6, "The state after step 6 is not finite: opt_state/"),
  ],
)
def test_what_is_not_finite_is_named_with_its_step_and_never_saved(
  make_config, tmp_path, field, poisoned_step, message
):
  compile_step = program.compile_step

  def compile_poisoned_step(step, *rest):
    compiled = compile_step(step, *rest)

    def run_poisoned_step(*arguments):
      state, report = compiled(*arguments)
      if int(state.step) == poisoned_step:
        leaves, structure = jax.tree.flatten(getattr(state, field))
        index = next(i for i, leaf in enumerate(leaves) if leaf.ndim == 2)
        leaves[index] = leaves[index].at[4, 1].set(jnp.inf)
        tree = jax.tree.unflatten(structure, leaves)
        state = state._replace(**{field: tree})
      return state, report

    is_training = step.__wrapped__.func is steps.train_step
    return run_poisoned_step if is_training else compiled

  config = make_config(run__eval_every_steps=None)
  with (
    mock.patch.object(program, "compile_step", compile_poisoned_step),
    pytest.raises(FloatingPointError) as error,
  ):
    train.train(config, str(tmp_path))
  assert str(error.value).startswith(message)
  assert "Nothing of it was saved; lower optimizer.peak" in str(error.value)
  assert saved_steps(tmp_path) == [3]


def test_sft_uses_the_same_loop_and_preferences_start_from_it(
  make_config, tmp_path
):
  sft_dir, dpop_dir = str(tmp_path / "sft"), str(tmp_path / "dpop")
  sft = train.train(make_config(loss__name="sft"), sft_dir)
  assert sft.is_complete
  evaluations = records(sft_dir, "eval")
  assert list(evaluations) == [0, 4, 8]
  assert evaluations[8]["loss"] < evaluations[0]["loss"]
  # The loss is a mean over tokens.
  per_token = evaluations[8]["logps_per_token/chosen"]
  assert evaluations[8]["loss"] == pytest.approx(-per_token, rel=1e-6)
  assert_steps_come_once(sft_dir)
  assert evaluate.evaluate_run(make_config(loss__name="sft"), sft_dir) == (
    sft.eval_metrics
  )

  config = make_config(run__init_from=sft_dir)
  train.train(config, dpop_dir)
  for step, values in records(dpop_dir, "eval").items():
    # At every step the reference is the supervised model, on the same answers.
    reference = values["reference_logps_per_token/chosen"]
    assert reference == pytest.approx(per_token, rel=1e-5), step
  first = records(dpop_dir, "eval")[0]
  assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
  assert first["logps_per_token/chosen"] == pytest.approx(per_token, rel=1e-5)

  # The supervised run goes on; the reference of the other stays what it was.
  assert saved_config.load(dpop_dir).run.init_from == f"{sft_dir}/checkpoints/8"
  longer = make_config(loss__name="sft", run__num_steps=9)
  train.train(longer, sft_dir)
  with pytest.raises(ValueError, match=r"run.init_from: .*/8 -> .*/9\."):
    train.train(config, dpop_dir)


def test_a_start_that_is_not_there_is_named(make_config, tmp_path):
  config = make_config(run__init_from=str(tmp_path / "nothing"))
  with pytest.raises(ValueError, match="run.init_from='.*nothing'; expected"):
    train.train(config, str(tmp_path / "run"))
  assert not (tmp_path / "run").exists()


def test_a_start_that_was_trained_as_another_model_is_refused(
  run, make_config, tmp_path
):
  workdir = run[1]
  config = make_config(run__init_from=workdir, model__rope_theta=5.0)
  with pytest.raises(
    ValueError, match=r"another model .*: rope_theta: 10000\.0 -> 5\.0\."
  ):
    train.train(config, str(tmp_path / "run"))
  assert not (tmp_path / "run").exists()
  # How it is computed may differ.
  config = make_config(run__init_from=workdir, model__dtype="bfloat16")
  inputs.check_start(inputs.pin_models(config))


@pytest.mark.slow
def test_the_reference_may_be_another_model(make_config, tmp_path):
  """Other sizes, another family, other weights; scored as it scores itself."""
  path = tiny_runs.write_model(
    tmp_path / "other", hidden_size=32, qk_norm="head", num_hidden_layers=1
  )
  config = make_config(
    run__num_steps=3, run__eval_every_steps=1, reference__init_from=path
  )
  train.train(config, str(tmp_path / "run"))
  other = make_config(
    run__num_steps=3,
    run__init_from=path,
    model__hidden_size=32,
    model__qk_norm="head",
    model__num_hidden_layers=1,
  )
  train.train(other, str(tmp_path / "other_run"))
  name = "logps_per_token/chosen"
  expected = records(str(tmp_path / "other_run"), "eval")[0][name]
  evaluations = records(str(tmp_path / "run"), "eval")
  assert list(evaluations) == [0, 1, 2, 3]
  for values in evaluations.values():
    assert values[f"reference_{name}"] == pytest.approx(expected, rel=1e-5)
  # So the loss does not start at ln 2, which is no mistake here.
  assert abs(evaluations[0]["loss"] - math.log(2)) > 0.01
  again = evaluate.evaluate_run(config, str(tmp_path / "run"))
  assert again == {name: evaluations[3][name] for name in again}


@pytest.mark.slow
def test_the_reference_may_be_kept_in_half_the_memory(make_config, tmp_path):
  changes = dict(model__dtype="bfloat16", reference__param_dtype="bfloat16")
  config = make_config(run__num_steps=3, **changes)
  model = config_lib.reference_model(config)
  assert (model.param_dtype, config.model.param_dtype) == (
    "bfloat16",
    "float32",
  )
  reference = inputs.load_reference(config, sharding.make_mesh(config.mesh))
  assert {x.dtype.name for x in jax.tree.leaves(reference)} == {"bfloat16"}
  # Fresh norms are 1 and matrices are cast anyway: ln 2 to the last bit.
  train.train(config, str(tmp_path / "run"))
  first = records(str(tmp_path / "run"), "eval")[0]["loss"]
  assert first == pytest.approx(math.log(2), abs=1e-6)


def test_a_vocabulary_that_is_too_small_is_refused(make_config, tmp_path):
  config = make_config(model__vocab_size=8)
  with pytest.raises(ValueError) as error:
    train.train(config, str(tmp_path))
  assert str(error.value) == (
    "data.train holds token 13, but model.vocab_size is 8; raise it to the "
    "tokenizer's 14 or more."
  )
  assert not (tmp_path / "config.json").exists()


def test_a_saved_config_that_is_damaged_is_named(run_copy, make_config):
  path = pathlib.Path(run_copy) / "config.json"
  for text, message in (
    ("{", "Expecting property name"),
    ("[]", "it should hold an object"),
    (json.dumps({"modell": {}}), "Unknown config key modell"),
  ):
    path.write_text(text)
    with pytest.raises(ValueError, match=f"config.json cannot be .*{message}"):
      saved_config.load(run_copy)
  path.unlink()
  with pytest.raises(ValueError, match="There is no run in .*config.json"):
    saved_config.load(run_copy)


def test_other_data_behind_the_same_names_is_refused(run_copy, make_config):
  config = saved_config.load(run_copy)
  path = pathlib.Path(config.data.train)
  before = path.read_text()
  lines = before.splitlines(keepends=True)
  try:
    path.write_text("".join(lines[::-1]))
    with pytest.raises(ValueError, match=r"other data than data.train"):
      train.train(config, str(run_copy))
  finally:
    path.write_text(before)


def test_checkpoints_without_their_config_are_refused(run_copy, make_config):
  (pathlib.Path(run_copy) / saved_config.FILE_NAME).unlink()
  with pytest.raises(ValueError, match="without the config.json"):
    train.train(make_config(), str(run_copy))


def test_a_workdir_that_is_a_file_is_refused(make_config, tmp_path):
  path = tmp_path / "file"
  path.write_text("")
  with pytest.raises(ValueError, match="is a file"):
    train.train(make_config(), str(path))


# The reference's log-probs, kept.


@pytest.fixture(scope="module")
def cached_run(make_config, tmp_path_factory):
  """The same run with a cache of the reference's log-probs: also its config."""
  folder = tmp_path_factory.mktemp("cached")
  config = make_config(reference__cache_dir=str(folder / "cache"))
  return train.train(config, str(folder / "run")), str(folder / "run"), config


def test_with_kept_log_probs_a_run_is_the_same(run, cached_run):
  assert_same_metrics(cached_run[1], run[1], rel=1e-4, abs=1e-5)
  first = records(cached_run[1], "eval")[0]
  assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
  # Rounding does not switch the penalty on.
  assert first["dpop/active_fraction"] == 0
  for actual, expected in zip(
    jax.tree.leaves(cached_run[0].params),
    jax.tree.leaves(run[0].params),
    strict=True,
  ):
    np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_on_sigterm_the_scoring_stops_and_goes_on_where_it_was(
  cached_run, make_config, tmp_path, capsys
):
  config = make_config(reference__cache_dir=str(tmp_path / "cache"))
  workdir = str(tmp_path / "run")
  add, added = reference_cache._Table.add, []

  def add_and_terminate(table, part, logps):
    add(table, part, logps)
    added.append(part.file.name)
    if len(added) == 1:
      os.kill(os.getpid(), signal.SIGTERM)

  # Sixteen pairs in parts of six, and four that are held out.
  with (
    mock.patch.object(reference_cache, "_PAIRS_A_PART", 6),
    mock.patch.object(reference_cache._Table, "add", add_and_terminate),
  ):
    stopped = train.train(config, workdir)
    assert (stopped.step, stopped.is_complete) == (0, False)
    assert added == ["000000.logps"]
    assert "Asked to stop while the reference" in capsys.readouterr().err
    assert saved_steps(workdir) == []
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert train.train(config, workdir).is_complete
  # The first part was not scored again; the last one is of the held-out pairs.
  assert added == [f"00000{i}.logps" for i in (0, 1, 2, 0)]
  assert_same_metrics(workdir, cached_run[1], rel=1e-4, abs=1e-5)


def test_evaluation_of_a_workdir_needs_no_kept_log_probs(cached_run):
  result, workdir, config = cached_run
  found = evaluate.evaluate_run(config, workdir)
  assert found == pytest.approx(result.eval_metrics, rel=1e-4, abs=1e-5)


def test_on_resuming_the_reference_is_freed_before_the_state_is_there(
  cached_run, tmp_path
):
  result, workdir, config = cached_run
  shutil.copytree(workdir, tmp_path / "run")
  shutil.rmtree(tmp_path / "run" / "checkpoints" / "8")
  restore = checkpoints.Checkpoints.restore
  attach = reference_cache.attach
  live_bytes = lambda: sum(x.nbytes for x in jax.live_arrays())
  seen = {"before": live_bytes()}

  def attach_and_look(*arguments, **options):
    seen["with reference"] = live_bytes()
    return attach(*arguments, **options)

  def look_and_restore(*arguments):
    seen["restoring"] = live_bytes()
    return restore(*arguments)

  with (
    mock.patch.object(reference_cache, "attach", attach_and_look),
    mock.patch.object(checkpoints.Checkpoints, "restore", look_and_restore),
    mock.patch.object(reference_cache._Table, "add") as add,
  ):
    resumed = train.train(config, str(tmp_path / "run"))
  size = sum(x.nbytes for x in jax.tree.leaves(result.params))
  assert seen["with reference"] - seen["before"] >= size
  assert abs(seen["restoring"] - seen["before"]) < size / 10
  add.assert_not_called()
  assert_same_bits(resumed.params, result.params)


def test_a_reference_of_its_own_is_freed_before_the_first_step(
  make_config, tmp_path
):
  config = make_config(
    reference__cache_dir=str(tmp_path / "cache"),
    reference__param_dtype="bfloat16",
  )
  count = lambda: sum(x.dtype == jnp.bfloat16 for x in jax.live_arrays())
  before, seen = count(), []
  attach = reference_cache.attach

  def attach_and_look(*arguments, **options):
    seen.append(count() - before)
    return attach(*arguments, **options)

  def look(*_, **__):
    seen.append(count() - before)
    return train.Result(0, True, None, None)

  with (
    mock.patch.object(reference_cache, "attach", attach_and_look),
    mock.patch.object(train, "_run", look),
  ):
    train.train(config, str(tmp_path / "run"))
  assert seen[0] > 0 == seen[1]
