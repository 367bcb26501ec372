"""Several processes that act as one run do what one process does.

The processes are real ones on this machine, with four devices among them. A
mesh of four devices gives the same bits however they are spread over processes:
the compiled steps are the same, and so is the order of their sums. That holds
with gloo between the devices of one process as well, as here; left to itself,
one process with CPU devices adds up in another order, and agrees to rounding.
So does another mesh.
"""

import fcntl
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tiny_runs

from dpop_jax import (
  checkpoints,
  config,
  metric_writers,
  processes,
  program,
  sharding,
)
from dpop_jax.models import decoder

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parent.parent
# For machines that are busy with something else.
SECONDS = 400
# So that a process that dies is noticed soon.
SILENCE_SECONDS = 10
CHANGES = dict(
  mesh__data=2,
  mesh__fsdp=2,
  mesh__tensor=1,
  # A pair or two in a row: two microbatches or so, some of them on each device.
  batch__row_length=16,
  batch__batch_size=8,
)
PROMPTS = ["ab", "cab", "abc"]


def start(folder, num_processes, *actions):
  """Starts processes with four devices in all."""
  folder.mkdir()
  (folder / "actions.json").write_text(json.dumps(actions))
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  return [
    subprocess.Popen(
      [sys.executable, ROOT / "tests" / "multihost_worker.py", folder],
      cwd=folder,
      env={
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(4 // num_processes),
        # Most of the time goes into compiling.
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": str(folder.parent.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "DPOP_COORDINATOR": f"127.0.0.1:{port}",
        "DPOP_NUM_PROCESSES": str(num_processes),
        "DPOP_PROCESS_ID": str(index),
        "DPOP_SILENCE_SECONDS": str(SILENCE_SECONDS),
      },
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for index in range(num_processes)
  ]


def finish(started):
  """Exit codes and errors; no process outlives it."""
  deadline = time.monotonic() + SECONDS
  try:
    errors = [
      process.communicate(timeout=max(1, deadline - time.monotonic()))[1]
      for process in started
    ]
  finally:
    for process in started:
      process.kill()
      process.wait()
  return [process.returncode for process in started], errors


def run(folder, num_processes, *actions, code=0):
  """What came of actions, by process."""
  codes, errors = finish(start(folder, num_processes, *actions))
  assert codes == [code] * num_processes, "\n".join(errors)
  return [
    json.loads((folder / f"{index}.json").read_text())
    for index in range(num_processes)
  ]


@pytest.fixture(scope="module")
def sections(tmp_path_factory):
  data = tiny_runs.write_data(tmp_path_factory.mktemp("data"))
  return tiny_runs.make_sections(data, **CHANGES)


@pytest.fixture(scope="module")
def stopped(sections, tmp_path_factory):
  """A run of four processes, of which the third is told to stop."""
  folder = tmp_path_factory.mktemp("four")
  arguments = {
    "sections": sections,
    "workdir": str(folder / "workdir"),
    "stops": [2, 3, signal.SIGTERM],
  }
  results = run(
    folder / "work", 4, ("run_training", arguments), code=128 + signal.SIGTERM
  )
  return folder / "workdir", [result for (result,) in results]


@pytest.fixture(scope="module")
def died(sections, tmp_path_factory):
  """A run of two processes, of which the second is killed.

  Its workdir, how the other one ended, what it said, and after which time.
  """
  folder = tmp_path_factory.mktemp("died")
  arguments = {
    "sections": sections,
    "workdir": str(folder / "workdir"),
    "stops": [1, 5, signal.SIGKILL],
  }
  started = start(folder / "work", 2, ("run_training", arguments))
  try:
    killed = started[1].wait(SECONDS)
    died_at = time.monotonic()
  finally:
    codes, errors = finish(started)
  assert killed == -signal.SIGKILL, errors[1]
  seconds = time.monotonic() - died_at
  return folder / "workdir", codes[0], errors[0], seconds


@pytest.fixture(scope="module")
def one(sections, stopped, died, tmp_path_factory):
  """Folders and results of one process, by names."""
  folder = tmp_path_factory.mktemp("one")
  shutil.copytree(stopped[0], folder / "resumed")
  shutil.copytree(died[0], folder / "revived")
  return act(folder, 1, sections)


@pytest.fixture(scope="module")
def two(sections, stopped, tmp_path_factory):
  """Folders and results of two processes, by names."""
  folder = tmp_path_factory.mktemp("two")
  shutil.copytree(stopped[0], folder / "resumed")
  (folder / "busy").mkdir()
  with (folder / "busy" / "lock").open("w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    return act(folder, 2, sections)


def act(folder, num_processes, sections):
  """What several tests look at, in one start of the processes."""
  names = ("workdir", "resumed", "revived", "exported", "imported", "own")
  names += ("kept", "busy", "scored", "cache")
  path = {name: str(folder / name) for name in (*names, "other")}
  workdir = path["workdir"]
  with_sections = lambda **others: {"sections": sections, **others}
  train_in = lambda name: ("run_training", with_sections(workdir=path[name]))
  actions = {
    "trained": train_in("workdir"),
    "resumed": train_in("resumed"),
    "used": ("use_run", {"workdir": workdir, "prompts": PROMPTS}),
    "exported": (
      "export_and_import",
      {
        "workdir": workdir,
        "exported": path["exported"],
        "imported": path["imported"],
      },
    ),
    "kept": ("keep_reference", with_sections(folder=path["kept"])),
  }
  if num_processes == 1:
    code = 0
    actions["revived"] = train_in("revived")
  else:
    code = 128 + signal.SIGTERM
    (folder / "own").mkdir()
    # In bfloat16 every step of the run is scored.
    scoring = {
      "sections": sections
      | {
        "model": sections["model"] | {"dtype": "bfloat16"},
        "reference": {"cache_dir": path["cache"]},
      },
      "workdir": path["scored"],
      "stops": [1, 2],
    }
    actions |= {
      "exchanged": ("exchange_texts", {"texts": ["a", "longer, ä"]}),
      "failed": (
        "fail_first",
        {"text": "There is no x.", "may_fail": True},
      ),
      "different": (
        "train_differently",
        with_sections(workdir=path["other"], may_fail=True),
      ),
      "busy": (
        "run_training",
        with_sections(workdir=path["busy"], may_fail=True),
      ),
      # Each process is in a folder of its own from here on.
      "own cache": ("load_into_own_cache", with_sections(folder=path["own"])),
      "own workdir": ("train_in_own_workdir", with_sections(may_fail=True)),
      # What follows would be stopped as well.
      "stopped": ("stop_scoring", scoring),
    }
  results = run(folder / "work", num_processes, *actions.values(), code=code)
  return path, {
    name: [result[i] for result in results] for i, name in enumerate(actions)
  }


def saved_state(sections, workdir):
  """The newest checkpoint of a run, as NumPy arrays."""
  its_config = config.from_dict(sections)
  mesh = sharding.make_mesh(its_config.mesh, jax.devices()[:4])
  made = program.make_program(its_config, mesh, num_steps=8)
  with checkpoints.Checkpoints(workdir, its_config.checkpoints) as saved:
    assert saved.latest_step() == 8
    return jax.tree.map(np.asarray, saved.restore(made.abstract_state))


def metrics(workdir, *splits):
  """All but the speed, of all splits if none is given."""
  return [
    {k: v for k, v in record.items() if not k.startswith("perf/")}
    for record in metric_writers.read_metrics(workdir)
    if not splits or record["split"] in splits
  ]


def assert_same_bits(actual, expected):
  for a, b in zip(
    jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_array_equal(a, b, strict=True)


def assert_same_run(sections, actual, expected):
  assert metrics(actual) == metrics(expected)
  assert_same_bits(
    saved_state(sections, actual), saved_state(sections, expected)
  )


def test_one_process_keeps_the_log_probs_that_all_have_scored(one, two):
  (expected,) = one[1]["kept"]
  first, second = two[1]["kept"]
  assert first["scored"] == second["scored"] == [1, 0]
  assert (first["parts"], second["parts"]) == (["000000.logps"], [])
  for found in (*first["logps"], *second["logps"], expected["logps"][1]):
    assert found == expected["logps"][0]


def test_two_processes_give_the_losses_and_the_checkpoint_of_one(
  sections, one, two
):
  assert_same_run(sections, two[0]["workdir"], one[0]["workdir"])
  (expected,) = one[1]["trained"]
  for result in two[1]["trained"]:
    assert result["is_complete"] and result["step"] == 8
    assert result["eval_metrics"] == expected["eval_metrics"]


def test_each_process_reads_only_its_share(one, two):
  (expected,) = one[1]["trained"]
  first, second = two[1]["trained"]
  assert expected["laid_out"] == list(range(8))
  assert first["laid_out"] == [0, 2, 4, 6]
  assert second["laid_out"] == [1, 3, 5, 7]
  for step, pairs in expected["read"].items():
    assert len(pairs) == 8
    here, there = first["read"][step], second["read"][step]
    # No pair is read twice, and both have something to do.
    assert sorted(here + there) == sorted(pairs)
    assert len(here) >= 2 and len(there) >= 2


def test_one_process_tokenises_for_all_that_see_its_files(two):
  _, results = two
  assert [result["num_built"] for result in results["trained"]] == [1, 0]
  first, second = results["own cache"]
  assert first["num_built"] == second["num_built"] == 1
  assert first == second


def test_sigterm_in_one_process_stops_all_of_them_at_one_saved_step(stopped):
  workdir, results = stopped
  (step,) = {result["step"] for result in results}
  assert 3 <= step < 8
  assert [result["is_complete"] for result in results] == [False] * 4
  folders = pathlib.Path(workdir, "checkpoints").iterdir()
  assert max(int(folder.name) for folder in folders) == step


@pytest.mark.parametrize("processes_now", ["one", "two"])
def test_what_four_processes_saved_fewer_continue_with_the_same_bits(
  sections, one, two, processes_now
):
  path, results = one if processes_now == "one" else two
  assert all(result["is_complete"] for result in results["resumed"])
  assert_same_run(sections, path["resumed"], one[0]["workdir"])


def test_two_processes_evaluate_and_answer_as_one(one, two):
  assert two[1]["used"] == one[1]["used"] * 2


def test_two_processes_export_and_import_as_one(sections, one, two):
  files = lambda folder: {
    file.name: file.read_bytes()
    for file in pathlib.Path(folder).iterdir()
    if file.is_file()
  }
  for name in ("exported", "imported"):
    assert files(two[0][name]) == files(one[0][name])
  its_config = config.from_dict(sections)
  mesh = sharding.make_mesh(its_config.mesh, jax.devices()[:4])
  abstract = decoder.abstract_params(its_config.model, mesh)
  assert_same_bits(
    checkpoints.load_params(two[0]["imported"], abstract),
    checkpoints.load_params(one[0]["workdir"], abstract),
  )


def test_what_processes_say_reaches_all_of_them(two):
  _, results = two
  for index, result in enumerate(results["exchanged"]):
    assert result == {
      "gathered": ["a", "longer, ä"],
      "shared": [[0], [2], [4], [6], [8]],
      "done": [[0, 2, 4], [1, 3]][index],
    }


def test_a_mistake_that_the_first_process_makes_is_told_by_all(two):
  assert two[1]["failed"][1] == "There is no x."


def test_processes_that_were_started_differently_are_told_apart(two):
  path, results = two
  host = socket.gethostname()
  assert (
    results["different"]
    == [
      "All processes of a run have to be started alike, but in process 1 (on "
      f"{host}) loss.beta is 0.1 instead of 0.3, which is what process 0 (on "
      f"{host}) has."
    ]
    * 2
  )
  assert not pathlib.Path(path["other"]).exists()


def test_a_workdir_in_use_is_refused_by_all(two):
  path, results = two
  message = f"Another process is training in {path['busy']}; wait for it"
  for result in results["busy"]:
    assert result.startswith(message)


def test_sigterm_in_one_process_stops_scoring_in_all_of_them(two):
  path, results = two
  first, second = results["stopped"]
  assert first == second
  assert not first["is_complete"] and first["step"] == 0
  # Eight steps and the held-out pairs, and some again as a check.
  assert 2 <= first["num_scored"] < 8 + 1
  assert not list(pathlib.Path(path["scored"], "checkpoints").iterdir())


def test_a_workdir_that_is_not_shared_is_refused(two):
  for message in two[1]["own workdir"]:
    assert "workdir must be one folder for all processes" in message
    assert "is not seen by process 1 (on " in message


def test_a_process_that_dies_ends_the_others_and_the_run_continues(
  sections, died, one
):
  _, code, error, seconds = died
  assert seconds < SILENCE_SECONDS + 60
  # Told by a collective or by JAX's service, whichever is faster.
  assert code in (processes.EXIT_LOST_ANOTHER, -signal.SIGABRT), error
  assert (
    "Another process of this run has ended" in error
    or "another task died" in error
  )
  assert one[1]["revived"][0]["is_complete"]
  # A line of the log is a mean since the line or the start before it.
  expected = one[0]["workdir"]
  assert_same_bits(
    saved_state(sections, one[0]["revived"]), saved_state(sections, expected)
  )
  assert metrics(one[0]["revived"], "eval") == metrics(expected, "eval")
