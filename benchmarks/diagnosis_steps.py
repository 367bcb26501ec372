"""One large first step of DPO, of all parameters.

What lies between `dpop_jax.inspection`, with its step of the output layer, and
a run of DPO: Adam's first step moves every parameter by the learning rate along
the sign of its gradient, which is that of all margins.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpop_jax import pairs as pairs_lib
from dpop_jax import steps
from dpop_jax.inspection import forward, pair_rows
from dpop_jax.models import decoder

# By which every parameter is moved.
_STEP = 5e-4
# Scores of a row, so that all sets of pairs have rows of one shape.
_MOST_SCORES = 1400
_ROW_LENGTH = 1024


def fall(
  model: forward.Model,
  train: Sequence[pairs_lib.TokenPair],
  held_out: Sequence[pairs_lib.TokenPair],
) -> float:
  """What the step takes off held-out chosen answers, in nats a pair.

  Args:
    model: The model to move.
    train: Pairs whose gradient is followed.
    held_out: Others.
  """
  params, config = model.params, model.config
  with jax.set_mesh(model.mesh):
    parts = [
      _gradient(params, rows._replace(pair_ids=[]), config)
      for rows in _rows(train)
    ]
    signs = jax.tree.map(lambda *leaves: jnp.sign(sum(leaves)), *parts)
    moved = jax.tree.map(lambda x, sign: x + _STEP * sign, params, signs)
    lost = 0.0
    for rows in _rows(held_out):
      before, after = (
        np.asarray(_logps(each, rows._replace(pair_ids=[]), config))
        for each in (params, moved)
      )
      split = pair_rows.split(before - after, rows, held_out)
      lost += sum(float(chosen.sum()) for _, chosen, _ in split)
  return lost / len(held_out)


def _rows(pairs: Sequence[pairs_lib.TokenPair]) -> Iterator[pair_rows.Rows]:
  """Rows of one shape."""
  for rows in pair_rows.batches(
    pairs, row_length=_ROW_LENGTH, rows_per_batch=1
  ):
    missing = _MOST_SCORES - rows.signs.shape[1]
    padded: Mapping[str, Any] = {
      name: np.pad(getattr(rows, name), ((0, 0), (0, missing)))
      for name in ("score_positions", "score_targets", "signs", "partners")
    }
    yield rows._replace(**padded)


@functools.partial(jax.jit, static_argnums=2)
def _logps(params, rows, config):
  return steps.token_logps(
    steps.hidden_states(params, rows, config),
    decoder.unembedding(params, config),
    rows,
    config,
  )


@functools.partial(jax.jit, static_argnums=2)
@jax.grad
def _gradient(params, rows, config):
  """Of the sum of the margins."""
  return (_logps(params, rows, config) * rows.signs).sum()
