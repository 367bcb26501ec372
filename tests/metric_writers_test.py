"""Metric files: strict JSON, no doubled points after a resume, none lost."""

import json
import math
import os
import signal
import struct
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest

from dpop_jax import metric_writers


def opened(workdir, resume_step=None, is_primary=True):
  return metric_writers.MetricWriter(
    str(workdir), resume_step=resume_step, is_primary=is_primary
  )


def tensorboard_points(workdir):
  """(step, tag, value) as TensorBoard shows them: purged where it would."""
  from tensorboardX.proto import event_pb2

  points = []
  for path in sorted((workdir / "tensorboard").iterdir(), key=os.path.getmtime):
    data = path.read_bytes()
    while data:
      # Length, its checksum, the event, its checksum.
      (length,) = struct.unpack("<Q", data[:8])
      event = event_pb2.Event.FromString(data[12 : 12 + length])
      data = data[16 + length :]
      # What a process that starts again says: drop everything from here on.
      if event.HasField("session_log"):
        points = [point for point in points if point[0] < event.step]
      for value in event.summary.value:
        points.append((event.step, value.tag, value.simple_value))
  return points


def test_one_line_and_one_point_for_each_write(tmp_path):
  with opened(tmp_path) as writer:
    writer.write(0, "eval", {"loss": 0.75, "rewards/margins": jnp.float32(0.5)})
    writer.write(1, "train", {"loss": jnp.bfloat16(1.5), "pairs": np.int32(64)})
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  assert lines == [
    '{"step": 0, "split": "eval", "loss": 0.75, "rewards/margins": 0.5}',
    '{"step": 1, "split": "train", "loss": 1.5, "pairs": 64}',
  ]
  expected = [json.loads(line) for line in lines]
  assert metric_writers.read_metrics(tmp_path) == expected
  assert tensorboard_points(tmp_path) == [
    (0, "eval/loss", 0.75),
    (0, "eval/rewards/margins", 0.5),
    (1, "train/loss", 1.5),
    (1, "train/pairs", 64.0),
  ]


def test_values_that_are_not_finite_are_strict_json_and_come_back(tmp_path):
  values = {"a": jnp.nan, "b": jnp.float32(-jnp.inf), "c": math.inf}
  with opened(tmp_path) as writer:
    writer.write(3, "train", values)

  def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")

  text = (tmp_path / "metrics.jsonl").read_text()
  record = json.loads(text, parse_constant=refuse)
  assert [record[name] for name in "abc"] == ["nan", "-inf", "inf"]
  (record,) = metric_writers.read_metrics(tmp_path)
  assert math.isnan(record["a"])
  assert (record["b"], record["c"]) == (-math.inf, math.inf)


def test_a_split_may_have_any_name(tmp_path):
  with opened(tmp_path) as writer:
    writer.write(1, "nan", {"loss": 1.0})
  assert metric_writers.read_metrics(tmp_path)[0]["split"] == "nan"


def test_resuming_leaves_each_point_once(tmp_path):
  with opened(tmp_path) as writer:
    for step in range(1, 8):
      writer.write(step, "train", {"loss": float(step), "bad": math.nan})
  time.sleep(1.1)  # Names of event files are unique by the second.
  # Killed at step 7, resumed from the checkpoint of step 4.
  with opened(tmp_path, resume_step=4) as writer:
    for step in range(5, 10):
      writer.write(step, "train", {"loss": float(10 * step), "bad": math.nan})
  losses = {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0, 5: 50, 6: 60, 7: 70, 8: 80, 9: 90}
  records = metric_writers.read_metrics(tmp_path)
  assert [(r["step"], r["loss"]) for r in records] == list(losses.items())
  assert all(math.isnan(r["bad"]) for r in records)
  points = tensorboard_points(tmp_path)
  shown = [(s, value) for s, tag, value in points if tag == "train/loss"]
  assert shown == list(losses.items())


def test_a_run_from_the_beginning_starts_empty(tmp_path):
  with opened(tmp_path) as writer:
    writer.write(0, "eval", {"loss": 1.0})
  time.sleep(1.1)  # Names of event files are unique by the second.
  with opened(tmp_path) as writer:
    writer.write(0, "eval", {"loss": 2.0})
  assert [r["loss"] for r in metric_writers.read_metrics(tmp_path)] == [2.0]
  assert tensorboard_points(tmp_path) == [(0, "eval/loss", 2.0)]


def test_a_torn_last_line_is_dropped(tmp_path):
  path = tmp_path / "metrics.jsonl"
  whole = '{"step": 1, "split": "train", "loss": 0.5}\n'
  path.write_text(whole + '{"step": 2, "spl')
  assert [r["step"] for r in metric_writers.read_metrics(path)] == [1]
  with opened(tmp_path, resume_step=1) as writer:
    writer.write(2, "train", {"loss": 0.25})
  assert [r["step"] for r in metric_writers.read_metrics(path)] == [1, 2]


KILLED_WHILE_WRITING = """
  import os, signal, sys
  from tests import metric_writers_test

  writer = metric_writers_test.opened(sys.argv[1])
  for step in range(1000):
    writer.write(step, "train", {"loss": 1.0 / (step + 1)})
  os.kill(os.getpid(), signal.SIGKILL)
"""


def test_sigkill_loses_no_written_line(tmp_path):
  script = "\n".join(x.strip() for x in KILLED_WHILE_WRITING.splitlines())
  script = script.replace("\nwriter.write", "\n  writer.write")
  died = subprocess.run(
    [sys.executable, "-c", script, str(tmp_path)], timeout=60
  )
  assert died.returncode == -signal.SIGKILL
  records = metric_writers.read_metrics(tmp_path)
  assert [record["step"] for record in records] == list(range(1000))


def test_only_the_primary_process_writes(tmp_path):
  with opened(tmp_path / "run", is_primary=False) as writer:
    writer.write(1, "train", {"loss": 1.0})
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  "line",
  [
    "{",
    "[]",
    "3",
    '"step split"',
    '{"step": 1}',
    '{"step": "1", "split": "train"}',
    '{"step": 1, "split": "train"',
  ],
)
def test_a_damaged_line_is_named_and_left_alone(tmp_path, line):
  path = tmp_path / "metrics.jsonl"
  text = '{"step": 1, "split": "train"}\n' + line + "\n"
  path.write_text(text)
  with pytest.raises(ValueError, match=f"Line 2 of {path} is not"):
    opened(tmp_path, resume_step=1)
  assert path.read_text() == text


@pytest.mark.parametrize(
  "value",
  [jnp.ones(2), "1", None, True, 1j],
  ids=lambda value: str(type(value)),
)
def test_what_is_not_a_real_scalar_is_refused_by_name(tmp_path, value):
  with opened(tmp_path) as writer:
    with pytest.raises(
      ValueError, match="Metric rewards/chosen must be one real"
    ):
      writer.write(1, "train", {"loss": 1.0, "rewards/chosen": value})
  assert metric_writers.read_metrics(tmp_path) == []


def test_names_of_the_line_are_reserved(tmp_path):
  with opened(tmp_path) as writer:
    with pytest.raises(ValueError, match="can be named step"):
      writer.write(1, "train", {"step": 2})


def test_missing_metrics_are_named(tmp_path):
  path = tmp_path / "metrics.jsonl"
  with pytest.raises(ValueError, match=f"no metrics at {path}"):
    metric_writers.read_metrics(tmp_path)
