"""Compiles for an NVIDIA GPU that is not there, in a process of its own.

  python tests/gpu_compiler.py h100 FOLDER kernels
  python tests/gpu_compiler.py h100 FOLDER 8b a

FOLDER takes what the compiler writes down. What is found goes to its file
found.json: of the kernels, for each name of `HEADS`; or of the train step of
benchmarks/gpu.py whose shape and load are given.
"""

import json
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.suite_parts import gpu_work
from dpop_jax import program, sharding
from dpop_jax.data import packing
from dpop_jax.models import attention, attention_blocks

# Compute capability, cores, memory, and bytes of it that the threads of a core
# and of a block of them may share.
CARDS = {
  "h100": ((9, 0), 132, 84_942_979_072, 233_472, 232_448),
  "a100": ((8, 0), 108, 85_094_825_984, 167_936, 166_912),
  "a6000": ((8, 6), 84, 51_041_271_808, 102_400, 101_376),
}
# Rows, length, heads, key heads, width, dtype, window and cap of scores. Rows
# of 1,000 are padded, as are heads of 96.
HEADS = {
  "0.5b": (8, 2048, 14, 2, 64, jnp.bfloat16, None, None),
  "8b": (4, 2048, 32, 8, 128, jnp.bfloat16, None, None),
  "padded": (2, 1000, 8, 8, 96, jnp.bfloat16, None, None),
  "capped": (2, 1000, 8, 4, 256, jnp.bfloat16, 512, 50.0),
  "float32": (2, 1000, 8, 2, 64, jnp.float32, 300, None),
  "wide float32": (2, 1000, 8, 2, 128, jnp.float32, None, None),
}


def main(card, folder, *what) -> None:
  mesh = sharding.make_mesh(sharding.MeshConfig(), [_device(card)])
  folder = pathlib.Path(folder)
  if what == ("kernels",):
    found = {
      name: _kernels(mesh, folder, *heads) for name, heads in HEADS.items()
    }
  else:
    found = _step(mesh, what)
  (folder / "found.json").write_text(json.dumps(found))


def _device(card):
  (major, minor), cores, memory, core_shares, block_shares = CARDS[card]
  config = f"""
    gpu_device_info {{
      threads_per_block_limit: 1024
      threads_per_warp: 32
      shared_memory_per_block: 49152
      shared_memory_per_core: {core_shares}
      shared_memory_per_block_optin: {block_shares}
      threads_per_core_limit: {2048 if minor == 0 else 1536}
      core_count: {cores}
      fpus_per_core: 128
      block_dim_limit_x: 2147483647
      block_dim_limit_y: 65535
      block_dim_limit_z: 65535
      memory_bandwidth: 2000000000000
      l2_cache_size: 41943040
      clock_rate_ghz: 1.5
      device_memory_size: {memory}
      cuda_compute_capability {{ major: {major} minor: {minor} }}
      registers_per_core_limit: 65536
      registers_per_block_limit: 65536
      driver_version: "12.9.0"
      runtime_version: "12.9.0"
      compile_time_toolkit_version: "12.9.0"
      dnn_version: "9.10.0"
    }}
    platform_name: "CUDA"
    dnn_version_info {{ major: 9 minor: 10 }}
    device_description_str: "{card}"
  """
  # Lets JAX find the compiler.
  jax.devices()
  description = topologies.get_topology_desc(
    "1x1x1", "cuda", target_config=config, topology="1x1x1"
  )
  return description.devices[0]


def _kernels(mesh, folder, *heads):
  rows, length, heads, kv_heads, width, dtype, window, cap = heads

  def attend(query, key, value, out_gradient, *tree):
    limit = None if window is None else jnp.int32(window)
    visibility = attention_blocks.visibility(*tree, limit)
    out, pull = jax.vjp(
      lambda *qkv: attention.forest_attention(
        *qkv, visibility, scale=0.1, softcap=cap
      ),
      *(query, key, value),
    )
    return out, pull(out_gradient)

  placement = NamedSharding(mesh, P())
  abstract = lambda *shape, dtype: jax.ShapeDtypeStruct(
    shape, dtype, sharding=placement
  )
  arrays = [
    abstract(rows, length, size, width, dtype=dtype)
    for size in (heads, kv_heads, kv_heads, heads)
  ]
  tree = [abstract(rows, length, dtype=jnp.int32)] * 2
  step = jax.jit(attend, out_shardings=placement).trace(*arrays, *tree)
  compiled = step.lower(lowering_platforms=("cuda",)).compile()
  text = compiled.as_text()
  square = rf"\w+\[(?:\d+,)*({length}|{length + -length % 128}),\1\]"
  return {
    "kernels": text.count('"__gpu$xla.gpu.triton"'),
    "squares": [match[0] for match in re.finditer(square, text)],
    "spilt_bytes": _spilt(folder),
  }


def _spilt(folder):
  """What kernels keep in memory for want of registers, by name."""
  found = {}
  for file in folder.glob("*.ptx"):
    text = file.read_text()
    for name in re.findall(r"\.entry (\w*(?:forward|gradient)_kernel)", text):
      target = re.search(r"\.target (\w+)", text)[1]
      command = ["ptxas", "-v", "--gpu-name", target, str(file)]
      done = subprocess.run(
        [*command, "-o", "/dev/null"],
        capture_output=True,
        text=True,
        check=True,
      )
      spilt = re.search(r"(\d+) bytes spill stores", done.stderr)
      found[name] = int(spilt[1])
    file.unlink()
  return found


def _step(mesh, key):
  """Of rows that are full, and half of whose positions are scored."""
  shape, load = gpu_work.SHAPES[key[0]], gpu_work.LOADS[key]
  made = program.make_program(
    gpu_work.config(shape, load), mesh, num_steps=load.updates
  )
  length = load.row_length
  batch = packing.empty_rows(
    (1 if shape.is_reference_cached else 2, load.rows),
    packing.Capacity(length, length // 2, 64, 8),
  )
  compiled = program.compile_step(
    made.train_step, made, made.abstract_state, batch
  )
  memory = compiled.memory_analysis()
  return {
    "kernels": compiled.as_text().count('"__gpu$xla.gpu.triton"'),
    "argument_bytes": memory.argument_size_in_bytes,
    "temporary_bytes": memory.temp_size_in_bytes,
    "card_bytes": CARDS["h100"][2],
  }


if __name__ == "__main__":
  main(*sys.argv[1:])
