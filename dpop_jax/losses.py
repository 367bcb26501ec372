"""Preference losses: pure functions from log-probs to one loss per pair.

Every loss takes log-probs of whole answers (sums over their tokens, in nats)
and returns the loss of each pair, unreduced; means and weights are the
caller's. Any shape will do as long as all arrays have the same: [pairs], [rows,
pairs].

In the equations r_w and r_l are the log-ratios of policy to reference for the
chosen (w, won) and the rejected (l, lost) answer, and logp_w and logp_l their
log-probs under the policy.

Where a loss has a kink, `jax.nn.relu` sets the gradient there to 0. That
matters: training starts with policy and reference equal, which is on DPOP's
kink.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int


def dpop_loss(
  policy_chosen_logps: Float[Array, "*pairs"],
  policy_rejected_logps: Float[Array, "*pairs"],
  reference_chosen_logps: Float[Array, "*pairs"],
  reference_rejected_logps: Float[Array, "*pairs"],
  *,
  beta: float,
  dpop_lambda: float,
) -> Float32[Array, "*pairs"]:
  """DPO-Positive: DPO that also keeps the chosen answer likely.

    -log(sigmoid(beta * (r_w - r_l - dpop_lambda * max(0, -r_w))))

  The penalty acts only while the policy finds the chosen answer less likely
  than the reference does. It stands inside the sigmoid and is scaled by beta,
  so the pull on the chosen answer is then 1 + dpop_lambda times that on the
  rejected. With `dpop_lambda=0` this is `dpo_loss`.

  Args:
    policy_chosen_logps: log pi(y_w | x) under the model being trained.
    policy_rejected_logps: log pi(y_l | x) under the same model.
    reference_chosen_logps: log pi_ref(y_w | x) under the frozen reference.
    reference_rejected_logps: log pi_ref(y_l | x) under the frozen reference.
    beta: Strength of the tie to the reference, per nat; positive.
    dpop_lambda: Weight of the penalty against the log-ratios; not negative.

  Returns:
    The loss of each pair, in nats.

  References:
    Pal et al., 2024, https://arxiv.org/abs/2402.13228v2, eq. 3. The first
    version of the paper brackets the penalty differently.
  """
  chosen_logratios = _logratios(policy_chosen_logps, reference_chosen_logps)
  rejected_logratios = _logratios(
    policy_rejected_logps, reference_rejected_logps
  )
  # jnp.maximum and jnp.clip have half the penalty's gradient at 0, where
  # training starts: with beta 0.3 and lambda 50 a first step 26 times too
  # large.
  penalties = jax.nn.relu(-chosen_logratios)
  margins = chosen_logratios - rejected_logratios - dpop_lambda * penalties
  return -jax.nn.log_sigmoid(beta * margins)


def dpo_loss(
  policy_chosen_logps: Float[Array, "*pairs"],
  policy_rejected_logps: Float[Array, "*pairs"],
  reference_chosen_logps: Float[Array, "*pairs"],
  reference_rejected_logps: Float[Array, "*pairs"],
  *,
  beta: float,
) -> Float32[Array, "*pairs"]:
  """Direct preference optimisation: logistic regression on the margin.

    -log(sigmoid(beta * (r_w - r_l)))

  Args:
    policy_chosen_logps: log pi(y_w | x) under the model being trained.
    policy_rejected_logps: log pi(y_l | x) under the same model.
    reference_chosen_logps: log pi_ref(y_w | x) under the frozen reference.
    reference_rejected_logps: log pi_ref(y_l | x) under the frozen reference.
    beta: Strength of the tie to the reference, per nat; positive.

  Returns:
    The loss of each pair, in nats.

  References:
    Rafailov et al., 2023, https://arxiv.org/abs/2305.18290, eq. 7.
  """
  margins = _margins(
    policy_chosen_logps,
    policy_rejected_logps,
    reference_chosen_logps,
    reference_rejected_logps,
  )
  return -jax.nn.log_sigmoid(beta * margins)


def conservative_dpo_loss(
  policy_chosen_logps: Float[Array, "*pairs"],
  policy_rejected_logps: Float[Array, "*pairs"],
  reference_chosen_logps: Float[Array, "*pairs"],
  reference_rejected_logps: Float[Array, "*pairs"],
  *,
  beta: float,
  label_smoothing: float,
) -> Float32[Array, "*pairs"]:
  """DPO for labels that are swapped now and then (cDPO).

    -(1 - label_smoothing) * log(sigmoid(beta * (r_w - r_l)))
    - label_smoothing * log(sigmoid(-beta * (r_w - r_l)))

  It is smallest at a finite margin, where sigmoid(beta * (r_w - r_l)) is
  1 - label_smoothing. With `label_smoothing=0` this is `dpo_loss`.

  Args:
    policy_chosen_logps: log pi(y_w | x) under the model being trained.
    policy_rejected_logps: log pi(y_l | x) under the same model.
    reference_chosen_logps: log pi_ref(y_w | x) under the frozen reference.
    reference_rejected_logps: log pi_ref(y_l | x) under the frozen reference.
    beta: Strength of the tie to the reference, per nat; positive.
    label_smoothing: Share of pairs believed to be swapped; in [0, 0.5).

  Returns:
    The loss of each pair, in nats.

  References:
    Mitchell, 2023, "A note on DPO with noisy preferences & relationship to
    IPO", https://ericmitchell.ai/cdpo.pdf.
  """
  margins = _margins(
    policy_chosen_logps,
    policy_rejected_logps,
    reference_chosen_logps,
    reference_rejected_logps,
  )
  as_labelled = -jax.nn.log_sigmoid(beta * margins)
  swapped = -jax.nn.log_sigmoid(-beta * margins)
  return (1.0 - label_smoothing) * as_labelled + label_smoothing * swapped


def ipo_loss(
  policy_chosen_logps: Float[Array, "*pairs"],
  policy_rejected_logps: Float[Array, "*pairs"],
  reference_chosen_logps: Float[Array, "*pairs"],
  reference_rejected_logps: Float[Array, "*pairs"],
  *,
  beta: float,
) -> Float32[Array, "*pairs"]:
  """Identity preference optimisation: regression of the margin to a constant.

    (r_w - r_l - 1 / (2 * beta)) ** 2

  Here log-ratios are sums over tokens, as in the paper's equation;
  `length_normalised_ipo_loss` has means.

  Args:
    policy_chosen_logps: log pi(y_w | x) under the model being trained.
    policy_rejected_logps: log pi(y_l | x) under the same model.
    reference_chosen_logps: log pi_ref(y_w | x) under the frozen reference.
    reference_rejected_logps: log pi_ref(y_l | x) under the frozen reference.
    beta: The paper's tau, per nat; positive. The margin aimed at is 1 / (2
      beta).

  Returns:
    The loss of each pair, in nats squared.

  References:
    Azar et al., 2023, https://arxiv.org/abs/2310.12036, eq. 17.
  """
  margins = _margins(
    policy_chosen_logps,
    policy_rejected_logps,
    reference_chosen_logps,
    reference_rejected_logps,
  )
  return jnp.square(margins - 1.0 / (2.0 * beta))


def length_normalised_ipo_loss(
  policy_chosen_logps: Float[Array, "*pairs"],
  policy_rejected_logps: Float[Array, "*pairs"],
  reference_chosen_logps: Float[Array, "*pairs"],
  reference_rejected_logps: Float[Array, "*pairs"],
  chosen_lengths: Int[Array, "*pairs"],
  rejected_lengths: Int[Array, "*pairs"],
  *,
  beta: float,
) -> Float32[Array, "*pairs"]:
  """IPO on log-ratios per token, the form its authors confirmed to TRL.

    (r_w / chosen_length - r_l / rejected_length - 1 / (2 * beta)) ** 2

  The same beta asks for far more here than in `ipo_loss`: the margin aimed at
  is per token.

  Args:
    policy_chosen_logps: log pi(y_w | x) under the model being trained; a sum.
    policy_rejected_logps: log pi(y_l | x) under the same model; a sum.
    reference_chosen_logps: log pi_ref(y_w | x) under the frozen reference; a
      sum.
    reference_rejected_logps: log pi_ref(y_l | x) under the same; a sum.
    chosen_lengths: Scored tokens of the chosen answer; 0 counts as 1.
    rejected_lengths: Scored tokens of the rejected answer; 0 counts as 1.
    beta: The paper's tau, per nat per token; positive.

  Returns:
    The loss of each pair, in (nats per token) squared.

  References:
    Azar et al., 2023, https://arxiv.org/abs/2310.12036, eq. 17; with means as
    in TRL from 0.7.11 on.
  """
  # Padding has no tokens; 0 / 0 would reach the gradient even at weight 0.
  chosen_lengths = jnp.maximum(chosen_lengths, 1).astype(jnp.float32)
  rejected_lengths = jnp.maximum(rejected_lengths, 1).astype(jnp.float32)
  margins = (
    _logratios(policy_chosen_logps, reference_chosen_logps) / chosen_lengths
    - _logratios(policy_rejected_logps, reference_rejected_logps)
    / rejected_lengths
  )
  return jnp.square(margins - 1.0 / (2.0 * beta))


def slic_hinge_loss(
  policy_chosen_logps: Float[Array, "*pairs"],
  policy_rejected_logps: Float[Array, "*pairs"],
  reference_chosen_logps: Float[Array, "*pairs"],
  reference_rejected_logps: Float[Array, "*pairs"],
  *,
  beta: float,
) -> Float32[Array, "*pairs"]:
  """SLiC as many libraries have it: a hinge on the margin of log-ratios.

    max(0, 1 - beta * (r_w - r_l))

  It takes SLiC's hinge and DPO's reference; `slic_likelihood_loss` is the loss
  of the SLiC paper. Pairs whose margin has reached 1 / beta have no gradient.

  Args:
    policy_chosen_logps: log pi(y_w | x) under the model being trained.
    policy_rejected_logps: log pi(y_l | x) under the same model.
    reference_chosen_logps: log pi_ref(y_w | x) under the frozen reference.
    reference_rejected_logps: log pi_ref(y_l | x) under the frozen reference.
    beta: Strength of the tie to the reference, per nat; positive.

  Returns:
    The loss of each pair, without a unit.

  References:
    Liu et al., 2023, https://arxiv.org/abs/2309.06657 ("hinge-norm").
  """
  margins = _margins(
    policy_chosen_logps,
    policy_rejected_logps,
    reference_chosen_logps,
    reference_rejected_logps,
  )
  return jax.nn.relu(1.0 - beta * margins)


def slic_likelihood_loss(
  policy_chosen_logps: Float[Array, "*pairs"],
  policy_rejected_logps: Float[Array, "*pairs"],
  *,
  delta: float,
  likelihood_weight: float,
) -> Float32[Array, "*pairs"]:
  """SLiC of its own paper: a hinge on log-probs, and likelihood; no reference.

    max(0, delta - logp_w + logp_l) - likelihood_weight * logp_w

  The second term is the paper's cross-entropy regulariser with the chosen
  answer as its target; HALOs uses `delta=1.0, likelihood_weight=0.1`. With a
  weight of 0 it equals `slic_hinge_loss` with beta 1 / delta and a reference of
  log-prob 0, times delta.

  Args:
    policy_chosen_logps: log pi(y_w | x) under the model being trained.
    policy_rejected_logps: log pi(y_l | x) under the same model.
    delta: The margin, in nats, beyond which a pair has no ranking loss;
      positive.
    likelihood_weight: The paper's lambda: weight of the negative log-likelihood
      of the chosen answer; not negative.

  Returns:
    The loss of each pair, in nats.

  References:
    Zhao et al., 2023, https://arxiv.org/abs/2305.10425 (delta and lambda);
    Ethayarajh et al., 2024, https://github.com/ContextualAI/HALOs (the target).
  """
  chosen_logps = policy_chosen_logps.astype(jnp.float32)
  rejected_logps = policy_rejected_logps.astype(jnp.float32)
  ranking = jax.nn.relu(delta - chosen_logps + rejected_logps)
  return ranking - likelihood_weight * chosen_logps


def sft_loss(
  policy_chosen_logps: Float[Array, "*pairs"],
) -> Float32[Array, "*pairs"]:
  """Supervised fine-tuning: negative log-likelihood of the chosen answer.

    -logp_w

  It is the sum over the tokens of an answer, so every token of a batch weighs
  the same; divided by the number of tokens it is the usual cross-entropy.

  Args:
    policy_chosen_logps: log pi(y_w | x) under the model being trained.

  Returns:
    The loss of each answer, in nats.
  """
  return -policy_chosen_logps.astype(jnp.float32)


def _margins(
  policy_chosen_logps: Float[Array, "*pairs"],
  policy_rejected_logps: Float[Array, "*pairs"],
  reference_chosen_logps: Float[Array, "*pairs"],
  reference_rejected_logps: Float[Array, "*pairs"],
) -> Float32[Array, "*pairs"]:
  chosen_logratios = _logratios(policy_chosen_logps, reference_chosen_logps)
  return chosen_logratios - _logratios(
    policy_rejected_logps, reference_rejected_logps
  )


def _logratios(
  policy_logps: Float[Array, "*pairs"],
  reference_logps: Float[Array, "*pairs"],
) -> Float32[Array, "*pairs"]:
  # A difference of large, nearly equal numbers: near -100 bfloat16 resolves
  # half a nat, so whatever comes in is subtracted in float32.
  policy_logps = policy_logps.astype(jnp.float32)
  return policy_logps - reference_logps.astype(jnp.float32)
