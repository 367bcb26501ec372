"""What pairs share at their beginning, and what prefix trees save by it.

A share of s means that of the tokens of all sequences (prompt + chosen and
prompt + rejected, one by one) a share of s is not run again; the speed-up is
tokens of sequences by tokens of trees, 1 / (1 - s). Attention and whatever
does not grow with tokens are not in it.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from dpop_jax.data import dataset, forests
from dpop_jax.data import plan as plan_lib
from dpop_jax.inspection import summaries
from dpop_jax.inspection.pair_statistics import PairStatistics

# An epoch of a large set takes long to lay out, and its updates are alike.
_MAX_UPDATES = 100


def of_pairs(statistics: PairStatistics) -> dict[str, Any]:
  """Each pair by itself: the prompt and the beginning of its two answers."""
  sequences, trees = statistics.sequence_tokens, statistics.tree_tokens
  return {
    "share": summaries.distribution(1 - trees / sequences),
    "speed_up": summaries.ratio(sequences.sum(), trees.sum()),
  }


def of_prompts(
  pairs: dataset.TokenPairs,
  statistics: PairStatistics,
  groups: np.ndarray,
  *,
  row_length: int,
) -> dict[str, Any]:
  """The pairs of each prompt in trees of their own.

  Args:
    pairs: The pairs.
    statistics: Of them.
    groups: int [pairs]; equal for pairs of one prompt.
    row_length: Largest size of a tree; a prompt may need several.
  """
  by_prompt = members(groups)
  trees = np.array(
    [
      sum(
        forests.group_into_trees(
          [pairs[i] for i in group],
          row_length=row_length,
          min_shared_tokens=None,
        )[1]
      )
      if len(group) > 1
      else statistics.tree_tokens[group[0]]
      for group in by_prompt
    ]
  )
  sequences = np.array(
    [statistics.sequence_tokens[group].sum() for group in by_prompt]
  )
  return {
    "num_prompts": len(by_prompt),
    "pairs_per_prompt": summaries.distribution(
      np.array([len(group) for group in by_prompt])
    ),
    "share": summaries.distribution(1 - trees / sequences),
    "speed_up": summaries.ratio(sequences.sum(), trees.sum()),
  }


def of_updates(
  pairs: dataset.TokenPairs,
  config: plan_lib.BatchConfig,
  *,
  seed: int,
  progress: Callable[[int], Any] = lambda number: None,
) -> dict[str, Any]:
  """Updates as a run would make them: their trees and rows.

  Pairs that a shuffle brings together may share more than their prompt (few-
  shot prompts) or less (pairs of one prompt in different updates).

  Args:
    pairs: The pairs.
    config: The batch. The rows of a microbatch play no part.
    seed: Of the shuffle, `run.seed`.
    progress: Called with the number of each update.
  """
  num_updates = min(-(-len(pairs) // config.batch_size), _MAX_UPDATES)

  def share(function, steps):
    results = []
    for step in steps:
      results.append(function(step))
      progress(step)
    return results

  plan = plan_lib.Plan(
    pairs, config, seed=seed, num_steps=num_updates, share=share
  )
  # Only the counts: the arrays of no row are made.
  steps = [plan.step(step, np.zeros(0, int)) for step in range(num_updates)]
  rows = np.array([step.num_rows for step in steps])
  tokens = np.array([step.num_tokens for step in steps])
  sequences = sum(step.num_sequence_tokens for step in steps)
  return {
    "batch_size": config.batch_size,
    "row_length": config.row_length,
    "group_by_prompt": config.group_by_prompt,
    "num_updates": num_updates,
    "rows_per_update": summaries.distribution(rows),
    "fill": summaries.distribution(tokens / (rows * config.row_length)),
    "mean_fill": summaries.ratio(tokens.sum(), rows.sum() * config.row_length),
    "speed_up": summaries.ratio(sequences, tokens.sum()),
  }


def members(groups: np.ndarray) -> list[np.ndarray]:
  """The indices of each group, groups in the order of their first member."""
  _, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
  order = np.argsort(inverse, kind="stable")
  ends = np.cumsum(np.bincount(inverse))[:-1]
  parts = np.split(order, ends)
  return [parts[i] for i in np.argsort(first)]
