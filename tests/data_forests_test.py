"""Prefix trees: structure, counted and drawn by hand and on random forests."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from dpop_jax import pairs as pairs_lib
from dpop_jax.data import forests


def ids(*tokens):
  return np.array(tokens, np.int32)


def pair(prompt, chosen, rejected=()):
  return pairs_lib.TokenPair(ids(*prompt), ids(*chosen), ids(*rejected))


# Few different tokens, so that beginnings are often shared.
answers = st.lists(st.integers(1, 3), min_size=1, max_size=6)
random_pairs = st.lists(
  st.builds(
    pair,
    st.lists(st.integers(1, 2), max_size=3).map(lambda p: [0, *p]),
    answers,
    st.one_of(st.just([]), answers),
  ),
  min_size=1,
  max_size=5,
)


def sequences(pairs):
  return {
    tuple(p.prompt) + tuple(answer)
    for p in pairs
    for answer in (p.chosen, p.rejected)
    if len(answer)
  }


def ancestors(tree, node):
  """What a token sees, in order: `k <= q < visible_until[k]`."""
  return [k for k in range(node + 1) if node < tree.visible_until[k]]


def prefixes(pairs):
  return {s[: n + 1] for s in sequences(pairs) for n in range(len(s))}


@hypothesis.given(random_pairs)
def test_a_tree_holds_every_distinct_prefix_once_and_sees_exactly_it(pairs):
  tree = forests.build_tree(pairs, range(len(pairs)))
  paths = [
    tuple(tree.tokens[ancestors(tree, node)].tolist())
    for node in range(len(tree.tokens))
  ]
  assert sorted(paths) == sorted(prefixes(pairs))
  assert [len(path) - 1 for path in paths] == tree.positions.tolist()


@hypothesis.given(random_pairs)
def test_links_lead_every_answer_over_its_own_edges(pairs):
  tree = forests.build_tree(pairs, range(len(pairs)))
  regions = [forests.answer_regions(p) for p in pairs]
  edges = [
    tuple(tree.tokens[ancestors(tree, parent)].tolist()) + (int(target),)
    for parent, target in zip(
      tree.score_positions, tree.score_targets, strict=True
    )
  ]
  assert len(set(edges)) == len(edges), "an edge is scored once"
  for number, p in enumerate(pairs):
    for side, answer in enumerate((p.chosen, p.rejected)):
      for region in range(3):
        slot = (2 * number + side) * 3 + region
        branches = tree.link_branches[tree.link_slots == slot]
        found = [
          edge
          for edge, branch in zip(edges, tree.score_branches, strict=True)
          if branch in branches
        ]
        start, end = regions[number][side][region : region + 2]
        expected = [
          tuple(p.prompt) + tuple(answer[: n + 1]) for n in range(start, end)
        ]
        assert sorted(found) == sorted(expected)
        assert tree.answer_lengths[number, side, region] == len(expected)


@hypothesis.given(random_pairs, st.integers(16, 40))
def test_grouping_keeps_all_pairs_and_counts_the_trees_it_would_build(
  pairs, row_length
):
  groups, sizes = forests.group_into_trees(pairs, row_length=row_length)
  assert sorted(i for group in groups for i in group) == list(range(len(pairs)))
  for group, size in zip(groups, sizes, strict=True):
    members = [pairs[i] for i in group]
    tree = forests.build_tree(members, group)
    assert size == len(tree.tokens) == len(prefixes(members)) <= row_length
    assert forests.count_tree(members) == (
      len(tree.score_targets),
      len(tree.link_slots),
      len(members),
    )


def test_a_row_as_the_docstring_of_packed_batch_draws_it():
  tree = forests.build_tree([pair([0, 1], [2, 4, 9], [2, 5, 9])], [7])
  np.testing.assert_array_equal(tree.tokens, [0, 1, 2, 4, 9, 5, 9])
  np.testing.assert_array_equal(tree.positions, [0, 1, 2, 3, 4, 3, 4])
  np.testing.assert_array_equal(tree.visible_until, [7, 7, 7, 5, 5, 7, 7])
  np.testing.assert_array_equal(tree.score_positions, [1, 2, 3, 2, 5])
  np.testing.assert_array_equal(tree.score_targets, [2, 4, 9, 5, 9])
  np.testing.assert_array_equal(tree.score_branches, [0, 1, 2, 3, 4])
  np.testing.assert_array_equal(tree.link_branches, [0, 0, 1, 2, 3, 4])
  np.testing.assert_array_equal(tree.link_slots, [0, 3, 1, 2, 4, 5])


def test_regions_are_common_prefix_edit_and_common_suffix():
  regions = forests.answer_regions(
    pair([0], [1, 2, 3, 4, 5], [1, 7, 8, 3, 4, 5])
  )
  np.testing.assert_array_equal(regions, [[0, 1, 2, 5], [0, 1, 3, 6]])


def test_an_answer_that_begins_the_other_has_an_empty_edit():
  p = pair([0], [1, 2], [1, 2, 3])
  np.testing.assert_array_equal(
    forests.answer_regions(p), [[0, 2, 2, 2], [0, 2, 3, 3]]
  )
  assert len(forests.build_tree([p], [0]).tokens) == 4


def test_pairs_of_one_question_share_prompt_and_chosen_answer():
  pairs = [pair([0, 1, 2], [3, 4, 9], [wrong, 9]) for wrong in (5, 6, 7)]
  groups, sizes = forests.group_into_trees(pairs, row_length=64)
  # Prompt 3, chosen 3, and 2 for each of three rejected answers.
  assert (groups, sizes) == ([[0, 1, 2]], [12])


def test_few_shot_prompts_share_their_shots_and_others_do_not():
  shots = list(range(100, 120))
  related = [pair([0, *shots, 1], [2], [3]), pair([0, *shots, 4], [2], [3])]
  groups, sizes = forests.group_into_trees(related, row_length=64)
  assert (groups, sizes) == ([[0, 1]], [21 + 3 + 3])
  unrelated = [pair([0, 1], [2], [3]), pair([0, 4], [2], [3])]
  assert forests.group_into_trees(unrelated, row_length=64)[1] == [4, 4]


def test_a_tree_that_would_pass_the_row_is_split():
  pairs = [pair([0, 1, 2], [3, 4, 9], [wrong, 9]) for wrong in (5, 6, 7)]
  groups, sizes = forests.group_into_trees(pairs, row_length=10)
  assert (groups, sizes) == ([[0, 1], [2]], [10, 8])


def test_a_pair_larger_than_a_row_is_refused_with_both_sizes():
  with pytest.raises(ValueError, match=r"tree of 5 tokens.*row_length is 4"):
    forests.group_into_trees([pair([0, 1], [2, 3], [4])], row_length=4)


def test_prompts_of_a_tree_must_begin_alike():
  with pytest.raises(ValueError, match="begin with the same token"):
    forests.build_tree([pair([0], [1]), pair([2], [1])], [0, 1])
