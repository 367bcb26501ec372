"""A library on a load of benchmarks/gpu.py, in a process of its own."""

import dataclasses
import json
import pathlib
import subprocess
import time
from typing import Any

from . import gpu_work, runs

LIBRARIES = ("ours", "trl")
# Ours takes memory once and keeps it; by default three quarters.
_OURS = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}
# PyTorch's advice against memory that is free in pieces.
_TRL = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
_OUT_OF_MEMORY = "out of memory"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Order:
  """What a process is told: `peers/meter.py` reads it from a file.

  Attributes:
    pairs_file: From `work.make`.
    shape: A key of `gpu_work.SHAPES`.
    load: With it, a key of `gpu_work.LOADS`.
    architecture: Of the shape, as what follows.
    sizes: Of the model.
    optimizer: Its name.
    is_reference_cached: Score the reference before training, not in the step.
    peer_weights: Dtype of TRL's weights.
    is_checkpointed: Whether TRL computes activations again.
    pairs: Of an update.
    peer_pairs: That TRL computes at once.
    updates: That are measured.
    warm_up_updates: Before them.
    beta: Of the loss.
    learning_rate: Constant.
    is_smoke: Everything runs on a CPU.
    folder: For what a library writes.
    report_file: For the report.
    started: When the process was started, in seconds since 1970.
  """

  pairs_file: str
  shape: str
  load: str
  architecture: str
  sizes: dict[str, Any]
  optimizer: str
  is_reference_cached: bool
  peer_weights: str
  is_checkpointed: bool
  pairs: int
  peer_pairs: int
  updates: int
  warm_up_updates: int
  beta: float
  learning_rate: float
  is_smoke: bool
  folder: str
  report_file: str
  started: float


def run(
  key: tuple[str, str],
  *,
  library: str,
  python: str,
  pairs_file: pathlib.Path,
  folder: pathlib.Path,
  is_smoke: bool,
) -> dict[str, Any]:
  """Trains, and returns the report of `meter.Meter.write`.

  Where TRL does not have the memory for as many pairs at once, it gets half.

  Args:
    key: Of `gpu_work.LOADS`.
    library: One of LIBRARIES.
    python: Of its environment.
    pairs_file: The token pairs.
    folder: Of the order, the log and the report.
    is_smoke: Whether to run on a CPU.

  Returns:
    The report, or {"error": what it said} if the process failed.
  """
  peer_pairs = gpu_work.LOADS[key].peer_pairs
  while True:
    report = runs.execute(
      _order(key, peer_pairs, pairs_file, folder, is_smoke),
      python=python,
      script=f"gpu_{library}.py",
      environment=_environment(library, is_smoke),
    )
    is_too_much = _OUT_OF_MEMORY in report.get("error", "").lower()
    if library == "ours" or not is_too_much or peer_pairs == 1:
      return report
    peer_pairs //= 2


def _order(key, peer_pairs, pairs_file, folder, is_smoke) -> Order:
  shape, load = gpu_work.SHAPES[key[0]], gpu_work.LOADS[key]
  return Order(
    pairs_file=str(pairs_file),
    shape=key[0],
    load=key[1],
    architecture=shape.architecture,
    sizes=shape.sizes,
    optimizer=shape.optimizer,
    is_reference_cached=shape.is_reference_cached,
    peer_weights=shape.peer_weights,
    is_checkpointed=shape.is_checkpointed,
    pairs=load.pairs,
    peer_pairs=peer_pairs,
    updates=load.updates - gpu_work.WARM_UP_UPDATES,
    warm_up_updates=gpu_work.WARM_UP_UPDATES,
    beta=runs.BETA,
    learning_rate=runs.LEARNING_RATE,
    is_smoke=is_smoke,
    folder=str(folder / "scratch"),
    report_file=str(folder / "report.json"),
    started=time.time(),
  )


def _environment(library, is_smoke) -> dict[str, str]:
  environment = runs.variables(is_ours=library == "ours")
  environment |= _OURS if library == "ours" else _TRL
  if is_smoke:
    environment |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
  return environment


def device_of(python: str) -> tuple[str, str]:
  """Platform and kind of the first device that JAX finds.

  Asked of another process, for one that has asked holds the GPU's memory.

  Args:
    python: Runs JAX.
  """
  code = (
    "import jax, json; device = jax.devices()[0]; "
    "print(json.dumps([device.platform, device.device_kind]))"
  )
  done = subprocess.run([python, "-c", code], capture_output=True, text=True)
  if done.returncode:
    said = done.stderr.strip().splitlines()
    raise ValueError(f"JAX does not start: {said[-1] if said else 'no word'}")
  platform, kind = json.loads(done.stdout.splitlines()[-1])
  return platform, kind
