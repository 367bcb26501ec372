"""Which pairs, in which trees, in which rows, an update sees.

The plan is a pure function of the token pairs, the seed and the step. It knows
nothing of hosts or devices, so a run resumes at any step, on any number of
hosts, without state.
"""

import dataclasses
import functools
from typing import NamedTuple

import numpy as np

from dpop_jax import pairs as pairs_lib
from dpop_jax.data import dataset, forests, packing


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchConfig:
  """How many pairs an update trains on, and the rows they are packed into.

  Attributes:
    batch_size: Pairs of an update, whatever the packing.
    row_length: Tokens of a row.
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
    batch: PackedBatch of NumPy arrays [microbatches, rows, ...].
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


class Plan:
  """The packed batches of a run, addressed by step.

  Attributes:
    capacity: What each row holds; the same for every step.
    max_microbatches: The most that any step needs.
  """

  def __init__(
    self,
    pairs: dataset.TokenPairs,
    config: BatchConfig,
    *,
    seed: int,
    num_steps: int,
    is_shuffled: bool = True,
  ):
    """Lays out all steps once to find the static shapes.

    Args:
      pairs: The data set.
      config: Batch and row sizes.
      seed: Seed of the shuffles.
      num_steps: Steps that will be asked for.
      is_shuffled: If false, pairs come once, in their order, and the last step
        may be smaller (evaluation).

    Raises:
      ValueError: The data set is empty, or a pair does not fit a row.
    """
    if not len(pairs):
      raise ValueError("There are no pairs to plan steps with.")
    self._pairs, self._config, self._seed = pairs, config, seed
    self._is_shuffled = is_shuffled
    self.num_steps = num_steps
    most = packing.Capacity(config.row_length, 1, 1, 1)
    num_rows = 1
    for step in range(num_steps):
      rows = [
        [forests.count_tree([self._pairs[i] for i in ids]) for ids in row]
        for row in self._rows(step)
      ]
      needed = packing.needed_capacity(rows, config.row_length)
      most = packing.Capacity(*map(max, most, needed))
      num_rows = max(num_rows, len(rows))
    self.capacity = most
    self.max_microbatches = -(-num_rows // config.rows_per_microbatch)

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

  def empty_batch(self) -> pairs_lib.PackedBatch:
    """A batch of the shapes of every step that holds nothing."""
    shape = (self.max_microbatches, self._config.rows_per_microbatch)
    return packing.empty_rows(shape, self.capacity)

  def step(self, step: int) -> PlannedStep:
    """The input of one update."""
    rows = [
      [forests.build_tree([self._pairs[i] for i in ids], ids) for ids in row]
      for row in self._rows(step)
    ]
    per_microbatch = self._config.rows_per_microbatch
    shape = (self.max_microbatches, per_microbatch)
    padding = [[]] * (self.max_microbatches * per_microbatch - len(rows))
    flat = packing.pack_rows([*rows, *padding], self.capacity)
    batch = pairs_lib.PackedBatch(
      *(array.reshape(shape + array.shape[1:]) for array in flat)
    )
    pairs = [self._pairs[i] for i in self.pair_ids(step).tolist()]
    answers = [a for pair in pairs for a in (pair.chosen, pair.rejected)]
    num_prompt_tokens = sum(
      len(pair.prompt) * (1 + bool(len(pair.rejected))) for pair in pairs
    )
    num_answer_tokens = sum(map(len, answers))
    return PlannedStep(
      batch=batch,
      num_microbatches=-(-len(rows) // per_microbatch),
      num_rows=len(rows),
      num_tokens=sum(len(tree.tokens) for row in rows for tree in row),
      num_sequence_tokens=num_prompt_tokens + num_answer_tokens,
      num_answer_tokens=num_answer_tokens,
    )

  def _rows(self, step: int) -> list[list[list[int]]]:
    """The pairs of each tree of each row of a step."""
    ids = self.pair_ids(step).tolist()
    pairs = [self._pairs[i] for i in ids]
    row_length = self._config.row_length
    # Trees of several prompts have fewer tokens, but are harder to pack: behind
    # a short system prompt that all pairs begin with, they take more rows.
    choices = []
    for min_shared_tokens in (forests.MIN_SHARED_TOKENS, None):
      groups, sizes = forests.group_into_trees(
        pairs, row_length=row_length, min_shared_tokens=min_shared_tokens
      )
      choices.append((groups, packing.pack(sizes, row_length)))
    groups, rows = min(choices, key=lambda choice: len(choice[1]))
    return [[[ids[i] for i in groups[g]] for g in row] for row in rows]

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
