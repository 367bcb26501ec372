"""A step of the output layer, against softmax and outer products by hand."""

import inspection_model
import numpy as np
import pytest
from inspection_model import PAIRS, pair

from dpop_jax.inspection import head_step
from dpop_jax.models import decoder


@pytest.fixture(scope="module")
def model():
  return inspection_model.make()


def states(model, prompt, answer):
  return inspection_model.states(model, prompt, answer).astype(np.float64)


def log_softmax(logits):
  logits = logits - logits.max(axis=-1, keepdims=True)
  return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def logp(head, hidden, answer):
  return log_softmax(hidden @ head.T)[np.arange(len(answer)), answer].sum()


def expected_fall(model, pairs):
  head = np.asarray(decoder.unembedding(model.params, model.config), np.float64)
  gradient, norms = np.zeros_like(head), []
  for each in pairs[::2]:
    for answer, sign in ((each.chosen, 1), (each.rejected, -1)):
      hidden = states(model, each.prompt, answer)
      errors = np.eye(len(head))[answer] - np.exp(log_softmax(hidden @ head.T))
      # The common beginning cancels.
      gradient += sign * errors.T @ hidden
      norms += np.abs(hidden).sum(axis=-1).tolist()
  moved = head + head_step.SIZE / np.mean(norms) * np.sign(gradient)
  falls = []
  for each in pairs[1::2]:
    hidden = states(model, each.prompt, each.chosen)
    before, after = (logp(w, hidden, each.chosen) for w in (head, moved))
    falls.append(before - after)
  return np.mean(falls)


def test_fall_of_pairs_that_the_step_was_not_made_for(model):
  expected = expected_fall(model, PAIRS)
  assert abs(expected) > 0.1
  found = head_step.fall(model, PAIRS, row_length=32)
  assert found == pytest.approx(expected, rel=1e-4)
  # Packed otherwise.
  found = head_step.fall(model, PAIRS, row_length=12)
  assert found == pytest.approx(expected, rel=1e-4)


def test_chosen_answers_rise_where_all_pairs_are_the_same(model):
  same = [pair([1, 3, 4], [5, 2], [7, 2])] * 4
  assert head_step.fall(model, same, row_length=32) < 0


def test_one_pair_says_nothing_of_others(model):
  assert head_step.fall(model, PAIRS[:1], row_length=32) is None
