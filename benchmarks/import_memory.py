"""Host memory that the import of a Hugging Face checkpoint takes.

  python benchmarks/import_memory.py --folder /tmp/import_memory

Writes a sharded bfloat16 checkpoint of a Llama (`--num_hidden_layers` sets its
size; it stays in the folder), imports it in a process of its own and prints
what that process had resident at its peak beyond the parameters, in units of
the largest tensor, and how fast it was. Then it imports it again with a limit
set on the process's data (RLIMIT_DATA): what it has before, the parameters and
1.5 times the largest tensor. `--naive` does the same with every file read as a
whole before the parameters are made. The last line is JSON.

"What it has before" is an interpreter in which JAX runs and has imported a tiny
model, so that compilers are loaded. Linux, and parameters on the CPU.
"""

import json
import math
import os
import pathlib
import resource
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from dpop_jax import sharding
from dpop_jax.hf import names, safetensors_files, weights
from dpop_jax.models import decoder, decoder_config

_FOLDER = flags.DEFINE_string("folder", None, "For the checkpoint.")
_LAYERS = flags.DEFINE_integer("num_hidden_layers", 30, "Of the model.")
_FILE_BYTES = flags.DEFINE_integer("max_file_bytes", 10**9, "Of a file.")
_NAIVE = flags.DEFINE_bool("naive", False, "Read everything, then place it.")
_CHILD = flags.DEFINE_enum(
  "child", None, ["free", "limited"], "What a process of its own does."
)
_ALLOWED = 1.5


def main(_) -> None:
  config = _config(_LAYERS.value, hidden_size=2048)
  folder = pathlib.Path(_FOLDER.value) / f"{_LAYERS.value}_layers"
  if _CHILD.value is not None:
    return _child(config, folder, is_limited=_CHILD.value == "limited")
  if not list(folder.glob("model*.safetensors")):
    folder.mkdir(parents=True, exist_ok=True)
    _write(config, folder)
  found = {"naive": _NAIVE.value}
  for kind in ("free", "limited"):
    command = [sys.executable, *sys.argv, f"--child={kind}"]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
      reason = process.stderr.strip().splitlines()[-1]
      print(f"{kind}: failed with status {process.returncode}: {reason}")
      found[kind] = None
      continue
    found[kind] = result = json.loads(process.stdout.splitlines()[-1])
    print(
      f"{kind}: {result['params'] / 1e9:.2f} GB in {result['seconds']:.1f} s "
      f"({result['params'] / 1e9 / result['seconds']:.2f} GB/s, "
      f"{result['cpu_seconds']:.1f} CPU-s); beyond them "
      f"and {result['before'] / 2**20:.0f} MiB before, "
      f"{result['excess'] / 2**20:.0f} MiB at the peak: "
      f"{result['excess'] / result['largest']:.2f} of the largest tensor "
      f"({result['largest'] / 2**20:.0f} MiB)"
    )
  print(json.dumps(found))


def _child(config, folder: pathlib.Path, *, is_limited: bool) -> None:
  load = _load_naively if _NAIVE.value else _load
  tiny = _config(1, hidden_size=64)
  tiny_folder = folder / "tiny"
  if not tiny_folder.exists():
    tiny_folder.mkdir()
    _write(tiny, tiny_folder)
  load(tiny, tiny_folder)
  entries = safetensors_files.tensors(folder).values()
  sizes = [2 * math.prod(entry.shape) for entry in entries]
  allowed = sum(sizes) + int(_ALLOWED * max(sizes))
  before = _status("VmRSS")
  if is_limited:
    limit = _status("VmData") + allowed
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
  start, cpu_start = time.perf_counter(), time.process_time()
  params = load(config, folder)
  seconds = time.perf_counter() - start
  cpu_seconds = time.process_time() - cpu_start
  # Not ru_maxrss: a new process inherits that from the one that starts it.
  peak = _status("VmHWM")
  assert sum(array.nbytes for array in jax.tree.leaves(params)) == sum(sizes)
  result = {
    "params": sum(sizes),
    "largest": max(sizes),
    "before": before,
    "excess": peak - before - sum(sizes),
    "seconds": seconds,
    "cpu_seconds": cpu_seconds,
  }
  print(json.dumps(result))


def _load(config, folder: pathlib.Path):
  mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  abstract = decoder.abstract_params(config, mesh)
  return weights.load(folder, names.parts(config, "llama"), abstract)


def _load_naively(config, folder: pathlib.Path):
  from safetensors import numpy as safetensors_numpy

  tensors = {}
  for path in sorted(folder.glob("*.safetensors")):
    tensors |= safetensors_numpy.load_file(path, backend="pread")
  stacked: dict[tuple[str, ...], list[np.ndarray]] = {}
  for part in names.parts(config, "llama"):
    order = [axis for merged in part.axes for axis in merged]
    array = tensors[part.name].reshape([part.shape[axis] for axis in order])
    array = array.transpose(np.argsort(order))
    stacked.setdefault(part.path, []).append(array)
  return [
    jax.block_until_ready(jax.device_put(np.stack(arrays)))
    for arrays in stacked.values()
  ]


def _write(config, folder: pathlib.Path) -> None:
  """Weights of repeated random bits; values do not matter."""
  mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  bits = np.random.default_rng(0).integers(0, 2**14, 2**20, np.uint16)
  make = lambda array: jax.device_put(
    np.resize(bits, array.shape).view(jnp.bfloat16), array.sharding
  )
  params = jax.tree.map(make, decoder.abstract_params(config, mesh))
  start = time.perf_counter()
  weights.save(
    params,
    names.parts(config, "llama"),
    folder,
    dtype=jnp.bfloat16,
    max_file_bytes=_FILE_BYTES.value,
  )
  size = sum(array.nbytes for array in jax.tree.leaves(params)) / 1e9
  seconds = time.perf_counter() - start
  print(f"written: {size:.2f} GB in {seconds:.1f} s")


def _config(num_layers: int, *, hidden_size: int):
  return decoder_config.DecoderConfig(
    vocab_size=16 * hidden_size,
    hidden_size=hidden_size,
    intermediate_size=4 * hidden_size,
    num_hidden_layers=num_layers,
    num_attention_heads=hidden_size // 64,
    num_key_value_heads=max(1, hidden_size // 256),
    param_dtype="bfloat16",
  )


def _status(key: str) -> int:
  """Bytes, of this process."""
  for line in pathlib.Path("/proc/self/status").read_text().splitlines():
    if line.startswith(f"{key}:"):
      return int(line.split()[1]) * 1024
  raise ValueError(f"/proc/self/status has no {key}; this needs Linux.")


if __name__ == "__main__":
  flags.mark_flag_as_required("folder")
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  app.run(main)
