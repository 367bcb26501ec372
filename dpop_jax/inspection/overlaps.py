"""What occurs twice: pairs, pairs the other way round, prompts of both sets.

Token ids are compared, prompts as the model sees them.
"""

import collections
import hashlib
from typing import Any

import numpy as np

from dpop_jax import pairs as pairs_lib
from dpop_jax.data import dataset

_MAX_EXAMPLES = 20


def prompt_groups(pairs: dataset.TokenPairs) -> np.ndarray:
  """A number for each pair: int64 [pairs], equal where the prompts are."""
  numbers: dict[bytes, int] = {}
  return np.array(
    [numbers.setdefault(_digest(pair.prompt), len(numbers)) for pair in pairs],
    np.int64,
  )


def within(pairs: dataset.TokenPairs, groups: np.ndarray) -> dict[str, Any]:
  """Duplicates and contradictions of one set.

  Args:
    pairs: The pairs.
    groups: Of `prompt_groups`.

  Returns:
    `num_duplicates`: pairs of which an equal one came before;
    `num_contradictory`: pairs of which the reverse is there as well (A over B
    and B over A for one prompt), counted on both sides;
    `num_both_chosen_and_rejected`: answers of one prompt that are chosen in one
    pair and rejected in another, which need be no contradiction (A over B over
    C); `duplicates` and `contradictory`: some of them, as indices of pairs
    [earlier, later].
  """
  first: dict[tuple, int] = {}
  duplicates, contradictory = [], []
  in_contradiction: set[int] = set()
  chosen, rejected = set(), set()
  by_answers = collections.defaultdict(list)
  for number, pair in enumerate(pairs):
    prompt = int(groups[number])
    answers = _digest(pair.chosen), _digest(pair.rejected)
    key = prompt, *answers
    if key in first:
      duplicates.append([first[key], number])
    reverse = prompt, *answers[::-1]
    if reverse in first:
      contradictory.append([first[reverse], number])
      in_contradiction.update([number, *by_answers[reverse]])
    first.setdefault(key, number)
    by_answers[key].append(number)
    chosen.add((prompt, answers[0]))
    rejected.add((prompt, answers[1]))
  return {
    "num_duplicates": len(duplicates),
    "num_contradictory": len(in_contradiction),
    "num_both_chosen_and_rejected": len(chosen & rejected),
    "duplicates": duplicates[:_MAX_EXAMPLES],
    "contradictory": contradictory[:_MAX_EXAMPLES],
  }


def between(
  train: dataset.TokenPairs, held_out: dataset.TokenPairs
) -> dict[str, Any]:
  """What held-out pairs have in common with those to train on.

  Returns:
    Counts of held-out pairs whose prompt, whose pair as a whole, or whose
    chosen answer (behind any prompt, which also finds a question that stands
    behind other shots) is in `train` as well; `pairs`: some of those whose
    prompt is, as indices of held-out pairs.
  """
  prompts = {_digest(pair.prompt) for pair in train}
  chosen = {_digest(pair.chosen) for pair in train}
  whole = {_key(pair) for pair in train}
  shared = [
    number
    for number, pair in enumerate(held_out)
    if _digest(pair.prompt) in prompts
  ]
  return {
    "num_pairs": len(held_out),
    "num_shared_prompts": len(shared),
    "num_shared_pairs": sum(_key(pair) in whole for pair in held_out),
    "num_shared_chosen": sum(
      _digest(pair.chosen) in chosen for pair in held_out
    ),
    "pairs": shared[:_MAX_EXAMPLES],
  }


def _key(pair: pairs_lib.TokenPair) -> tuple[bytes, ...]:
  return tuple(map(_digest, pair))


def _digest(ids: np.ndarray) -> bytes:
  # Sets of all ids would hold a large data set in memory.
  return hashlib.blake2b(ids.tobytes(), digest_size=16).digest()
