"""Packing, and the plan of a run."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from dpop_jax import pairs as pairs_lib
from dpop_jax.data import dataset, forests, packing, plan


def make_pairs(count, seed=0, prompts=None):
  """Pairs of random lengths, of `prompts` prompts if that is not None."""
  generator = np.random.default_rng(seed)
  draw = lambda low, high: generator.integers(
    1, 50, generator.integers(low, high), dtype=np.int32
  )
  pool = [draw(3, 20) for _ in range(prompts or count)]
  return dataset.TokenPairs.of(
    [
      pairs_lib.TokenPair(pool[i % len(pool)], draw(1, 12), draw(1, 12))
      for i in range(count)
    ]
  )


@hypothesis.given(st.lists(st.integers(1, 30), max_size=60))
def test_every_tree_is_packed_once_and_no_row_overflows(sizes):
  rows = packing.pack(sizes, 30)
  assert sorted(i for row in rows for i in row) == list(range(len(sizes)))
  loads = [sum(sizes[i] for i in row) for row in rows]
  assert all(load <= 30 for load in loads)
  # Any fit packing leaves at most one row half empty.
  assert sum(load <= 15 for load in loads) <= 1


def best_fit_decreasing(sizes, row_length):
  """As textbooks have it: rows, each a list of sizes."""
  rows = []
  for size in sorted(sizes, reverse=True):
    fitting = [row for row in rows if sum(row) + size <= row_length]
    if fitting:
      max(fitting, key=sum).append(size)
    else:
      rows.append([size])
  return rows


@hypothesis.given(st.lists(st.integers(1, 30), max_size=60))
def test_packing_is_deterministic_and_takes_no_more_rows_than_best_fit(sizes):
  rows = packing.pack(sizes, 30)
  assert rows == packing.pack(list(sizes), 30)
  assert -(-sum(sizes) // 30) <= len(rows)
  assert len(rows) <= len(best_fit_decreasing(sizes, 30))


def test_trees_change_places_until_a_row_less_is_enough():
  # Best fit makes 6 + 3 and 5 + 2 + 2, and is left with 2.
  sizes = [2, 2, 2, 3, 5, 6]
  assert len(best_fit_decreasing(sizes, 10)) == 3
  rows = packing.pack(sizes, 10)
  assert sorted(sum(sizes[i] for i in row) for row in rows) == [10, 10]


@pytest.mark.parametrize(("row_length", "taken"), [(1024, 640), (1000, 1000)])
def test_long_rows_are_shortened_where_that_makes_them_fuller(
  row_length, taken
):
  # Every update needs two rows of 600 to 640, or two of 1,024.
  generator = np.random.default_rng(0)
  size = lambda: generator.integers(300, 321)
  pairs = dataset.TokenPairs.of(
    [
      pairs_lib.TokenPair(
        generator.integers(1, 50, size() - 2, dtype=np.int32),
        *np.array([[1], [2]], np.int32),
      )
      for _ in range(40)
    ]
  )
  config = plan.BatchConfig(batch_size=4, row_length=row_length)
  the_plan = plan.Plan(pairs, config, seed=0, num_steps=10)
  assert the_plan.capacity.tokens == taken
  for step in range(10):
    planned = the_plan.step(step)
    assert planned.batch.tokens.shape[-1] == taken
    found = planned.batch.pair_ids[planned.batch.pair_ids >= 0]
    assert sorted(found) == sorted(the_plan.pair_ids(step))


def test_a_long_pair_of_a_later_step_gets_the_rows_that_were_asked_for():
  sizes = [300] * 80 + [900]
  pairs = dataset.TokenPairs.of(
    [
      pairs_lib.TokenPair(
        np.full(size - 2, i + 1, np.int32), *np.array([[1], [2]], np.int32)
      )
      for i, size in enumerate(sizes)
    ]
  )
  config = plan.BatchConfig(batch_size=4, row_length=1024)
  build = lambda count: plan.Plan(
    pairs, config, seed=0, num_steps=count, is_shuffled=False
  )
  assert build(20).capacity.tokens == 640
  assert build(21).capacity.tokens == 1024


def test_best_fit_decreasing_by_hand():
  # 7 | 7+3? best fit for 3 is the row with 3 left; 6 goes with 4, 2 is alone.
  assert packing.pack([3, 7, 6, 4, 2], 10) == [[1, 0], [2, 3], [4]]


def test_rows_hold_their_trees_one_behind_the_other():
  pairs = list(make_pairs(3))
  trees = [forests.build_tree([p], [10 + i]) for i, p in enumerate(pairs)]
  counts = [[forests.count_tree([p]) for p in pairs]]
  size = sum(len(tree.tokens) for tree in trees)
  capacity = packing.needed_capacity(counts, size + 5)
  rows = packing.pack_rows([trees, []], capacity)
  start = len(trees[0].tokens)
  second = slice(start, start + len(trees[1].tokens))
  np.testing.assert_array_equal(rows.tokens[0, second], trees[1].tokens)
  np.testing.assert_array_equal(
    rows.visible_until[0, second], trees[1].visible_until + start
  )
  np.testing.assert_array_equal(rows.pair_ids, [[10, 11, 12], [-1, -1, -1]])
  np.testing.assert_array_equal(rows.num_scores, [capacity.scores, 0])
  # Padding is seen by nobody, also not by itself.
  index = np.arange(capacity.tokens)
  np.testing.assert_array_equal(rows.visible_until[0, size:], index[size:])
  np.testing.assert_array_equal(rows.visible_until[1], index)


CONFIG = plan.BatchConfig(batch_size=8, row_length=64, rows_per_microbatch=2)


def shapes_of(batch):
  return tuple(array.shape for array in batch if array is not None)


def test_every_step_trains_on_exactly_batch_size_pairs_of_one_shape():
  the_plan = plan.Plan(make_pairs(21), CONFIG, seed=1, num_steps=7)
  shapes = set()
  for step in range(7):
    planned = the_plan.step(step)
    assert planned.batch.pair_weights.sum() == 8
    found = planned.batch.pair_ids[planned.batch.pair_ids >= 0]
    assert sorted(found) == sorted(the_plan.pair_ids(step))
    used = planned.batch.pair_weights.any(axis=(1, 2)).sum()
    assert used == planned.num_microbatches <= the_plan.max_microbatches
    shapes.add(shapes_of(planned.batch))
  empty = shapes_of(the_plan.empty_batch())
  assert shapes == {empty}


@pytest.mark.parametrize("rows", [[0], [1], [0, 2]])
def test_some_rows_of_a_step_are_those_of_all_and_read_nothing_else(rows):
  config = plan.BatchConfig(batch_size=8, row_length=64, rows_per_microbatch=3)
  pairs = make_pairs(21)
  the_plan = plan.Plan(pairs, config, seed=1, num_steps=3)
  read = []

  class Watched(dataset.TokenPairs):
    def __getitem__(self, index):
      read.append(index)
      return super().__getitem__(index)

  watched = plan.Plan(
    Watched(pairs.tokens, pairs.offsets), config, seed=1, num_steps=3
  )
  for step in range(3):
    read.clear()
    whole, some = the_plan.step(step), watched.step(step, rows)
    assert whole[1:] == some[1:]
    for a, b in zip(whole.batch[:-1], some.batch[:-1], strict=True):
      np.testing.assert_array_equal(a[:, rows], b, strict=True)
    assert sorted(read) == sorted(some.batch.pair_ids[some.batch.pair_ids >= 0])
    # The trees' tokens are counted without being built.
    index = np.arange(config.row_length)
    is_used = whole.batch.visible_until > index
    assert whole.num_tokens == is_used.sum()


def test_epochs_go_through_all_pairs_and_shuffle_anew():
  the_plan = plan.Plan(make_pairs(20), CONFIG, seed=1, num_steps=5)
  drawn = np.concatenate([the_plan.pair_ids(step) for step in range(5)])
  assert sorted(drawn[:20]) == sorted(drawn[20:]) == list(range(20))
  assert drawn[:20].tolist() != drawn[20:].tolist()


def test_a_step_is_a_function_of_seed_and_step_alone():
  pairs = make_pairs(30)
  first = plan.Plan(pairs, CONFIG, seed=1, num_steps=9)
  again = plan.Plan(pairs, CONFIG, seed=1, num_steps=9)
  other = plan.Plan(pairs, CONFIG, seed=2, num_steps=9)
  first.step(3)
  for a, b in zip(first.step(7).batch, again.step(7).batch, strict=True):
    np.testing.assert_array_equal(a, b)
  assert first.pair_ids(7).tolist() != other.pair_ids(7).tolist()


def test_unshuffled_plans_take_the_pairs_in_order_and_once():
  the_plan = plan.Plan(
    make_pairs(11), CONFIG, seed=0, num_steps=2, is_shuffled=False
  )
  assert the_plan.pair_ids(0).tolist() == list(range(8))
  assert the_plan.step(1).batch.pair_weights.sum() == 3


def test_grouping_by_prompt_keeps_the_pairs_of_a_prompt_together():
  pairs = make_pairs(32, prompts=8)  # Four pairs a prompt.
  config = plan.BatchConfig(batch_size=8, row_length=128, group_by_prompt=True)
  the_plan = plan.Plan(pairs, config, seed=0, num_steps=4)
  for step in range(4):
    prompts = {pairs[int(i)].prompt.tobytes() for i in the_plan.pair_ids(step)}
    assert len(prompts) == 2
  grouped = the_plan.step(0)
  spread = plan.Plan(
    pairs, CONFIG.__class__(batch_size=8, row_length=128), seed=0, num_steps=4
  ).step(0)
  assert grouped.num_tokens / grouped.num_sequence_tokens < (
    spread.num_tokens / spread.num_sequence_tokens
  )


@pytest.mark.parametrize(
  ("num_shared", "num_rows", "num_trees"),
  # In order, rows of 101 would hold 60 | 60 | 60 + 25 | 41 + 25; one by one
  # they hold 60 + 41 three times.
  [(16, 3, 6)]
  # 60 + 21 | 60 + 2 + 2 + 2.
  + [(39, 2, 2)],
)
def test_prompts_share_a_tree_where_that_takes_fewer_rows(
  num_shared, num_rows, num_trees
):
  shared = np.arange(num_shared, dtype=np.int32)
  answers = np.array([[1], [2]], np.int32)
  pairs = [
    pairs_lib.TokenPair(
      np.append(shared, np.full(size - num_shared - 2, 50 + i, np.int32)),
      *answers,
    )
    for i, size in enumerate((60, 60, 60, 41, 41, 41))
  ]
  config = plan.BatchConfig(batch_size=6, row_length=101)
  planned = plan.Plan(
    dataset.TokenPairs.of(pairs), config, seed=0, num_steps=1
  ).step(0)
  batch = planned.batch
  is_root = (batch.positions == 0) & (batch.visible_until > np.arange(101))
  assert planned.num_rows == num_rows
  assert is_root.sum() == num_trees


def test_tokens_are_counted_with_and_without_sharing():
  pair = pairs_lib.TokenPair(*(np.arange(n, dtype=np.int32) for n in (5, 3, 2)))
  the_plan = plan.Plan(
    dataset.TokenPairs.of([pair]),
    plan.BatchConfig(batch_size=1, row_length=16),
    seed=0,
    num_steps=1,
  )
  planned = the_plan.step(0)
  # Rejected (0, 1) begins chosen (0, 1, 2).
  assert planned.num_tokens == 5 + 3
  assert planned.num_sequence_tokens == 5 + 3 + 5 + 2
  assert planned.num_answer_tokens == 5


def test_no_pairs_and_bad_sizes_are_refused():
  with pytest.raises(ValueError, match="no pairs"):
    plan.Plan(dataset.TokenPairs.of([]), CONFIG, seed=0, num_steps=1)
  with pytest.raises(ValueError, match=r"batch.row_length must be at least 1"):
    plan.BatchConfig(batch_size=1, row_length=0)
