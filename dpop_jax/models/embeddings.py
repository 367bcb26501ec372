"""What a token is."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from dpop_jax import sharding

_TABLE = P(sharding.TENSOR, sharding.FSDP)
_ROWS = P(sharding.ROW_AXES)


def look_up(
  embedding: Float[Array, "vocab hidden"], tokens: Int[Array, "rows length"]
) -> Float[Array, "rows length hidden"]:
  """Embeddings of tokens; each device reads the part of the table it holds."""
  if not sharding.split_axes(*sharding.MESH_AXES):
    return jnp.take(embedding, tokens, axis=0)
  return _look_up(embedding, tokens, embedding.shape[0])


# With a gradient of its own: the automatic one sums over `tensor` what is the
# same on all of its devices.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _look_up(embedding, tokens, vocab_size):
  return sharding.per_device(_read, in_specs=(_TABLE, _ROWS), out_specs=_ROWS)(
    embedding, tokens
  )


def _forward(embedding, tokens, vocab_size):
  return _look_up(embedding, tokens, vocab_size), tokens


def _backward(vocab_size, tokens, gradient):
  add = functools.partial(_add, vocab_size=vocab_size)
  run = sharding.per_device(add, in_specs=(_ROWS, _ROWS), out_specs=_TABLE)
  return run(tokens, gradient), None


_look_up.defvjp(_forward, _backward)


def _read(table, tokens):
  if fsdp := sharding.split_axes(sharding.FSDP):
    table = jax.lax.all_gather(table, fsdp, axis=1, tiled=True)
  tensor = sharding.split_axes(sharding.TENSOR)
  if not tensor:
    return jnp.take(table, tokens, axis=0)
  local, is_here = _local(tokens, table.shape[0])
  found = jnp.take(table, local, axis=0)
  return jax.lax.psum(jnp.where(is_here[..., None], found, 0), tensor)


def _add(tokens, gradient, *, vocab_size):
  if sharding.split_axes(sharding.TENSOR):
    vocab_size //= jax.lax.axis_size(sharding.TENSOR)
    tokens, is_here = _local(tokens, vocab_size)
    gradient = jnp.where(is_here[..., None], gradient, 0)
  table = jnp.zeros((vocab_size, gradient.shape[-1]), gradient.dtype)
  table = table.at[tokens].add(gradient)
  table = jax.lax.psum(table, sharding.split_axes(sharding.DATA))
  if fsdp := sharding.split_axes(sharding.FSDP):
    table = jax.lax.psum_scatter(table, fsdp, scatter_dimension=1, tiled=True)
  return table


def _local(tokens, size):
  """Rows of this device's part of the table, and which tokens are in it."""
  local = tokens - size * jax.lax.axis_index(sharding.TENSOR)
  is_here = (local >= 0) & (local < size)
  return jnp.where(is_here, local, 0), is_here
