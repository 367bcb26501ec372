"""The flags of commands that use what a run has left in its workdir."""

import dataclasses

from absl import flags

_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of the run.", required=True
)
_MESH = flags.DEFINE_list(
  "mesh",
  None,
  "Devices along data, fsdp and tensor, one of them -1 for the rest; as in "
  "training if not given.",
)


def workdir() -> str:
  """What `--workdir` says."""
  return _WORKDIR.value


def load_config():
  """The run's `config.Config`, with the mesh that `--mesh` asks for.

  Raises:
    ValueError: There is no run, or `--mesh` is not three whole numbers.
  """
  from dpop_jax import saved_config, sharding

  config = saved_config.load(workdir())
  if _MESH.value is None:
    return config
  try:
    data, fsdp, tensor = map(int, _MESH.value)
  except ValueError:
    raise ValueError(
      "--mesh must be three whole numbers, such as 1,-1,1; got "
      f"{','.join(_MESH.value)!r}."
    ) from None
  mesh = sharding.MeshConfig(data=data, fsdp=fsdp, tensor=tensor)
  return dataclasses.replace(config, mesh=mesh)
