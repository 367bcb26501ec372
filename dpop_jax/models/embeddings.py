"""What a token is."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from dpop_jax import sharding


def look_up(
  embedding: Float[Array, "vocab hidden"], tokens: Int[Array, "rows length"]
) -> Float[Array, "rows length hidden"]:
  """Embeddings of tokens; each device reads the part of the table it holds."""
  fsdp = sharding.active_axes(sharding.FSDP)
  tensor = sharding.active_axes(sharding.TENSOR)

  def read(table, tokens):
    if not tensor:
      return jnp.take(table, tokens, axis=0)
    table = jax.lax.all_gather(table, fsdp, axis=1, tiled=True)
    local = tokens - jax.lax.axis_index(tensor) * table.shape[0]
    is_here = (local >= 0) & (local < table.shape[0])
    found = jnp.take(table, jnp.where(is_here, local, 0), axis=0)
    return jax.lax.psum(jnp.where(is_here[..., None], found, 0), tensor)

  rows = P(sharding.ROW_AXES)
  table = P(sharding.TENSOR, sharding.FSDP)
  return sharding.per_device(read, in_specs=(table, rows), out_specs=rows)(
    embedding, tokens
  )
