"""The paper's condition on probabilities given by hand, and of a model."""

import math

import inspection_model
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inspection_model import PAIRS, pair

from dpop_jax.inspection import (
  condition,
  forward,
  look_ahead,
  pair_rows,
  verdict,
)
from dpop_jax.models import decoder

EOS = 9


def logps(chosen, rejected):
  logps = [np.log(np.array(x, np.float32)) for x in (chosen, rejected)]
  still = [np.zeros((len(x), len(look_ahead.SIZES))) for x in logps]
  return forward.TokenLogps(*logps, *still)


@pytest.fixture(scope="module")
def found():
  """Token 3 goes down by 0.6, the EOS up by 0.25; 4 is lifted by 0.5."""
  return condition.measure(
    [pair([0], [1, 4, 3, EOS], [1, 5, 3, EOS])],
    [logps([0.9, 0.5, 0.8, 0.5], [0.9, 0.1, 0.2, 0.75])],
  )


def test_condition_of_each_token(found):
  np.testing.assert_array_equal(found.place, [2, 3])
  np.testing.assert_allclose(found.push, [0.6, -0.25], rtol=1e-6)
  np.testing.assert_allclose(found.doubt, [0.2, 0.5], rtol=1e-6)
  np.testing.assert_array_equal(found.is_pushed_down, [True, False])
  # (s_w - s_l) / (1 - s_w); the other needs none.
  np.testing.assert_allclose(found.lambda_needed, [3.0, 0.0], rtol=1e-5)


def test_condition_of_each_pair(found):
  np.testing.assert_allclose(found.push_down_of_pairs(), [0.6], rtol=1e-6)
  np.testing.assert_allclose(found.push_up_of_pairs(), [0.75], rtol=1e-6)
  expected = math.log(0.9 * 0.5 * 0.8 * 0.5)
  np.testing.assert_allclose(found.chosen_logps, [expected], rtol=1e-6)
  summary = condition.summary(found)
  assert summary["share_of_tokens_pushed_down"] == 0.5
  assert summary["share_of_push_down"] == pytest.approx(0.6 / 1.35)
  assert summary["lambda_needed"]["median"] == pytest.approx(3.0)


def test_lambda_is_the_gradient_changing_its_sign(found):
  # The gradient of log p with respect to the token's logit, as in the paper.
  def gradient(dpop_lambda):
    s_w, s_l = 0.8, 0.2
    return dpop_lambda * (1 - s_w) + s_l - s_w

  assert gradient(2.99) < 0 < gradient(3.01)
  assert condition.share_turned(found, 2.99) == 0.0
  assert condition.share_turned(found, 3.01) == 1.0


def test_a_certain_token_needs_an_endless_lambda():
  found = condition.measure(
    [pair([0], [1, EOS], [2, EOS])], [logps([0.5, 1.0], [0.5, 0.25])]
  )
  assert found.lambda_needed.tolist() == [math.inf]
  assert condition.summary(found)["lambda_needed"]["median"] is None


def judge(found, head_step_fall=None):
  summary = condition.summary(found) | {"head_step_fall": head_step_fall}
  return verdict.of_model(summary)


NOTHING_SHARED = condition.measure([pair([0], [1], [2])], [logps([0.5], [0.5])])


def test_verdicts(found):
  # 0.6 down against 0.75 up is less than half.
  assert judge(found)["is_at_risk"] is False
  at_risk = condition.measure(
    [pair([0], [4, 3, EOS], [5, 3, EOS])],
    [logps([0.95, 0.9, 0.99], [0.1, 0.2, 0.9])],
  )
  result = judge(at_risk)
  assert result["is_at_risk"] is True
  assert result["dpop_lambda"] == 50.0
  assert result["sentence"].startswith("At risk of the paper's failure")
  assert judge(NOTHING_SHARED)["is_at_risk"] is False


@pytest.mark.parametrize("name", ["found", "nothing shared"])
def test_a_step_of_the_output_layer_may_tell_of_another_risk(found, name):
  which = found if name == "found" else NOTHING_SHARED
  small = judge(which, 0.49)
  assert small["is_at_risk"] is False
  assert "takes 0.49 nats off" in small["sentence"]
  assert "adds 0.25 nats to the" in judge(which, -0.25)["sentence"]
  large = judge(which, 0.5)
  assert large["is_at_risk"] is True and large["dpop_lambda"] == 50.0
  assert large["sentence"].startswith(
    "At risk of losing chosen answers, if not"
  )


def test_a_lambda_above_the_papers_where_that_is_not_enough():
  # (0.999 - 0.1) / 0.001 is about 900 for one, and 90 for the other.
  found = condition.measure(
    [pair([0], [4, 3, 2, EOS], [5, 3, 2, EOS])],
    [logps([0.99, 0.999, 0.99, 0.9], [0.1, 0.1, 0.1, 0.9])],
  )
  assert judge(found)["dpop_lambda"] == 500.0


@pytest.fixture(scope="module")
def model():
  return inspection_model.make()


def expected_logps(model, prompt, answer):
  """By the decoder on one sequence, and a softmax over everything."""
  states = inspection_model.states(model, prompt, answer)
  logits = decoder.logits(model.params, jnp.asarray(states), model.config)
  logps = np.asarray(jax.nn.log_softmax(logits))
  return logps[np.arange(len(answer)), answer]


def test_log_probs_of_packed_pairs_are_those_of_single_sequences(model):
  # Two pairs share a row, and there is a second batch.
  results = forward.token_logps(model, PAIRS, row_length=17)
  for one, result in zip(PAIRS, results, strict=True):
    for side in ("chosen", "rejected"):
      np.testing.assert_allclose(
        getattr(result, side),
        expected_logps(model, one.prompt, getattr(one, side)),
        rtol=1e-4,
        atol=1e-5,
      )


def test_look_ahead_is_the_softmax_of_moved_logits(model):
  # chosen 5 6 2, rejected 5 7 6 2: 6 and 2 stand in both, 6 and 7 part.
  prompt, chosen, rejected = PAIRS[0]
  (result,) = forward.token_logps(model, PAIRS[:1], row_length=17)
  distributions = {}
  for side, answer in (("w", chosen), ("l", rejected)):
    distributions[side] = np.stack(
      [
        expected_logps(model, np.concatenate([prompt, answer[:k]]), [token])[0]
        for k in range(len(answer))
        for token in range(model.config.vocab_size)
      ]
    ).reshape(len(answer), -1)
  gradient = lambda logps, token: np.eye(16)[token] - np.exp(logps)
  w, l = distributions["w"], distributions["l"]
  at = 10
  size = look_ahead.SIZES[at]

  def change(logps, direction, token):
    moved = logps + size * direction
    return moved[token] - np.log(np.exp(moved).sum()) - logps[token]

  np.testing.assert_array_equal(result.chosen_changes[0], 0.0)
  # The two that part share their logits: 6 goes up and 7 down.
  parts = gradient(w[1], 6) - gradient(w[1], 7)
  # The EOS moves with the difference of the softmaxes; the 6 that comes later
  # in the rejected answer is pushed down alone.
  ends = gradient(w[2], 2) - gradient(l[3], 2)
  expected = [
    (result.chosen_changes[1], change(w[1], parts, 6)),
    (result.chosen_changes[2], change(w[2], ends, 2)),
    (result.rejected_changes[1], change(l[1], parts, 7)),
    (result.rejected_changes[2], change(l[2], -gradient(l[2], 6), 6)),
    (result.rejected_changes[3], change(l[3], ends, 2)),
  ]
  for found, by_hand in expected:
    np.testing.assert_allclose(found[at], by_hand, rtol=1e-3, atol=1e-5)


def test_fall_is_taken_where_the_margin_is_reached():
  # Margins of 0, then 6 and 14 nats: 10 is half-way from the second size to
  # the third. The falling token loses 2 and 4 there, the rising one is not set
  # against it.
  sizes = [[1.0, 2.0], [-2.0, -4.0]], [[-7.0, -16.0]]
  np.testing.assert_allclose(
    look_ahead.falls(*([np.array(x)] for x in sizes)), 3
  )
  # Never reached: the largest size counts.
  sizes = [[-1.0, -2.0]], [[-3.0, -9.0]]
  np.testing.assert_allclose(
    look_ahead.falls(*([np.array(x)] for x in sizes)), 2
  )


def test_rows_hold_several_pairs_in_trees():
  (rows,) = pair_rows.batches(PAIRS[1:2], row_length=8, rows_per_batch=1)
  np.testing.assert_array_equal(rows.tokens[0], [1, 8, 9, 2, 10, 11, 2, 0])
  np.testing.assert_array_equal(rows.positions[0], [0, 1, 2, 3, 2, 3, 4, 0])
  np.testing.assert_array_equal(rows.visible_until[0], [7, 7, 4, 4, 7, 7, 7, 7])
  np.testing.assert_array_equal(rows.score_positions[0], [1, 2, 1, 4, 5])
  np.testing.assert_array_equal(rows.score_targets[0], [9, 2, 10, 11, 2])


def test_tokens_that_the_model_lacks(model):
  with pytest.raises(ValueError, match="hold token 99, but the model in tiny"):
    forward.token_logps(model, [pair([1], [99], [2])], row_length=8)
