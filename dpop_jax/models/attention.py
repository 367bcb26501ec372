"""Attention over rows of prefix trees.

Query `q` sees key `k` exactly when `k <= q < visible_until[k]` and, if there is
a window, `positions[q] - positions[k] < window`, where a position is the depth
of a token in its tree.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from dpop_jax import sharding
from dpop_jax.models import attention_blocks

# Stands for minus infinity: finite, so that differences of two are not nan.
_MASKED = -1e30


class _Visibility(NamedTuple):
  """What decides which keys a query sees.

  Attributes:
    until: int32 [rows, length].
    positions: int32 [rows, length]; None without a window.
    window: int32 []; None for none.
  """

  until: jax.Array
  positions: jax.Array | None
  window: jax.Array | None


def _visibility(visible_until, positions, window):
  visible_until = jnp.asarray(visible_until)
  if window is None:
    return _Visibility(visible_until, None, None)
  if positions is None:
    raise ValueError(
      "A window of attention is counted in positions, but there are none; give "
      "`positions`, or None for the window."
    )
  return _Visibility(visible_until, jnp.asarray(positions), jnp.asarray(window))


class _Scoring(NamedTuple):
  """What makes scores of products."""

  scale: float
  softcap: float | None


# How [rows, length, heads, head_dim], what decides on visibility, and the
# log-normalizers [rows, kv_heads, blocks, queries] are split.
_HEADS = P(sharding.ROW_AXES, None, sharding.TENSOR)
_VISIBILITY = _Visibility(P(sharding.ROW_AXES), P(sharding.ROW_AXES), P())
_NORMALIZERS = P(sharding.ROW_AXES, sharding.TENSOR)


def forest_mask(
  visible_until: Int[Array, "rows length"],
  positions: Int[Array, "rows length"] | None = None,
  window: Int[Array, ""] | None = None,
) -> Bool[Array, "rows length length"]:
  """Which key (last axis) each query (second axis) may see, written out.

  Raises:
    ValueError: There is a window, but no positions.
  """
  _, positions, window = _visibility(visible_until, positions, window)
  index = jnp.arange(visible_until.shape[-1])
  queries, keys = index[None, :, None], index[None, None, :]
  mask = (keys <= queries) & (queries < visible_until[:, None, :])
  if window is None:
    return mask
  return mask & (positions[:, :, None] - positions[:, None, :] < window)


def masked_attention(
  query: Float[Array, "rows queries heads head_dim"],
  key: Float[Array, "rows keys kv_heads head_dim"],
  value: Float[Array, "rows keys kv_heads head_dim"],
  mask: Bool[Array, "rows queries keys"],
  *,
  scale: float,
  softcap: float | None = None,
) -> Float[Array, "rows queries heads head_dim"]:
  """Grouped-query attention with the whole mask in memory; for decoding.

  Scores and their softmax are float32. A query that sees nothing gives zeros.
  For `scale` and `softcap` see `forest_attention`.
  """
  rows, queries, heads, head_dim = query.shape
  kv_heads = key.shape[2]
  grouped = query.reshape(rows, queries, kv_heads, -1, head_dim)
  scores = jnp.einsum(
    "rqkgd,rckd->rkgqc", grouped, key, preferred_element_type=jnp.float32
  )
  scores = _scores(scores, _Scoring(scale, softcap))
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
  *,
  scale: float,
  softcap: float | None = None,
  positions: Int[Array, "rows length"] | None = None,
  window: Int[Array, ""] | None = None,
) -> Float[Array, "rows length heads head_dim"]:
  """Grouped-query attention in blocks, without a mask in memory.

  Softmax is accumulated block by block in float32 and recomputed in the
  backward pass. Blocks in which no query sees a key are not computed. Rows are
  split over the mesh's data and fsdp axes and heads over its tensor axis, with
  no communication. A row that can't be cut evenly into large blocks is padded,
  for blocks of a few tokens would take a hundred times as long.

  Args:
    query: One for each token and head.
    key: One for each token and group of heads.
    value: Likewise.
    visible_until: End of the subtree of each token; see `pairs.PackedBatch`.
    scale: Multiplies the products of queries and keys, which makes scores.
    softcap: Scores s become softcap * tanh(s / softcap), if given.
    positions: Depth of each token in its tree; needed with a window.
    window: A query sees keys less than this far above it, itself included; it
      need not be known when compiling. None for no window.

  Raises:
    ValueError: There is a window, but no positions.
  """
  query, key, value = map(jnp.asarray, (query, key, value))
  inputs = query, key, value, _visibility(visible_until, positions, window)
  scoring = _Scoring(scale, softcap)
  length = query.shape[1]
  padding = attention_blocks.padding(length)
  if not padding:
    return _attention(*inputs, scoring)

  # A key with `visible_until` 0 is seen by nobody.
  def pad(x):
    widths = ((0, 0), (0, padding), (0, 0), (0, 0))[: x.ndim]
    return jnp.pad(x, widths) if widths else x  # The window is a scalar.

  return _attention(*jax.tree.map(pad, inputs), scoring)[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(query, key, value, visibility, scoring):
  return _forward(query, key, value, visibility, scoring)[0]


def _forward(query, key, value, visibility, scoring):
  run = sharding.per_device(
    functools.partial(_forward_blocks, scoring=scoring),
    in_specs=(_HEADS, _HEADS, _HEADS, _VISIBILITY),
    out_specs=(_HEADS, _NORMALIZERS),
  )
  out, log_normalizers = run(query, key, value, visibility)
  return out, (query, key, value, visibility, out, log_normalizers)


def _backward(scoring, residuals, out_gradient):
  run = sharding.per_device(
    functools.partial(_backward_blocks, scoring=scoring),
    in_specs=(_HEADS,) * 3 + (_VISIBILITY, _HEADS, _NORMALIZERS, _HEADS),
    out_specs=(_HEADS, _HEADS, _HEADS),
  )
  return (*run(*residuals, out_gradient), None)


_attention.defvjp(_forward, _backward)


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


def _scores(products, scoring):
  scores = products * scoring.scale
  if scoring.softcap is None:
    return scores
  return scoring.softcap * jnp.tanh(scores / scoring.softcap)


def _product_gradient(score_gradient, scores, scoring):
  """The gradient in front of `_scores`, from that behind it."""
  if scoring.softcap is not None:
    # The slope of tanh at x is 1 - tanh(x)**2.
    slope = 1.0 - jnp.square(scores / scoring.softcap)
    score_gradient = score_gradient * slope
  return score_gradient * scoring.scale


def _masked_scores(q, k, query, key, visibility, scoring):
  """Scores of two blocks [kv_heads, groups * size, size], and the mask."""
  until, positions, window = visibility
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
  return _scores(products, scoring), mask


def _put(blocks, index, block):
  """`blocks.at[index].set(block)` as a slice update, which is done in place."""
  return jax.lax.dynamic_update_index_in_dim(blocks, block, index, axis=0)


def _forward_blocks(query, key, value, visibility, *, scoring):
  """Attention of one device's rows and heads; also the log-normalizers."""
  rows, length, heads, _ = query.shape
  num_groups, size = heads // key.shape[2], attention_blocks.block_size(length)
  blocks = attention_blocks.visible_blocks(*visibility)
  query = _split(query, num_groups, size)
  key, value = _split(key, 1, size), _split(value, 1, size)

  def attend(step, carry):
    sums, maxima, mixed = carry
    q, k = blocks.queries[step], blocks.keys[step]
    scores, mask = _masked_scores(q, k, query, key, visibility, scoring)
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
  query, key, value, visibility, out, log_normalizers, out_gradient, *, scoring
):
  """Gradients of one device's rows and heads."""
  rows, length, heads, _ = query.shape
  num_groups, size = heads // key.shape[2], attention_blocks.block_size(length)
  blocks = attention_blocks.visible_blocks(*visibility)
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
  contract = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

  def attend(step, carry):
    query_gradient, key_gradient, value_gradient = carry
    q, k = blocks.queries[step], blocks.keys[step]
    scores, mask = _masked_scores(q, k, query, key, visibility, scoring)
    weights = jnp.where(
      mask, jnp.exp(scores - log_normalizers[q][..., None]), 0
    )
    dtype = out_gradient.dtype
    weight_gradient = contract("kqd,kcd->kqc", out_gradient[q], value[k])
    score_gradient = weights * (weight_gradient - deltas[q][..., None])
    product_gradient = _product_gradient(score_gradient, scores, scoring)
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
  gradients = jax.lax.fori_loop(0, blocks.count, attend, start)
  return tuple(
    _join(gradient, rows, groups, size).astype(dtype)
    for gradient, groups, dtype in zip(
      gradients, (num_groups, 1, 1), dtypes, strict=True
    )
  )
