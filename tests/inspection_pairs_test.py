"""What is measured of pairs alone, worked out by hand."""

import numpy as np
import pytest

from dpop_jax import pairs as pairs_lib
from dpop_jax.data import dataset, plan
from dpop_jax.inspection import (
  alignment,
  overlaps,
  pair_statistics,
  sharing,
  summaries,
  worst_pairs,
)

EOS = 9


def pair(prompt, chosen, rejected):
  ids = (np.array(x, np.int32) for x in (prompt, chosen, rejected))
  return pairs_lib.TokenPair(*ids)


def measure(*pairs, texts=("p", "a b c d", "a x c")):
  return pair_statistics.measure(
    dataset.TokenPairs.of(pairs), lambda _: pair_statistics.PairTexts(*texts)
  )


def test_edit_distance_is_by_the_longer_answer_in_each_unit():
  # Tokens: one exchanged, one gone, of 5. Words: b to x, d gone, of 4.
  # Characters: b to x, two gone, of 7.
  found = measure(pair([0], [1, 2, 3, 4, EOS], [1, 5, 3, EOS]))
  distances = {k: v.tolist() for k, v in found.edit_distances.items()}
  assert distances == {
    "tokens": [pytest.approx(2 / 5)],
    "words": [pytest.approx(2 / 4)],
    "characters": [pytest.approx(3 / 7)],
  }


def test_lengths_and_what_a_tree_saves():
  found = measure(pair([0, 0, 0], [1, 2, 3, EOS], [1, 5, 3, 3, EOS]))
  assert found.first_difference == [1 / 4]
  assert found.length_differences == [-1]
  # 3 + 4 and 3 + 5 tokens; prompt and one token of the answers are shared.
  assert found.sequence_tokens == [15]
  assert found.tree_tokens == [11]
  # 3 and the EOS.
  assert found.common_end_tokens == [2]
  assert sharing.of_pairs(found)["speed_up"] == pytest.approx(15 / 11)
  summary = pair_statistics.summary(found)
  assert summary["lengths"]["share_rejected_longer"] == 1.0
  assert summary["first_difference"]["chosen_tokens_behind_it"]["mean"] == 3


def test_pairs_of_a_prompt_share_prompt_and_chosen_answer():
  pairs = [
    pair([0, 1], [2, EOS], [3, EOS]),
    pair([0, 2], [2, EOS], [3, EOS]),
    pair([0, 1], [2, EOS], [4, EOS]),
  ]
  found, data = measure(*pairs), dataset.TokenPairs.of(pairs)
  groups = overlaps.prompt_groups(data)
  assert groups.tolist() == [0, 1, 0]
  shared = sharing.of_prompts(data, found, groups, row_length=32)
  # Sequences of 4 tokens, two a pair. Together: prompt 2, three answers of 2.
  assert shared["num_prompts"] == 2
  assert shared["speed_up"] == pytest.approx(24 / (8 + 6))
  # By prompt: 1 - 8/16 and 1 - 6/8.
  assert shared["share"]["min"] == 0.25
  assert shared["share"]["max"] == 0.5


def test_updates_tell_rows_fill_and_speed_up():
  # Trees of 2 + 2 + 2 tokens, two of which fill a row.
  pairs = [pair([0, i], [2, EOS], [3, EOS]) for i in range(1, 5)]
  found = sharing.of_updates(
    dataset.TokenPairs.of(pairs),
    plan.BatchConfig(batch_size=4, row_length=12),
    seed=0,
  )
  assert found["num_updates"] == 1
  assert found["rows_per_update"]["mean"] == 2
  assert found["mean_fill"] == 1.0
  assert found["speed_up"] == pytest.approx(8 / 6)


def test_groups_come_in_the_order_of_their_first_member():
  groups = sharing.members(np.array([7, 3, 7, 3, 5]))
  assert [group.tolist() for group in groups] == [[0, 2], [1, 3], [4]]


def test_duplicates_and_contradictions_are_within_a_prompt():
  a, b, c = [1, EOS], [2, EOS], [3, EOS]
  pairs = [
    pair([0], a, b),
    pair([0], a, b),  # repeats the first
    pair([0], b, a),  # contradicts both
    pair([5], b, a),  # another prompt
    pair([5], a, c),  # a is chosen here and rejected there: no contradiction
  ]
  data = dataset.TokenPairs.of(pairs)
  found = overlaps.within(data, overlaps.prompt_groups(data))
  assert found == {
    "num_duplicates": 1,
    "num_contradictory": 3,
    "num_both_chosen_and_rejected": 3,
    "duplicates": [[0, 1]],
    "contradictory": [[0, 2]],
  }


def test_held_out_pairs_in_the_training_data():
  a, b = [1, EOS], [2, EOS]
  train = dataset.TokenPairs.of([pair([0], a, b)])
  held_out = dataset.TokenPairs.of(
    [pair([0], a, b), pair([0], b, a), pair([4], a, b), pair([4], b, a)]
  )
  assert overlaps.between(train, held_out) == {
    "num_pairs": 4,
    "num_shared_prompts": 2,
    "num_shared_pairs": 1,
    "num_shared_chosen": 2,
    "pairs": [0, 1],
  }


@pytest.mark.parametrize(
  ("chosen", "rejected", "expected"),
  [
    # One edit: the common end.
    ([1, 2, 3, EOS], [1, 5, 3, EOS], [(2, 2), (3, 3)]),
    # Two edits: also what lies between.
    ([2, 3, 4, EOS], [5, 3, 6, EOS], [(1, 1), (3, 3)]),
    # An insertion moves what follows.
    ([1, 3, EOS], [1, 5, 6, 3, EOS], [(1, 3), (2, 4)]),
    # Nothing in common but the end.
    ([1, EOS], [2, EOS], [(1, 1)]),
    # Cut short, without EOS: one begins the other.
    ([1, 2], [1], []),
  ],
)
def test_aligned_tokens(chosen, rejected, expected):
  found = alignment.align(pair([0], chosen, rejected))
  assert list(zip(*map(np.ndarray.tolist, found), strict=True)) == expected


def test_distributions_are_json_and_quantiles_occur():
  found = summaries.distribution(np.array([1.0, 2.0, np.inf]))
  assert found == {
    "count": 3,
    "mean": None,
    "min": 1.0,
    "max": None,
    "p10": 1.0,
    "median": 2.0,
    "p90": None,
  }
  assert summaries.distribution(np.array([])) == {"count": 0}


def test_texts_are_split_where_they_differ():
  texts = pair_statistics.PairTexts("q", "ab12cd", "ab3cd")
  assert worst_pairs.describe(4, lambda _: texts) == {
    "pair": 4,
    "prompt": "q",
    "chosen": ["ab", "12", "cd"],
    "rejected": ["ab", "3", "cd"],
  }
