"""One large first step of DPO, of the output layer alone or of all parameters.

What lies between the forward pass of `dpop_jax.inspection` and a run of DPO:
Adam's first step moves every parameter by the learning rate against the sign of
its gradient, which is that of all pairs' log p(chosen) - log p(rejected).
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpop_jax import logprobs
from dpop_jax import pairs as pairs_lib
from dpop_jax.inspection import forward, pair_rows
from dpop_jax.models import decoder

# By which every parameter that is moved is moved.
_HEAD_STEP, _WHOLE_STEP = 0.03, 5e-4
# Scores of a row, so that all sets of pairs have rows of one shape.
_MOST_SCORES = 1100
_ROW_LENGTH = 1024


def falls(
  model: forward.Model,
  train: Sequence[pairs_lib.TokenPair],
  held_out: Sequence[pairs_lib.TokenPair],
) -> dict[str, float]:
  """What the steps take off held-out chosen answers: nats a pair, by name.

  Args:
    model: The model to move.
    train: Pairs whose gradient is followed.
    held_out: Others.
  """
  params, config = model.params, model.config
  with jax.set_mesh(model.mesh):
    parts = [_gradient(params, rows, config) for rows, _ in _rows(train)]
    signs = jax.tree.map(lambda *leaves: jnp.sign(sum(leaves)), *parts)
    rows_held_out = list(_rows(held_out))

    def chosen_logp(params):
      logps = [_chosen_logp(params, *rows, config) for rows in rows_held_out]
      return sum(map(float, logps)) / len(held_out)

    def moved(size):
      return jax.tree.map(lambda x, sign: x + size * sign, params, signs)

    name = "embedding" if config.tie_word_embeddings else "unembedding"
    steps = {
      "head_step": params | {name: moved(_HEAD_STEP)[name]},
      "whole_step": moved(_WHOLE_STEP),
    }
    before = chosen_logp(params)
    return {name: before - chosen_logp(step) for name, step in steps.items()}


def _rows(
  pairs: Sequence[pairs_lib.TokenPair],
) -> Iterator[tuple[pair_rows.Rows, np.ndarray]]:
  """Rows of one shape, and which of their scores are of chosen answers."""
  for rows in pair_rows.batches(
    pairs, row_length=_ROW_LENGTH, rows_per_batch=1
  ):
    is_chosen, place = np.zeros((1, _MOST_SCORES), bool), 0
    for i in rows.pair_ids[0]:
      is_chosen[0, place : place + len(pairs[i].chosen)] = True
      place += len(pairs[i].chosen) + len(pairs[i].rejected)
    missing = _MOST_SCORES - rows.signs.shape[1]
    padded: Mapping[str, Any] = {
      name: np.pad(getattr(rows, name), ((0, 0), (0, missing)))
      for name in ("score_positions", "score_targets", "signs", "partners")
    }
    yield rows._replace(pair_ids=[], **padded), is_chosen


def _logps(params, rows, config):
  hidden, _ = decoder.Decoder(config).apply(
    {"params": params}, rows.tokens, rows.positions, rows.visible_until
  )
  logps = logprobs.token_logps(
    hidden,
    decoder.unembedding(params, config),
    rows.score_positions,
    rows.score_targets,
    rows.num_scores,
    softcap=config.final_logit_softcapping,
  )
  counts = jnp.arange(logps.shape[1])[None] < rows.num_scores[:, None]
  return jnp.where(counts, logps, 0.0)


@functools.partial(jax.jit, static_argnums=2)
@jax.grad
def _gradient(params, rows, config):
  """Of the sum of the margins."""
  return (_logps(params, rows, config) * rows.signs).sum()


@functools.partial(jax.jit, static_argnums=3)
def _chosen_logp(params, rows, is_chosen, config):
  return jnp.where(is_chosen, _logps(params, rows, config), 0.0).sum()
