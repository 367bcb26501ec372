"""Several sets of pairs in one, each as often as its weight says.

A weight is how often the pairs of a set come in an epoch: 2.0 is twice each,
0.25 a quarter of them, the same quarter in every epoch. So an epoch stays a
list of pairs, and shuffling, packing and resuming know nothing of mixtures.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from dpop_jax import pairs


class Drawn(NamedTuple):
  """What a mixture takes of its sets.

  Attributes:
    ids: Of the pairs, ascending; int64 [drawn], with repeats.
    counts: Of each set the pairs that it has, and those of `ids`.
  """

  ids: np.ndarray
  counts: list[tuple[int, int]]


def draw(
  source_ids: np.ndarray,
  prompt_keys: np.ndarray,
  weights: Sequence[float],
  *,
  seed: int,
) -> Drawn:
  """Decides which pairs are in an epoch, and how often.

  Args:
    source_ids: int [pairs]; which set each pair is of, from 0.
    prompt_keys: int [pairs]; equal for pairs of one prompt. Where a part of a
      set is taken, the pairs of a prompt stay together but for the last one.
    weights: Of each set.
    seed: Decides which part.

  Raises:
    ValueError: A set has no pairs, or its weight leaves none of them.
  """
  ids, counts = [], []
  for source, weight in enumerate(weights):
    own = np.flatnonzero(source_ids == source)
    times, share = divmod(weight, 1.0)
    num_extra = round(share * len(own))
    drawn = np.concatenate(
      [np.tile(own, int(times)), _some(own, prompt_keys, num_extra, seed)]
    )
    if not len(drawn):
      raise ValueError(
        f"data.weights: {weight} of the {len(own)} pairs of source "
        f"{source + 1} are none; give it a larger weight, or leave it out."
      )
    ids.append(drawn)
    counts.append((len(own), len(drawn)))
  return Drawn(np.sort(np.concatenate(ids)), counts)


def read_each(
  read: Callable[[Sequence[str]], Iterator[pairs.TokenPair]],
  groups: Sequence[Sequence[str]],
  counts: list[int],
) -> Iterator[pairs.TokenPair]:
  """The pairs of all groups of files, one group behind the other.

  Args:
    read: The pairs of some files.
    groups: The files of each set.
    counts: Empty; gets the number of pairs of each set.
  """
  for group in groups:
    counter = itertools.count()
    for pair in read(group):
      next(counter)
      yield pair
    counts.append(next(counter))


def _some(own, prompt_keys, count, seed):
  """That many of the pairs `own`, prompt by prompt."""
  if not count:
    return own[:0]
  keys, groups = np.unique(prompt_keys[own], return_inverse=True)
  places = np.random.default_rng(seed).permutation(len(keys))
  return own[np.argsort(places[groups], kind="stable")[:count]]
