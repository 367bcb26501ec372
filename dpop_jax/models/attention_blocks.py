"""Which keys a query sees, and which pairs of blocks of tokens that needs."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Int

from dpop_jax import sharding

# Without a kernel; of the TPU's kernel, the largest first; and of the GPU's.
MAX_BLOCK_SIZE = 128
KERNEL_BLOCK_SIZES = (512, 256, 128)
GPU_BLOCK_SIZE = 128


class Blocks(NamedTuple):
  """The pairs of a query block and a key block that are computed.

  Blocks of all rows of a device count through: block `row * blocks_per_row + i`
  of the row's blocks.

  Attributes:
    queries: int32 [all pairs + 1]; those that count come first.
    keys: int32 [all pairs + 1].
    count: int32 [1]; number of pairs that count.
  """

  queries: jax.Array
  keys: jax.Array
  count: jax.Array


class Runs(NamedTuple):
  """For each block of one kind, the blocks of the other kind that it needs.

  Blocks of all rows of a device count through, as in `Blocks`.

  Attributes:
    starts: int32 [blocks + 1]; block `i` needs `others[starts[i]:starts[i+1]]`.
    others: int32 [all pairs + 1].
  """

  starts: jax.Array
  others: jax.Array


class Visibility(NamedTuple):
  """What decides which keys a query sees; made once for many layers.

  Query `q` sees key `k` exactly when `k <= q < until[k]` and, if there is a
  window, `positions[q] - positions[k] < window`.

  Attributes:
    until: int32 [rows, length]; end of the subtree of each token.
    positions: int32 [rows, length]; depth of each token in its tree. None
      without a window.
    window: int32 []; None for none.
    plain: Pairs of blocks of `block_size`, for where there is no kernel.
    by_query: Those of `kernel_block_size`, for a TPU, all keys of a query block
      together.
    by_key: The same pairs, all queries of a key block together.
    gpu_by_query: Key blocks of each query block, of GPU_BLOCK_SIZE tokens.
    gpu_by_key: Query blocks of each key block.
  """

  until: jax.Array
  positions: jax.Array | None
  window: jax.Array | None
  plain: Blocks
  by_query: Blocks
  by_key: Blocks
  gpu_by_query: Runs
  gpu_by_key: Runs


# How a Visibility is split over the mesh.
_ROWS = P(sharding.ROW_AXES)
_BLOCKS = Blocks(_ROWS, _ROWS, _ROWS)
_RUNS = Runs(_ROWS, _ROWS)
SPLIT = Visibility(_ROWS, _ROWS, P(), _BLOCKS, _BLOCKS, _BLOCKS, _RUNS, _RUNS)


def block_size(length: int) -> int:
  """Largest divisor of a row's length up to MAX_BLOCK_SIZE."""
  return next(
    size for size in range(MAX_BLOCK_SIZE, 0, -1) if length % size == 0
  )


def padding(length: int) -> int:
  """Tokens to add to a row that no size near MAX_BLOCK_SIZE divides."""
  is_fine = block_size(length) * 4 >= MAX_BLOCK_SIZE or length <= MAX_BLOCK_SIZE
  return 0 if is_fine else -length % MAX_BLOCK_SIZE


def kernel_block_size(length: int) -> int:
  """Largest size of which a row's length takes whole blocks, or nearly.

  A row is padded to whole blocks, by at most an eighth or to one small block.
  Blocks of padding alone are not computed; it costs memory.
  """
  *sizes, smallest = KERNEL_BLOCK_SIZES
  return next((s for s in sizes if -length % s * 8 <= length), smallest)


def visibility(
  visible_until: Int[Array, "rows length"],
  positions: Int[Array, "rows length"] | None = None,
  window: Int[Array, ""] | None = None,
) -> Visibility:
  """What each query sees, ready for `attention.forest_attention`.

  Args:
    visible_until: End of the subtree of each token; see `pairs.PackedBatch`.
    positions: Depth of each token in its tree; needed with a window.
    window: A query sees keys less than this far above it, itself included; it
      need not be known when compiling. None for no window.

  Raises:
    ValueError: There is a window, but no positions.
  """
  check_window(positions, window)
  visible_until = jnp.asarray(visible_until)
  if window is None:
    positions = None
  else:
    positions, window = jnp.asarray(positions), jnp.asarray(window)
  list_blocks = sharding.per_device(
    _all_blocks, in_specs=SPLIT[:3], out_specs=SPLIT[3:]
  )
  blocks = list_blocks(visible_until, positions, window)
  return Visibility(visible_until, positions, window, *blocks)


def check_window(positions, window) -> None:
  """Raises ValueError if there is a window, but no positions."""
  if window is not None and positions is None:
    raise ValueError(
      "A window of attention is counted in positions, but there are none; give "
      "`positions`, or None for the window."
    )


def _all_blocks(visible_until, positions, window):
  """From `plain` on, what a `Visibility` has, of one device's rows."""
  length = visible_until.shape[1]
  arrays = visible_until, positions, window

  def needed(padding, size):
    return needed_blocks(*padded(arrays, padding), size=size)

  padded_length = length + padding(length)
  plain = needed(padding(length), block_size(padded_length))
  size = kernel_block_size(length)
  is_needed = needed(-length % size, size)
  transposed = listed(is_needed.swapaxes(1, 2))
  by_key = Blocks(transposed.keys, transposed.queries, transposed.count)
  on_gpu = needed(-length % GPU_BLOCK_SIZE, GPU_BLOCK_SIZE)
  return (
    listed(plain),
    listed(is_needed),
    by_key,
    runs(on_gpu),
    runs(on_gpu.swapaxes(1, 2)),
  )


def padded(arrays, padding: int):
  """Adds tokens of zeros to arrays [rows, length, ...]; leaves scalars.

  A key whose `visible_until` is 0 is seen by nobody.
  """

  def pad(x):
    return jnp.pad(x, ((0, 0), (0, padding), *((0, 0),) * (x.ndim - 2)))

  return jax.tree.map(lambda x: pad(x) if x.ndim else x, arrays)


def needed_blocks(
  visible_until: Int[Array, "rows length"],
  positions: Int[Array, "rows length"] | None = None,
  window: Int[Array, ""] | None = None,
  *,
  size: int,
) -> Bool[Array, "rows blocks blocks"]:
  """Which key blocks (last axis) any token of a query block needs.

  With a window, where a block holds several branches, a pair may be marked in
  which nothing is visible; never the other way round.

  Args:
    visible_until: End of the subtree of each token.
    positions: Depth of each token in its tree; only needed with a window.
    window: See `visibility`.
    size: Tokens of a block; divides the length.
  """
  rows, length = visible_until.shape
  count = length // size
  index = jnp.arange(count)
  # Padding sees not even itself, so it asks for nothing.
  is_seen = visible_until > jnp.arange(length)[None]
  last_query = jnp.where(is_seen, visible_until, 0)
  last_query = last_query.reshape(rows, count, size).max(axis=-1)
  queries, keys = index[None, :, None], index[None, None, :]
  is_needed = (keys <= queries) & (last_query[:, None, :] > queries * size)
  if window is None:
    return is_needed
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
  return is_needed & (shallowest - deepest < window)


def listed(is_needed: Bool[Array, "rows blocks blocks"]) -> Blocks:
  """The pairs that are needed, by row, query block and key block.

  At most half of all pairs of a row and its diagonal can be.
  """
  rows, count, _ = is_needed.shape
  pairs = rows * count * (count + 1) // 2
  row, query, key = jnp.nonzero(is_needed, size=pairs + 1, fill_value=0)
  return Blocks(
    queries=row * count + query,
    keys=row * count + key,
    count=is_needed.sum()[None],
  )


def runs(is_needed: Bool[Array, "rows blocks others"]) -> Runs:
  """The same pairs as each block's list of others."""
  counts = is_needed.sum(axis=2, dtype=jnp.int32).reshape(-1)
  starts = jnp.cumsum(counts, dtype=jnp.int32)
  return Runs(
    starts=jnp.concatenate([jnp.zeros(1, jnp.int32), starts]),
    others=listed(is_needed).keys,
  )
