"""How far chosen answers would fall while DPO buys a margin, in logits.

The paper's condition is about an infinitesimal step, in which a token that the
model is certain of loses nothing. This goes on where that stops. Each position
behind the edit gets logits of its own to move, z, except that the same token
in both answers moves with one vector, as the paper assumes, and so does the
place where the answers part, which both share. All move along the gradient of
DPO's margin at the start, c times:

  z + c (e_i - s^w - (e_i - s^l))        a token i that stands in both answers
  z + c (e_i - s^w - (e_j - s^w))        where the answers part, i against j
  z + c (e_i - s^w), z - c (e_j - s^l)   tokens of one answer alone

with s^w and s^l the softmax behind the chosen and the rejected beginning, and e
the unit vectors. The larger c, the larger the margin; what is reported is the
fall of the chosen answer's tokens at the c that gives MARGIN nats. A pair that
is easily told apart needs a small c and loses nothing.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

# With beta = 0.3, DPO's gradient has then fallen from 1/2 to 1 / (1 + e^3), a
# tenth of what it starts with.
MARGIN = 10.0
SIZES = tuple(np.geomspace(0.05, 60.0, 24).tolist())
# Positions whose logits are in memory at a time.
_CHUNK = 64


def changes(
  hidden: jax.Array,
  logits: Callable[[jax.Array], jax.Array],
  positions: jax.Array,
  targets: jax.Array,
  signs: jax.Array,
  partners: jax.Array,
) -> jax.Array:
  """What log-probs change by in steps of SIZES.

  Args:
    hidden: [rows, length, hidden_size]; last hidden states, normalised.
    logits: Hidden states to float32 logits [..., vocab].
    positions: int32 [rows, scores]; see `pair_rows.Rows`.
    targets: int32 [rows, scores].
    signs: int32 [rows, scores].
    partners: int32 [rows, scores].

  Returns:
    float32 [rows, scores, sizes], in nats; 0 for what does not move.
  """
  rows, scores = positions.shape
  count = rows * scores
  first = jnp.arange(rows)[:, None]
  sources = (first * hidden.shape[1] + positions).reshape(-1)
  # Entries without a partner point at their row's first and are not moved by
  # it.
  others = (first * scores + jnp.maximum(partners, 0)).reshape(-1)
  has_other = (partners >= 0).astype(jnp.float32).reshape(-1)
  directions = signs.astype(jnp.float32).reshape(-1)
  targets = targets.reshape(-1)
  states = hidden.reshape(-1, hidden.shape[-1])
  sizes = jnp.asarray(SIZES, jnp.float32)
  # What moves comes first, so that no chunk is computed for the rest.
  padded = -(-count // _CHUNK) * _CHUNK
  (order,) = jnp.nonzero(directions, size=padded, fill_value=count)
  num_chunks = -(-jnp.count_nonzero(directions) // _CHUNK)

  def of_entries(entries):
    """[chunk, sizes]; entries behind the end read the last one."""
    own = logits(states[sources[entries]])
    other = others[entries]
    gradient = _gradient(own, targets[entries])
    gradient -= has_other[entries][:, None] * _gradient(
      logits(states[sources[other]]), targets[other]
    )
    gradient *= directions[entries][:, None]

    def logps(size):
      moved = jax.nn.log_softmax(own + size * gradient)
      return jnp.take_along_axis(moved, targets[entries][:, None], -1)[:, 0]

    return jax.lax.map(logps, sizes).T - logps(jnp.float32(0))[:, None]

  def step(number, result):
    entries = jax.lax.dynamic_slice_in_dim(order, number * _CHUNK, _CHUNK)
    return result.at[entries].set(of_entries(entries), mode="drop")

  result = jnp.zeros((count, len(SIZES)), jnp.float32)
  result = jax.lax.fori_loop(0, num_chunks, step, result)
  return result.reshape(rows, scores, len(SIZES))


def falls(
  chosen: Sequence[np.ndarray], rejected: Sequence[np.ndarray]
) -> np.ndarray:
  """What the falling tokens of each chosen answer lose at MARGIN.

  Tokens that rise are not set against them: with which one a question's own
  answer begins is nothing that other questions learn from.

  Args:
    chosen: Of each pair, what `changes` gives for its chosen tokens: [tokens,
      sizes].
    rejected: The same of its rejected tokens.

  Returns:
    float64 [pairs]; nats, 0 or more.
  """
  return np.array([_fall(*each) for each in zip(chosen, rejected, strict=True)])


def _fall(chosen, rejected) -> float:
  chosen, rejected = (
    np.concatenate([np.zeros((len(x), 1)), x], axis=1)
    for x in (chosen, rejected)
  )
  margins = chosen.sum(axis=0) - rejected.sum(axis=0)
  lost = -np.minimum(chosen, 0.0).sum(axis=0)
  is_enough = margins >= MARGIN
  if not is_enough.any():
    return float(lost[-1])
  # The first size whose margin is enough, and the way to it from the last.
  i = int(is_enough.argmax())
  part = (MARGIN - margins[i - 1]) / (margins[i] - margins[i - 1])
  return float(lost[i - 1] + part * (lost[i] - lost[i - 1]))


def _gradient(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """That of the target's log-prob: [..., vocab]."""
  return jax.nn.one_hot(targets, logits.shape[-1]) - jax.nn.softmax(logits)
