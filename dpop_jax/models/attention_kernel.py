"""Forest attention on a TPU: kernels that read one integer per token.

A kernel visits the pairs of blocks in `Visibility.by_query` or `by_key` and no
others: their number is the length of its grid, and the lists are prefetched, so
that the next block is on its way while one is computed. A block's mask is made
of its tokens' `visible_until` where it is used; nothing of the size of queries
times keys is ever in memory.

Scores are laid out with keys down and queries across, [keys, queries]. So what
belongs to a query (maximum, sum, log-normalizer) is a row, which fills a TPU's
registers; as a column it would waste 127 of 128 numbers.

The softmax is that of Dao, 2023, https://arxiv.org/abs/2307.08691.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from dpop_jax.models import attention_grid
from dpop_jax.models.attention_blocks import Visibility
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
  grid = attention_grid.Grid.by_query(query, key, visibility)
  size, width = grid.size, grid.width
  out, log_normalizers = grid.run(
    functools.partial(_forward_kernel, scoring=scoring),
    inputs=(
      (grid.flat(query), grid.queries),
      (grid.flat(key), grid.keys),
      (grid.flat(value), grid.keys),
    ),
    outputs=(
      (grid.like(query), grid.queries),
      (grid.like_line(), grid.query_line),
    ),
    scratch=((1, size), (1, size), (width, size)),
    num_products=2,
    interpret=interpret,
  )
  return grid.unflat(out), grid.unflat_line(log_normalizers)


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
  deltas = jnp.einsum(
    "rlhd,rlhd->hrl", out, out_gradient, preferred_element_type=jnp.float32
  )

  def run(kernel, grid, outputs, scratch, num_products):
    return grid.run(
      functools.partial(kernel, scoring=scoring),
      inputs=(
        (grid.flat(query), grid.queries),
        (grid.flat(key), grid.keys),
        (grid.flat(value), grid.keys),
        (grid.flat(out_gradient), grid.queries),
        (grid.line(log_normalizers), grid.query_line),
        (grid.line(deltas), grid.query_line),
      ),
      outputs=outputs,
      scratch=scratch,
      num_products=num_products,
      interpret=interpret,
    )

  grid = attention_grid.Grid.by_query(query, key, visibility)
  (query_gradient,) = run(
    _query_gradient_kernel,
    grid,
    outputs=((grid.like(query), grid.queries),),
    scratch=((grid.width, grid.size),),
    num_products=3,
  )
  grid = attention_grid.Grid.by_key(query, key, visibility)
  key_gradient, value_gradient = run(
    _key_gradient_kernel,
    grid,
    outputs=((grid.like(key), grid.keys), (grid.like(value), grid.keys)),
    scratch=((grid.size, grid.width),) * 2,
    num_products=4,
  )
  return tuple(map(grid.unflat, (query_gradient, key_gradient, value_gradient)))


def _ends(blocks, step, num_steps):
  """Whether a step is the first, and the last, of those of its block."""
  block = blocks[step]
  is_first = (step == 0) | (blocks[jnp.maximum(step - 1, 0)] != block)
  # The list is longer than the grid by one.
  is_last = (step == num_steps - 1) | (blocks[step + 1] != block)
  return is_first, is_last


def _forward_kernel(
  pair,
  query,
  key,
  value,
  out,
  log_normalizers,
  maxima,
  sums,
  mixed,
  *,
  scoring,
):
  step = pl.program_id(2)
  is_first, is_last = _ends(pair.queries, step, pl.num_programs(2))

  @pl.when(is_first)
  def _():
    maxima[...] = jnp.full_like(maxima, LOWEST)
    sums[...] = jnp.zeros_like(sums)
    mixed[...] = jnp.zeros_like(mixed)

  scores = scoring.scores(dot(key[...], query[...], 1, 1))
  scores = jnp.where(pair.mask(step), scores, MASKED)
  old = maxima[...]
  new = jnp.maximum(old, scores.max(axis=0, keepdims=True))
  weights = jnp.exp(scores - new)
  rescale = jnp.exp(old - new)
  maxima[...] = new
  sums[...] = sums[...] * rescale + weights.sum(axis=0, keepdims=True)
  update = dot(value[...], weights.astype(value.dtype), 0, 0)
  mixed[...] = mixed[...] * rescale + update

  @pl.when(is_last)
  def _():
    # A query that sees nothing (padding) gives zeros.
    total = jnp.where(sums[...] > 0, sums[...], 1.0)
    out[...] = (mixed[...] / total).T.astype(out.dtype)
    log_normalizers[...] = maxima[...] + jnp.log(total)


class _Inputs(NamedTuple):
  """Blocks that both gradients are computed from."""

  query: jax.Ref
  key: jax.Ref
  value: jax.Ref
  out_gradient: jax.Ref
  log_normalizers: jax.Ref
  deltas: jax.Ref

  def weights(self, mask, scoring):
    """Weights, and the gradient of products, in the inputs' dtype."""
    scores = scoring.scores(dot(self.key[...], self.query[...], 1, 1))
    masked = jnp.where(mask, scores, MASKED)
    weights = jnp.exp(masked - self.log_normalizers[...])
    weight_gradient = dot(self.value[...], self.out_gradient[...], 1, 1)
    score_gradient = weights * (weight_gradient - self.deltas[...])
    product_gradient = scoring.product_gradient(score_gradient, scores)
    dtype = self.out_gradient.dtype
    return weights.astype(dtype), product_gradient.astype(dtype)


def _query_gradient_kernel(pair, *refs, scoring):
  inputs, (query_gradient, total) = _Inputs(*refs[:6]), refs[6:]
  step = pl.program_id(2)
  is_first, is_last = _ends(pair.queries, step, pl.num_programs(2))

  @pl.when(is_first)
  def _():
    total[...] = jnp.zeros_like(total)

  _, product_gradient = inputs.weights(pair.mask(step), scoring)
  total[...] += dot(inputs.key[...], product_gradient, 0, 0)

  @pl.when(is_last)
  def _():
    query_gradient[...] = total[...].T.astype(query_gradient.dtype)


def _key_gradient_kernel(pair, *refs, scoring):
  inputs, outputs, totals = _Inputs(*refs[:6]), refs[6:8], refs[8:]
  step, group = pl.program_id(1), pl.program_id(2)
  is_first, is_last = _ends(pair.keys, step, pl.num_programs(1))

  @pl.when(is_first & (group == 0))
  def _():
    for total in totals:
      total[...] = jnp.zeros_like(total)

  weights, product_gradient = inputs.weights(pair.mask(step), scoring)
  key_total, value_total = totals
  key_total[...] += dot(product_gradient, inputs.query[...], 1, 0)
  value_total[...] += dot(weights, inputs.out_gradient[...], 1, 0)

  @pl.when(is_last & (group == pl.num_programs(2) - 1))
  def _():
    for output, total in zip(outputs, totals, strict=True):
      output[...] = total[...].astype(output.dtype)
