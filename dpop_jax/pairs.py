"""The arrays everybody speaks: token pairs, packed rows, and a picture of one.

A batch is a forest. The sequences of a tree (prompt + chosen, prompt +
rejected, and those of every other pair that shares a beginning with them) are
merged into one prefix tree over token ids, and trees are laid out depth-first,
one behind the other, in rows of static length. A token sees its ancestors and
itself, and one integer per token says it all: query `q` sees key `k` exactly
when `k <= q < visible_until[k]`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

CHOSEN, REJECTED = 0, 1
# Where a token of an answer stands relative to what differs between answers.
BEFORE_EDIT, AT_EDIT, AFTER_EDIT = 0, 1, 2
NUM_REGIONS = 3

Array = Any  # jax.Array, or np.ndarray on the host.


class TokenPair(NamedTuple):
  """One preference pair as token ids, on the host.

  Attributes:
    prompt: int32 [prompt_length], at least one token; holds the BOS, if any.
    chosen: int32 [chosen_length], ends with EOS.
    rejected: int32 [rejected_length], ends with EOS; empty for supervised data.
  """

  prompt: np.ndarray
  chosen: np.ndarray
  rejected: np.ndarray


class PackedBatch(NamedTuple):
  """Rows of prefix trees, and which edges of them belong to which answer.

  One row with the pair (prompt `<s> 2+2`, chosen `= 4 .`, rejected `= 5 .`):

    index            0    1    2    3    4    5    6    7
    tokens          <s>  2+2   =    4    .    5    .    -
    positions        0    1    2    3    4    3    4    0
    visible_until    7    7    7    5    5    7    7    7

  An edge is scored once, from the hidden state of the parent
  (`score_positions`) to the token of the child (`score_targets`). Edges that
  belong to the same answers in the same regions form a branch, and links say
  which branches an answer is the sum of. With slot = (2 * pair + side) * 3 +
  region, where side is CHOSEN or REJECTED and region BEFORE_EDIT, AT_EDIT or
  AFTER_EDIT:

    score_positions  1  2  3  2  5        score_targets    =  4  .  5  .
    score_branches   0  1  2  3  4
    link_branches    0  0  1  2  3  4
    link_slots       0  3  1  2  4  5

  Padding: tokens that nobody sees (`visible_until[k] == k`), scores of branch
  `num_branches`, links to slot `num_slots`, pairs of weight 0. All arrays may
  have further leading axes (microbatches).

  Attributes:
    tokens: int32 [rows, length].
    positions: int32 [rows, length]; depth in the tree, the position for RoPE.
    visible_until: int32 [rows, length]; end of the subtree of a token.
    score_positions: int32 [rows, scores].
    score_targets: int32 [rows, scores].
    score_branches: int32 [rows, scores]; non-decreasing never assumed.
    num_scores: int32 [rows]; scores beyond are padding.
    link_branches: int32 [rows, links].
    link_slots: int32 [rows, links].
    answer_lengths: int32 [rows, pairs, 2, 3]; scored tokens by side and region.
    pair_weights: float32 [rows, pairs]; 1 for a pair, 0 for padding.
    pair_ids: int32 [rows, pairs]; index in the data set, -1 for padding.
    reference_logps: float32 [rows, pairs, 2, 3]; the reference's log-probs by
      side and region, 0 for padding. None where it is scored in the step.
  """

  tokens: Array
  positions: Array
  visible_until: Array
  score_positions: Array
  score_targets: Array
  score_branches: Array
  num_scores: Array
  link_branches: Array
  link_slots: Array
  answer_lengths: Array
  pair_weights: Array
  pair_ids: Array
  reference_logps: Array | None = None

  def map(self, function: Callable[[Array], Array]) -> "PackedBatch":
    """The batch with a function of each array in its place."""
    return PackedBatch(
      *(None if array is None else function(array) for array in self)
    )

  @property
  def num_pairs(self) -> int:
    """Pairs a row can hold."""
    return self.pair_weights.shape[-1]

  @property
  def num_slots(self) -> int:
    """Answers times regions that a row can hold."""
    return self.num_pairs * 2 * NUM_REGIONS


class WeightedSum(NamedTuple):
  """A sum and the weight it was taken over; merging is addition."""

  total: Array
  weight: Array

  def mean(self) -> Array:
    return self.total / self.weight


def answer_logps(
  token_logps: Float[jax.Array, "rows scores"], batch: PackedBatch
) -> Float[jax.Array, "rows pairs 2 3"]:
  """Sums token log-probabilities along the path of every answer.

  Edges are summed by branch, then branches by answer and region, so that what
  answers share is added up once. The last axes are (CHOSEN, REJECTED) and
  (BEFORE_EDIT, AT_EDIT, AFTER_EDIT); the log-probability of an answer is the
  sum over the last one.
  """
  # Out-of-range branches and slots are padding; segment_sum drops them.
  num_branches = batch.link_branches.shape[-1]
  branches = jax.vmap(
    functools.partial(jax.ops.segment_sum, num_segments=num_branches)
  )(token_logps, batch.score_branches)
  parts = jnp.take_along_axis(branches, batch.link_branches, axis=-1)
  slots = jax.vmap(
    functools.partial(jax.ops.segment_sum, num_segments=batch.num_slots)
  )(parts, batch.link_slots)
  return slots.reshape(-1, batch.num_pairs, 2, NUM_REGIONS)
