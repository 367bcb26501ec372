"""Runs with everything in a bucket, which the libraries see over HTTP."""

import contextlib
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time
from unittest import mock

import jax
import numpy as np
import pytest
import tiny_runs

from dpop_jax import (
  answers,
  checkpoints,
  evaluate,
  exports,
  generate,
  imports,
  metric_writers,
  model_folders,
  program,
  saved_config,
  sharding,
  train,
)
from dpop_jax.data import dataset, jsonl, pair_sets, tokenizers
from dpop_jax.models import decoder

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module", autouse=True)
def one_device_and_shared_compilations(tmp_path_factory):
  make_mesh = sharding.make_mesh
  one_device = lambda config: make_mesh(config, jax.devices()[:1])
  with (
    mock.patch.object(sharding, "make_mesh", one_device),
    compilation_cache(str(tmp_path_factory.mktemp("compiled"))),
  ):
    yield


@contextlib.contextmanager
def compilation_cache(folder):
  """Keeps what is compiled in the block in a folder."""
  options = {
    "jax_enable_compilation_cache": True,
    "jax_compilation_cache_dir": folder,
    "jax_persistent_cache_min_compile_time_secs": 0.0,
  }
  old = {name: getattr(jax.config, name) for name in options}
  reset = jax.experimental.compilation_cache.compilation_cache.reset_cache
  try:
    for name, value in options.items():
      jax.config.update(name, value)
    reset()
    yield
  finally:
    for name, value in old.items():
      jax.config.update(name, value)
    reset()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return tiny_runs.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def remote_data(gcs, data):
  """The same files in a bucket, the rows in two files."""
  lines = pathlib.Path(data["train"]).read_text().splitlines(keepends=True)
  gcs.write("data/pairs/1.jsonl", "".join(lines[:7]))
  gcs.write("data/pairs/2.jsonl", "".join(lines[7:]))
  tokenizer = pathlib.Path(data["tokenizer"]).read_bytes()
  gcs.write("data/tokenizer/tokenizer.json", tokenizer)
  # Weights in the same folder are not copied.
  gcs.write("data/tokenizer/model.safetensors", "x")
  return {
    "train": "gs://data/pairs/*.jsonl",
    "tokenizer": "gs://data/tokenizer",
  }


def make_config(data, **changes):
  values = dict(mesh__data=1, mesh__fsdp=1, mesh__tensor=1)
  values["checkpoints__save_every_steps"] = 4
  return tiny_runs.make_config(data, **values | changes)


def records(workdir):
  """Without how fast it was."""
  return [
    {k: v for k, v in record.items() if not k.startswith("perf/")}
    for record in metric_writers.read_metrics(workdir)
  ]


class Killed(BaseException):
  """So that nothing catches it on the way."""


@pytest.fixture(scope="module")
def local_run(data, tmp_path_factory):
  """An uninterrupted run on a file system, and what it returned."""
  workdir = str(tmp_path_factory.mktemp("run"))
  return workdir, train.train(make_config(data), workdir)


@pytest.fixture(scope="module")
def remote_run(gcs, remote_data):
  """The same run in a bucket, killed in step 6 and continued from step 4."""
  gcs.buckets["runs"] = {}
  workdir = "gs://runs/some/run"
  config = make_config(remote_data)
  add = train.training_log.TrainingLog.add

  with pytest.MonkeyPatch.context() as patch:

    def kill(log, step, *rest):
      if step == 6:
        # It does not get to say its last words.
        patch.setattr(metric_writers.MetricWriter, "_upload", lambda self: None)
        raise Killed
      add(log, step, *rest)

    patch.setattr(train.training_log.TrainingLog, "add", kill)
    with pytest.raises(Killed):
      train.train(config, workdir)
  lines = gcs.text("runs/some/run/metrics.jsonl").splitlines()
  assert [json.loads(line)["step"] for line in lines] == [0, 2, 4, 4]
  assert checkpoints.newest(workdir) == f"{workdir}/checkpoints/4"
  with mock.patch.object(dataset, "_build", side_effect=AssertionError):
    return workdir, train.train(config, workdir)


def test_a_run_in_a_bucket_that_was_killed_has_the_numbers_of_a_local_one(
  gcs, local_run, remote_run
):
  local, expected = local_run
  remote, result = remote_run
  assert records(remote) == records(local)
  assert result.eval_metrics == expected.eval_metrics
  jax.tree.map(np.testing.assert_array_equal, result.params, expected.params)
  name = "data.json"
  expected_text = pathlib.Path(local, name).read_text()
  assert gcs.text(f"runs/some/run/{name}") == expected_text
  events = gcs.names("runs/some/run/tensorboard/")
  assert len(events) == 2
  for event in events:
    assert b"train/loss" in gcs.content(f"runs/some/run/tensorboard/{event}")


def test_the_workdir_keeps_the_newest_checkpoints_and_the_tokens(
  gcs, remote_run
):
  names = gcs.names("runs/some/run/checkpoints/")
  assert {name.split("/")[0] for name in names} == {"4", "8"}
  (key,) = {n.split("/")[0] for n in gcs.names("runs/some/run/tokens/")}
  assert set(gcs.names(f"runs/some/run/tokens/{key}/")) == {
    ".complete",
    "report.json",
    *(f"{s}/{n}.npy" for s in ("train", "eval") for n in ("tokens", "offsets")),
  }


def test_tokens_are_mapped_from_a_copy_on_this_machine(
  gcs, remote_run, remote_data, tmp_path, monkeypatch
):
  workdir, _ = remote_run
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  config = make_config(remote_data, data__cache_dir=f"{workdir}/tokens").data
  loaded = dataset.load(config, is_sft=False, row_length=32)
  # On a machine that has never seen them.
  assert loaded.report["is_cached"]
  file = pathlib.Path(loaded.report["file"])
  assert file.is_relative_to(tmp_path / "dpop_jax/runs/some/run/tokens")
  assert isinstance(loaded.train.tokens.base, np.memmap)


def test_a_run_in_a_bucket_is_evaluated_and_continues_prompts(
  local_run, remote_run
):
  local, _ = local_run
  remote, result = remote_run
  config = saved_config.load(remote)
  assert evaluate.evaluate_run(config, remote) == result.eval_metrics
  prompts = ["ab", "ba"]
  sampling = generate.SamplingConfig(max_new_tokens=4)
  assert answers.generate_answers(
    config, remote, prompts, sampling, seed=0, batch_size=2
  ) == answers.generate_answers(
    saved_config.load(local), local, prompts, sampling, seed=0, batch_size=2
  )


def test_a_run_starts_from_one_in_a_bucket(remote_run, remote_data, tmp_path):
  remote, start = remote_run
  config = make_config(remote_data, run__init_from=remote, run__num_steps=3)
  train.train(config, str(tmp_path))
  saved = saved_config.load(str(tmp_path))
  assert saved.run.init_from == f"{remote}/checkpoints/8"


def test_a_checkpoint_that_was_never_finished_is_not_taken(gcs, remote_run):
  remote, _ = remote_run
  folder = "checkpoints/8/"
  for name in gcs.names("runs/some/run/"):
    content = gcs.content(f"runs/some/run/{name}")
    # Orbax writes this object when all others are there.
    if name != f"{folder}commit_success.txt":
      gcs.write(f"runs/killed/{name}", content)
  killed = "gs://runs/killed"
  assert checkpoints.newest(remote) == f"{remote}/{folder[:-1]}"
  assert checkpoints.newest(killed) == f"{killed}/checkpoints/4"
  config = checkpoints.CheckpointConfig()
  with checkpoints.Checkpoints(killed, config) as saved:
    assert saved.latest_step() == 4
    # In the background; only a save has to wait for it.
    give_up_at = time.monotonic() + 30
    while gcs.names(f"runs/killed/{folder}"):
      assert time.monotonic() < give_up_at
      time.sleep(0.05)


def test_commands_take_a_workdir_in_a_bucket(remote_run):
  remote, _ = remote_run
  done = command("generate", f"--workdir={remote}", "--prompt=ab")
  assert done.returncode == 0, done.stderr
  assert len(done.stdout.strip()) > 0


@pytest.mark.parametrize(
  ("bucket", "message"),
  [
    ("nowhere", "There is no gs://nowhere."),
    ("closed", "Permission denied for gs://closed ("),
  ],
)
def test_commands_name_a_bucket_that_they_cannot_use(gcs, bucket, message):
  gcs.buckets["closed"] = {}
  gcs.forbidden.add("closed")
  done = command("generate", f"--workdir=gs://{bucket}/run", "--prompt=ab")
  assert done.returncode == 1
  assert done.stderr.startswith(f"Error: {message}")
  assert done.stderr.count("\n") == 1


def command(name, *arguments):
  return subprocess.run(
    [sys.executable, "-m", f"dpop_jax.cli.{name}", *arguments],
    cwd=ROOT,
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
  )


def test_a_remote_workdir_without_a_run_is_named(gcs):
  gcs.buckets["empty"] = {}
  with pytest.raises(ValueError, match="There is no run in gs://empty/run"):
    saved_config.load("gs://empty/run")


def test_an_account_that_may_not_ask_for_the_bucket_is_told_the_role(gcs):
  gcs.write("objects-only/run/checkpoints/1/params/a", "")
  gcs.without_metadata.add("objects-only")
  with pytest.raises(PermissionError, match="Storage Legacy Bucket Reader"):
    checkpoints.newest("gs://objects-only/run")


def test_tokenizers_are_copied_once_and_know_where_they_came_from(
  gcs, remote_data, tmp_path, monkeypatch
):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  file = "gs://data/tokenizer/tokenizer.json"
  options = dict(bos_token="^", eos_token="$")
  for path in (remote_data["tokenizer"], file):
    tokenizers._copied.cache_clear()
    tokenizer = tokenizers.load(path, **options)
    assert tokenizer.name == path
    assert tokenizer.encode("ab") == [4, 5]
  copies = [path.name for path in tmp_path.rglob("*") if path.is_file()]
  assert copies == ["tokenizer.json"]
  # Another file under the same name is another tokenizer.
  vocabulary = gcs.text("data/tokenizer/tokenizer.json")
  changed = vocabulary.replace('"a": 4', '"a": 5').replace('"b": 5', '"b": 4')
  assert changed != vocabulary
  gcs.write("data/tokenizer/tokenizer.json", changed)
  tokenizers._copied.cache_clear()
  assert tokenizers.load(file, **options).encode("ab") == [5, 4]
  gcs.write("data/tokenizer/tokenizer.json", vocabulary)
  tokenizers._copied.cache_clear()


def test_a_missing_remote_tokenizer_is_named(gcs, remote_data):
  with pytest.raises(FileNotFoundError, match="none at 'gs://data/none'"):
    tokenizers.load("gs://data/none")


def test_pairs_are_built_from_and_to_a_bucket(gcs, tmp_path):
  row = {
    "question": "1 + 2?",
    "answer": "It is <<1+2=3>>3, <<3+4=7>>7.\n#### 7",
  }
  text = jsonl.dumps([row] * 3)
  (tmp_path / "source.jsonl").write_text(text)
  gcs.write("built/source.jsonl", text)
  for folder in (str(tmp_path), "gs://built"):
    config = pair_sets.BuildConfig(
      kind="maths", source=f"{folder}/source.jsonl", out=folder
    )
    pair_sets.build(config)
  for name in ("pairs.jsonl", "manifest.json"):
    assert gcs.text(f"built/{name}") == (tmp_path / name).read_text()


def test_metrics_reach_the_bucket_before_the_end(gcs, monkeypatch):
  gcs.buckets["metrics"] = {}
  lines = lambda: gcs.text("metrics/run/metrics.jsonl").splitlines()
  with metric_writers.MetricWriter(
    "gs://metrics/run", resume_step=None, is_primary=True
  ) as writer:
    writer.write(1, "train", {"loss": 1.0})
    assert not lines()
    writer.flush()
    assert len(lines()) == 1
    # Half a minute later without being asked.
    monkeypatch.setattr(metric_writers, "_UPLOAD_EVERY_SECONDS", 0.0)
    writer.write(2, "train", {"loss": 1.0})
    assert len(lines()) == 2
  resumed = dict(resume_step=1, is_primary=True)
  with metric_writers.MetricWriter("gs://metrics/run", **resumed) as writer:
    writer.write(2, "train", {"loss": 3.0})
  losses = [r["loss"] for r in metric_writers.read_metrics("gs://metrics/run")]
  assert losses == [1.0, 3.0]


def test_compilations_are_kept_in_a_bucket(gcs, remote_data):
  gcs.buckets["compiled"] = {}
  folder = "gs://compiled/cache"
  config = make_config(remote_data, run__compilation_cache_dir=folder)
  with compilation_cache(None):
    program.use_compilation_cache(config)
    jax.jit(lambda x: x * 3 + 17)(2.0)
  assert any(n.startswith("jit__lambda") for n in gcs.names("compiled/cache/"))


def test_models_are_imported_and_exported_in_a_bucket(gcs, tmp_path):
  gcs.buckets["models"] = {}
  local = pathlib.Path(tiny_runs.write_model(tmp_path / "model"))
  for file in local.iterdir():
    gcs.write(f"models/start/{file.name}", file.read_bytes())
  mesh = sharding.MeshConfig()
  model = imports.import_hf(
    "gs://models/start", "gs://models/imported", mesh=mesh
  )
  folder = model_folders.pin("gs://models/imported", key="run.init_from")
  assert folder == "gs://models/imported/checkpoints/0"
  assert decoder.DecoderConfig(**tiny_runs.SECTIONS["model"]) == (
    dataclasses.replace(model, initializer_range=0.02)
  )
  exports.export_hf(
    "gs://models/imported", "gs://models/out", mesh=mesh, max_file_bytes=4000
  )
  # All tensors are in the same order, so the files' bytes are comparable.
  exports.export_hf("gs://models/imported", "gs://models/one", mesh=mesh)
  weights = (local / "model.safetensors").read_bytes()
  assert gcs.content("models/one/model.safetensors") == weights
  assert "models/out/model.safetensors.index.json" in {
    f"models/{name}" for name in gcs.objects("models")
  }
  # A run starts from either, and goes on from what came out.
  for path in ("gs://models/start", "gs://models/imported", "gs://models/out"):
    devices = sharding.make_mesh(mesh)
    params = model_folders.load_params(path, model, devices)
    expected = model_folders.load_params(str(local), model, devices)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
  with pytest.raises(FileExistsError, match="something in gs://models/out al"):
    exports.export_hf("gs://models/imported", "gs://models/out", mesh=mesh)
