"""Log-probabilities of the scored tokens, without `[tokens, vocabulary]`.

Only hidden states that predict a token of an answer meet the vocabulary, a
chunk of them at a time; the backward pass computes a chunk's logits again.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from dpop_jax import pairs as pairs_lib
from dpop_jax import sharding

CHUNK_SIZE = 256


def token_logps(
  hidden: Float[Array, "rows length hidden"],
  unembedding: Float[Array, "vocab hidden"],
  positions: Int[Array, "rows scores"],
  targets: Int[Array, "rows scores"],
  num_scores: Int[Array, " rows"],
  *,
  softcap: float | None = None,
  chunk_size: int = CHUNK_SIZE,
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
    chunk_size: Positions whose logits are in memory at a time.
  """
  inputs = (hidden, unembedding, positions, targets, num_scores)
  return _token_logps(*map(jnp.asarray, inputs), softcap, chunk_size)


def answer_logps(
  token_logps: Float[Array, "rows scores"], batch: pairs_lib.PackedBatch
) -> Float[Array, "rows pairs 2 3"]:
  """Sums token log-probabilities along the path of every answer.

  Edges are summed by branch, then branches by answer and region, so that what
  answers share is added up once. The last axes are (CHOSEN, REJECTED) and
  (BEFORE_EDIT, AT_EDIT, AFTER_EDIT); the log-probability of an answer is the
  sum over the last one.
  """
  # Out-of-range branches and slots are padding; segment_sum drops them.
  num_branches = batch.link_branches.shape[-1]
  branches = jax.vmap(
    functools.partial(jax.ops.segment_sum, num_segments=num_branches)
  )(token_logps, batch.score_branches)
  parts = jnp.take_along_axis(branches, batch.link_branches, axis=-1)
  slots = jax.vmap(
    functools.partial(jax.ops.segment_sum, num_segments=batch.num_slots)
  )(parts, batch.link_slots)
  return slots.reshape(-1, batch.num_pairs, 2, pairs_lib.NUM_REGIONS)


_HIDDEN = P(sharding.ROW_AXES)
_UNEMBEDDING = P(sharding.TENSOR, sharding.FSDP)
_ROWS = P(sharding.ROW_AXES)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _token_logps(
  hidden, unembedding, positions, targets, counts, softcap, chunk_size
):
  inputs = (hidden, unembedding, positions, targets, counts)
  return _forward(*inputs, softcap, chunk_size)[0]


def _forward(
  hidden, unembedding, positions, targets, counts, softcap, chunk_size
):
  run = sharding.per_device(
    functools.partial(_forward_chunks, softcap=softcap, chunk_size=chunk_size),
    in_specs=(_HIDDEN, _UNEMBEDDING, _ROWS, _ROWS, _ROWS),
    out_specs=(_ROWS, _ROWS),
  )
  inputs = (hidden, unembedding, positions, targets, counts)
  logps, log_normalizers = run(*inputs)
  return logps, (*inputs, log_normalizers)


def _backward(softcap, chunk_size, residuals, logp_gradients):
  run = sharding.per_device(
    functools.partial(_backward_chunks, softcap=softcap, chunk_size=chunk_size),
    in_specs=(_HIDDEN, _UNEMBEDDING, _ROWS, _ROWS, _ROWS, _ROWS, _ROWS),
    out_specs=(_HIDDEN, _UNEMBEDDING),
  )
  return (*run(*residuals, logp_gradients), None, None, None)


_token_logps.defvjp(_forward, _backward)


class _Chunks:
  """One device's scored positions, those that count first, in chunks."""

  def __init__(
    self, hidden, unembedding, positions, targets, counts, softcap, size
  ):
    rows, scores = positions.shape
    self.softcap = softcap
    self.size = min(size, rows * scores)
    is_scored = jnp.arange(scores)[None, :] < counts[:, None]
    # Padding points behind the end: reads are clamped, writes are dropped.
    padded = -(-rows * scores // self.size) * self.size
    (self.order,) = jnp.nonzero(
      is_scored.reshape(-1), size=padded, fill_value=rows * scores
    )
    self.count = -(-counts.sum() // self.size)
    row_starts = jnp.arange(rows)[:, None] * hidden.shape[1]
    self.sources = (row_starts + positions).reshape(-1)
    self.targets = targets.reshape(-1)
    self.hidden = hidden.reshape(-1, hidden.shape[-1])
    # Master weights may be wider than the activations; gather what is used.
    self.unembedding = unembedding.astype(hidden.dtype)
    if fsdp := sharding.active_axes(sharding.FSDP):
      self.unembedding = jax.lax.all_gather(
        self.unembedding, fsdp, axis=1, tiled=True
      )

  def logits(self, chunk):
    """Entries, sources, float32 logits [size, vocab] and one-hot targets."""
    entries = jax.lax.dynamic_slice_in_dim(
      self.order, chunk * self.size, self.size
    )
    sources = self.sources[entries]
    logits = jnp.einsum(
      "sd,vd->sv",
      self.hidden[sources],
      self.unembedding,
      preferred_element_type=jnp.float32,
    )
    if self.softcap is not None:
      logits = self.softcap * jnp.tanh(logits / self.softcap)
    vocab = logits.shape[-1]
    first = vocab * _tensor_index()
    is_target = (
      self.targets[entries][:, None] == (first + jnp.arange(vocab))[None, :]
    )
    return entries, sources, logits, is_target

  def product_gradient(self, logit_gradient, logits):
    """The gradient in front of the soft cap, from that behind it."""
    if self.softcap is None:
      return logit_gradient
    # The slope of tanh at x is 1 - tanh(x)**2.
    return logit_gradient * (1.0 - jnp.square(logits / self.softcap))


def _tensor_index():
  axes = sharding.active_axes(sharding.TENSOR)
  return jax.lax.axis_index(axes) if axes else 0


def _forward_chunks(
  hidden, unembedding, positions, targets, counts, *, softcap, chunk_size
):
  chunks = _Chunks(
    hidden, unembedding, positions, targets, counts, softcap, chunk_size
  )
  tensor = sharding.active_axes(sharding.TENSOR)

  def score(chunk, carry):
    logps, log_normalizers = carry
    entries, _, logits, is_target = chunks.logits(chunk)
    largest = jax.lax.pmax(logits.max(axis=-1), tensor)
    total = jnp.exp(logits - largest[:, None]).sum(axis=-1)
    target = jnp.where(is_target, logits, 0.0).sum(axis=-1)
    total, target = jax.lax.psum((total, target), tensor)
    log_normalizer = largest + jnp.log(total)
    return (
      logps.at[entries].set(target - log_normalizer, mode="drop"),
      log_normalizers.at[entries].set(log_normalizer, mode="drop"),
    )

  zeros = jnp.zeros(positions.size, jnp.float32)
  logps, log_normalizers = jax.lax.fori_loop(
    0, chunks.count, score, (zeros, zeros)
  )
  return logps.reshape(positions.shape), log_normalizers.reshape(
    positions.shape
  )


def _backward_chunks(
  hidden,
  unembedding,
  positions,
  targets,
  counts,
  log_normalizers,
  logp_gradients,
  *,
  softcap,
  chunk_size,
):
  chunks = _Chunks(
    hidden, unembedding, positions, targets, counts, softcap, chunk_size
  )
  tensor = sharding.active_axes(sharding.TENSOR)
  gradients = logp_gradients.reshape(-1)
  log_normalizers = log_normalizers.reshape(-1)

  def score(chunk, carry):
    hidden_gradient, unembedding_gradient = carry
    entries, sources, logits, is_target = chunks.logits(chunk)
    is_padding = (entries >= positions.size)[:, None]
    gradient = jnp.where(is_padding, 0.0, gradients[entries][:, None])
    # Padding has no log-normalizer, and the exp of its logits may be inf.
    normalizers = jnp.where(
      is_padding, jnp.inf, log_normalizers[entries][:, None]
    )
    probabilities = jnp.exp(logits - normalizers)
    logit_gradient = jnp.where(is_target, gradient, 0.0)
    logit_gradient = logit_gradient - gradient * probabilities
    product_gradient = chunks.product_gradient(logit_gradient, logits)
    product_gradient = product_gradient.astype(hidden.dtype)
    update = jnp.einsum(
      "sv,vd->sd",
      product_gradient,
      chunks.unembedding,
      preferred_element_type=jnp.float32,
    )
    return (
      hidden_gradient.at[sources].add(update),
      unembedding_gradient
      + jnp.einsum(
        "sv,sd->vd",
        product_gradient,
        chunks.hidden[sources],
        preferred_element_type=jnp.float32,
      ),
    )

  start = (
    jnp.zeros(chunks.hidden.shape, jnp.float32),
    jnp.zeros(chunks.unembedding.shape, jnp.float32),
  )
  hidden_gradient, unembedding_gradient = jax.lax.fori_loop(
    0, chunks.count, score, start
  )
  hidden_gradient = jax.lax.psum(hidden_gradient, tensor)
  unembedding_gradient = jax.lax.psum(
    unembedding_gradient, sharding.active_axes(sharding.DATA)
  )
  if fsdp := sharding.active_axes(sharding.FSDP):
    unembedding_gradient = jax.lax.psum_scatter(
      unembedding_gradient, fsdp, scatter_dimension=1, tiled=True
    )
  return (
    hidden_gradient.reshape(hidden.shape).astype(hidden.dtype),
    unembedding_gradient.astype(unembedding.dtype),
  )
