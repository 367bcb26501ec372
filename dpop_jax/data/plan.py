"""Which pairs, in which trees, in which rows, an update sees.

The plan is a pure function of the token pairs, the seed and the step. It knows
nothing of hosts or devices, so a run resumes at any step, on any number of
hosts, without state. A host that needs some rows of a step only asks for these,
and only their pairs are read.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dpop_jax import pairs as pairs_lib
from dpop_jax.data import dataset, forests, packing

# Rows from this length on may be shorter than asked for: by whole steps, which
# attention likes, of which so many are tried on so many updates.
_LEAST_LENGTH, _STEP, _MAX_LENGTHS, _TRIED_STEPS = 1024, 128, 12, 16
# What a microbatch costs besides its tokens (gradients are added up), in rows.
_MICROBATCH_COST = 1 / 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchConfig:
  """How many pairs an update trains on, and the rows they are packed into.

  Attributes:
    batch_size: Pairs of an update, whatever the packing.
    row_length: Tokens of a row at most. A run with rows of 1,024 or more takes
      a shorter length, down to half of it, where that makes them fuller.
    rows_per_microbatch: Rows that are computed at once, over all devices; an
      update accumulates as many microbatches as its rows need.
    group_by_prompt: Shuffle prompts instead of pairs, so that all the pairs of
      a prompt meet in one update (or two, where an update ends between them).
  """

  batch_size: int
  row_length: int
  rows_per_microbatch: int = 1
  group_by_prompt: bool = False

  def __post_init__(self):
    for name in ("batch_size", "row_length", "rows_per_microbatch"):
      if getattr(self, name) < 1:
        raise ValueError(
          f"batch.{name} must be at least 1, got {getattr(self, name)}."
        )


class PlannedStep(NamedTuple):
  """One update's input.

  Attributes:
    batch: PackedBatch of NumPy arrays [microbatches, rows, ...], of the rows
      that were asked for; what follows is of all.
    num_microbatches: How many of them hold anything.
    num_rows: Rows that hold anything.
    num_tokens: Tokens of all the trees.
    num_sequence_tokens: Tokens that the sequences would have one by one.
    num_answer_tokens: Tokens of chosen and rejected answers.
  """

  batch: pairs_lib.PackedBatch
  num_microbatches: int
  num_rows: int
  num_tokens: int
  num_sequence_tokens: int
  num_answer_tokens: int


class Layout(NamedTuple):
  """Which pairs are in which tree and row of a step.

  Attributes:
    pair_ids: int32 [pairs], tree by tree.
    tree_ends: int32 [trees]; where the pairs of each tree end.
    row_ends: int32 [rows]; where the trees of each row end.
    num_tokens: Of all the trees.
  """

  pair_ids: np.ndarray
  tree_ends: np.ndarray
  row_ends: np.ndarray
  num_tokens: int

  def row(self, number: int) -> list[list[int]]:
    """The pairs of each tree of a row; none of a row beyond the last."""
    starts = np.append(np.int32(0), self.tree_ends)
    first, end = self._trees(number)
    return [
      self.pair_ids[starts[tree] : starts[tree + 1]].tolist()
      for tree in range(first, end)
    ]

  def row_pairs(self, number: int) -> slice:
    """Which of `pair_ids` are in a row."""
    starts = np.append(np.int32(0), self.tree_ends)
    first, end = self._trees(number)
    return slice(int(starts[first]), int(starts[end]))

  def _trees(self, number):
    """The first tree of a row, and the one behind its last."""
    count = len(self.row_ends)
    starts = np.append(np.int32(0), self.row_ends)
    return starts[min(number, count)], starts[min(number + 1, count)]


# Of the number of a step and its pairs; see `Plan`.
ReferenceLogps = Callable[[int, np.ndarray], np.ndarray]


def _call_for_each(function: Callable, items: Iterable) -> list:
  return [function(item) for item in items]


class Plan:
  """The packed batches of a run, addressed by step.

  Attributes:
    capacity: What each row holds; the same for every step.
    max_rows: The most that any step needs.
    max_microbatches: The most that any step needs.
    reference_logps: Gives the reference's log-probs of the pairs of a step,
      float32 [pairs, 2, 3] in the order of `layout`, of the number of the step
      and these pairs. None leaves them out of the batches.
  """

  def __init__(
    self,
    pairs: dataset.TokenPairs,
    config: BatchConfig,
    *,
    seed: int,
    num_steps: int,
    is_shuffled: bool = True,
    share: Callable[[Callable, Iterable], list] = _call_for_each,
  ):
    """Lays out all steps, which also finds the static shapes.

    Args:
      pairs: The data set.
      config: Batch and row sizes.
      seed: Seed of the shuffles.
      num_steps: Steps that will be asked for.
      is_shuffled: If false, pairs come once, in their order, and the last step
        may be smaller (evaluation).
      share: Calls a function for each of some numbers; `exchange.share` lets
        each process lay out, and so read, a part of the steps.

    Raises:
      ValueError: The data set is empty, or a pair does not fit a row.
    """
    if not len(pairs):
      raise ValueError("There are no pairs to plan steps with.")
    self._pairs, self._config, self._seed = pairs, config, seed
    self._is_shuffled = is_shuffled
    self.num_steps = num_steps
    row_length = self._choose_length(share)
    layouts = self._lay_out_all(row_length, share)
    if None in layouts:  # A pair of a later step is longer.
      row_length = config.row_length
      layouts = self._lay_out_all(row_length, share)
    most = packing.Capacity(row_length, 1, 1, 1)
    self._layouts: list[Layout] = []
    for rows, num_tokens, needed in layouts:
      most = packing.Capacity(*map(max, most, needed))
      trees = [tree for row in rows for tree in row]
      layout = Layout(
        np.array([i for tree in trees for i in tree], np.int32),
        np.cumsum([len(tree) for tree in trees], dtype=np.int32),
        np.cumsum([len(row) for row in rows], dtype=np.int32),
        num_tokens,
      )
      self._layouts.append(layout)
    self.max_rows = max((len(x.row_ends) for x in self._layouts), default=1)
    self.capacity = most
    self.reference_logps: ReferenceLogps | None = None
    self.max_microbatches = -(-self.max_rows // config.rows_per_microbatch)

  @property
  def pairs(self) -> dataset.TokenPairs:
    """The data set."""
    return self._pairs

  def pair_ids(self, step: int) -> np.ndarray:
    """Indices of the pairs of a step: int64 [batch_size]."""
    size, count = self._config.batch_size, len(self._pairs)
    if not self._is_shuffled:
      return np.arange(step * size, min((step + 1) * size, count))
    draws = np.arange(step * size, (step + 1) * size)
    epochs = draws // count
    return np.concatenate(
      [self._order(epoch)[draws[epochs == epoch] % count]
       for epoch in np.unique(epochs).tolist()]
    )  # fmt: skip

  def epoch(self, step: int) -> float:
    """Passes over the data after so many updates."""
    return step * self._config.batch_size / len(self._pairs)

  def layout(self, step: int) -> Layout:
    """Which pairs are in which tree and row of a step."""
    return self._layouts[step]

  def layout_digest(self) -> str:
    """A hash of the layouts of all steps, in terms of the data set's pairs."""
    shape = self._config, self.capacity.tokens
    digest = hashlib.sha256(repr(shape).encode())
    for layout in self._layouts:
      for array in layout[:3]:
        digest.update(f"{len(array)} ".encode() + array.tobytes())
    return digest.hexdigest()

  def empty_batch(self) -> pairs_lib.PackedBatch:
    """A batch of the shapes of every step that holds nothing."""
    shape = (self.max_microbatches, self._config.rows_per_microbatch)
    return packing.empty_rows(shape, self.capacity)

  def step(
    self,
    step: int,
    rows: Sequence[int] | np.ndarray | None = None,
    *,
    capacity: packing.Capacity | None = None,
  ) -> PlannedStep:
    """The input of one update.

    Args:
      step: Number of the update, from 0.
      rows: Rows of every microbatch to build, if not all.
      capacity: What each row holds, if it should be more than needed.
    """
    layout = self._layouts[step]
    per_microbatch = self._config.rows_per_microbatch
    rows = np.arange(per_microbatch) if rows is None else np.asarray(rows)
    numbers = np.arange(self.max_microbatches)[:, None] * per_microbatch + rows
    flat = packing.pack_rows(
      [
        [self._build_tree(ids) for ids in layout.row(number)]
        for number in numbers.ravel().tolist()
      ],
      capacity or self.capacity,
    )
    if self.reference_logps is not None:
      logps = self.reference_logps(step, layout.pair_ids)
      by_row = np.zeros(flat.answer_lengths.shape, np.float32)
      for index, number in enumerate(numbers.ravel().tolist()):
        part = logps[layout.row_pairs(number)]
        by_row[index, : len(part)] = part
      flat = flat._replace(reference_logps=by_row)
    batch = flat.map(
      lambda array: array.reshape(numbers.shape + array.shape[1:])
    )
    # int64 [pairs]; without a look at the tokens.
    prompts, chosen, rejected = self._pairs.lengths(layout.pair_ids).T
    num_answer_tokens = int(chosen.sum() + rejected.sum())
    num_prompt_tokens = int((prompts * np.where(rejected > 0, 2, 1)).sum())
    num_rows = len(layout.row_ends)
    return PlannedStep(
      batch=batch,
      num_microbatches=-(-num_rows // per_microbatch),
      num_rows=num_rows,
      num_tokens=layout.num_tokens,
      num_sequence_tokens=num_prompt_tokens + num_answer_tokens,
      num_answer_tokens=num_answer_tokens,
    )

  def _build_tree(self, ids: list[int]) -> forests.Tree:
    return forests.build_tree([self._pairs[i] for i in ids], ids)

  def _choose_length(self, share) -> int:
    """The length with which the first steps are computed soonest."""
    longest, at_once = self._config.row_length, self._config.rows_per_microbatch
    lengths = _lengths(longest)
    if len(lengths) == 1:
      return longest
    first = range(min(self.num_steps, _TRIED_STEPS))
    count = functools.partial(self._count_rows, lengths=lengths)
    costs = {}
    for length, *num_rows in zip(lengths, *share(count, first), strict=True):
      if None not in num_rows:
        microbatches = sum(-(-rows // at_once) for rows in num_rows)
        costs[length] = microbatches * (length + longest * _MICROBATCH_COST)
    return min(costs, key=costs.__getitem__)

  def _count_rows(self, step: int, *, lengths) -> list[int | None]:
    """Rows of each length that a step needs; None where a pair is longer."""
    pairs = [self._pairs[i] for i in self.pair_ids(step).tolist()]
    packed = [_pack(pairs, length, lengths[0]) for length in lengths]
    return [rows if rows is None else len(rows[2]) for rows in packed]

  def _lay_out_all(self, row_length, share) -> list[Any]:
    lay_out = functools.partial(self._lay_out, row_length=row_length)
    return share(lay_out, range(self.num_steps))

  def _lay_out(self, step: int, *, row_length: int) -> list[Any] | None:
    """The pairs of each tree of each row, their tokens, and what rows need.

    None if a pair is longer than the rows, but not than `batch.row_length`.
    """
    ids = self.pair_ids(step).tolist()
    pairs = [self._pairs[i] for i in ids]
    packed = _pack(pairs, row_length, self._config.row_length)
    if packed is None:
      return None
    groups, sizes, rows = packed
    counts = [
      [forests.count_tree([pairs[i] for i in groups[g]]) for g in row]
      for row in rows
    ]
    needed = packing.needed_capacity(counts, row_length)
    by_row = [[[ids[i] for i in groups[g]] for g in row] for row in rows]
    return [by_row, sum(sizes), list(needed)]

  @functools.lru_cache(maxsize=2)  # noqa: B019 (a plan lives as long as a run)
  def _order(self, epoch: int) -> np.ndarray:
    generator = np.random.default_rng([self._seed, epoch])
    if not self._config.group_by_prompt:
      return generator.permutation(len(self._pairs))
    groups = self._prompt_groups
    return np.concatenate(
      [groups[i] for i in generator.permutation(len(groups)).tolist()]
    )

  @functools.cached_property
  def _prompt_groups(self) -> list[np.ndarray]:
    groups: dict[bytes, list[int]] = {}
    for i in range(len(self._pairs)):
      groups.setdefault(self._pairs[i].prompt.tobytes(), []).append(i)
    return [np.asarray(group) for group in groups.values()]


def _lengths(longest: int) -> list[int]:
  """Lengths that rows may have, the longest first."""
  if longest < _LEAST_LENGTH:
    return [longest]
  shorter = range((longest - 1) // _STEP * _STEP, longest // 2 - 1, -_STEP)
  return [longest, *shorter[:: -(-len(shorter) // _MAX_LENGTHS)]]


def _pack(pairs, row_length: int, longest: int):
  """Pairs of each tree, tokens of each, and trees of each row.

  Raises:
    ValueError: A pair is larger than `longest`. If it is larger than the rows
      alone, the result is None.
  """
  # Trees of several prompts have fewer tokens, but are harder to pack: behind
  # a short system prompt that all pairs begin with, they take more rows.
  choices = []
  for min_shared_tokens in (forests.MIN_SHARED_TOKENS, None):
    try:
      groups, sizes = forests.group_into_trees(
        pairs, row_length=row_length, min_shared_tokens=min_shared_tokens
      )
    except ValueError:
      if row_length == longest:
        raise
      return None
    choices.append((groups, sizes, packing.pack(sizes, row_length)))
  return min(choices, key=lambda choice: len(choice[2]))
