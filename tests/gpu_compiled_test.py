"""Kernels and train steps through XLA's compiler for GPUs; no GPU is needed."""

import json
import os
import pathlib
import subprocess
import sys

import gpu_compiler
import pytest

from benchmarks.suite_parts import gpu_work

COMPILER = os.environ.get("DPOP_GPU_COMPILER")
# On cards whose products keep more registers than an H100's.
MAX_SPILT_BYTES = {"h100": 0, "a100": 16, "a6000": 16}
ROOT = pathlib.Path(__file__).parent.parent

pytestmark = [
  pytest.mark.gpu,
  pytest.mark.skipif(
    COMPILER is None, reason="needs the compiler for GPUs: make test-gpu"
  ),
]


def compiled(folder, *arguments):
  """What tests/gpu_compiler.py found."""
  compiler = (ROOT / COMPILER).resolve()
  toolkit = compiler / "nvidia" / "cuda_nvcc"
  done = subprocess.run(
    [sys.executable, "tests/gpu_compiler.py", arguments[0], str(folder)]
    + list(arguments[1:]),
    cwd=ROOT,
    env={
      **os.environ,
      "PYTHONPATH": f"{ROOT}:{compiler}",
      "PATH": f"{toolkit / 'bin'}:{os.environ['PATH']}",
      "JAX_PLATFORMS": "cpu",
      # Products of matrices are chosen by timing them, for which one needs it.
      "XLA_FLAGS": f"--xla_gpu_cuda_data_dir={toolkit} "
      f"--xla_gpu_autotune_level=0 --xla_dump_to={folder} "
      "--xla_dump_hlo_module_re=attend",
    },
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  return json.loads((folder / "found.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("card", gpu_compiler.CARDS)
def test_the_gpu_compiler_takes_the_kernels(card, tmp_path):
  found = compiled(tmp_path, card, "kernels")
  assert list(found) == list(gpu_compiler.HEADS)
  for heads in found.values():
    # There and two ways back, and nothing of the size of queries times keys.
    assert heads["kernels"] == 3
    assert not heads["squares"]
    # What a thread has no register for it keeps in memory, which is slow.
    assert sorted(heads["spilt_bytes"]) == [
      "forward_kernel",
      "key_gradient_kernel",
      "query_gradient_kernel",
    ]
    assert max(heads["spilt_bytes"].values()) <= MAX_SPILT_BYTES[card]


@pytest.mark.slow
@pytest.mark.parametrize(
  "key", [key for key in gpu_work.LOADS if key[0] != "tiny"]
)
def test_the_steps_of_the_benchmark_fit_an_h100(key, tmp_path):
  step = compiled(tmp_path, "h100", *key)
  # Of the policy there and two back, and of the reference or once again.
  assert step["kernels"] == 4
  # What is not there is not asked for: JAX is given 95 % of the card.
  needed = step["argument_bytes"] + step["temporary_bytes"]
  assert needed < 0.95 * step["card_bytes"]
