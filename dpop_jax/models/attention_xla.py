"""Forest attention in plain XLA: a loop over the pairs of blocks."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpop_jax.models import attention_blocks
from dpop_jax.models.attention_blocks import Visibility
from dpop_jax.models.attention_scores import MASKED, Scoring


def forward(
  query: Float[Array, "rows length heads head_dim"],
  key: Float[Array, "rows length kv_heads head_dim"],
  value: Float[Array, "rows length kv_heads head_dim"],
  visibility: Visibility,
  *,
  scoring: Scoring,
) -> tuple[
  Float[Array, "rows length heads head_dim"],
  Float[Array, "heads rows length"],
]:
  """Attention of one device's rows and heads; also the log-normalizers.

  Softmax is accumulated block by block in float32. A row that can't be cut
  evenly into large blocks is padded, for blocks of a few tokens would take a
  hundred times as long.
  """
  rows, length, heads, _ = query.shape
  query, key, value, tokens = _padded(query, key, value, visibility[:3])
  num_groups = heads // key.shape[2]
  size = attention_blocks.block_size(query.shape[1])
  blocks = visibility.plain
  query = _split(query, num_groups, size)
  key, value = _split(key, 1, size), _split(value, 1, size)

  def attend(step, carry):
    sums, maxima, mixed = carry
    q, k = blocks.queries[step], blocks.keys[step]
    scores, mask = _masked_scores(q, k, query, key, tokens, scoring)
    old = maxima[q]
    new = jnp.maximum(old, jnp.where(mask, scores, MASKED).max(axis=-1))
    weights = jnp.where(mask, jnp.exp(scores - new[..., None]), 0.0)
    rescale = jnp.exp(old - new)
    update = jnp.einsum(
      "kqc,kcd->kqd",
      weights.astype(value.dtype),
      value[k],
      preferred_element_type=jnp.float32,
    )
    return (
      _put(sums, q, sums[q] * rescale + weights.sum(axis=-1)),
      _put(maxima, q, new),
      _put(mixed, q, mixed[q] * rescale[..., None] + update),
    )

  zeros = jnp.zeros(query.shape, jnp.float32)
  start = (zeros[..., 0], jnp.full(query.shape[:-1], MASKED), zeros)
  sums, maxima, mixed = jax.lax.fori_loop(0, blocks.count[0], attend, start)
  # A query that sees nothing (padding) gives zeros.
  is_seeing = sums > 0
  sums = jnp.where(is_seeing, sums, 1.0)
  out = (mixed / sums[..., None]).astype(query.dtype)
  log_normalizers = jnp.where(is_seeing, maxima + jnp.log(sums), 0.0)
  return (
    _join(out, rows, num_groups, size)[:, :length],
    _join_line(log_normalizers, rows, num_groups, size)[..., :length],
  )


def backward(
  query: Float[Array, "rows length heads head_dim"],
  key: Float[Array, "rows length kv_heads head_dim"],
  value: Float[Array, "rows length kv_heads head_dim"],
  visibility: Visibility,
  out: Float[Array, "rows length heads head_dim"],
  log_normalizers: Float[Array, "heads rows length"],
  out_gradient: Float[Array, "rows length heads head_dim"],
  *,
  scoring: Scoring,
) -> tuple[
  Float[Array, "rows length heads head_dim"],
  Float[Array, "rows length kv_heads head_dim"],
  Float[Array, "rows length kv_heads head_dim"],
]:
  """Gradients of queries, keys and values; weights are computed again."""
  rows, length, heads, _ = query.shape
  query, key, value, tokens, out, out_gradient = _padded(
    query, key, value, visibility[:3], out, out_gradient
  )
  padding = query.shape[1] - length
  log_normalizers = jnp.pad(log_normalizers, ((0, 0), (0, 0), (0, padding)))
  num_groups = heads // key.shape[2]
  size = attention_blocks.block_size(query.shape[1])
  blocks = visibility.plain
  dtypes = query.dtype, key.dtype, value.dtype
  query = _split(query, num_groups, size)
  key, value = _split(key, 1, size), _split(value, 1, size)
  out_gradient = _split(out_gradient, num_groups, size)
  out = _split(out, num_groups, size)
  log_normalizers = _split_line(log_normalizers, num_groups, size)
  deltas = jnp.einsum(
    "bkqd,bkqd->bkq", out, out_gradient, preferred_element_type=jnp.float32
  )
  contract = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

  def attend(step, carry):
    query_gradient, key_gradient, value_gradient = carry
    q, k = blocks.queries[step], blocks.keys[step]
    scores, mask = _masked_scores(q, k, query, key, tokens, scoring)
    weights = jnp.where(
      mask, jnp.exp(scores - log_normalizers[q][..., None]), 0
    )
    dtype = out_gradient.dtype
    weight_gradient = contract("kqd,kcd->kqc", out_gradient[q], value[k])
    score_gradient = weights * (weight_gradient - deltas[q][..., None])
    product_gradient = scoring.product_gradient(score_gradient, scores)
    product_gradient = product_gradient.astype(dtype)
    query_update = contract("kqc,kcd->kqd", product_gradient, key[k])
    key_update = contract("kqc,kqd->kcd", product_gradient, query[q])
    value_update = contract(
      "kqc,kqd->kcd", weights.astype(dtype), out_gradient[q]
    )
    return (
      _put(query_gradient, q, query_gradient[q] + query_update),
      _put(key_gradient, k, key_gradient[k] + key_update),
      _put(value_gradient, k, value_gradient[k] + value_update),
    )

  start = tuple(jnp.zeros(x.shape, jnp.float32) for x in (query, key, value))
  gradients = jax.lax.fori_loop(0, blocks.count[0], attend, start)
  return tuple(
    _join(gradient, rows, groups, size)[:, :length].astype(dtype)
    for gradient, groups, dtype in zip(
      gradients, (num_groups, 1, 1), dtypes, strict=True
    )
  )


def _padded(query, *others):
  padding = attention_blocks.padding(query.shape[1])
  return attention_blocks.padded((query, *others), padding)


def _split(x, num_groups, size):
  """[rows, length, heads, d] -> [blocks, kv_heads, groups * size, d]."""
  rows, length, heads, head_dim = x.shape
  x = x.reshape(rows, length // size, size, heads // num_groups, num_groups, -1)
  x = x.transpose(0, 1, 3, 4, 2, 5)
  return x.reshape(-1, heads // num_groups, num_groups * size, head_dim)


def _join(x, rows, num_groups, size):
  """The inverse of `_split`."""
  _, kv_heads, _, head_dim = x.shape
  x = x.reshape(rows, -1, kv_heads, num_groups, size, head_dim)
  x = x.transpose(0, 1, 4, 2, 3, 5)
  return x.reshape(rows, -1, kv_heads * num_groups, head_dim)


def _split_line(x, num_groups, size):
  """[heads, rows, length] -> [blocks, kv_heads, groups * size]."""
  heads, rows, length = x.shape
  x = x.reshape(heads // num_groups, num_groups, rows * length // size, size)
  x = x.transpose(2, 0, 1, 3)
  return x.reshape(rows * length // size, -1, num_groups * size)


def _join_line(x, rows, num_groups, size):
  """The inverse of `_split_line`."""
  blocks, kv_heads, _ = x.shape
  x = x.reshape(blocks, kv_heads, num_groups, size).transpose(1, 2, 0, 3)
  return x.reshape(kv_heads * num_groups, rows, -1)


def _masked_scores(q, k, query, key, tokens, scoring):
  """Scores of two blocks [kv_heads, groups * size, size], and the mask."""
  until, positions, window = tokens
  size = key.shape[2]
  blocks_per_row = until.shape[-1] // size
  until = until.reshape(-1, size)[k]
  in_block = jnp.arange(size)
  queries = (q % blocks_per_row) * size + in_block[:, None]
  keys = (k % blocks_per_row) * size + in_block[None, :]
  mask = (keys <= queries) & (queries < until[None, :])
  if window is not None:
    positions = positions.reshape(-1, size)
    mask &= positions[q][:, None] - positions[k][None, :] < window
  num_groups = query.shape[2] // size
  mask = jnp.tile(mask, (num_groups, 1))[None]
  products = jnp.einsum(
    "kqd,kcd->kqc", query[q], key[k], preferred_element_type=jnp.float32
  )
  return scoring.scores(products), mask


def _put(blocks, index, block):
  """`blocks.at[index].set(block)` as a slice update, which is done in place."""
  return jax.lax.dynamic_update_index_in_dim(blocks, block, index, axis=0)
