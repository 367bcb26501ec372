"""The flag that says over which devices a command spreads a model."""

from absl import flags

_MESH = flags.DEFINE_list(
  "mesh",
  None,
  "Devices along data, fsdp and tensor, one of them -1 for the rest, such as "
  "1,-1,1.",
)


def config():
  """The `sharding.MeshConfig` that `--mesh` asks for; None if it is not given.

  Raises:
    ValueError: It is not three whole numbers, or these make no mesh.
  """
  from dpop_jax import sharding

  if _MESH.value is None:
    return None
  try:
    data, fsdp, tensor = map(int, _MESH.value)
  except ValueError:
    raise ValueError(
      "--mesh must be three whole numbers, such as 1,-1,1; got "
      f"{','.join(_MESH.value)!r}."
    ) from None
  return sharding.MeshConfig(data=data, fsdp=fsdp, tensor=tensor)
