"""Log-probabilities of the scored tokens, without `[tokens, vocabulary]`.

Only hidden states that predict a token of an answer meet the vocabulary, a
chunk of them and a tile of the vocabulary at a time; the backward pass computes
the logits again, unless they are few.

Tokens of the vocabulary go down and positions across, [tile, chunk]. So every
product has its operands as they lie in memory, weights and their gradient
included, which on a CPU takes half the time of one with an operand to turn.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from dpop_jax import sharding

TILE_SIZE = 1024
# Logits of a device that are kept for the backward pass if they take no more:
# what is small anyhow, such as an update on a CPU, is computed once.
KEPT_BYTES = 2**27
# Of the sizes of chunks and tiles: products of odd sizes are slow.
_MULTIPLE = 8
# Below all logits, and far from where a difference overflows.
_LEAST = -1e30


class _Sizes(NamedTuple):
  """Of the logits that are in memory at a time, [tile, chunk], and kept."""

  tile: int
  chunk: int
  kept_bytes: int


def token_logps(
  hidden: Float[Array, "rows length hidden"],
  unembedding: Float[Array, "vocab hidden"],
  positions: Int[Array, "rows scores"],
  targets: Int[Array, "rows scores"],
  num_scores: Int[Array, " rows"],
  *,
  softcap: float | None = None,
  chunk_size: int | None = None,
  tile_size: int = TILE_SIZE,
  kept_bytes: int = KEPT_BYTES,
) -> Float[Array, "rows scores"]:
  """Log-probability of each target, in nats, from the hidden state before it.

  Rows are split over the mesh's data and fsdp axes and the vocabulary over its
  tensor axis; neither hidden states nor logits are gathered. The logits and
  their softmax are float32, the matrix products take the dtype of `hidden`.

  Args:
    hidden: Last hidden states, normalised.
    unembedding: Output embedding, one row a token.
    positions: Which hidden state of the row predicts.
    targets: Token that is predicted.
    num_scores: How many entries of the row count; the others give 0.
    softcap: Logits l become softcap * tanh(l / softcap), if given.
    chunk_size: Positions whose logits are in memory at a time, at most; by
      default `default_chunk_size`.
    tile_size: Entries of the vocabulary for which they are, at most.
    kept_bytes: All logits of a device are kept for the backward pass if they
      take no more than that.
  """
  inputs = (hidden, unembedding, positions, targets, num_scores)
  if chunk_size is None:
    chunk_size = default_chunk_size(hidden.shape[-1])
  sizes = _Sizes(tile_size, chunk_size, kept_bytes)
  return _token_logps(*map(jnp.asarray, inputs), softcap, sizes)


def default_chunk_size(hidden_size: int) -> int:
  """As many positions as a hidden state is wide, within bounds.

  The gradient of a tile of weights is read and written once for each chunk.
  """
  return min(max(256, hidden_size), 1024)


def are_logits_kept(num_scores: int, vocab_size: int, kept_bytes: int) -> bool:
  """Whether a device keeps the logits of so many scores for the way back."""
  return num_scores * vocab_size * 4 <= kept_bytes


_HIDDEN = P(sharding.ROW_AXES)
_UNEMBEDDING = P(sharding.TENSOR, sharding.FSDP)
_ROWS = P(sharding.ROW_AXES)
_INPUTS = (_HIDDEN, _UNEMBEDDING, _ROWS, _ROWS, _ROWS)
# Logits [tiles, tile, scores] of all devices.
_LOGITS = P(sharding.TENSOR, None, sharding.ROW_AXES)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _token_logps(
  hidden, unembedding, positions, targets, counts, softcap, sizes
):
  inputs = hidden, unembedding, positions, targets, counts
  return _forward(*inputs, softcap, sizes._replace(kept_bytes=0))[0]


def _forward(hidden, unembedding, positions, targets, counts, softcap, sizes):
  run = sharding.per_device(
    functools.partial(_forward_chunks, softcap=softcap, sizes=sizes),
    in_specs=_INPUTS,
    out_specs=(_ROWS, _ROWS, _LOGITS),
  )
  inputs = hidden, unembedding, positions, targets, counts
  logps, *results = run(*inputs)
  return logps, (*inputs, *results)


def _backward(softcap, sizes, residuals, logp_gradients):
  run = sharding.per_device(
    functools.partial(_backward_chunks, softcap=softcap, sizes=sizes),
    in_specs=(*_INPUTS, _ROWS, _LOGITS, _ROWS),
    out_specs=(_HIDDEN, _UNEMBEDDING),
  )
  return (*run(*residuals, logp_gradients), None, None, None)


_token_logps.defvjp(_forward, _backward)


class _Head:
  """One device's scored positions, in chunks, before its vocabulary, in tiles.

  Positions that count come first, so that the chunks that are computed are
  those of the real scores. The last tile is moved back to end with the
  vocabulary; what it has in common with the one before counts there.
  """

  def __init__(
    self, hidden, unembedding, positions, targets, counts, softcap, sizes
  ):
    rows, scores = positions.shape
    self.softcap = softcap
    most = rows * scores
    self.chunk_size = _even(most, sizes.chunk)
    is_scored = jnp.arange(scores)[None, :] < counts[:, None]
    # Padding points behind the end: reads are clamped, writes are dropped.
    padded = -(-most // self.chunk_size) * self.chunk_size
    (self.order,) = jnp.nonzero(
      is_scored.reshape(-1), size=padded, fill_value=most
    )
    self.is_padding = self.order >= most
    self.num_chunks = -(-counts.sum() // self.chunk_size)
    row_starts = jnp.arange(rows)[:, None] * hidden.shape[1]
    self.sources = (row_starts + positions).reshape(-1)[self.order]
    self.targets = targets.reshape(-1)[self.order]
    self.states = hidden.reshape(-1, hidden.shape[-1])[self.sources]
    # Master weights may be wider than the activations; gather what is used.
    if fsdp := sharding.split_axes(sharding.FSDP):
      unembedding = jax.lax.all_gather(
        unembedding.astype(hidden.dtype), fsdp, axis=1, tiled=True
      )
    self.unembedding = unembedding
    vocab = unembedding.shape[0]
    self.tile_size = min(_even(vocab, sizes.tile), vocab)
    self.num_tiles = -(-vocab // self.tile_size)
    self.has_overlap = self.num_tiles * self.tile_size > vocab
    self.keeps_logits = are_logits_kept(most, vocab, sizes.kept_bytes)
    self.first_token = vocab * _tensor_index()

  def tile_start(self, tile):
    start = tile * self.tile_size
    return jnp.minimum(start, self.unembedding.shape[0] - self.tile_size)

  def weights(self, tile):
    """Rows of the output embedding [tile, hidden], as they are multiplied."""
    weights = jax.lax.dynamic_slice_in_dim(
      self.unembedding, self.tile_start(tile), self.tile_size
    )
    return weights.astype(self.states.dtype)

  def tokens(self, tile):
    """Token of each row of a tile, [tile, 1]."""
    rows = self.tile_start(tile) + jnp.arange(self.tile_size)
    return self.first_token + rows[:, None]

  def of_tile(self, tile, values, otherwise):
    """Values [tile, ...], but `otherwise` for tokens of the tile before."""
    if not self.has_overlap:
      return values
    rows = self.tile_start(tile) + jnp.arange(self.tile_size)
    return jnp.where(
      (rows >= tile * self.tile_size)[:, None], values, otherwise
    )

  def chunk(self, chunk, *arrays):
    """A chunk's part of arrays [..., padded scores]."""
    return tuple(
      jax.lax.dynamic_slice_in_dim(
        array, chunk * self.chunk_size, self.chunk_size, axis=-1
      )
      for array in arrays
    )

  def put(self, array, chunk, update):
    return jax.lax.dynamic_update_slice_in_dim(
      array, update, chunk * self.chunk_size, axis=-1
    )

  def no_logits(self):
    """[tiles, tile, padded scores], or nothing where they are not kept."""
    shape = self.num_tiles, self.tile_size, self.order.size
    return jnp.zeros(shape, jnp.float32) if self.keeps_logits else None

  def keep(self, kept, tile, chunk, logits):
    if kept is None:
      return None
    return jax.lax.dynamic_update_slice(
      kept, logits[None], (tile, 0, chunk * self.chunk_size)
    )

  def kept(self, kept, tile, chunk):
    return self.chunk(chunk, kept[tile])[0]

  def logits(self, weights, states):
    """Of some tokens and positions, in float32."""
    logits = _product("vd,ds->vs", weights, states)
    if self.softcap is None:
      return logits
    return self.softcap * jnp.tanh(logits / self.softcap)

  def target_logits(self):
    """The logit of each position's target, 0 where another device has it."""
    local = self.targets - self.first_token
    is_here = (local >= 0) & (local < self.unembedding.shape[0])
    weights = self.unembedding[jnp.where(is_here, local, 0)]
    # As wide as the sums of a product, of the numbers that those multiply.
    weights = weights.astype(self.states.dtype).astype(jnp.float32)
    logits = (self.states.astype(jnp.float32) * weights).sum(axis=-1)
    if self.softcap is not None:
      logits = self.softcap * jnp.tanh(logits / self.softcap)
    return jnp.where(is_here, logits, 0.0)

  def product_gradient(self, logit_gradient, logits):
    """The gradient in front of the soft cap, from that behind it."""
    if self.softcap is None:
      return logit_gradient
    # The slope of tanh at x is 1 - tanh(x)**2.
    return logit_gradient * (1.0 - jnp.square(logits / self.softcap))


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _even(most: int, size: int) -> int:
  """Size of parts of `most`, all alike and small, none above `size`."""
  even = -(-most // -(-most // size))
  return min(size, -(-even // _MULTIPLE) * _MULTIPLE)


def _tensor_index():
  axes = sharding.split_axes(sharding.TENSOR)
  return jax.lax.axis_index(axes) if axes else 0


def _forward_chunks(
  hidden, unembedding, positions, targets, counts, *, softcap, sizes
):
  head = _Head(hidden, unembedding, positions, targets, counts, softcap, sizes)
  tensor = sharding.split_axes(sharding.TENSOR)
  columns = head.states.T

  def add_tile(tile, carry):
    weights = head.weights(tile)

    def add_chunk(chunk, carry):
      *sums, kept = carry
      states, maxima, totals = head.chunk(chunk, columns, *sums)
      logits = head.logits(weights, states)
      kept = head.keep(kept, tile, chunk, logits)
      logits = head.of_tile(tile, logits, _LEAST)
      largest = jnp.maximum(maxima, logits.max(axis=0))
      total = jnp.exp(logits - largest[None]).sum(axis=0)
      total = total + totals * jnp.exp(maxima - largest)
      return (
        head.put(carry[0], chunk, largest),
        head.put(carry[1], chunk, total),
        kept,
      )

    return jax.lax.fori_loop(0, head.num_chunks, add_chunk, carry)

  shape = head.order.shape
  start = jnp.full(shape, _LEAST), jnp.zeros(shape, jnp.float32)
  maxima, totals, kept = jax.lax.fori_loop(
    0, head.num_tiles, add_tile, (*start, head.no_logits())
  )
  largest = jax.lax.pmax(maxima, tensor)
  totals, found = jax.lax.psum(
    (totals * jnp.exp(maxima - largest), head.target_logits()), tensor
  )
  log_normalizers = largest + jnp.log(totals)

  def spread(values):
    zeros = jnp.zeros(positions.size, jnp.float32)
    values = zeros.at[head.order].set(values, mode="drop")
    return values.reshape(positions.shape)

  return spread(found - log_normalizers), spread(log_normalizers), kept


def _backward_chunks(
  hidden,
  unembedding,
  positions,
  targets,
  counts,
  log_normalizers,
  kept,
  logp_gradients,
  *,
  softcap,
  sizes,
):
  head = _Head(hidden, unembedding, positions, targets, counts, softcap, sizes)
  # Padding has no log-normalizer, and the exp of its logits may be inf.
  normalizers = jnp.where(
    head.is_padding, jnp.inf, log_normalizers.reshape(-1)[head.order]
  )
  gradients = jnp.where(
    head.is_padding, 0.0, logp_gradients.reshape(-1)[head.order]
  )
  columns = head.states.T

  def add_tile(tile, carry):
    state_gradients, unembedding_gradient = carry
    weights, tokens = head.weights(tile), head.tokens(tile)
    # Turned once for all chunks; the barrier keeps it out of the product.
    turned = jax.lax.optimization_barrier(weights.T)

    def add_chunk(chunk, carry):
      states, targets, normalizer, gradient, state_gradient = head.chunk(
        chunk, columns, head.targets, normalizers, gradients, carry[0]
      )
      if kept is None:
        logits = head.logits(weights, states)
      else:
        logits = head.kept(kept, tile, chunk)
      probabilities = jnp.exp(logits - normalizer[None])
      is_target = (tokens == targets[None]).astype(jnp.float32)
      logit_gradient = gradient[None] * (is_target - probabilities)
      logit_gradient = head.of_tile(tile, logit_gradient, 0.0)
      product_gradient = head.product_gradient(logit_gradient, logits)
      product_gradient = product_gradient.astype(hidden.dtype)
      update = _product("dv,vs->ds", turned, product_gradient)
      return (
        head.put(carry[0], chunk, state_gradient + update),
        carry[1] + _product("vs,sd->vd", product_gradient, states.T),
      )

    state_gradients, new = jax.lax.fori_loop(
      0,
      head.num_chunks,
      add_chunk,
      (state_gradients, jnp.zeros(weights.shape, jnp.float32)),
    )
    start = head.tile_start(tile)
    old = jax.lax.dynamic_slice_in_dim(
      unembedding_gradient, start, head.tile_size
    )
    return state_gradients, jax.lax.dynamic_update_slice_in_dim(
      unembedding_gradient, head.of_tile(tile, new, old), start, axis=0
    )

  state_gradients, unembedding_gradient = jax.lax.fori_loop(
    0,
    head.num_tiles,
    add_tile,
    (
      jnp.zeros(columns.shape, jnp.float32),
      jnp.zeros(head.unembedding.shape, jnp.float32),
    ),
  )
  state_gradients = jax.lax.psum(
    state_gradients.T, sharding.split_axes(sharding.TENSOR)
  )
  unembedding_gradient = jax.lax.psum(
    unembedding_gradient, sharding.split_axes(sharding.DATA)
  )
  if fsdp := sharding.split_axes(sharding.FSDP):
    unembedding_gradient = jax.lax.psum_scatter(
      unembedding_gradient, fsdp, scatter_dimension=1, tiled=True
    )
  hidden_gradient = jnp.zeros(
    (hidden.shape[0] * hidden.shape[1], hidden.shape[2]), jnp.float32
  )
  hidden_gradient = hidden_gradient.at[head.sources].add(state_gradients)
  return (
    hidden_gradient.reshape(hidden.shape).astype(hidden.dtype),
    unembedding_gradient.astype(unembedding.dtype),
  )
