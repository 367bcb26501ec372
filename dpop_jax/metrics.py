"""What a run reports: sums and weights over the pairs of a batch.

Every metric is a `pairs.WeightedSum`, never a mean. Padding has weight 0, and
microbatches, hosts and evaluation batches are merged by addition, so a mean
taken at the end (`means`) is the mean over all pairs or tokens however they
were split.

Log-probs and lengths come by side (CHOSEN, REJECTED) and region (BEFORE_EDIT,
AT_EDIT, AFTER_EDIT) as in `pairs.py`: float32 and int32 [..., pairs, 2, 3].
Leading axes, such as rows, are summed over as well.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from dpop_jax import pairs

_SIDES = {"chosen": pairs.CHOSEN, "rejected": pairs.REJECTED}
_REGIONS = {
  "before_edit": pairs.BEFORE_EDIT,
  "at_edit": pairs.AT_EDIT,
  "after_edit": pairs.AFTER_EDIT,
}


def weighted_sum(
  values: Float[Array, "*pairs"] | Bool[Array, "*pairs"],
  weights: Float[Array, "*pairs"],
) -> pairs.WeightedSum:
  """Sums `values` over all axes, each times its weight.

  Args:
    values: One number per pair; anything, also nan, where the weight is 0.
    weights: How often each counts: 1 for a pair, 0 for padding.
  """
  weights = weights.astype(jnp.float32)
  # Select rather than only multiply: 0.0 * -inf of a padded pair is nan.
  values = jnp.where(weights > 0, values.astype(jnp.float32), 0.0)
  return pairs.WeightedSum(jnp.sum(values * weights), jnp.sum(weights))


def preference_metrics(
  policy_logps: Float32[Array, "*pairs 2 3"],
  reference_logps: Float32[Array, "*pairs 2 3"],
  answer_lengths: Int[Array, "*pairs 2 3"],
  pair_weights: Float32[Array, "*pairs"],
  *,
  beta: float,
) -> dict[str, pairs.WeightedSum]:
  """Metrics of preference pairs, under TRL's names plus DPOP's own.

  With r = policy_logps - reference_logps, summed over the regions of an answer:

    name                             mean over    of
    rewards/chosen, /rejected        pairs        beta * r
    rewards/margins                  pairs        beta * (r_w - r_l)
    rewards/accuracies               pairs        r_w > r_l, strictly
    logratios/chosen, /rejected      pairs        r, in nats
    logps/chosen, /rejected          pairs        the policy's log-prob, in nats
    dpop/penalty                     pairs        max(0, -r_w), in nats
    dpop/active_fraction             pairs        r_w < 0
    num_tokens/chosen, /rejected     pairs        scored tokens
    logps_per_token/chosen, ...      tokens       the policy's log-prob, in nats
    reference_logps_per_token/...    tokens       the reference's

  The last two come for whole answers (`/chosen`, `/rejected`) and by region
  (`/chosen_before_edit`, `/chosen_at_edit`, `/chosen_after_edit`, ...).

  Args:
    policy_logps: Log-probs by side and region under the model being trained.
    reference_logps: The same under the frozen reference.
    answer_lengths: Scored tokens by side and region.
    pair_weights: 1 for a pair, 0 for padding.
    beta: What a reward is in units of log-ratios. For a loss without a beta
      give 1.0: rewards are then log-ratios.

  Returns:
    Sums and weights by name, each a float32 scalar.
  """
  policy_answer_logps = jnp.sum(policy_logps, axis=-1)
  logratios = policy_answer_logps - jnp.sum(reference_logps, axis=-1)
  chosen_logratios = logratios[..., pairs.CHOSEN]
  rejected_logratios = logratios[..., pairs.REJECTED]
  values = {
    "rewards/chosen": beta * chosen_logratios,
    "rewards/rejected": beta * rejected_logratios,
    "rewards/margins": beta * (chosen_logratios - rejected_logratios),
    "rewards/accuracies": chosen_logratios > rejected_logratios,
    "logratios/chosen": chosen_logratios,
    "logratios/rejected": rejected_logratios,
    "logps/chosen": policy_answer_logps[..., pairs.CHOSEN],
    "logps/rejected": policy_answer_logps[..., pairs.REJECTED],
    "dpop/penalty": jax.nn.relu(-chosen_logratios),
    "dpop/active_fraction": chosen_logratios < 0,
  }
  metrics = {
    name: weighted_sum(value, pair_weights) for name, value in values.items()
  }
  for side_name, side in _SIDES.items():
    lengths = answer_lengths[..., side, :]
    metrics[f"num_tokens/{side_name}"] = _num_tokens(lengths, pair_weights)
    for prefix, logps in {
      "logps_per_token": policy_logps,
      "reference_logps_per_token": reference_logps,
    }.items():
      logps = logps[..., side, :]
      metrics[f"{prefix}/{side_name}"] = _per_token(
        jnp.sum(logps, axis=-1), jnp.sum(lengths, axis=-1), pair_weights
      )
      for region_name, region in _REGIONS.items():
        metrics[f"{prefix}/{side_name}_{region_name}"] = _per_token(
          logps[..., region], lengths[..., region], pair_weights
        )
  return metrics


def sft_metrics(
  policy_logps: Float32[Array, "*pairs 2 3"],
  answer_lengths: Int[Array, "*pairs 2 3"],
  pair_weights: Float32[Array, "*pairs"],
) -> dict[str, pairs.WeightedSum]:
  """Metrics of supervised answers, which are the chosen side of their pairs.

  `logps/chosen` and `num_tokens/chosen` are over answers,
  `logps_per_token/chosen` over tokens; the perplexity is exp of minus the mean
  of the latter.

  Args:
    policy_logps: Log-probs by side and region; the rejected side is not read.
    answer_lengths: Scored tokens by side and region.
    pair_weights: 1 for an answer, 0 for padding.

  Returns:
    Sums and weights by name, each a float32 scalar.
  """
  logps = jnp.sum(policy_logps[..., pairs.CHOSEN, :], axis=-1)
  lengths = answer_lengths[..., pairs.CHOSEN, :]
  return {
    "logps/chosen": weighted_sum(logps, pair_weights),
    "num_tokens/chosen": _num_tokens(lengths, pair_weights),
    "logps_per_token/chosen": _per_token(
      logps, jnp.sum(lengths, axis=-1), pair_weights
    ),
  }


def merge(
  left: Mapping[str, pairs.WeightedSum],
  right: Mapping[str, pairs.WeightedSum],
) -> dict[str, pairs.WeightedSum]:
  """Metrics of two disjoint sets of pairs taken together.

  Raises:
    ValueError: The two do not hold the same metrics.
  """
  if left.keys() != right.keys():
    difference = sorted(left.keys() ^ right.keys())
    raise ValueError(
      "Only metrics of the same names can be merged, but these are on one side "
      f"only: {', '.join(difference)}. Compute both sides with one function."
    )
  return {
    name: pairs.WeightedSum(
      total + right[name].total, weight + right[name].weight
    )
    for name, (total, weight) in left.items()
  }


def means(metrics: Mapping[str, pairs.WeightedSum]) -> dict[str, float]:
  """Means as Python floats, on the host; metrics of weight 0 are left out.

  A batch without a token after the edit has no log-prob there: the name is
  absent rather than nan, so that nan always means that something went wrong.
  """
  metrics = jax.device_get(dict(metrics))
  return {
    name: float(np.float64(total) / np.float64(weight))
    for name, (total, weight) in metrics.items()
    if weight != 0
  }


def _num_tokens(
  lengths: Int[Array, "*pairs 3"], pair_weights: Float32[Array, "*pairs"]
) -> pairs.WeightedSum:
  lengths = jnp.sum(lengths, axis=-1).astype(jnp.float32)
  return weighted_sum(lengths, pair_weights)


def _per_token(
  logps: Float32[Array, "*pairs"],
  lengths: Int[Array, "*pairs"],
  pair_weights: Float32[Array, "*pairs"],
) -> pairs.WeightedSum:
  num_tokens = weighted_sum(lengths.astype(jnp.float32), pair_weights)
  return pairs.WeightedSum(
    weighted_sum(logps, pair_weights).total, num_tokens.total
  )
