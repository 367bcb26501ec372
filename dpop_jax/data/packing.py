"""Trees into rows of static length, and rows into the arrays of a batch."""

import bisect
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dpop_jax import pairs as pairs_lib
from dpop_jax.data import forests


class Capacity(NamedTuple):
  """What a row can hold: the static shapes of a batch.

  Attributes:
    tokens: Length of a row.
    scores: Scored edges.
    links: Links between branches and answers.
    pairs: Pairs.
  """

  tokens: int
  scores: int
  links: int
  pairs: int


def pack(sizes: Sequence[int], row_length: int) -> list[list[int]]:
  """Bin packing: best-fit-decreasing, then into fewer rows as long as it works.

  Args:
    sizes: Size of each tree; none above `row_length`.
    row_length: Capacity of a row.

  Returns:
    The indices of the trees of each row; a pure function of the sizes.
  """
  rows = _best_fit(sizes, row_length)
  # Two trees of more than half a row never share one.
  num_large = sum(2 * size > row_length for size in sizes)
  least = max(-(-sum(sizes) // row_length), num_large)
  while len(rows) > least:
    fewer = _level(sizes, row_length, len(rows) - 1)
    if fewer is None:
      break
    rows = fewer
  return rows


def _best_fit(sizes, row_length):
  """The largest first, into the fullest row that takes it; ties by index."""
  rows: list[list[int]] = []
  # (room left, row), sorted: the first entry with enough room is the best fit.
  room: list[tuple[int, int]] = []
  for index in _largest_first(sizes):
    size = sizes[index]
    at = bisect.bisect_left(room, (size, -1))
    if at == len(room):
      rows.append([])
      left, row = row_length, len(rows) - 1
    else:
      left, row = room.pop(at)
    rows[row].append(index)
    bisect.insort(room, (left - size, row))
  return rows


def _level(sizes, row_length, num_rows):
  """Packs into a number of rows by exchanges between them; None if it fails.

  As best fit, but what fits nowhere goes into the emptiest row. Then, as long
  as that makes less stand out, a tree of a row that is too full changes places
  with one of another row, or with an empty place.
  """
  count = len(sizes)
  # At the end a tree of size 0 in every row, to change places with.
  size = np.append(np.asarray(sizes, np.int64), np.zeros(num_rows, np.int64))
  row = np.append(np.zeros(count, np.int64), np.arange(num_rows))
  loads = np.zeros(num_rows, np.int64)
  for index in _largest_first(sizes):
    fits = loads + size[index] <= row_length
    row[index] = (
      np.where(fits, loads, -1).argmax() if fits.any() else loads.argmin()
    )
    loads[row[index]] += size[index]
  excess = lambda loads: np.maximum(loads - row_length, 0)
  for _ in range(2 * count):
    if loads.max() <= row_length:
      return [
        np.flatnonzero(row[:count] == r).tolist() for r in range(num_rows)
      ]
    (given,) = np.nonzero(loads[row] > row_length)
    moved = size[given, None] - size[None]
    here, there = loads[row[given], None], loads[row][None]
    gain = excess(here) + excess(there)
    gain = gain - excess(here - moved) - excess(there + moved)
    gain = np.where(row[given, None] == row[None], 0, gain)
    at, taken = np.unravel_index(gain.argmax(), gain.shape)
    if gain[at, taken] <= 0:
      return None
    given, moved = given[at], moved[at, taken]
    loads[row[given]] -= moved
    loads[row[taken]] += moved
    row[given], row[taken] = row[taken], row[given]
  return None


def _largest_first(sizes):
  return sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))


def empty_rows(shape: Sequence[int], capacity: Capacity):
  """Rows that hold nothing, as a PackedBatch with leading axes `shape`."""
  shape = tuple(shape)

  def full(*sizes, value=0, dtype: npt.DTypeLike = np.int32):
    return np.full(shape + sizes, value, dtype)

  visible_until = full(capacity.tokens)
  visible_until[...] = np.arange(capacity.tokens, dtype=np.int32)
  num_slots = capacity.pairs * 2 * pairs_lib.NUM_REGIONS
  return pairs_lib.PackedBatch(
    tokens=full(capacity.tokens),
    positions=full(capacity.tokens),
    visible_until=visible_until,
    score_positions=full(capacity.scores),
    score_targets=full(capacity.scores),
    # A branch and a slot that do not exist: sums over them drop these entries.
    score_branches=full(capacity.scores, value=capacity.links),
    num_scores=full(),
    link_branches=full(capacity.links, value=0),
    link_slots=full(capacity.links, value=num_slots),
    answer_lengths=full(capacity.pairs, 2, pairs_lib.NUM_REGIONS),
    pair_weights=full(capacity.pairs, dtype=np.float32),
    pair_ids=full(capacity.pairs, value=-1),
  )


def fill_row(row: pairs_lib.PackedBatch, trees: Sequence[forests.Tree]) -> None:
  """Writes trees one behind the other into an empty row, in place.

  Args:
    row: Views of one row of `empty_rows`, without leading axes.
    trees: What to write; must fit.
  """
  token = score = branch = link = pair = 0
  for tree in trees:
    tokens = slice(token, token + len(tree.tokens))
    row.tokens[tokens] = tree.tokens
    row.positions[tokens] = tree.positions
    row.visible_until[tokens] = tree.visible_until + token
    scores = slice(score, score + len(tree.score_targets))
    row.score_positions[scores] = tree.score_positions + token
    row.score_targets[scores] = tree.score_targets
    row.score_branches[scores] = tree.score_branches + branch
    links = slice(link, link + len(tree.link_slots))
    row.link_branches[links] = tree.link_branches + branch
    row.link_slots[links] = tree.link_slots + pair * 2 * pairs_lib.NUM_REGIONS
    pairs = slice(pair, pair + len(tree.pair_ids))
    row.answer_lengths[pairs] = tree.answer_lengths
    row.pair_weights[pairs] = 1.0
    row.pair_ids[pairs] = tree.pair_ids
    token, score, link, pair = tokens.stop, scores.stop, links.stop, pairs.stop
    branch += tree.num_branches
  row.num_scores[...] = score


def needed_capacity(
  rows: Sequence[Sequence[forests.TreeCounts]], row_length: int
) -> Capacity:
  """The smallest capacity that holds all these rows."""
  sums = [[sum(counts) for counts in zip(*row, strict=True)] for row in rows]
  columns = zip(*sums, strict=True)
  return Capacity(row_length, *(max(column) for column in columns))


def pack_rows(
  rows: Sequence[Sequence[forests.Tree]], capacity: Capacity
) -> pairs_lib.PackedBatch:
  """Rows of trees as arrays with the leading axis [rows]."""
  batch = empty_rows([len(rows)], capacity)
  for number, trees in enumerate(rows):
    # `num_scores` is a scalar a row: index with a slice to keep it a view.
    view = batch.map(
      lambda array: array[number : number + 1].reshape(array.shape[1:])  # noqa: B023
    )
    fill_row(view, trees)
  return batch
