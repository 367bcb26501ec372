"""Several processes that are one run: how they start, and how they end."""

import importlib.util
import os
import pathlib
import signal
import socket
import subprocess
import sys
import textwrap
import time

import jax
import pytest

from dpop_jax import processes

ROOT = pathlib.Path(__file__).parent.parent
NAMED = {
  processes.COORDINATOR: "10.0.0.1:8482",
  processes.NUM_PROCESSES: "4",
  processes.PROCESS_ID: "3",
}


def test_a_single_process_is_left_alone():
  processes.initialize({})
  processes.initialize(SLURM | {"DPOP_NUM_PROCESSES": "1"})
  assert not jax.distributed.is_initialized()
  assert not processes.are_connected()
  assert processes.is_first()
  processes.leave(1)  # Returns.


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"DPOP_PROCESS_ID": ""}, "belong together; DPOP_PROCESS_ID not set."),
    ({"DPOP_COORDINATOR": "10.0.0.1"}, "should be HOST:PORT, got '10.0.0.1'."),
    ({"DPOP_COORDINATOR": ":80"}, "should be HOST:PORT, got ':80'."),
    ({"DPOP_NUM_PROCESSES": "0"}, "a whole number of at least 1, got '0'."),
    ({"DPOP_PROCESS_ID": "-1"}, "a whole number of at least 0, got '-1'."),
    ({"DPOP_PROCESS_ID": "4"}, "must be less than DPOP_NUM_PROCESSES (4), got"),
    ({"DPOP_START_SECONDS": "soon"}, "DPOP_START_SECONDS must be a whole"),
    ({"DPOP_SILENCE_SECONDS": "0"}, "DPOP_SILENCE_SECONDS must be a whole"),
  ],
)
def test_variables_that_cannot_be_are_named(changes, message):
  with pytest.raises(ValueError) as error:
    processes.initialize(NAMED | changes)
  assert message in str(error.value)


SLURM = {
  "SLURM_JOB_ID": "7",
  "SLURM_NTASKS": "2",
  "SLURM_PROCID": "1",
  "SLURM_LOCALID": "0",
  "SLURM_STEP_NODELIST": "node[1-2]",
}


@pytest.mark.parametrize(
  ("environment", "has_libtpu", "is_cluster"),
  [
    (SLURM, False, True),
    # The batch script itself, or a job of one task.
    ({k: v for k, v in SLURM.items() if "STEP" not in k}, False, False),
    (SLURM | {"SLURM_NTASKS": "1"}, False, False),
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, True, True),
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, False, False),
    ({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}, True, False),
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, True, False),
    (
      {"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"},
      True,
      True,
    ),
  ],
)
def test_jax_is_left_to_find_the_processes_where_it_can(
  monkeypatch, environment, has_libtpu, is_cluster
):
  find_spec = lambda name: object() if has_libtpu else None
  monkeypatch.setattr(importlib.util, "find_spec", find_spec)
  calls = []
  monkeypatch.setattr(
    jax.distributed, "initialize", lambda **kwargs: calls.append(kwargs)
  )
  processes.initialize(environment)
  assert len(calls) == is_cluster
  assert all("coordinator_address" not in call for call in calls)


def test_a_cluster_that_is_none_is_explained(monkeypatch):
  def initialize(**_):
    raise ValueError("coordinator_address should be defined.")

  monkeypatch.setattr(jax.distributed, "initialize", initialize)
  with pytest.raises(ValueError, match="not to be found.*coordinator_addr"):
    processes.initialize(SLURM)


# A command of two processes that add up numbers for ever, and what one does.
COMMAND = """
  import os, pathlib, sys
  import jax, numpy
  from jax.experimental import multihost_utils
  from dpop_jax.cli import command

  def main():
    folder = pathlib.Path(sys.argv[0])
    for step in range(10**9):
      if step == 3:
        {action}
      multihost_utils.process_allgather(numpy.ones(1))
      (folder / str(jax.process_index())).write_text(str(step))

  sys.argv = sys.argv[1:]
  command.run(main, in_several_processes=True)
"""


def start(folder, action="pass", ids=(0, 1), **variables):
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  script = textwrap.dedent(COMMAND).replace("{action}", action)
  return [
    subprocess.Popen(
      [sys.executable, "-c", script, str(folder)],
      cwd=ROOT,
      env={
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "DPOP_COORDINATOR": f"127.0.0.1:{port}",
        "DPOP_NUM_PROCESSES": "2",
        "DPOP_PROCESS_ID": str(index),
        **variables,
      },
      stderr=subprocess.PIPE,
      text=True,
    )
    for index in ids
  ]


def results(started):
  """Exit codes, and what was said without JAX's and gloo's remarks."""
  errors = [process.communicate(timeout=150)[1] for process in started]
  return [process.returncode for process in started], errors


@pytest.mark.parametrize("index", [0, 1])
def test_those_that_wait_in_vain_say_so_and_end(tmp_path, index):
  (code,), (error,) = results(
    start(tmp_path, ids=[index], DPOP_START_SECONDS="1")
  )
  assert code == 1
  assert "did not all reach process 0 at 127.0.0.1:" in error
  assert "within 1 s (DPOP_START_SECONDS)" in error
  assert "Traceback" not in error


def test_a_mistake_that_all_make_is_told_by_all(tmp_path):
  codes, errors = results(start(tmp_path, "raise ValueError('No such file.')"))
  assert codes == [1, 1]
  for error in errors:
    assert "Error: No such file.\n" in error and "Traceback" not in error


# How a process ends that has lost another one: of a collective that has failed,
# or, where none is under way or it waits for ever, by JAX.
LOST = (processes.EXIT_LOST_ANOTHER, -signal.SIGABRT)
SIGNS = ("Error: Another process of this run has", "another task died")


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_a_mistake_of_one_ends_all(tmp_path, failing):
  action = f"if jax.process_index() == {failing}: raise OSError('Disk full.')"
  codes, errors = results(start(tmp_path, action, DPOP_SILENCE_SECONDS="10"))
  assert codes[failing] == 1
  assert "Error: Disk full.\n" in errors[failing]
  assert codes[1 - failing] in LOST, errors[1 - failing]
  assert any(sign in errors[1 - failing] for sign in SIGNS)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_dies_ends_the_others(tmp_path, killed):
  started = start(tmp_path, DPOP_SILENCE_SECONDS="10")
  while not (tmp_path / str(killed)).exists():
    assert started[killed].poll() is None
    time.sleep(0.05)
  started[killed].kill()
  died = time.monotonic()
  codes, errors = results(started)
  assert time.monotonic() - died < 60
  assert codes[1 - killed] in LOST, errors[1 - killed]
  assert any(sign in errors[1 - killed] for sign in SIGNS)
