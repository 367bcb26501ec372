"""Forest attention on an NVIDIA GPU: kernels that read one integer per token.

A program has a block of queries of a head, or a block of keys and values, and
goes through the blocks of the other kind that `Visibility.gpu_by_query` or
`gpu_by_key` lists for it, and through no others. A block's mask is made of its
tokens' `visible_until` where it is used; nothing of the size of queries times
keys is ever in memory. Nothing is added up by several programs, so the same
rows always give the same bits.

The kernels are written in Pallas and compiled by Triton, which needs a card of
compute capability 8.0 (Ampere) or later. The softmax is that of Dao, 2023,
https://arxiv.org/abs/2307.08691.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from dpop_jax.models import attention_blocks
from dpop_jax.models.attention_blocks import Runs, Visibility
from dpop_jax.models.attention_gpu_layout import Layout, sizes_of
from dpop_jax.models.attention_scores import LOWEST, MASKED, Scoring, dot


def forward(
  query: Float[Array, "rows length heads head_dim"],
  key: Float[Array, "rows length kv_heads head_dim"],
  value: Float[Array, "rows length kv_heads head_dim"],
  visibility: Visibility,
  *,
  scoring: Scoring,
  interpret: bool = False,
) -> tuple[
  Float[Array, "rows length heads head_dim"],
  Float[Array, "heads rows length"],
]:
  """Attention of one device's rows and heads; also the log-normalizers.

  Args:
    query: Queries.
    key: Keys.
    value: Values.
    visibility: What a query sees.
    scoring: What makes scores of products.
    interpret: Whether to run on another platform, slowly.
  """
  layout = Layout.of(query, key)
  sizes, _ = sizes_of(layout.width, query.dtype)
  out, log_normalizers = layout.run(
    functools.partial(_forward_kernel, scoring=scoring, sizes=sizes),
    visibility,
    visibility.gpu_by_query,
    grid=(layout.num_tokens // sizes.queries, layout.heads),
    inputs=(
      (layout.flat(query), layout.block(sizes.queries)),
      (layout.flat(key), layout.keys()),
      (layout.flat(value), layout.keys()),
    ),
    outputs=(
      (layout.like(query), layout.block(sizes.queries)),
      (layout.like_line(), layout.line_block(sizes.queries)),
    ),
    sizes=sizes,
    interpret=interpret,
  )
  return layout.unflat(out), layout.unflat_line(log_normalizers)


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
  interpret: bool = False,
) -> tuple[
  Float[Array, "rows length heads head_dim"],
  Float[Array, "rows length kv_heads head_dim"],
  Float[Array, "rows length kv_heads head_dim"],
]:
  """Gradients of queries, keys and values, from what `forward` gave."""
  layout = Layout.of(query, key)
  _, sizes = sizes_of(layout.width, query.dtype)
  deltas = jnp.einsum(
    "rlhd,rlhd->hrl", out, out_gradient, preferred_element_type=jnp.float32
  )
  flat_query, flat_gradient = layout.flat(query), layout.flat(out_gradient)
  flat_key, flat_value = layout.flat(key), layout.flat(value)
  lines = layout.line(log_normalizers), layout.line(deltas)
  run = functools.partial(layout.run, sizes=sizes, interpret=interpret)
  settings = dict(scoring=scoring, sizes=sizes)
  block, line_block = (
    layout.block(sizes.queries),
    layout.line_block(sizes.queries),
  )
  (query_gradient,) = run(
    functools.partial(_query_gradient_kernel, **settings),
    visibility,
    visibility.gpu_by_query,
    grid=(layout.num_tokens // sizes.queries, layout.heads),
    inputs=(
      (flat_query, block),
      (flat_key, layout.keys()),
      (flat_value, layout.keys()),
      (flat_gradient, block),
      *((line, line_block) for line in lines),
    ),
    outputs=((layout.like(query), block),),
  )
  block = layout.block(sizes.keys)
  key_gradient, value_gradient = run(
    functools.partial(_key_gradient_kernel, **settings),
    visibility,
    visibility.gpu_by_key,
    grid=(layout.num_tokens // sizes.keys, layout.heads // layout.groups),
    inputs=(
      (flat_query, layout.group()),
      (flat_key, block),
      (flat_value, block),
      (flat_gradient, layout.group()),
      *((line, layout.group_lines()) for line in lines),
    ),
    outputs=((layout.like(key), block), (layout.like(value), block)),
  )
  return tuple(
    map(layout.unflat, (query_gradient, key_gradient, value_gradient))
  )


def _fold(runs: Runs, block, size: int, other_size: int, attend, start):
  """Goes through what a block is computed with, in parts of `other_size`.

  Args:
    runs: What belongs to each block of GPU_BLOCK_SIZE tokens.
    block: Number of the program's block of `size` tokens.
    size: Divides GPU_BLOCK_SIZE.
    other_size: Likewise.
    attend: Takes a slice of tokens and the sums so far; returns sums.
    start: Sums to begin with.
  """
  whole = attention_blocks.GPU_BLOCK_SIZE
  run, parts = jax.lax.div(block * size, whole), whole // other_size

  def step(number, sums):
    other = runs.others[jax.lax.div(number, parts)]
    part = other * parts + jax.lax.rem(number, parts)
    return attend(pl.ds(part * other_size, other_size), sums)

  first, end = runs.starts[run] * parts, runs.starts[run + 1] * parts
  return jax.lax.fori_loop(first, end, step, start)


def _forward_kernel(
  tokens,
  runs,
  query,
  key,
  value,
  out,
  log_normalizers,
  *,
  scoring,
  sizes,
):
  block = pl.program_id(0)
  queries = pl.ds(block * sizes.queries, sizes.queries)
  query_block = query[...]

  def attend(keys, carry):
    sums, maxima, mixed = carry
    scores = scoring.scores(dot(query_block, key[keys], 1, 1))
    mask = tokens.mask(queries, keys, axis_of_queries=0)
    scores = jnp.where(mask, scores, MASKED)
    new = jnp.maximum(maxima, scores.max(axis=1))
    weights = jnp.exp(scores - new[:, None])
    rescale = jnp.exp(maxima - new)
    update = dot(weights.astype(value.dtype), value[keys], 1, 0)
    sums = sums * rescale + weights.sum(axis=1)
    return sums, new, mixed * rescale[:, None] + update

  line = jnp.zeros(sizes.queries, jnp.float32)
  sums, maxima, mixed = _fold(
    runs,
    block,
    sizes.queries,
    sizes.keys,
    attend,
    (line, line + LOWEST, jnp.zeros(query.shape, jnp.float32)),
  )
  # A query that sees nothing (padding) gives zeros.
  is_seeing = sums > 0
  sums = jnp.where(is_seeing, sums, 1.0)
  out[...] = (mixed / sums[:, None]).astype(out.dtype)
  log_normalizers[...] = jnp.where(is_seeing, maxima + jnp.log(sums), 0.0)


def _query_gradient_kernel(
  tokens,
  runs,
  query,
  key,
  value,
  out_gradient,
  log_normalizers,
  deltas,
  query_gradient,
  *,
  scoring,
  sizes,
):
  block = pl.program_id(0)
  queries = pl.ds(block * sizes.queries, sizes.queries)
  query_block, gradient_block = query[...], out_gradient[...]
  normalizers, delta = log_normalizers[...][:, None], deltas[...][:, None]

  def attend(keys, total):
    key_block = key[keys]
    scores = scoring.scores(dot(query_block, key_block, 1, 1))
    mask = tokens.mask(queries, keys, axis_of_queries=0)
    weights = jnp.exp(jnp.where(mask, scores, MASKED) - normalizers)
    weight_gradient = dot(gradient_block, value[keys], 1, 1)
    score_gradient = weights * (weight_gradient - delta)
    product_gradient = scoring.product_gradient(score_gradient, scores)
    return total + dot(product_gradient.astype(key.dtype), key_block, 1, 0)

  total = jnp.zeros(query.shape, jnp.float32)
  total = _fold(runs, block, sizes.queries, sizes.keys, attend, total)
  query_gradient[...] = total.astype(query_gradient.dtype)


def _key_gradient_kernel(
  tokens,
  runs,
  query,
  key,
  value,
  out_gradient,
  log_normalizers,
  deltas,
  key_gradient,
  value_gradient,
  *,
  scoring,
  sizes,
):
  block = pl.program_id(0)
  keys = pl.ds(block * sizes.keys, sizes.keys)
  key_block, value_block = key[...], value[...]

  # Scores have keys down and queries across, so that none is transposed.
  def attend(queries, totals, head):
    key_total, value_total = totals
    query_block = query[queries, head]
    gradient_block = out_gradient[queries, head]
    scores = scoring.scores(dot(key_block, query_block, 1, 1))
    mask = tokens.mask(queries, keys, axis_of_queries=1)
    normalizers = log_normalizers[head, queries][None]
    weights = jnp.exp(jnp.where(mask, scores, MASKED) - normalizers)
    weight_gradient = dot(value_block, gradient_block, 1, 1)
    score_gradient = weights * (weight_gradient - deltas[head, queries][None])
    product_gradient = scoring.product_gradient(score_gradient, scores)
    dtype = query.dtype
    key_total += dot(product_gradient.astype(dtype), query_block, 1, 0)
    value_total += dot(weights.astype(dtype), gradient_block, 1, 0)
    return key_total, value_total

  def of_head(head, totals):
    of_queries = functools.partial(attend, head=head)
    return _fold(runs, block, sizes.keys, sizes.queries, of_queries, totals)

  zeros = jnp.zeros(key.shape, jnp.float32)
  totals = jax.lax.fori_loop(0, query.shape[1], of_head, (zeros, zeros))
  for gradient, total in zip(
    (key_gradient, value_gradient), totals, strict=True
  ):
    gradient[...] = total.astype(gradient.dtype)
