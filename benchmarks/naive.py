"""What packed forests are measured against: a pair is two padded sequences.

As a careful user of JAX would write it: prompt + chosen and prompt + rejected
of some pairs go through one forward pass of the same decoder, right-padded to
the longest of them rounded up; gradients are accumulated over such
microbatches, each as long as it needs to be, and donated.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpop_jax import pairs as pairs_lib
from dpop_jax import steps
from dpop_jax.models import attention, decoder

HEADS = ("answers", "full")
ATTENTIONS = ("blocks", "dense")


class Sequences(NamedTuple):
  """All chosen, then all rejected sequences of some pairs.

  Attributes:
    tokens: int32 [sequences, length].
    lengths: int32 [sequences].
    targets: int32 [sequences, length]; the next token.
    loss_mask: bool [sequences, length]; whether it belongs to the answer.
    score_positions: int32 [sequences, scores]; where that is so, as an index.
    score_targets: int32 [sequences, scores].
    num_scores: int32 [sequences].
  """

  tokens: np.ndarray
  lengths: np.ndarray
  targets: np.ndarray
  loss_mask: np.ndarray
  score_positions: np.ndarray
  score_targets: np.ndarray
  num_scores: np.ndarray


def pad(pairs: Sequence[pairs_lib.TokenPair], *, multiple: int) -> Sequences:
  """Pads some pairs to their longest sequence, and that to a multiple."""
  round_up = lambda size: -(-size // multiple) * multiple
  answers = [p.chosen for p in pairs] + [p.rejected for p in pairs]
  prompts = [p.prompt for p in pairs] * 2
  sizes = [len(p) + len(a) for p, a in zip(prompts, answers, strict=True)]
  shape = len(answers), round_up(max(sizes))
  scores = len(answers), round_up(max(map(len, answers)))
  zeros = functools.partial(np.zeros, dtype=np.int32)
  batch = Sequences(
    tokens=zeros(shape),
    lengths=np.array(sizes, np.int32),
    targets=zeros(shape),
    loss_mask=np.zeros(shape, np.bool_),
    score_positions=zeros(scores),
    score_targets=zeros(scores),
    num_scores=np.array([len(a) for a in answers], np.int32),
  )
  for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
    first, end = len(prompt) - 1, len(prompt) + len(answer)
    batch.tokens[i, :end] = np.concatenate([prompt, answer])
    batch.targets[i, first : end - 1] = answer
    batch.loss_mask[i, first : end - 1] = True
    batch.score_positions[i, : len(answer)] = np.arange(first, end - 1)
    batch.score_targets[i, : len(answer)] = answer
  return batch


class NaiveStep:
  """A train step like `steps.train_step`, on pairs instead of forests."""

  def __init__(
    self,
    *,
    config: decoder.DecoderConfig,
    objective: steps.Objective,
    optimizer: optax.GradientTransformation,
    head: str,
    attention_name: str,
    pairs_per_microbatch: int,
    multiple: int,
  ):
    """A step; each new length of a microbatch compiles once.

    Args:
      config: The decoder.
      objective: The loss of a pair.
      optimizer: As in the other step.
      head: "answers" computes logits where an answer is scored, in chunks;
        "full" at every position, all at once.
      attention_name: "blocks" skips what is not visible; "dense" is
        `jax.nn.dot_product_attention`.
      pairs_per_microbatch: Pairs that are computed at once.
      multiple: Lengths are rounded up to a multiple of this.
    """
    self._pairs_per_microbatch = pairs_per_microbatch
    self._multiple = multiple
    rows_loss = functools.partial(
      _loss, config=config, objective=objective, head=head
    )
    self._attention_name = attention_name

    def accumulate(params, reference, total, batch):
      loss, gradients = jax.value_and_grad(rows_loss)(params, reference, batch)
      return jax.tree.map(jnp.add, total, (loss, gradients))

    def update(state, total, num_pairs):
      loss, gradients = jax.tree.map(lambda x: x / num_pairs, total)
      updates, opt_state = optimizer.update(
        gradients, state.opt_state, state.params
      )
      params = optax.apply_updates(state.params, updates)
      state = steps.State(state.step + 1, params, opt_state)
      return state, loss, optax.global_norm(gradients)

    def zeros(params):
      return jnp.float32(0), jax.tree.map(jnp.zeros_like, params)

    self._zeros = jax.jit(zeros)
    self._accumulate = jax.jit(accumulate, donate_argnums=2)
    self._update = jax.jit(update, donate_argnums=0)

  def batches(self, pairs: Sequence[pairs_lib.TokenPair]) -> list[Sequences]:
    """The microbatches of an update."""
    size = self._pairs_per_microbatch
    return [
      jax.tree.map(
        jnp.asarray, pad(pairs[i : i + size], multiple=self._multiple)
      )
      for i in range(0, len(pairs), size)
    ]

  def __call__(
    self, state: steps.State, reference: steps.Params, batches: list[Sequences]
  ) -> tuple[steps.State, jax.Array, jax.Array]:
    """The new state, the loss per pair and the norm of the gradient."""
    with _attention(self._attention_name):
      total = self._zeros(state.params)
      for batch in batches:
        total = self._accumulate(state.params, reference, total, batch)
    num_pairs = sum(len(batch.lengths) for batch in batches) / 2
    return self._update(state, total, np.float32(num_pairs))


def _attention(name):
  """The decoder's attention, while it is traced."""
  if name == "blocks":
    return mock.patch.object(
      attention, "forest_attention", attention.forest_attention
    )

  def dense(query, key, value, visibility, *, scale, softcap=None):
    # What is padded on the right, nothing looks at.
    if softcap is not None or visibility.window is not None:
      raise ValueError(
        "Dense attention has neither a soft cap nor a window; measure a model "
        "without them, or blocks."
      )
    return jax.nn.dot_product_attention(
      query, key, value, scale=scale, is_causal=True
    )

  return mock.patch.object(attention, "forest_attention", dense)


def _answer_logps(params, batch, config, head):
  """Log-prob of every sequence's answer: [sequences]."""
  length = batch.tokens.shape[1]
  index = jnp.arange(length, dtype=jnp.int32)[None]
  is_token = index < batch.lengths[:, None]
  visible_until = jnp.where(is_token, batch.lengths[:, None], index)
  hidden, _ = decoder.Decoder(config).apply(
    {"params": params},
    batch.tokens,
    jnp.where(is_token, index, 0),
    visible_until,
  )
  if head == "answers":
    unembedding = decoder.unembedding(params, config)
    logps = steps.token_logps(hidden, unembedding, batch, config)
    return logps.sum(axis=-1)
  logits = decoder.logits(params, hidden, config)
  losses = optax.softmax_cross_entropy_with_integer_labels(
    logits, batch.targets
  )
  return -jnp.sum(losses, axis=-1, where=batch.loss_mask)


def _loss(params, reference, batch, *, config, objective, head):
  """Sum of the losses of the pairs."""
  by_side = lambda x: x.reshape(2, -1).T
  policy = by_side(_answer_logps(params, batch, config, head))
  reference = by_side(_answer_logps(reference, batch, config, head))
  losses = objective.pair_losses(policy, reference, by_side(batch.num_scores))
  return losses.sum()
