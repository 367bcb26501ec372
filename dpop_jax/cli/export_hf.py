"""Makes a Hugging Face folder of a run's newest checkpoint.

  python -m dpop_jax.cli.export_hf --workdir=DIR --out=MODEL_FOLDER

MODEL_FOLDER then holds safetensors files, config.json, generation_config.json
and the tokenizer as the run used it. DIR may also be the folder of one step, or
what import_hf made; both may be gs:// paths.
"""

import math

from absl import flags

from dpop_jax import processes
from dpop_jax.cli import command, mesh_flag

_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of the run, or of one of its steps.", required=True
)
_OUT = flags.DEFINE_string("out", None, "Folder to make.", required=True)
_DTYPE = flags.DEFINE_enum(
  "dtype",
  None,
  ["float32", "bfloat16", "float16"],
  "Of all weights; if not given, those of the model that the run started from.",
)
_MAX_FILE_GB = flags.DEFINE_float(
  "max_file_gb", 5.0, "Size of each file of weights, unless one tensor is more."
)


def main() -> None:
  from dpop_jax import exports, sharding  # noqa: PLC0415 (slow to import)

  if not 1e-9 <= _MAX_FILE_GB.value < math.inf:
    raise ValueError(
      f"--max_file_gb must be positive and finite, got {_MAX_FILE_GB.value}."
    )
  exported = exports.export_hf(
    _WORKDIR.value,
    _OUT.value,
    dtype=_DTYPE.value,
    mesh=mesh_flag.config() or sharding.MeshConfig(),
    max_file_bytes=int(_MAX_FILE_GB.value * 1e9),
  )
  if processes.is_first():
    print(
      f"{_OUT.value} holds step {exported.step} as a {exported.family} model "
      f"in {exported.dtype}"
    )


if __name__ == "__main__":
  command.run(main, in_several_processes=True)
