"""What the kernels of attention run over: heads times pairs of blocks.

Arrays of heads are [tokens, heads * head_dim] here and blocks of them [size,
head_dim], as the projections around attention give and take them, so nothing is
transposed. What there is one of for each token and head is [heads, 1, tokens],
and for each token [1, tokens]; blocks of these are [1, size].
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dpop_jax.models import attention_blocks
from dpop_jax.models.attention_blocks import Blocks, Visibility

# Width of a register; narrower heads are padded to it.
_LANES = 128


class Pair(NamedTuple):
  """What a step of a grid knows of its pair of blocks.

  Attributes:
    queries: Query block of each step.
    keys: Key block of each step.
    window: int32 [1].
    until: Of the tokens of the key block [1, size], counted through all rows.
    key_positions: Likewise [1, size]; None without a window.
    query_positions: Likewise of the query block.
  """

  queries: jax.Ref
  keys: jax.Ref
  window: jax.Ref
  until: jax.Ref
  key_positions: jax.Ref | None
  query_positions: jax.Ref | None

  def mask(self, step):
    """Which key (down) each query (across) sees."""
    until = self.until[0][:, None]
    size = until.shape[0]
    shape = (size, size)
    index = lambda axis: jax.lax.broadcasted_iota(jnp.int32, shape, axis)
    queries = self.queries[step] * size + index(1)
    keys = self.keys[step] * size + index(0)
    mask = (keys <= queries) & (queries < until)
    if self.key_positions is None:
      return mask
    distances = self.query_positions[...] - self.key_positions[0][:, None]
    return mask & (distances < self.window[0])


class Grid(NamedTuple):
  """Heads times pairs of blocks, and how arrays are cut for it.

  Attributes:
    blocks: The pairs, in the order in which they are visited.
    visibility: What a query sees.
    is_by_key: Whether all queries of a key block, of all heads that share it,
      follow each other, instead of all keys of a query block.
    rows: Rows of this device.
    length: Of a row.
    heads: Query heads.
    groups: Query heads for each key head.
    head_dim: Width of a head.
  """

  blocks: Blocks
  visibility: Visibility
  is_by_key: bool
  rows: int
  length: int
  heads: int
  groups: int
  head_dim: int

  @classmethod
  def by_query(cls, query, key, visibility):
    return cls._of(query, key, visibility, visibility.by_query, False)

  @classmethod
  def by_key(cls, query, key, visibility):
    return cls._of(query, key, visibility, visibility.by_key, True)

  @classmethod
  def _of(cls, query, key, visibility, blocks, is_by_key):
    rows, length, heads, head_dim = query.shape
    groups = heads // key.shape[2]
    return cls(
      blocks, visibility, is_by_key, rows, length, heads, groups, head_dim
    )

  @property
  def size(self) -> int:
    return attention_blocks.kernel_block_size(self.length)

  @property
  def padded_length(self) -> int:
    return self.length + -self.length % self.size

  @property
  def tokens(self) -> int:
    return self.rows * self.padded_length

  @property
  def width(self) -> int:
    return self.head_dim + -self.head_dim % _LANES

  # How arrays become those of a kernel, and back.

  def flat(self, x):
    """[rows, length, heads, head_dim] -> [tokens, heads * width]."""
    length = (0, self.padded_length - self.length)
    x = jnp.pad(x, ((0, 0), length, (0, 0), (0, self.width - self.head_dim)))
    return x.reshape(self.tokens, -1)

  def like(self, x):
    """Shape and dtype of `flat`."""
    return jax.eval_shape(self.flat, x)

  def unflat(self, x):
    """The inverse of `flat`."""
    x = x.reshape(self.rows, self.padded_length, -1, self.width)
    x = x[:, : self.length, :, : self.head_dim]
    is_token = self._is_token()[:, :, None, None]
    return jnp.where(is_token, x, jnp.zeros((), x.dtype))

  def line(self, x):
    """[heads, rows, length] -> [heads, 1, tokens]."""
    x = jnp.pad(x, ((0, 0), (0, 0), (0, self.padded_length - self.length)))
    return x.reshape(self.heads, 1, self.tokens)

  def like_line(self):
    """Shape and dtype of `line`."""
    return jax.ShapeDtypeStruct((self.heads, 1, self.tokens), jnp.float32)

  def unflat_line(self, x):
    """The inverse of `line`."""
    x = x.reshape(self.heads, self.rows, self.padded_length)[..., : self.length]
    return jnp.where(self._is_token()[None], x, 0.0)

  def _is_token(self):
    # Others see nothing and are seen by nobody; memory that belongs to a block
    # of nothing else is never written, and may hold anything.
    return self.visibility.until > jnp.arange(self.length)[None]

  def _token_line(self, x):
    x = jnp.pad(x, ((0, 0), (0, self.padded_length - self.length)))
    return x.reshape(1, self.tokens)

  # Which block of an array a step works on.

  def queries(self):
    shape = (self.size, self.width)
    return self._spec(shape, lambda head, _, query, key: (query, head))

  def keys(self):
    shape = (self.size, self.width)
    return self._spec(shape, lambda _, kv_head, query, key: (key, kv_head))

  def query_line(self):
    shape = (None, 1, self.size)
    return self._spec(shape, lambda head, _, query, key: (head, 0, query))

  def _query_tokens(self):
    return self._spec((1, self.size), lambda _, __, query, key: (0, query))

  def _key_tokens(self):
    return self._spec((1, self.size), lambda _, __, query, key: (0, key))

  def _spec(self, shape, block):
    def index(kv_head, second, third, queries, keys, window):
      step, group = (second, third) if self.is_by_key else (third, second)
      head = kv_head * self.groups + group
      return block(head, kv_head, queries[step], keys[step])

    return pl.BlockSpec(shape, index)

  def run(
    self,
    kernel: Callable,
    *,
    inputs: Sequence,
    outputs: Sequence,
    scratch: Sequence[tuple[int, int]],
    num_products: int,
    interpret: bool,
  ) -> Sequence[jax.Array]:
    """Runs a kernel, given pairs of an array and the method that cuts it.

    Args:
      kernel: Takes `Pair`, and references to blocks and scratch memory.
      inputs: Arrays.
      outputs: Shapes and dtypes.
      scratch: Shapes of float32 memory that is kept from step to step.
      num_products: Matrix products for each pair, for the compiler's estimate.
      interpret: Whether to run on another platform.
    """
    # Tokens count through all rows, so that a block need not know its row.
    starts = jnp.arange(self.rows)[:, None] * self.padded_length
    until, positions, window = self.visibility[:3]
    tokens = [(self._token_line(until + starts), self._key_tokens())]
    if window is None:
      window = jnp.int32(0)
      tokens += [(None, None)] * 2
    else:
      positions = self._token_line(positions)
      tokens += [(positions, self._key_tokens())]
      tokens += [(positions, self._query_tokens())]
    inputs = tokens + [(array, cut()) for array, cut in inputs]
    # A device that has nothing but padding visits one pair, and sees nothing.
    steps = jnp.maximum(self.blocks.count[0], 1)
    kv_heads = self.heads // self.groups
    # Two cores of a chip share what is parallel; a key's gradient is a sum over
    # its group, so there the group is not.
    if self.is_by_key:
      sizes = (kv_heads, steps, self.groups)
      semantics = ("parallel", "arbitrary", "arbitrary")
    else:
      sizes = (kv_heads, self.groups, steps)
      semantics = ("parallel", "parallel", "arbitrary")

    def body(queries, keys, window, *refs):
      kernel(Pair(queries, keys, window, *refs[:3]), *refs[3:])

    return pl.pallas_call(
      body,
      grid_spec=pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=3,
        grid=sizes,
        in_specs=[spec for _, spec in inputs],
        out_specs=[cut() for _, cut in outputs],
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
      ),
      out_shape=[shape for shape, _ in outputs],
      compiler_params=pltpu.CompilerParams(dimension_semantics=semantics),
      cost_estimate=self._cost(num_products, inputs, outputs),
      interpret=interpret,
      name=kernel.func.__name__.strip("_"),
    )(
      self.blocks.queries,
      self.blocks.keys,
      window.reshape(1),
      *(array for array, _ in inputs),
    )

  def _cost(self, num_products, inputs, outputs):
    """As if every token saw all before it."""
    scores = self.heads * self.tokens * self.padded_length // 2
    arrays = [x for x, _ in (*inputs, *outputs) if x is not None]
    return pl.CostEstimate(
      flops=2 * num_products * scores * self.width,
      transcendentals=scores,
      bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays),
    )
