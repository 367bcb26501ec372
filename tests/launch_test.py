"""launch/tpu.sh for real, on slices of local processes."""

import jax
import launch_place
import numpy as np
import pytest
import tiny_runs

from dpop_jax import checkpoints, metric_writers, saved_config, sharding
from dpop_jax.models import decoder


@pytest.fixture
def place(tmp_path):
  place = launch_place.Place(tmp_path)
  yield place
  for key in place.cloud.load():
    kind, name = key.split("/")
    if kind == "tpu-vm":
      place.cloud.kill_processes(name)


# --- a training run ----------------------------------------------------------


def train_command(folder, data):
  """A tiny run on two hosts of a device each, and its workdir."""
  sections = tiny_runs.make_sections(
    data,
    mesh__data=1,
    mesh__fsdp=2,
    mesh__tensor=1,
    model__num_hidden_layers=1,
    data__num_eval_pairs=0,
    run__eval_every_steps=None,
    run__num_steps=40,
    checkpoints__save_every_steps=3,
    run__compilation_cache_dir=str(folder.parent / "compiled"),
  )
  folder.mkdir()
  config = folder / "tiny.py"
  config.write_text(
    "from dpop_jax import config\n"
    f"def get_config():\n  return config.config_dict(**{sections!r})\n"
  )
  workdir = folder / "run"
  return workdir, [
    *("python", "-m", "dpop_jax.cli.train"),
    *(f"--config={config}", f"--workdir={workdir}"),
  ]


def saved_parameters(workdir):
  """The last checkpoint's arrays."""
  model = saved_config.load(str(workdir)).model
  mesh = jax.make_mesh((1, 1, 1), sharding.MESH_AXES, devices=jax.devices()[:1])
  abstract = decoder.abstract_params(model, mesh)
  return checkpoints.load_params(f"{workdir}/checkpoints/40", abstract)


@pytest.mark.slow
def test_a_preempted_run_comes_back_by_itself_and_ends_with_the_same_bits(
  place, tmp_path
):
  (tmp_path / "data").mkdir()
  data = tiny_runs.write_data(tmp_path / "data")

  workdir, command = train_command(tmp_path / "straight", data)
  place.write_settings(command, NAME="straight")
  for verb in ("create", "setup", "start"):
    place.succeed(verb)
  again = place.run("start")
  assert again.returncode == 1
  assert "A run is under way here already." in again.stderr
  followed = place.succeed("follow")
  assert "train  40/40" in followed.stdout
  status = place.succeed("status")
  assert "status: straight-w-0 ended 0\n" in status.stdout
  assert "status: straight-w-1 ended 0\n" in status.stdout
  place.succeed("delete", "--yes")
  assert not place.cloud.load()
  assert "ssh" in place.verbs() and place.verbs()[-1] == "delete"

  preempted, command = train_command(tmp_path / "preempted", data)
  place.write_settings(command, NAME="preempted")
  watching = place.start("watch", "--yes")
  launch_place.wait_for(lambda: (preempted / "checkpoints" / "6").exists())
  place.cloud.preempt("preempted")
  stdout, stderr = watching.communicate(timeout=240)
  assert watching.returncode == 0, stdout + stderr
  assert "was taken away" in stderr and "The run is complete." in stderr
  mine = [call[2:4] for call in place.calls() if call[4] == "preempted"]
  assert mine.count(["queued-resources", "create"]) == 2
  assert mine.count(["queued-resources", "delete"]) == 1
  log = place.cloud.hosts("preempted")[0] / "dpop_jax" / "log"
  assert "Continuing from step" in log.read_text()

  expected, losses = (
    [(record["step"], record["loss"]) for record in records]
    for records in map(metric_writers.read_metrics, (workdir, preempted))
  )
  assert losses == expected
  jax.tree.map(
    np.testing.assert_array_equal, *map(saved_parameters, (workdir, preempted))
  )


# --- what else may happen to a run -------------------------------------------


def counting(folder, body):
  """A command that first writes down that it was started."""
  return ["bash", "-c", f'echo "$(hostname)" >> {folder}/starts; {body}']


def starts(folder):
  path = folder / "starts"
  return path.read_text().split() if path.exists() else []


def test_a_run_that_fails_by_itself_is_not_started_again(place, tmp_path):
  body = 'if [ "$DPOP_PROCESS_ID" = 1 ]; then echo mistake; exit 3; fi'
  place.write_settings(counting(tmp_path, f"{body}; sleep 60"))
  done = place.run("watch", "--yes")
  assert done.returncode == 1
  assert "The run failed by itself (exit code 3)" in done.stderr
  assert "  tiny-w-1  mistake\n" in done.stdout
  assert sorted(starts(tmp_path)) == ["tiny-w-0", "tiny-w-1"]


@pytest.mark.parametrize("code", [75, 134, 143])
def test_an_interrupted_run_is_started_again_on_the_same_slice(
  place, tmp_path, code
):
  body = f"[ $(wc -l < {tmp_path}/starts) -gt 2 ] || exit {code}"
  place.write_settings(counting(tmp_path, f"sleep 0.5; {body}"))
  done = place.succeed("watch", "--yes")
  assert "(1 of at most 100)" in done.stderr
  assert len(starts(tmp_path)) == 4
  assert place.verbs().count("create") == 1
  assert "delete" not in place.verbs()


def test_a_run_that_is_always_interrupted_is_given_up(place, tmp_path):
  place.write_settings(counting(tmp_path, "exit 143"), MAX_RESTARTS="1")
  done = place.run("watch", "--yes")
  assert done.returncode == 1
  assert "was tried again MAX_RESTARTS (1) times" in done.stderr
  assert len(starts(tmp_path)) == 4


def test_a_slice_that_is_refused_is_asked_for_again(place):
  (place.cloud.folder / "refusals").write_text("1")
  place.write_settings(["true"])
  done = place.succeed("watch", "--yes")
  assert "no more capacity" in done.stderr
  assert place.verbs().count("create") == 2


def test_a_failing_gcloud_never_leads_to_a_deletion(place):
  place.write_settings(["true"], MAX_RESTARTS="1")
  place.succeed("create")
  program = place.folder / "bin" / "gcloud"
  program.write_text("#!/bin/sh\necho 'the network is down' >&2\nexit 1\n")
  done = place.run("watch", "--yes")
  assert done.returncode == 1
  assert "the network is down" in done.stderr
  for verb in ("create", "delete", "start", "status"):
    done = place.run(verb, "--yes")
    assert done.returncode == 1 and "the network is down" in done.stderr
  assert place.verbs() == ["create"]


def test_stop_waits_for_the_run_to_save_and_watch_leaves_it_stopped(
  place, tmp_path
):
  body = f'trap "sleep 1; touch {tmp_path}/saved; exit 143" TERM; '
  body += f"touch {tmp_path}/ready; while true; do sleep 0.1; done"
  place.write_settings(counting(tmp_path, body))
  for verb in ("create", "setup", "start"):
    place.succeed(verb)
  launch_place.wait_for((tmp_path / "ready").exists)
  following = place.start("follow")
  done = place.succeed("stop", "--yes")
  assert (tmp_path / "saved").exists()
  assert done.stdout.count(": stopped\n") == 2
  following.communicate(timeout=60)
  assert following.returncode == 143
  done = place.succeed("watch", "--yes")
  assert "The run was stopped by launch/tpu.sh" in done.stderr
  assert len(starts(tmp_path)) == 2
  assert "nothing is running" in place.succeed("stop", "--yes").stdout


def test_a_run_that_does_not_end_is_killed_with_all_it_started(place, tmp_path):
  body = f'trap "" TERM; sleep 1000 & touch {tmp_path}/ready; wait'
  place.write_settings(["bash", "-c", body], STOP_SECONDS="1")
  for verb in ("create", "setup", "start"):
    place.succeed(verb)
  launch_place.wait_for((tmp_path / "ready").exists)
  done = place.succeed("stop", "--yes")
  assert "killed, as it had not ended after 1 s" in done.stdout
  # The lock is free only if nobody is left who has inherited it.
  assert "status: tiny-w-0 stopped\n" in place.succeed("status").stdout


def test_setup_runs_once_for_a_source_and_not_under_a_run(place, tmp_path):
  place.write_settings(counting(tmp_path, "sleep 1000"))
  place.succeed("create")
  assert place.succeed("setup").stdout.count(": set up\n") == 2
  assert place.succeed("setup").stdout.count(": set up already\n") == 2
  (first, _) = place.cloud.hosts("tiny")
  assert (first / "uv.log").read_text().splitlines()[1].endswith("[tpu,gcs]")
  source = first / "dpop_jax" / "source"
  assert (source / "launch" / "host.sh").exists()
  assert not (source / ".git").exists()
  place.succeed("start")
  for verb in ("setup", "start"):
    done = place.run(verb)
    assert done.returncode == 1 and "A run is under way here" in done.stderr
  assert source.exists() and len(starts(tmp_path)) == 2


def test_a_slice_that_somebody_else_made_is_not_deleted(place):
  place.write_settings(["true"])
  place.succeed("create")
  things = place.cloud.load()
  for thing in things.values():
    thing["labels"] = {}
  place.cloud.save(things)
  done = place.run("delete", "--yes")
  assert done.returncode == 1
  assert "does not have the label created-by=dpop-jax-launch" in done.stderr
  place.cloud.preempt("tiny")
  place.write_settings(["true"], MAX_RESTARTS="1")
  assert place.run("watch", "--yes").returncode == 1
  assert "delete" not in place.verbs()


# --- mistakes ----------------------------------------------------------------


@pytest.mark.parametrize(
  ("verb", "settings", "message"),
  [
    ("create", {"ZONE": ""}, "settings.env should set ZONE."),
    ("create", {"command": ""}, "should set COMMAND, as COMMAND=(python"),
    ("create", {"NAME": "Tiny_1"}, "NAME must be of small letters"),
    ("create", {"CAPACITY": "cheap"}, "CAPACITY must be on-demand, spot or"),
    ("create", {"NUM_SLICES": "0"}, "NUM_SLICES must be a positive whole"),
    (
      "create",
      {"NUM_SLICES": "2", "QUEUED": "no"},
      "NUM_SLICES=2 needs QUEUED=yes.",
    ),
    ("destroy", {}, "There is no verb destroy;"),
    ("start", {}, "tiny in some-project, some-zone is not ready (none)"),
    ("delete", {}, "There is no tiny in some-project, some-zone."),
  ],
)
def test_a_mistake_is_one_sentence_and_changes_nothing(
  place, verb, settings, message
):
  place.write_settings(**settings)
  done = place.run(verb, "--yes")
  assert done.returncode == 1
  assert done.stderr.startswith("Error: ") and message in done.stderr
  assert not place.cloud.load()


def test_a_slice_is_not_created_twice(place):
  place.write_settings()
  place.succeed("create")
  done = place.run("create")
  assert done.returncode == 1
  assert "tiny exists already in some-project, some-zone (ready)" in done.stderr
  assert place.verbs() == ["create"]


@pytest.mark.parametrize("verb", ["stop", "watch", "delete"])
def test_what_cannot_be_undone_is_named_and_needs_a_yes(place, verb):
  place.write_settings()
  place.succeed("create")
  done = place.run(verb)
  assert done.returncode == 1
  assert done.stderr.startswith("Error: Not confirmed: ")
  for name in ("tiny", "some-project", "some-zone"):
    assert name in done.stderr
  assert place.verbs() == ["create"]


def test_a_missing_gcloud_is_named(place):
  place.write_settings()
  (place.folder / "bin" / "gcloud").unlink()
  tools = place.folder / "tools"
  tools.mkdir()
  for tool in ("bash", "env", "dirname"):
    (tools / tool).symlink_to(f"/usr/bin/{tool}")
  place.environment["PATH"] = str(tools)
  done = place.run("create")
  assert done.returncode == 1
  assert "There is no gcloud here: https://cloud.google.com" in done.stderr


# --- what is said to gcloud --------------------------------------------------

WHERE = "--project=some-project --zone=some-zone"
LABEL = "--labels=created-by=dpop-jax-launch"


@pytest.mark.parametrize(
  ("settings", "expected"),
  [
    (
      {"QUEUED": "no", "CAPACITY": "on-demand"},
      f"tpu-vm create tiny {WHERE} --accelerator-type=v5litepod-8 {LABEL} "
      "--version=v2-alpha-tpuv5-lite",
    ),
    (
      {"CREATE_FLAGS": "(--network=mine)"},
      f"queued-resources create tiny {WHERE} --accelerator-type=v5litepod-8 "
      f"{LABEL} --network=mine --spot --runtime-version=v2-alpha-tpuv5-lite "
      "--node-id=tiny",
    ),
    (
      {"NUM_SLICES": "2", "CAPACITY": "reserved"},
      f"queued-resources create tiny {WHERE} --accelerator-type=v5litepod-8 "
      f"{LABEL} --reserved --runtime-version=v2-alpha-tpuv5-lite "
      "--node-count=2 --node-prefix=tiny",
    ),
  ],
)
def test_a_dry_run_prints_the_command_and_does_nothing(
  place, settings, expected
):
  place.write_settings(**settings)
  (place.folder / "bin" / "gcloud").unlink()
  done = place.succeed("create", "--dry-run")
  assert done.stdout == f"gcloud compute tpus {expected}\n"


def test_two_slices_are_addressed_as_one(place, tmp_path):
  place.write_settings(
    counting(tmp_path, 'echo "process $DPOP_PROCESS_ID of 4"'), NUM_SLICES="2"
  )
  place.succeed("watch", "--yes")
  names = ["tiny-0-w-0", "tiny-0-w-1", "tiny-1-w-0", "tiny-1-w-1"]
  assert sorted(starts(tmp_path)) == names
  assert "process 0 of 4" in place.succeed("follow").stdout
  place.cloud.preempt("tiny-1")
  assert place.succeed("status").stdout.endswith(": gone\n")
  printed = place.succeed("watch", "--dry-run").stdout
  commands = [line.split()[3:5] for line in printed.splitlines()
              if line.startswith("gcloud")]  # fmt: skip
  assert {kind for kind, _ in commands} == {"queued-resources"}
  order = ["delete", "create", "scp", "ssh", "ssh", "ssh"]
  assert [verb for _, verb in commands] == order
