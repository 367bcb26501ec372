"""How arrays are cut for the GPU's kernels of attention, and run through them.

Arrays of heads are [tokens, heads, width] here, what there is one of for each
token and head is [heads, tokens], and for each token [tokens]; tokens count
through all rows, so that a block need not know its row.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from dpop_jax.models import attention_blocks
from dpop_jax.models.attention_blocks import Runs, Visibility

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
# (see `sizes_of`). Compiled for cards of capability 8.0, 8.6 and 9.0, they find
# shared memory enough, and no thread spills more than 16 bytes of registers.
SIZES = {
  128: (Sizes(128, 64, 8, 3), Sizes(64, 64, 4, 2)),
  256: (Sizes(128, 64, 8, 3), Sizes(64, 64, 8, 2)),
  512: (Sizes(64, 32, 8, 2), Sizes(32, 32, 8, 2)),
  1024: (Sizes(64, 32, 8, 2), Sizes(32, 32, 8, 1)),
  2048: (Sizes(32, 32, 8, 1), Sizes(16, 16, 8, 1)),
}


def sizes_of(width: int, dtype: jnp.dtype) -> tuple[Sizes, Sizes]:
  """Those of SIZES, forward and backward, for heads of a width."""
  # Bytes of a head; of float32, products take twice the registers as well.
  demand = width * dtype.itemsize**2 // 2
  return SIZES[next((x for x in SIZES if x >= demand), max(SIZES))]


class Tokens(NamedTuple):
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


class Layout(NamedTuple):
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
      kernel: Takes `Tokens`, `Runs`, and references to inputs and outputs.
      visibility: What a query sees.
      runs: Which blocks a block is computed with.
      grid: Blocks and heads.
      inputs: Arrays, and which part of them a program has.
      outputs: Shapes and dtypes likewise.
      sizes: Of the blocks.
      interpret: Whether to run on another platform.
    """
    starts = jnp.arange(self.rows)[:, None] * self.padded_length
    until, positions, window = visibility[:3]
    tokens = Tokens(
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
