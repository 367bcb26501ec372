"""One library on one kind of work, in a process of its own."""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import time
from typing import Any

from . import work as work_lib

BETA = 0.1
LEARNING_RATE = 1e-5
_PEERS = pathlib.Path(__file__).parent.parent / "peers"
_LIMIT_SECONDS = 3600
# Makes glibc's allocator keep what is freed; else the kernel clears the pages
# of every large tensor again, which takes longer than computing it.
_KEEPING_MEMORY = {
  "MALLOC_MMAP_MAX_": "0",
  "MALLOC_TRIM_THRESHOLD_": str(2**36),
  "MALLOC_TOP_PAD_": str(2**28),
}
# Large pages for everybody, where the system gives them to who asks. Clearing
# small ones takes a tenth of the time of a step of small matrices.
_LARGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
_TAIL_LINES = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Order:
  """What a process is told: `peers/meter.py` reads it from a file.

  Attributes:
    pairs_file: From `work.make`.
    model: Sizes, in `transformers`' names.
    pairs: Of an update.
    updates: That are measured; one more comes before them.
    microbatch_pairs: Pairs computed at once, if the library counts in pairs.
    row_length: Tokens of our rows.
    is_grouped: The pairs of a prompt come together.
    is_reference_cached: Score the reference before training, not in the step.
    threads: Processors there are.
    beta: Of the loss.
    learning_rate: Of AdamW.
    tokenizer: Ours asks for one, though everything comes as ids.
    folder: For what a library writes.
    report_file: For the report.
    started: When the process was started, in seconds since 1970.
  """

  pairs_file: str
  model: dict[str, int]
  pairs: int
  updates: int
  microbatch_pairs: int
  row_length: int
  is_grouped: bool
  is_reference_cached: bool
  threads: int
  beta: float
  learning_rate: float
  tokenizer: str
  folder: str
  report_file: str
  started: float


def run(
  name: str,
  *,
  library: str,
  python: str,
  pairs_file: pathlib.Path,
  tokenizer: str,
  is_reference_cached: bool,
  folder: pathlib.Path,
  num_cores: int,
) -> dict[str, Any]:
  """Trains, and returns the report of `meter.Meter.write`.

  Args:
    name: A key of `work.WORK`.
    library: "ours", "trl", "tunix" or "easydel".
    python: Of its environment.
    pairs_file: The token pairs.
    tokenizer: For ours.
    is_reference_cached: See `Order`.
    folder: Of the order, the log and the report.
    num_cores: Processors the process may use, with a thread each.

  Returns:
    The report, or {"error": what it said} if the process failed. A report of
    the same order that is there already is not made again.
  """
  work = work_lib.WORK[name]
  report_file = folder / "report.json"
  order = Order(
    pairs_file=str(pairs_file),
    model=dataclasses.asdict(work.model),
    pairs=work.pairs,
    updates=work.updates,
    microbatch_pairs=work.microbatch_pairs,
    row_length=work.row_length,
    is_grouped=work.is_grouped,
    is_reference_cached=is_reference_cached,
    threads=num_cores,
    beta=BETA,
    learning_rate=LEARNING_RATE,
    tokenizer=tokenizer,
    folder=str(folder / "scratch"),
    report_file=str(report_file),
    started=time.time(),
  )
  with _on_cores(num_cores):
    return execute(
      order,
      python=python,
      script=f"train_{library}.py",
      environment=_environment(library),
    )


def execute(
  order: Any, *, python: str, script: str, environment: dict[str, str]
) -> dict[str, Any]:
  """Starts a process that is told an order, and returns its report.

  Args:
    order: A dataclass; has at least `folder` and `report_file`, in whose folder
      the order and the log are kept.
    python: Runs the script.
    script: Of the folder `peers`.
    environment: Its variables.

  Returns:
    As `run` does.
  """
  report_file = pathlib.Path(order.report_file)
  folder = report_file.parent
  kept = _kept(folder, order)
  if kept is not None:
    return kept
  shutil.rmtree(folder, ignore_errors=True)
  pathlib.Path(order.folder).mkdir(parents=True)
  order_file = folder / "order.json"
  order_file.write_text(json.dumps(dataclasses.asdict(order), indent=2))
  command = [python, str(_PEERS / script), str(order_file)]
  log_file = folder / "log.txt"
  with log_file.open("w") as log:
    try:
      status = subprocess.run(
        command,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment,
        cwd=folder,
        timeout=_LIMIT_SECONDS,
      ).returncode
    except subprocess.TimeoutExpired:
      status = f"after {_LIMIT_SECONDS} seconds"
  shutil.rmtree(order.folder)
  if status == 0 and report_file.exists():
    return json.loads(report_file.read_text())
  tail = log_file.read_text(errors="replace").strip().splitlines()
  return {"error": f"ended with {status}: {' '.join(tail[-_TAIL_LINES:])}"}


@contextlib.contextmanager
def _on_cores(num_cores):
  """Processes that are started here have so many processors."""
  before = os.sched_getaffinity(0)
  os.sched_setaffinity(0, sorted(before)[-num_cores:])
  try:
    yield
  finally:
    os.sched_setaffinity(0, before)


def _kept(folder, order):
  """The report of an earlier start, if it was told the same."""
  try:
    earlier = json.loads((folder / "order.json").read_text())
    report = json.loads((folder / "report.json").read_text())
  except FileNotFoundError:
    return None
  wanted = dataclasses.asdict(order)
  # Where it all lies, and when, makes no difference.
  same = wanted.keys() - {
    *("pairs_file", "tokenizer", "folder", "report_file", "started")
  }
  is_same = all(earlier.get(key) == wanted[key] for key in same)
  return report if is_same else None


def _environment(library):
  """Nobody asks a network."""
  environment = variables(is_ours=library == "ours")
  environment |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"} | _LARGE_PAGES
  if library == "trl":
    environment |= _KEEPING_MEMORY
  return environment


def variables(*, is_ours: bool) -> dict[str, str]:
  """What every library's process has; ours is found without being installed."""
  environment = dict(os.environ)
  environment |= {"WANDB_MODE": "disabled", "TOKENIZERS_PARALLELISM": "false"}
  environment.pop("PYTHONPATH", None)
  if is_ours:
    environment["PYTHONPATH"] = str(_PEERS.parent.parent)
  return environment
