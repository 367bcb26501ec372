"""One update and one evaluation: pure functions of state, reference, batch."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dpop_jax import logprobs, metrics, optim
from dpop_jax import pairs as pairs_lib
from dpop_jax.models import decoder

Params = Any
Metrics = dict[str, pairs_lib.WeightedSum]
# Of a log-prob of a part of an answer in float32, in nats.
_ROUNDING, _RELATIVE_ROUNDING = 5e-5, 1e-6
# (policy_logps, reference_logps, answer_lengths), each [..., pairs, 2] by side,
# to one loss per pair.
PairLosses = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class State(NamedTuple):
  """What training changes. Data only, so that it can be saved and sharded.

  Attributes:
    step: int32 scalar; updates made so far.
    params: The policy.
    opt_state: Of the optimizer.
  """

  step: jax.Array
  params: Params
  opt_state: optax.OptState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
  """What is minimised.

  Attributes:
    pair_losses: One loss per pair.
    is_sft: Supervised: there is no reference and no rejected answer, and the
      loss is a mean over tokens instead of pairs.
    beta: Unit of the reported rewards.
  """

  pair_losses: PairLosses
  is_sft: bool
  beta: float


class StepReport(NamedTuple):
  """What an update tells about itself.

  Attributes:
    metrics: Sums and weights by name.
    grad_norm: Global norm of the gradient, before clipping.
    grad_norms: Norm of each parameter's gradient, float32 [parameters], in the
      order of `jax.tree.leaves`; names what went non-finite.
    learning_rate: That of the update. Here, because what the host asks a
      device for waits for the steps that it has been given.
  """

  metrics: Metrics
  grad_norm: jax.Array
  grad_norms: jax.Array
  learning_rate: jax.Array


def hidden_states(
  params: Params, rows: Any, config: decoder.DecoderConfig
) -> jax.Array:
  """What predicts the tokens of some rows: [rows, length, hidden].

  Args:
    params: Of the decoder.
    rows: Has `tokens`, `positions` and `visible_until` as `pairs.PackedBatch`.
    config: The decoder's.
  """
  hidden, _ = decoder.Decoder(config).apply(
    {"params": params}, rows.tokens, rows.positions, rows.visible_until
  )
  return hidden


def token_logps(
  hidden: jax.Array,
  unembedding: jax.Array,
  rows: Any,
  config: decoder.DecoderConfig,
) -> jax.Array:
  """Log-prob of each scored token: float32 [rows, scores], 0 behind the last.

  Args:
    hidden: From `hidden_states`.
    unembedding: The output embedding, [vocabulary, hidden].
    rows: Has `score_positions`, `score_targets` and `num_scores` as
      `pairs.PackedBatch`.
    config: The decoder's.
  """
  return logprobs.token_logps(
    hidden,
    unembedding,
    rows.score_positions,
    rows.score_targets,
    rows.num_scores,
    softcap=config.final_logit_softcapping,
  )


def region_logps(
  params: Params, rows: pairs_lib.PackedBatch, config: decoder.DecoderConfig
) -> jax.Array:
  """Log-prob of every answer by region: float32 [rows, pairs, 2, 3]."""
  hidden = hidden_states(params, rows, config)
  unembedding = decoder.unembedding(params, config)
  return pairs_lib.answer_logps(
    token_logps(hidden, unembedding, rows, config), rows
  )


def score_step(
  params: Params,
  batch: pairs_lib.PackedBatch,
  *,
  config: decoder.DecoderConfig,
) -> jax.Array:
  """Log-probs of the answers of one microbatch: float32 [rows, pairs, 2, 3].

  Args:
    params: What scores.
    batch: [1, rows, ...].
    config: Its decoder.
  """
  return region_logps(params, jax.tree.map(lambda x: x[0], batch), config)


def rows_loss(
  params: Params,
  reference: Params | None,
  rows: pairs_lib.PackedBatch,
  *,
  config: decoder.DecoderConfig,
  reference_config: decoder.DecoderConfig,
  objective: Objective,
) -> tuple[jax.Array, Metrics]:
  """Sum of the losses of the pairs in some rows, and metrics.

  Args:
    params: The policy.
    reference: Parameters of the frozen reference; None for SFT, and where the
      rows hold its log-probs.
    rows: One microbatch, [rows, ...].
    config: The policy's decoder.
    reference_config: The reference's.
    objective: What to compute.

  Returns:
    The sum, to be divided by the weight of `metrics["loss"]` over the whole
    update, and the metrics.
  """
  policy = region_logps(params, rows, config)
  lengths = rows.answer_lengths.sum(axis=-1)
  weights = rows.pair_weights
  if objective.is_sft:
    reference_logps = jnp.zeros_like(policy)
    report = metrics.sft_metrics(policy, rows.answer_lengths, weights)
  else:
    if rows.reference_logps is None:
      reference_logps = region_logps(reference, rows, reference_config)
    else:
      reference_logps = _settled(rows.reference_logps, policy)
    report = metrics.preference_metrics(
      policy, reference_logps, rows.answer_lengths, weights, beta=objective.beta
    )
  losses = objective.pair_losses(
    policy.sum(axis=-1), reference_logps.sum(axis=-1), lengths
  )
  loss = metrics.weighted_sum(losses, weights)
  if objective.is_sft:
    tokens = lengths[..., pairs_lib.CHOSEN].astype(jnp.float32)
    loss = loss._replace(weight=metrics.weighted_sum(tokens, weights).total)
  return loss.total, {"loss": loss, **report}


def _settled(reference_logps, policy_logps):
  """The reference's log-probs, those of the policy where only rounding differs.

  DPOP's penalty has a kink where policy and reference are equal, which is where
  training starts. Scored in the step they are equal to the last bit there;
  elsewhere in a batch sums round differently, and the penalty of half of the
  pairs would be on.
  """
  rounding = _ROUNDING + _RELATIVE_ROUNDING * jnp.abs(reference_logps)
  is_equal = jnp.abs(policy_logps - reference_logps) <= rounding
  policy_logps = jax.lax.stop_gradient(policy_logps)
  return jnp.where(is_equal, policy_logps, reference_logps)


def train_step(
  state: State,
  reference: Params | None,
  batch: pairs_lib.PackedBatch,
  num_microbatches: jax.Array,
  *,
  config: decoder.DecoderConfig,
  reference_config: decoder.DecoderConfig,
  objective: Objective,
  optimizer: optax.GradientTransformation,
  schedule: optim.Schedule,
) -> tuple[State, StepReport]:
  """One update on all the pairs of a batch, however they are packed.

  Args:
    state: Before the update.
    reference: See `rows_loss`.
    batch: [microbatches, rows, ...].
    num_microbatches: int32; the leading ones that hold anything.
    config: The policy's decoder.
    reference_config: The reference's.
    objective: What to minimise.
    optimizer: How.
    schedule: Its learning rate by the number of updates before.
  """

  def differentiate(rows):
    (_, report), gradients = jax.value_and_grad(rows_loss, has_aux=True)(
      state.params,
      reference,
      rows,
      config=config,
      reference_config=reference_config,
      objective=objective,
    )
    return gradients, report

  gradients, report = _accumulate(differentiate, batch, num_microbatches)
  scale = 1.0 / report["loss"].weight
  gradients = jax.tree.map(lambda g: g * scale.astype(g.dtype), gradients)
  grad_norms = jnp.stack(
    [optax.tree.norm(leaf) for leaf in jax.tree.leaves(gradients)]
  )
  updates, opt_state = optimizer.update(
    gradients, state.opt_state, state.params
  )
  params = optax.apply_updates(state.params, updates)
  report = StepReport(
    metrics=report,
    grad_norm=jnp.linalg.norm(grad_norms),
    grad_norms=grad_norms,
    learning_rate=schedule(state.step),
  )
  return State(state.step + 1, params, opt_state), report


def eval_step(
  params: Params,
  reference: Params | None,
  batch: pairs_lib.PackedBatch,
  num_microbatches: jax.Array,
  *,
  config: decoder.DecoderConfig,
  reference_config: decoder.DecoderConfig,
  objective: Objective,
) -> Metrics:
  """Metrics of a batch, with the arguments of `train_step`."""

  def evaluate(rows):
    return rows_loss(
      params,
      reference,
      rows,
      config=config,
      reference_config=reference_config,
      objective=objective,
    )[1]

  return _accumulate(evaluate, batch, num_microbatches)


def _accumulate(function, batch, num_microbatches):
  """Sums a function's results over the microbatches that hold anything."""

  def at(index):
    return jax.tree.map(
      lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), batch
    )

  if batch.tokens.shape[0] == 1:
    return function(at(0))

  def add(index, total):
    return jax.tree.map(jnp.add, total, function(at(index)))

  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, at(0))
  )
  return jax.lax.fori_loop(0, num_microbatches, add, zeros)
