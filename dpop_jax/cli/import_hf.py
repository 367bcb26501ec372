"""Makes a folder that runs can start from, of a Hugging Face model.

  python -m dpop_jax.cli.import_hf --source=MODEL_FOLDER --out=DIR

A run takes it as --config.run.init_from=DIR, which may also be MODEL_FOLDER
itself: an import is worth while where many runs, or many hosts, start from it.
Both folders may be gs:// paths.
"""

from absl import flags

from dpop_jax import processes
from dpop_jax.cli import command, mesh_flag

_SOURCE = flags.DEFINE_string(
  "source", None, "Hugging Face folder with safetensors files.", required=True
)
_OUT = flags.DEFINE_string("out", None, "Folder to make.", required=True)
_PARAM_DTYPE = flags.DEFINE_enum(
  "param_dtype",
  None,
  ["float32", "bfloat16"],
  "Of the weights as stored; if not given, that of the source, and float32 for "
  "float16.",
)
_IGNORE_OPTIONS = flags.DEFINE_list(
  "ignore_options",
  [],
  "Options of the source's config.json that are not known and may be ignored.",
)


def main() -> None:
  from dpop_jax import imports, sharding  # noqa: PLC0415 (slow to import)

  config = imports.import_hf(
    _SOURCE.value,
    _OUT.value,
    param_dtype=_PARAM_DTYPE.value,
    mesh=mesh_flag.config() or sharding.MeshConfig(),
    ignored_options=_IGNORE_OPTIONS.value,
  )
  if processes.is_first():
    print(
      f"{_OUT.value} holds {config.num_hidden_layers} layers of width "
      f"{config.hidden_size} in {config.param_dtype}; start a run from it with "
      f"--config.run.init_from={_OUT.value}"
    )


if __name__ == "__main__":
  command.run(main, in_several_processes=True)
