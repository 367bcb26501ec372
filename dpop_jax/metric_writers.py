"""Metrics of a run on disk: JSON lines for programs, TensorBoard for people."""

import json
import math
import os
import pathlib
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from dpop_jax import atomic_files, paths

FILE_NAME = "metrics.jsonl"
_TENSORBOARD = "tensorboard"
_UPLOAD_EVERY_SECONDS = 30.0
STEP, SPLIT = "step", "split"
_NON_FINITE = ("nan", "inf", "-inf")


class MetricWriter:
  """Appends scalars to `workdir`/metrics.jsonl and `workdir`/tensorboard.

  One line of the JSON file is one call of `write`:

    {"step": 10, "split": "train", "loss": 0.6931, "rewards/margins": "nan"}

  JSON has no numbers that are not finite, so these are the strings "nan", "inf"
  and "-inf"; `read_metrics` returns them as floats. In TensorBoard the same
  value is at "train/loss". A line outlives the process as soon as `write`
  returns; TensorBoard follows within a second or so. Nothing can be appended to
  what is in a bucket: there, both are written again as a whole every half a
  minute, by `flush` and by `close`.

  A context manager. All processes may hold one; only the primary one writes.
  """

  def __init__(
    self, workdir: str, *, resume_step: int | None, is_primary: bool
  ):
    """Opens the files, and removes what the resumed run will write again.

    Args:
      workdir: The folder of the run; made if not there.
      resume_step: The step of the checkpoint the run continues from: later
        lines are removed, those of the step itself stay. None is a run from the
        beginning: all lines are removed.
      is_primary: Whether this process writes, `jax.process_index() == 0`.

    Raises:
      ValueError: The metrics.jsonl in `workdir` is damaged.
    """
    self._lines = None
    self._tensorboard = None
    self._workdir = paths.of(workdir)
    self._draft = None
    if not is_primary:
      return
    # Steps that are run again would appear twice in every curve.
    first_new_step = 0 if resume_step is None else resume_step + 1
    _keep_steps_before(first_new_step, self._workdir / FILE_NAME)
    import tensorboardX  # noqa: PLC0415 (used by nobody who only reads)

    if paths.is_remote(workdir):
      self._draft = tempfile.TemporaryDirectory(prefix="dpop_jax_metrics_")
      self._folder = pathlib.Path(self._draft.name)
      paths.copy_files([FILE_NAME], self._workdir, self._folder)
      self._uploaded_at = time.monotonic()
    else:
      self._folder = pathlib.Path(self._workdir)
    # Unbuffered, so that each line reaches the system in one piece and at once.
    self._lines = (self._folder / FILE_NAME).open("ab", buffering=0)
    self._tensorboard = tensorboardX.SummaryWriter(
      str(self._folder / _TENSORBOARD),
      purge_step=first_new_step,
      flush_secs=1,
    )

  def __enter__(self) -> "MetricWriter":
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def write(self, step: int, split: str, values: Mapping[str, Any]) -> None:
    """Writes one line.

    Args:
      step: Updates done so far.
      split: What was measured: "train", "eval" or the name of a benchmark.
      values: Scalars by metric name: Python numbers or arrays of shape [].

    Raises:
      ValueError: A value is not a real scalar, or is named "step" or "split".
    """
    if self._lines is None:
      return
    scalars = {name: _scalar(name, value) for name, value in values.items()}
    if reserved := sorted({STEP, SPLIT} & scalars.keys()):
      raise ValueError(
        f"No metric can be named {' or '.join(reserved)}; these name the line."
      )
    record = {STEP: step, SPLIT: split}
    record |= {name: _to_json(value) for name, value in scalars.items()}
    self._lines.write(json.dumps(record, allow_nan=False).encode() + b"\n")
    for name, value in scalars.items():
      self._tensorboard.add_scalar(f"{split}/{name}", value, global_step=step)
    if self._draft is not None:
      if time.monotonic() - self._uploaded_at >= _UPLOAD_EVERY_SECONDS:
        self.flush()

  def flush(self) -> None:
    """Makes what was written outlive the process in a bucket as well.

    Before a checkpoint, so that a run that continues from it lacks no line.

    Raises:
      OSError: The bucket refuses, or cannot be reached.
    """
    if self._lines is not None and self._draft is not None:
      self._tensorboard.flush()
      self._upload()

  def close(self) -> None:
    """Writes what TensorBoard still has in memory, and closes the files."""
    if self._lines is None:
      return
    self._lines.close()
    self._tensorboard.close()
    self._lines = None
    if self._draft is not None:
      with self._draft:
        self._upload()

  def _upload(self):
    files = paths.files_below(self._folder)
    names = [os.path.relpath(file, self._folder) for file in files]
    paths.copy_files(names, self._folder, self._workdir)
    self._uploaded_at = time.monotonic()


def read_metrics(path: epath.PathLike) -> list[dict[str, Any]]:
  """The lines of a metrics.jsonl as dicts, in the order written.

  A last line that a killed process left torn is dropped.

  Args:
    path: The file, or the workdir it is in.

  Raises:
    ValueError: There is no such file, or a line is not such a record.
  """
  path = paths.of(path)
  path = path / FILE_NAME if path.is_dir() else path
  if not path.exists():
    raise ValueError(f"There are no metrics at {path}.")
  # Whatever follows the last newline is torn.
  lines = path.read_bytes().split(b"\n")[:-1]
  records = []
  for number, line in enumerate(lines, start=1):
    try:
      record = json.loads(line)
      is_record = type(record[STEP]) is int and type(record[SPLIT]) is str
    except (ValueError, TypeError, KeyError):
      is_record = False
    if not is_record:
      raise ValueError(
        f"Line {number} of {path} is not a JSON object with {STEP} and "
        f"{SPLIT}; remove it if the file was edited."
      )
    records.append({name: _from_json(name, x) for name, x in record.items()})
  return records


def _keep_steps_before(first_new_step: int, path: epath.Path) -> None:
  """Rewrites the file with the complete lines of earlier steps only."""
  records = read_metrics(path) if path.exists() else []
  kept = [record for record in records if record[STEP] < first_new_step]
  text = "".join(
    json.dumps({name: _to_json(x) for name, x in record.items()}) + "\n"
    for record in kept
  )
  atomic_files.write_text(path, text)


def _scalar(name: str, value: Any) -> int | float:
  array = np.asarray(value)
  # ml_dtypes' bfloat16 is of kind "V", but knows how to become a float.
  if array.ndim or array.dtype.kind in "cOSUM" or array.dtype == bool:
    raise ValueError(
      f"Metric {name} must be one real number, got {value!r} of shape "
      f"{list(array.shape)}."
    )
  return int(array) if array.dtype.kind in "iu" else float(array)


def _to_json(value: int | float | str) -> int | float | str:
  if isinstance(value, float) and not math.isfinite(value):
    return str(value)
  return value


def _from_json(name: str, value: int | float | str) -> int | float | str:
  return float(value) if name != SPLIT and value in _NON_FINITE else value
