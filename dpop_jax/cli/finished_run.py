"""The flags of commands that use what a run has left in its workdir."""

import dataclasses

from absl import flags

from dpop_jax.cli import mesh_flag

_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of the run.", required=True
)


def workdir() -> str:
  """What `--workdir` says."""
  return _WORKDIR.value


def load_config():
  """The run's `config.Config`, with the mesh that `--mesh` asks for if it does.

  Raises:
    ValueError: There is no run, or `--mesh` is not three whole numbers.
  """
  from dpop_jax import saved_config

  config = saved_config.load(workdir())
  mesh = mesh_flag.config()
  return config if mesh is None else dataclasses.replace(config, mesh=mesh)
