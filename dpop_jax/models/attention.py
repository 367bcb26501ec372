"""Attention over rows of prefix trees.

Query `q` sees key `k` exactly when `k <= q < visible_until[k]`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from dpop_jax import sharding

MAX_BLOCK_SIZE = 128
# Stands for minus infinity: finite, so that differences of two are not nan.
_MASKED = -1e30
# How [rows, length, heads, head_dim], [rows, length] and the log-normalizers
# [rows, kv_heads, blocks, queries] are split.
_HEADS = P(sharding.ROW_AXES, None, sharding.TENSOR)
_ROWS = P(sharding.ROW_AXES)
_NORMALIZERS = P(sharding.ROW_AXES, sharding.TENSOR)


def forest_mask(
  visible_until: Int[Array, "rows length"],
) -> Bool[Array, "rows length length"]:
  """Which key (last axis) each query (second axis) may see, written out."""
  index = jnp.arange(visible_until.shape[-1])
  queries, keys = index[None, :, None], index[None, None, :]
  return (keys <= queries) & (queries < visible_until[:, None, :])


def masked_attention(
  query: Float[Array, "rows queries heads head_dim"],
  key: Float[Array, "rows keys kv_heads head_dim"],
  value: Float[Array, "rows keys kv_heads head_dim"],
  mask: Bool[Array, "rows queries keys"],
) -> Float[Array, "rows queries heads head_dim"]:
  """Grouped-query attention with the whole mask in memory; for decoding.

  Scores and their softmax are float32. A query that sees nothing gives zeros.
  """
  rows, queries, heads, head_dim = query.shape
  kv_heads = key.shape[2]
  grouped = query.reshape(rows, queries, kv_heads, -1, head_dim)
  scores = jnp.einsum(
    "rqkgd,rckd->rkgqc", grouped, key, preferred_element_type=jnp.float32
  )
  scores = scores * head_dim**-0.5
  mask = mask[:, None, None]
  weights = jax.nn.softmax(jnp.where(mask, scores, _MASKED), axis=-1)
  weights = jnp.where(mask, weights, 0.0).astype(value.dtype)
  mixed = jnp.einsum(
    "rkgqc,rckd->rqkgd", weights, value, preferred_element_type=jnp.float32
  )
  return mixed.reshape(rows, queries, heads, head_dim).astype(query.dtype)


def forest_attention(
  query: Float[Array, "rows length heads head_dim"],
  key: Float[Array, "rows length kv_heads head_dim"],
  value: Float[Array, "rows length kv_heads head_dim"],
  visible_until: Int[Array, "rows length"],
) -> Float[Array, "rows length heads head_dim"]:
  """Grouped-query attention in blocks, without a mask in memory.

  Softmax is accumulated block by block in float32 and recomputed in the
  backward pass. Blocks in which no query sees a key are not computed. Rows are
  split over the mesh's data and fsdp axes and heads over its tensor axis, with
  no communication. A row that has no divisor near MAX_BLOCK_SIZE is padded, for
  blocks of a few tokens would take a hundred times as long.
  """
  inputs = [jnp.asarray(x) for x in (query, key, value, visible_until)]
  length = query.shape[1]
  if block_size(length) * 4 >= MAX_BLOCK_SIZE or length <= MAX_BLOCK_SIZE:
    return _attention(*inputs)
  # A key with `visible_until` 0 is seen by nobody.
  padding = -length % MAX_BLOCK_SIZE
  widths = lambda x: ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2)
  return _attention(*(jnp.pad(x, widths(x)) for x in inputs))[:, :length]


@jax.custom_vjp
def _attention(query, key, value, visible_until):
  return _forward(query, key, value, visible_until)[0]


def _forward(query, key, value, visible_until):
  run = sharding.per_device(
    _forward_blocks,
    in_specs=(_HEADS, _HEADS, _HEADS, _ROWS),
    out_specs=(_HEADS, _NORMALIZERS),
  )
  out, log_normalizers = run(query, key, value, visible_until)
  return out, (query, key, value, visible_until, out, log_normalizers)


def _backward(residuals, out_gradient):
  run = sharding.per_device(
    _backward_blocks,
    in_specs=(_HEADS, _HEADS, _HEADS, _ROWS, _HEADS, _NORMALIZERS, _HEADS),
    out_specs=(_HEADS, _HEADS, _HEADS),
  )
  return (*run(*residuals, out_gradient), None)


_attention.defvjp(_forward, _backward)


class _Blocks(NamedTuple):
  """The pairs of a query block and a key block in which something is visible.

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


def visible_blocks(visible_until: Int[Array, "rows length"]) -> _Blocks:
  """Lists the pairs of blocks that any token needs."""
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
  row, query, key = jnp.nonzero(is_needed, size=rows * count**2, fill_value=0)
  return _Blocks(
    queries=row * count + query, keys=row * count + key, count=is_needed.sum()
  )


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


def _masked_scores(blocks, step, query, key, visible_until, size):
  """Scores of two blocks [kv_heads, groups * size, size], and the mask."""
  q, k = blocks.queries[step], blocks.keys[step]
  blocks_per_row = visible_until.shape[-1] // size
  until = visible_until.reshape(-1, size)[k]
  in_block = jnp.arange(size)
  queries = (q % blocks_per_row) * size + in_block[:, None]
  keys = (k % blocks_per_row) * size + in_block[None, :]
  mask = (keys <= queries) & (queries < until[None, :])
  num_groups = query.shape[2] // size
  mask = jnp.tile(mask, (num_groups, 1))[None]
  scores = jnp.einsum(
    "kqd,kcd->kqc", query[q], key[k], preferred_element_type=jnp.float32
  )
  return scores * query.shape[-1] ** -0.5, mask


def _put(blocks, index, block):
  """`blocks.at[index].set(block)` as a slice update, which is done in place."""
  return jax.lax.dynamic_update_index_in_dim(blocks, block, index, axis=0)


def _forward_blocks(query, key, value, visible_until):
  """Attention of one device's rows and heads; also the log-normalizers."""
  rows, length, heads, head_dim = query.shape
  kv_heads = key.shape[2]
  num_groups, size = heads // kv_heads, block_size(length)
  blocks = visible_blocks(visible_until)
  query = _split(query, num_groups, size)
  key, value = _split(key, 1, size), _split(value, 1, size)

  def attend(step, carry):
    sums, maxima, mixed = carry
    q, k = blocks.queries[step], blocks.keys[step]
    scores, mask = _masked_scores(blocks, step, query, key, visible_until, size)
    old = maxima[q]
    new = jnp.maximum(old, jnp.where(mask, scores, _MASKED).max(axis=-1))
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
  start = (zeros[..., 0], jnp.full(query.shape[:-1], _MASKED), zeros)
  sums, maxima, mixed = jax.lax.fori_loop(0, blocks.count, attend, start)
  # A query that sees nothing (padding) gives zeros.
  sums = jnp.where(sums > 0, sums, 1.0)
  out = (mixed / sums[..., None]).astype(query.dtype)
  log_normalizers = (maxima + jnp.log(sums)).reshape(rows, -1, *sums.shape[1:])
  return (
    _join(out, rows, num_groups, size),
    log_normalizers.transpose(0, 2, 1, 3),  # [rows, kv_heads, blocks, queries]
  )


def _backward_blocks(
  query, key, value, visible_until, out, log_normalizers, out_gradient
):
  """Gradients of one device's rows and heads."""
  rows, length, heads, head_dim = query.shape
  num_groups, size = heads // key.shape[2], block_size(length)
  blocks = visible_blocks(visible_until)
  dtypes = query.dtype, key.dtype, value.dtype
  query = _split(query, num_groups, size)
  key, value = _split(key, 1, size), _split(value, 1, size)
  out_gradient = _split(out_gradient, num_groups, size)
  out = _split(out, num_groups, size)
  log_normalizers = log_normalizers.transpose(0, 2, 1, 3).reshape(
    query.shape[:-1]
  )
  deltas = jnp.einsum(
    "bkqd,bkqd->bkq", out, out_gradient, preferred_element_type=jnp.float32
  )
  scale = head_dim**-0.5
  contract = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

  def attend(step, carry):
    query_gradient, key_gradient, value_gradient = carry
    q, k = blocks.queries[step], blocks.keys[step]
    scores, mask = _masked_scores(blocks, step, query, key, visible_until, size)
    weights = jnp.where(
      mask, jnp.exp(scores - log_normalizers[q][..., None]), 0
    )
    dtype = out_gradient.dtype
    weight_gradient = contract("kqd,kcd->kqc", out_gradient[q], value[k])
    score_gradient = weights * (weight_gradient - deltas[q][..., None]) * scale
    score_gradient = score_gradient.astype(dtype)
    query_update = contract("kqc,kcd->kqd", score_gradient, key[k])
    key_update = contract("kqc,kqd->kcd", score_gradient, query[q])
    value_update = contract(
      "kqc,kqd->kcd", weights.astype(dtype), out_gradient[q]
    )
    return (
      _put(query_gradient, q, query_gradient[q] + query_update),
      _put(key_gradient, k, key_gradient[k] + key_update),
      _put(value_gradient, k, value_gradient[k] + value_update),
    )

  start = tuple(jnp.zeros(x.shape, jnp.float32) for x in (query, key, value))
  gradients = jax.lax.fori_loop(0, blocks.count, attend, start)
  return tuple(
    _join(gradient, rows, groups, size).astype(dtype)
    for gradient, groups, dtype in zip(
      gradients, (num_groups, 1, 1), dtypes, strict=True
    )
  )
