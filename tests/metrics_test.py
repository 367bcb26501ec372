import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpop_jax import metrics

# Two pairs and padding; sides are (chosen, rejected), columns the regions
# before, at and after the edit. The first chosen answer became likelier by 1
# nat and its rejected one less likely by 2; the second pair's lost 3 and 1.
POLICY = jnp.array(
  [
    [[-1.0, -2.0, -3.0], [-1.0, -5.0, -4.0]],
    [[-2.0, -4.0, 0.0], [-2.0, -1.0, -6.0]],
    [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]],
  ]
)
REFERENCE = jnp.array(
  [
    [[-1.5, -2.5, -3.0], [-1.5, -3.5, -3.0]],
    [[-1.0, -2.0, 0.0], [-1.0, -2.0, -5.0]],
    [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]],
  ]
)
LENGTHS = jnp.array(
  [
    [[4, 1, 3], [4, 2, 3]],
    [[2, 2, 0], [2, 1, 2]],
    [[0, 0, 0], [0, 0, 0]],
  ]
)
WEIGHTS = jnp.array([1.0, 1.0, 0.0])
# name: (total, weight)
EXPECTED = {
  "rewards/chosen": (0.5 * (1 - 3), 2),
  "rewards/rejected": (0.5 * (-2 - 1), 2),
  "rewards/margins": (0.5 * (3 - 2), 2),
  "rewards/accuracies": (1, 2),
  "logratios/chosen": (1 - 3, 2),
  "logratios/rejected": (-2 - 1, 2),
  "logps/chosen": (-6 - 6, 2),
  "logps/rejected": (-10 - 9, 2),
  "dpop/penalty": (0 + 3, 2),
  "dpop/active_fraction": (1, 2),
  "num_tokens/chosen": (8 + 4, 2),
  "num_tokens/rejected": (9 + 5, 2),
  "logps_per_token/chosen": (-6 - 6, 8 + 4),
  "logps_per_token/chosen_before_edit": (-1 - 2, 4 + 2),
  "logps_per_token/chosen_at_edit": (-2 - 4, 1 + 2),
  "logps_per_token/chosen_after_edit": (-3 - 0, 3 + 0),
  "logps_per_token/rejected": (-10 - 9, 9 + 5),
  "logps_per_token/rejected_before_edit": (-1 - 2, 4 + 2),
  "logps_per_token/rejected_at_edit": (-5 - 1, 2 + 1),
  "logps_per_token/rejected_after_edit": (-4 - 6, 3 + 2),
  "reference_logps_per_token/chosen": (-7 - 3, 8 + 4),
  "reference_logps_per_token/chosen_before_edit": (-1.5 - 1, 4 + 2),
  "reference_logps_per_token/chosen_at_edit": (-2.5 - 2, 1 + 2),
  "reference_logps_per_token/chosen_after_edit": (-3 - 0, 3 + 0),
  "reference_logps_per_token/rejected": (-8 - 8, 9 + 5),
  "reference_logps_per_token/rejected_before_edit": (-1.5 - 1, 4 + 2),
  "reference_logps_per_token/rejected_at_edit": (-3.5 - 2, 2 + 1),
  "reference_logps_per_token/rejected_after_edit": (-3 - 5, 3 + 2),
}
ARRAYS = (POLICY, REFERENCE, LENGTHS, WEIGHTS)


def preference_metrics(*arrays):
  return metrics.preference_metrics(*arrays, beta=0.5)


def assert_equal(left, right):
  assert left.keys() == right.keys()
  for name in left:
    np.testing.assert_allclose(left[name], right[name], err_msg=name)


@pytest.mark.parametrize(
  "transform", [lambda x: x, jax.jit], ids=["eager", "jit"]
)
def test_hand_worked_pairs(transform):
  result = transform(preference_metrics)(*ARRAYS)
  assert_equal(result, EXPECTED)
  for total, weight in result.values():
    assert total.dtype == weight.dtype == jnp.float32
    assert total.shape == weight.shape == ()


def test_rows_are_summed_over_like_pairs():
  rows = [jnp.stack([x, x]) for x in ARRAYS]
  expected = {name: (2 * t, 2 * w) for name, (t, w) in EXPECTED.items()}
  assert_equal(preference_metrics(*rows), expected)


@pytest.mark.parametrize("junk", [-math.inf, math.inf, math.nan])
def test_padding_of_any_value_counts_nothing(junk):
  policy = POLICY.at[2].set(junk)
  reference = REFERENCE.at[2].set(-1.0)
  lengths = LENGTHS.at[2].set(7)
  result = preference_metrics(policy, reference, lengths, WEIGHTS)
  assert_equal(result, EXPECTED)
  assert_equal(
    metrics.sft_metrics(policy, lengths, WEIGHTS),
    metrics.sft_metrics(POLICY, LENGTHS, WEIGHTS),
  )


def test_impossible_answers_are_not_hidden():
  result = preference_metrics(POLICY.at[0, 0, 1].set(-jnp.inf), *ARRAYS[1:])
  assert result["logps/chosen"].total == -jnp.inf
  assert result["dpop/penalty"].total == jnp.inf
  assert result["logps_per_token/chosen_at_edit"].total == -jnp.inf
  assert result["logps_per_token/chosen_after_edit"].total == -3.0


def test_accuracy_is_strict_and_penalty_off_where_policy_equals_reference():
  result = preference_metrics(REFERENCE, REFERENCE, LENGTHS, WEIGHTS)
  for name in (
    "rewards/accuracies",
    "rewards/margins",
    "dpop/active_fraction",
    "dpop/penalty",
  ):
    assert result[name] == (0.0, 2.0), name


def test_metrics_of_parts_add_up_to_metrics_of_the_whole():
  parts = [[x[i : i + 1] for x in ARRAYS] for i in range(3)]
  first, second, padding = (preference_metrics(*part) for part in parts)
  assert_equal(metrics.merge(first, metrics.merge(second, padding)), EXPECTED)


def test_metrics_can_be_accumulated_in_a_scan():
  microbatches = [x[:, None] for x in ARRAYS]
  start = jax.tree.map(
    jnp.zeros_like, preference_metrics(*(x[:1] for x in ARRAYS))
  )
  total, _ = jax.lax.scan(
    lambda sums, arrays: (
      metrics.merge(sums, preference_metrics(*arrays)),
      None,
    ),
    start,
    tuple(microbatches),
  )
  assert_equal(total, EXPECTED)


def test_merging_different_metrics_names_what_differs():
  sums = metrics.sft_metrics(POLICY, LENGTHS, WEIGHTS)
  fewer = {k: v for k, v in sums.items() if k != "logps/chosen"}
  with pytest.raises(ValueError, match="one side only: logps/chosen"):
    metrics.merge(sums, fewer)


def test_sft_metrics_are_of_the_chosen_answers_only():
  result = metrics.sft_metrics(POLICY.at[:, 1].set(jnp.nan), LENGTHS, WEIGHTS)
  expected = {
    "logps/chosen": (-12, 2),
    "num_tokens/chosen": (12, 2),
    "logps_per_token/chosen": (-12, 12),
  }
  assert_equal(result, expected)


def test_means_are_floats_and_leave_out_what_has_no_weight():
  # Without the first pair nothing of a chosen answer is after the edit.
  means = metrics.means(preference_metrics(*(x[1:] for x in ARRAYS)))
  assert "logps_per_token/chosen_after_edit" not in means
  assert "reference_logps_per_token/chosen_after_edit" not in means
  assert len(means) == len(EXPECTED) - 2
  assert all(type(mean) is float for mean in means.values())
  assert means["logps_per_token/chosen"] == -6 / 4
  assert means["dpop/penalty"] == 3.0
  assert means["num_tokens/chosen"] == 4.0


def test_means_show_what_is_not_finite():
  values = jnp.array([math.nan, 1.0])
  sums = {"loss": metrics.weighted_sum(values, jnp.array([1.0, 1.0]))}
  assert math.isnan(metrics.means(sums)["loss"])


def test_weighted_sum_weighs():
  values = jnp.array([1.0, 10.0])
  result = metrics.weighted_sum(values, jnp.array([3.0, 0.5]))
  assert result == (8.0, 3.5)
