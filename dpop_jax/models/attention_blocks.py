"""Blocks of the tokens of a row, and which pairs of them attention needs."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

MAX_BLOCK_SIZE = 128


class Blocks(NamedTuple):
  """The pairs of a query block and a key block that are computed.

  Blocks of all rows count through: block `row * blocks_per_row + i`.

  Attributes:
    queries: int32 [all pairs]; those that count come first.
    keys: int32 [all pairs].
    count: Number of pairs that count.
  """

  queries: jax.Array
  keys: jax.Array
  count: jax.Array


def block_size(length: int) -> int:
  """Largest divisor of a row's length up to MAX_BLOCK_SIZE."""
  return next(
    size for size in range(MAX_BLOCK_SIZE, 0, -1) if length % size == 0
  )


def padding(length: int) -> int:
  """Tokens to add to a row that no size near MAX_BLOCK_SIZE divides."""
  is_fine = block_size(length) * 4 >= MAX_BLOCK_SIZE or length <= MAX_BLOCK_SIZE
  return 0 if is_fine else -length % MAX_BLOCK_SIZE


def visible_blocks(
  visible_until: Int[Array, "rows length"],
  positions: Int[Array, "rows length"] | None = None,
  window: Int[Array, ""] | None = None,
) -> Blocks:
  """Lists the pairs of blocks that any token needs.

  With a window, where a block holds several branches, a pair may be listed in
  which nothing is visible; never the other way round.

  Args:
    visible_until: End of the subtree of each token.
    positions: Depth of each token in its tree; only needed with a window.
    window: See `attention.forest_attention`.
  """
  rows, length = visible_until.shape
  size = block_size(length)
  count = length // size
  index = jnp.arange(count)
  # Padding sees not even itself, so it asks for nothing.
  is_seen = visible_until > jnp.arange(length)[None]
  last_query = jnp.where(is_seen, visible_until, 0)
  last_query = last_query.reshape(rows, count, size).max(axis=-1)
  queries, keys = index[None, :, None], index[None, None, :]
  is_needed = (keys <= queries) & (last_query[:, None, :] > queries * size)
  if window is not None:
    # The shallowest query that a key of the key block may reach, less the
    # deepest key that reaches into the query block: this leaves out padding
    # and other trees. `initial` is for pairs that are not needed anyway.
    tokens = jnp.arange(length).reshape(1, count, 1, size)
    shallowest = positions.reshape(rows, count, 1, size).min(
      axis=-1, where=tokens < last_query[:, None, :, None], initial=length
    )
    until = visible_until.reshape(rows, 1, count, size)
    deepest = positions.reshape(rows, 1, count, size).max(
      axis=-1, where=until > queries[..., None] * size, initial=0
    )
    is_needed &= shallowest - deepest < window
  row, query, key = jnp.nonzero(is_needed, size=rows * count**2, fill_value=0)
  return Blocks(
    queries=row * count + query, keys=row * count + key, count=is_needed.sum()
  )
