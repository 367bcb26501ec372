"""What DPO's first step would do to other pairs, through the output layer.

Adam's first step moves each parameter by the learning rate along the sign of
its gradient, which is that of all margins,

  log p(chosen) - log p(rejected),

as long as policy and reference are equal. Of the output layer W it follows from
one forward pass: with h the last hidden state where a token w is predicted, and
p = softmax(W h), it is the sum of (e_w - p) h^T over chosen tokens minus that
over rejected ones. Half of the pairs say where W goes, and the fall is that of
the chosen answers of the other half: what a step does to a pair that it was not
made for. The paper's condition, in contrast, looks at each pair alone.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dpop_jax import pairs as pairs_lib
from dpop_jax import sharding, steps
from dpop_jax.inspection import forward, pair_rows
from dpop_jax.models import decoder

# By which a logit moves where all weights agree, in nats. As far as many steps
# of DPO go, in the direction of the first.
SIZE = 3.0


def fall(
  model: forward.Model,
  pairs: Sequence[pairs_lib.TokenPair],
  *,
  row_length: int,
) -> float | None:
  """What a step takes off log p(chosen) of pairs it was not made for.

  Args:
    model: The model.
    pairs: With rejected answers; those at even places say where to step. Those
      of one prompt may be at both, which makes the fall smaller.
    row_length: Tokens of a row, into which each pair fits.

  Returns:
    The mean over the pairs at odd places, in nats; below 0 if they rise. None
    if there are fewer than two pairs, or nothing to step for.
  """
  if len(pairs) < 2:
    return None
  made_for, others = pairs[::2], pairs[1::2]
  config, params = model.config, model.params
  head = decoder.unembedding(params, config)
  batches = functools.partial(
    pair_rows.batches,
    row_length=row_length,
    rows_per_batch=sharding.num_row_shards(model.mesh),
  )
  with jax.set_mesh(model.mesh):
    gradient = jnp.zeros(head.shape, jnp.float32)
    total, count = 0.0, 0
    for rows in batches(made_for):
      part, norms = _gradient(params, head, rows._replace(pair_ids=[]), config)
      gradient += part
      total += float(norms)
      count += int(rows.num_scores.sum())
    signs = jnp.sign(gradient)
    if not count or not total:
      return None
    moved = (head + SIZE * count / total * signs).astype(head.dtype)
    lost = 0.0
    for rows in batches(others):
      losses = _losses(params, head, moved, rows._replace(pair_ids=[]), config)
      split = pair_rows.split(np.asarray(losses), rows, others)
      lost += sum(float(chosen.sum()) for _, chosen, _ in split)
  return lost / len(others)


@functools.partial(jax.jit, static_argnums=3)
def _gradient(params, head, rows, config):
  """That of the sum of the margins, and the sum of the hidden states' norms.

  The norm is that of the sum of absolute values, which is what the sign of a
  gradient meets.
  """
  hidden = steps.hidden_states(params, rows, config)
  signs = rows.signs.astype(jnp.float32)
  gradient = jax.grad(
    lambda head: (steps.token_logps(hidden, head, rows, config) * signs).sum()
  )(head)
  norms = jnp.abs(hidden.astype(jnp.float32)).sum(-1)
  scored = jnp.take_along_axis(norms, rows.score_positions, axis=1)
  counts = jnp.arange(scored.shape[1])[None] < rows.num_scores[:, None]
  return gradient.astype(jnp.float32), jnp.where(counts, scored, 0.0).sum()


@functools.partial(jax.jit, static_argnums=4)
def _losses(params, head, moved, rows, config):
  """What the scored tokens lose where the output layer moves, in nats."""
  hidden = steps.hidden_states(params, rows, config)
  before, after = (
    steps.token_logps(hidden, layer, rows, config) for layer in (head, moved)
  )
  return before - after
