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
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float

from dpop_jax.models import attention_blocks
from dpop_jax.models.attention_blocks import Runs, Visibility
from dpop_jax.models.attention_scores import LOWEST, MASKED, Scoring, dot

# The narrowest head that Triton multiplies; others are padded, to powers of 2.
_MIN_WIDTH = 16


class Sizes(NamedTuple):
  """What a program computes at once, and what it gets for it.

  Attributes:
    queries: Tokens of a block; divides `attention_blocks.GPU_BLOCK_SIZE`.
    keys: Likewise.
    warps: Of 32 threads.
    stages: How many blocks are loaded or computed at the same time.
  """

  queries: int
  keys: int
  warps: int
  stages: int


# Of the forward and the backward kernels, for heads that demand at most so much
# (see `_sizes`). Compiled for cards of capability 8.0, 8.6 and 9.0, they find
# shared memory enough, and no thread spills more than 16 bytes of registers.
SIZES = {
  128: (Sizes(128, 64, 8, 3), Sizes(64, 64, 4, 2)),
  256: (Sizes(128, 64, 8, 3), Sizes(64, 64, 8, 2)),
  512: (Sizes(64, 32, 8, 2), Sizes(32, 32, 8, 2)),
  1024: (Sizes(64, 32, 8, 2), Sizes(32, 32, 8, 1)),
  2048: (Sizes(32, 32, 8, 1), Sizes(16, 16, 8, 1)),
}


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
  layout = _Layout.of(query, key)
  sizes, _ = _sizes(layout.width, query.dtype)
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
  layout = _Layout.of(query, key)
  _, sizes = _sizes(layout.width, query.dtype)
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


def _sizes(width: int, dtype: jnp.dtype) -> tuple[Sizes, Sizes]:
  """Those of SIZES that suit heads of a width, in a dtype."""
  # Bytes of a head; of float32, products take twice the registers as well.
  demand = width * dtype.itemsize**2 // 2
  return SIZES[next((x for x in SIZES if x >= demand), max(SIZES))]


class _Tokens(NamedTuple):
  """What decides which keys a query sees, of all tokens of all rows.

  Attributes:
    until: int32 [tokens].
    positions: int32 [tokens]; None without a window.
    window: int32 [1]; None for none.
  """

  until: jax.Ref
  positions: jax.Ref | None
  window: jax.Ref | None

  def mask(self, queries: pl.Slice, keys: pl.Slice, *, axis_of_queries: int):
    """Which keys these queries see: [queries, keys] for axis 0."""
    across = lambda x, axis: jnp.expand_dims(x, 1 - axis)
    of_query = functools.partial(across, axis=axis_of_queries)
    of_key = functools.partial(across, axis=1 - axis_of_queries)
    index = lambda part: part.start + jnp.arange(part.size)
    query = of_query(index(queries))
    mask = of_key(index(keys)) <= query
    mask &= query < of_key(self.until[keys])
    if self.positions is None:
      return mask
    distances = of_query(self.positions[queries]) - of_key(self.positions[keys])
    return mask & (distances < self.window[0])


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


class _Layout(NamedTuple):
  """How arrays are cut for the kernels, whose grid is (blocks, heads).

  Attributes:
    rows: Rows of this device.
    length: Of a row.
    heads: Query heads.
    groups: Query heads for each key head.
    head_dim: Width of a head.
  """

  rows: int
  length: int
  heads: int
  groups: int
  head_dim: int

  @classmethod
  def of(cls, query, key):
    rows, length, heads, head_dim = query.shape
    return cls(rows, length, heads, heads // key.shape[2], head_dim)

  @property
  def padded_length(self) -> int:
    return self.length + -self.length % attention_blocks.GPU_BLOCK_SIZE

  @property
  def num_tokens(self) -> int:
    return self.rows * self.padded_length

  @property
  def width(self) -> int:
    return max(_MIN_WIDTH, pl.next_power_of_2(self.head_dim))

  # How arrays become those of a kernel, and back.

  def flat(self, x):
    """[rows, length, heads, head_dim] -> [tokens, heads, width]."""
    length = (0, self.padded_length - self.length)
    x = jnp.pad(x, ((0, 0), length, (0, 0), (0, self.width - self.head_dim)))
    return x.reshape(self.num_tokens, -1, self.width)

  def like(self, x):
    """Shape and dtype of `flat`."""
    return jax.eval_shape(self.flat, x)

  def unflat(self, x):
    """The inverse of `flat`."""
    x = x.reshape(self.rows, self.padded_length, -1, self.width)
    return x[:, : self.length, :, : self.head_dim]

  def line(self, x):
    """[heads, rows, length] -> [heads, tokens]."""
    x = jnp.pad(x, ((0, 0), (0, 0), (0, self.padded_length - self.length)))
    return x.reshape(self.heads, self.num_tokens)

  def like_line(self):
    """Shape and dtype of `line`."""
    return jax.ShapeDtypeStruct((self.heads, self.num_tokens), jnp.float32)

  def unflat_line(self, x):
    """The inverse of `line`."""
    x = x.reshape(self.heads, self.rows, self.padded_length)
    return x[..., : self.length]

  def _token_line(self, x):
    x = jnp.pad(x, ((0, 0), (0, self.padded_length - self.length)))
    return x.reshape(self.num_tokens)

  # Which part of an array a program has.

  def block(self, size):
    """Its own tokens of its own head."""
    shape = (size, None, self.width)
    return pl.BlockSpec(shape, lambda block, head: (block, head, 0))

  def line_block(self, size):
    """Likewise of what there is one of for each token and head."""
    return pl.BlockSpec((None, size), lambda block, head: (head, block))

  def keys(self):
    """All tokens of the key head of its query head."""
    shape = (self.num_tokens, None, self.width)
    return pl.BlockSpec(shape, lambda _, head: (0, head // self.groups, 0))

  def group(self):
    """All tokens of the query heads of its key head."""
    shape = (self.num_tokens, self.groups, self.width)
    return pl.BlockSpec(shape, lambda _, kv_head: (0, kv_head, 0))

  def group_lines(self):
    """Likewise of what there is one of for each token and head."""
    shape = (self.groups, self.num_tokens)
    return pl.BlockSpec(shape, lambda _, kv_head: (kv_head, 0))

  def run(
    self,
    kernel: Callable,
    visibility: Visibility,
    runs: Runs,
    *,
    grid: tuple[int, int],
    inputs: Sequence,
    outputs: Sequence,
    sizes: Sizes,
    interpret: bool,
  ) -> Sequence[jax.Array]:
    """Runs a kernel.

    Args:
      kernel: Takes `_Tokens`, `Runs`, and references to inputs and outputs.
      visibility: What a query sees.
      runs: Which blocks a block is computed with.
      grid: Blocks and heads.
      inputs: Arrays, and which part of them a program has.
      outputs: Shapes and dtypes likewise.
      sizes: Of the blocks.
      interpret: Whether to run on another platform.
    """
    # Tokens count through all rows, so that a block need not know its row.
    starts = jnp.arange(self.rows)[:, None] * self.padded_length
    until, positions, window = visibility[:3]
    tokens = _Tokens(
      self._token_line(until + starts),
      None if window is None else self._token_line(positions),
      None if window is None else window.reshape(1),
    )
    arrays, specs = zip(*inputs, strict=True)
    shapes, out_specs = zip(*outputs, strict=True)
    whole = jax.tree.map(lambda _: pl.BlockSpec(), (tokens, runs))
    return pl.pallas_call(
      kernel,
      grid=grid,
      in_specs=[*whole, *specs],
      out_specs=list(out_specs),
      out_shape=list(shapes),
      compiler_params=pltriton.CompilerParams(
        num_warps=sizes.warps, num_stages=sizes.stages
      ),
      interpret=interpret,
      name=kernel.func.__name__.strip("_"),
    )(tokens, runs, *arrays)
