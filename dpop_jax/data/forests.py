"""Prefix trees over token ids: every distinct beginning is laid out once."""

import bisect
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dpop_jax import pairs as pairs_lib

# Sequences with different prompts share a tree only if they share at least this
# many tokens: tied together for less, they cost more in packing than they save.
MIN_SHARED_TOKENS = 16


class Tree(NamedTuple):
  """One prefix tree in depth-first order, in the terms of `pairs.PackedBatch`.

  Attributes:
    tokens: int32 [size].
    positions: int32 [size]; depth of each token.
    visible_until: int32 [size]; counted from the start of the tree.
    score_positions: int32 [scores]; likewise.
    score_targets: int32 [scores].
    score_branches: int32 [scores]; branches of this tree count from 0.
    link_branches: int32 [links].
    link_slots: int32 [links]; pairs of this tree count from 0.
    answer_lengths: int32 [pairs, 2, 3].
    pair_ids: int32 [pairs].
  """

  tokens: np.ndarray
  positions: np.ndarray
  visible_until: np.ndarray
  score_positions: np.ndarray
  score_targets: np.ndarray
  score_branches: np.ndarray
  link_branches: np.ndarray
  link_slots: np.ndarray
  answer_lengths: np.ndarray
  pair_ids: np.ndarray

  @property
  def num_branches(self) -> int:
    return int(self.score_branches.max(initial=-1)) + 1


class TreeCounts(NamedTuple):
  """What a tree asks of a row besides its tokens."""

  scores: int
  links: int
  pairs: int


def common_prefix_length(a: np.ndarray, b: np.ndarray) -> int:
  """Number of leading elements in which two arrays agree."""
  length = min(len(a), len(b))
  different = a[:length] != b[:length]
  first = int(different.argmax()) if length else 0
  return first if length and different[first] else length


def answer_regions(pair: pairs_lib.TokenPair) -> np.ndarray:
  """Where the regions of both answers end: int32 [2, 4], starting with 0.

  BEFORE_EDIT is the common prefix of chosen and rejected, AFTER_EDIT the common
  suffix of what remains, AT_EDIT what lies between. Without a rejected answer
  all of the chosen one is BEFORE_EDIT.
  """
  chosen, rejected = pair.chosen, pair.rejected
  if not len(rejected):
    return np.array([[0, *[len(chosen)] * 3], [0] * 4], np.int32)
  before = common_prefix_length(chosen, rejected)
  after = common_prefix_length(chosen[before:][::-1], rejected[before:][::-1])
  return np.array(
    [
      [0, before, len(answer) - after, len(answer)]
      for answer in (chosen, rejected)
    ],
    np.int32,
  )


def build_tree(
  pairs: Sequence[pairs_lib.TokenPair], pair_ids: Sequence[int]
) -> Tree:
  """Merges the sequences of some pairs into one prefix tree.

  Args:
    pairs: Pairs whose prompts begin with the same token.
    pair_ids: Their indices in the data set; carried along.

  Raises:
    ValueError: A prompt is empty or the first tokens differ.
  """
  sequences = []
  for number, pair in enumerate(pairs):
    if not len(pair.prompt) or pair.prompt[0] != pairs[0].prompt[0]:
      raise ValueError(
        "The prompts of a tree must begin with the same token, but pair "
        f"{pair_ids[number]} begins with {pair.prompt[:1]} and the first one "
        f"with {pairs[0].prompt[:1]}."
      )
    sequences.append((number, np.concatenate([pair.prompt, pair.chosen])))
    if len(pair.rejected):
      sequences.append((number, np.concatenate([pair.prompt, pair.rejected])))
  sides = _sides(pairs)
  # Lexicographic order is depth-first order, and puts a sequence that is the
  # beginning of another in front of it.
  keys = [_sort_key(sequence) for _, sequence in sequences]
  order = sorted(range(len(sequences)), key=keys.__getitem__)

  capacity = sum(len(sequence) for _, sequence in sequences)
  tokens = np.zeros(capacity, np.int32)
  positions = np.zeros(capacity, np.int32)
  visible_until = np.zeros(capacity, np.int32)
  parents = np.full(capacity, -1, np.int32)
  # covers[slot, node]: the edge into the node is of that part of an answer.
  covers = np.zeros(
    (len(pairs) * 2 * pairs_lib.NUM_REGIONS, capacity), np.bool_
  )
  regions = [answer_regions(pair) for pair in pairs]
  size = 0
  previous, nodes = np.zeros(0, np.int32), np.zeros(0, np.int32)
  for index in order:
    number, sequence = sequences[index]
    shared = common_prefix_length(previous, sequence)
    end = size + len(sequence) - shared
    new = np.arange(size, end, dtype=np.int32)
    nodes = np.concatenate([nodes[:shared], new])
    tokens[new] = sequence[shared:]
    positions[new] = np.arange(shared, len(sequence))
    parents[new[:1]] = nodes[shared - 1] if shared else -1
    parents[new[1:]] = new[:-1]
    # Later sequences below the same node overwrite this with a later end.
    visible_until[nodes] = end
    bounds = len(pairs[number].prompt) + regions[number][sides[index]]
    for region in range(pairs_lib.NUM_REGIONS):
      slot = (2 * number + sides[index]) * pairs_lib.NUM_REGIONS + region
      covers[slot, nodes[bounds[region] : bounds[region + 1]]] = True
    previous, size = sequence, end

  scored = np.flatnonzero(covers.any(axis=0))
  # Edges that belong to exactly the same slots form a branch; branches count in
  # the order of their first edge.
  branch_slots, first, branches = np.unique(
    np.packbits(covers[:, scored], axis=0),
    axis=1,
    return_index=True,
    return_inverse=True,
  )
  by_first = np.argsort(first)
  link_branches, link_slots = np.nonzero(
    np.unpackbits(branch_slots[:, by_first], axis=0, count=len(covers)).T
  )
  return Tree(
    tokens=tokens[:size],
    positions=positions[:size],
    visible_until=visible_until[:size],
    score_positions=parents[scored],
    score_targets=tokens[scored],
    score_branches=np.argsort(by_first)[branches.ravel()].astype(np.int32),
    link_branches=link_branches.astype(np.int32),
    link_slots=link_slots.astype(np.int32),
    answer_lengths=np.diff(np.stack(regions), axis=-1).astype(np.int32),
    pair_ids=np.asarray(pair_ids, np.int32),
  )


def count_tree(pairs: Sequence[pairs_lib.TokenPair]) -> TreeCounts:
  """What `build_tree` would give; a pair that is alone is not built."""
  if len(pairs) > 1:
    tree = build_tree(pairs, range(len(pairs)))
    return TreeCounts(len(tree.score_targets), len(tree.link_slots), len(pairs))
  regions = answer_regions(pairs[0])
  # What comes before the edit stands in both answers and is scored once; if one
  # answer is the beginning of the other, nothing else is shared.
  scores = int(regions[:, -1].sum() - regions[pairs_lib.REJECTED, 1])
  links = int(np.count_nonzero(np.diff(regions, axis=-1)))
  return TreeCounts(scores, links, 1)


def group_into_trees(
  pairs: Sequence[pairs_lib.TokenPair],
  *,
  row_length: int,
  min_shared_tokens: int | None = MIN_SHARED_TOKENS,
) -> tuple[list[list[int]], list[int]]:
  """Decides which pairs share a tree: those that share a beginning.

  Pairs with the same prompt share a tree, and so do pairs whose prompts begin
  with the same `min_shared_tokens` tokens or more (few-shot prompts), as long
  as the tree fits a row.

  Args:
    pairs: The pairs of a step.
    row_length: Largest size of a tree, in tokens.
    min_shared_tokens: See above; None for pairs with the same prompt only.

  Returns:
    The indices of the pairs of each tree, and the size of each tree in tokens.

  Raises:
    ValueError: A pair alone is larger than a row.
  """
  order = sorted(
    range(len(pairs)),
    key=lambda i: (_sort_key(pairs[i].prompt), _sort_key(pairs[i].chosen), i),
  )
  groups, sizes = [], []
  growing = _GrowingTree()
  for index in order:
    pair = pairs[index]
    if groups:
      last = pairs[groups[-1][-1]].prompt
      shared = common_prefix_length(last, pair.prompt)
      is_related = shared == len(pair.prompt) == len(last) or (
        min_shared_tokens is not None and shared >= min_shared_tokens
      )
      if is_related and growing.add(pair, row_length):
        groups[-1].append(index)
        sizes[-1] = growing.size
        continue
    growing = _GrowingTree()
    if not growing.add(pair, row_length):
      raise ValueError(
        f"A pair needs a tree of {_GrowingTree.size_of(pair)} tokens, but "
        f"batch.row_length is {row_length}; raise it or lower data.max_length."
      )
    groups.append([index])
    sizes.append(growing.size)
  return groups, sizes


class _GrowingTree:
  """The size of a prefix tree as sequences are added, without building it."""

  def __init__(self):
    self.size = 0
    self._keys: list[bytes] = []
    self._sequences: list[np.ndarray] = []

  def add(self, pair: pairs_lib.TokenPair, limit: int) -> bool:
    """Adds both sequences of a pair, or neither where that passes `limit`."""
    keys, sequences = list(self._keys), list(self._sequences)
    size = self.size
    for answer in (pair.chosen, pair.rejected):
      if not len(answer):
        continue
      sequence = np.concatenate([pair.prompt, answer])
      key = _sort_key(sequence)
      at = bisect.bisect(keys, key)
      neighbours = sequences[max(0, at - 1) : at + 1]
      shared = max(
        (common_prefix_length(other, sequence) for other in neighbours),
        default=0,
      )
      size += len(sequence) - shared
      keys.insert(at, key)
      sequences.insert(at, sequence)
    if size > limit:
      return False
    self.size, self._keys, self._sequences = size, keys, sequences
    return True

  @classmethod
  def size_of(cls, pair: pairs_lib.TokenPair) -> int:
    tree = cls()
    tree.add(pair, limit=np.iinfo(np.int64).max)
    return tree.size


def _sides(pairs: Sequence[pairs_lib.TokenPair]) -> list[int]:
  sides = []
  for pair in pairs:
    sides.append(pairs_lib.CHOSEN)
    if len(pair.rejected):
      sides.append(pairs_lib.REJECTED)
  return sides


def _sort_key(tokens: np.ndarray) -> bytes:
  """Bytes that sort as the token ids do."""
  return tokens.astype(">u4").tobytes()
