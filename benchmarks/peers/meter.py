"""What every library is measured with: the clock, the pairs and the report.

Runs in any environment: it needs NumPy and Linux, and nothing of dpop_jax.
"""

import json
import os
import pathlib
import resource
import sys
import time

import numpy as np


def cpu_seconds() -> tuple[float, float]:
  """Of all threads of this process so far: in all, and of it in the kernel."""
  usage = resource.getrusage(resource.RUSAGE_SELF)
  return usage.ru_utime + usage.ru_stime, usage.ru_stime


def peak_bytes() -> int:
  """The most that was resident.

  Not ru_maxrss, which begins with what the parent had when it forked.
  """
  for line in pathlib.Path("/proc/self/status").read_text().splitlines():
    if line.startswith("VmHWM:"):
      return int(line.split()[1]) * 1024
  raise OSError("/proc/self/status has no VmHWM; this needs Linux.")


class Stop(Exception):
  """Everything is measured; what a library does at its end is left out."""


class Meter:
  """Reads the orders, counts updates, writes the report.

  Attributes:
    order: What to do; see `runs.Order`.
    pairs: (prompt, chosen, rejected) of every pair as lists of ids, in the
      order in which updates take them.
  """

  def __init__(self):
    """Reads the file that the command line names."""
    self.order = json.loads(pathlib.Path(sys.argv[1]).read_text())
    with np.load(self.order["pairs_file"]) as file:
      tokens, offsets = file["tokens"], file["offsets"].tolist()
    self.pairs = [
      tuple(
        tokens[start:end].tolist()
        for start, end in zip(bounds, bounds[1:], strict=False)
      )
      for bounds in offsets
    ]
    self._marks, self._losses, self._answer_tokens = [], [], 0

  @property
  def num_updates(self) -> int:
    """Those that warm up included."""
    return self.order["updates"] + self._warm_up_updates

  @property
  def _warm_up_updates(self) -> int:
    return self.order.get("warm_up_updates", 1)

  def count_answer_tokens(self, count: int) -> None:
    """Adds tokens that the library was seen to score."""
    self._answer_tokens += int(count)

  def add_loss(self, loss: float) -> None:
    """Takes a reported loss."""
    self._losses.append(float(loss))

  def end_update(self) -> None:
    """Marks that an update, or several of them, has been computed."""
    self._marks.append((time.time(), *cpu_seconds()))

  @property
  def is_done(self) -> bool:
    """Whether all updates have been computed."""
    return len(self._marks) >= self.num_updates

  def write(
    self, *, versions: dict[str, str], settings: dict, **figures
  ) -> None:
    """Writes the report, to where the order says.

    Args:
      versions: Of what matters.
      settings: What the library was set to, in its own names.
      **figures: That the library gives beside the meter's.
    """
    if len(self._marks) != self.num_updates:
      raise ValueError(
        f"Expected {self.num_updates} updates, but {len(self._marks)} were "
        "made."
      )
    first_wall, first_cpu, first_kernel = self._marks[self._warm_up_updates - 1]
    last_wall, last_cpu, last_kernel = self._marks[-1]
    num_pairs = self.order["pairs"] * self.order["updates"]
    report = {
      "cpu_seconds_per_pair": (last_cpu - first_cpu) / num_pairs,
      "kernel_seconds_per_pair": (last_kernel - first_kernel) / num_pairs,
      "wall_seconds_per_pair": (last_wall - first_wall) / num_pairs,
      "seconds_to_first_step": self._marks[0][0] - self.order["started"],
      "cpu_seconds_to_first_step": self._marks[0][1],
      "peak_bytes": peak_bytes(),
      "losses": self._losses,
      "answer_tokens": self._answer_tokens,
      "load_average": os.getloadavg()[0],
      "versions": versions | {"python": sys.version.split()[0]},
      "settings": settings,
      **figures,
    }
    path = pathlib.Path(self.order["report_file"])
    path.write_text(json.dumps(report, indent=2))


def round_up(size: int, multiple: int) -> int:
  """To the next multiple."""
  return -(-size // multiple) * multiple
