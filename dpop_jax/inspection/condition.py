"""The paper's condition, token by token: which right tokens DPO pushes down.

Let a token i stand in both answers of a pair behind the edit, s_w its
probability behind the chosen beginning and s_l that behind the rejected one.
If both beginnings lead to nearly the same hidden state, a step of DPO moves
the logit of i there by (a positive factor times)

  s_l - s_w,

which is negative as soon as the model finds i likelier where it is right: the
right token is pushed down. With the penalty of DPOP at work it is

  lambda (1 - s_w) + s_l - s_w,

so a lambda above (s_w - s_l) / (1 - s_w) turns it round. Tokens before the edit
cancel, and those of the chosen answer that are not in the rejected one go up by
1 - s_w. See section 3 and appendix B of the paper.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from dpop_jax import pairs as pairs_lib
from dpop_jax.data import forests
from dpop_jax.inspection import alignment, forward, look_ahead, summaries

LAMBDAS = (5.0, 50.0, 500.0)
# Pushes of less are of tokens that are certain behind both beginnings, or
# hopeless, and only rounding decides on their sign.
_LEAST_PUSH = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Condition:
  """What one forward pass says of some pairs.

  Tokens behind the edit that stand in both answers, of all pairs:

  Attributes:
    pair: int64 [tokens]; which pair.
    place: int64 [tokens]; where in the chosen answer.
    push: float64 [tokens]; s_w - s_l: DPO moves the token's logit by minus
      that.
    doubt: float64 [tokens]; 1 - s_w.

  Of each pair:

  Attributes:
    lift: float64 [pairs]; sum of 1 - s_w over chosen tokens behind the common
      beginning that are not in the rejected answer: what DPO pushes up.
    chosen_logps: float64 [pairs]; of the whole answer, in nats.
    rejected_logps: float64 [pairs].
    falls: float64 [pairs]; see `look_ahead.falls`, in nats.
  """

  pair: np.ndarray
  place: np.ndarray
  push: np.ndarray
  doubt: np.ndarray
  lift: np.ndarray
  chosen_logps: np.ndarray
  rejected_logps: np.ndarray
  falls: np.ndarray

  @property
  def is_pushed_down(self) -> np.ndarray:
    """bool [tokens]; by more than rounding."""
    return self.push > _LEAST_PUSH

  @property
  def lambda_needed(self) -> np.ndarray:
    """float64 [tokens]; 0 where DPO pushes up; inf where no lambda helps."""
    with np.errstate(divide="ignore", invalid="ignore"):
      needed = self.push / self.doubt
    return np.where(self.push > 0, needed, 0.0)

  def push_down_of_pairs(self) -> np.ndarray:
    """float64 [pairs]; sum of s_w - s_l over the tokens pushed down."""
    return np.bincount(
      self.pair, np.maximum(self.push, 0.0), minlength=len(self.lift)
    )

  def push_up_of_pairs(self) -> np.ndarray:
    """float64 [pairs]; what DPO pushes right tokens up by."""
    aligned = np.bincount(
      self.pair, np.maximum(-self.push, 0.0), minlength=len(self.lift)
    )
    return self.lift + aligned


def measure(
  pairs: Sequence[pairs_lib.TokenPair], logps: Sequence[forward.TokenLogps]
) -> Condition:
  """The condition of pairs, given the log-probs of their tokens."""
  columns = {name: [] for name in ("pair", "place", "push", "doubt")}
  lift = []
  for number, (pair, scored) in enumerate(zip(pairs, logps, strict=True)):
    places = alignment.align(pair)
    chosen = scored.chosen.astype(np.float64)
    rejected = scored.rejected.astype(np.float64)[places.rejected]
    # Not -0.0 of a token that is certain, for it is divided by.
    doubts = np.maximum(-np.expm1(chosen), 0.0) + 0.0
    of_aligned = np.exp(chosen[places.chosen])
    columns["pair"].append(np.full(len(of_aligned), number))
    columns["place"].append(places.chosen)
    columns["push"].append(of_aligned - np.exp(rejected))
    columns["doubt"].append(doubts[places.chosen])
    common = forests.common_prefix_length(pair.chosen, pair.rejected)
    is_lifted = np.arange(len(chosen)) >= common
    is_lifted[places.chosen] = False
    lift.append(doubts[is_lifted].sum())
  empty = {"pair": np.zeros(0, np.int64), "place": np.zeros(0, np.int64)}
  return Condition(
    **{
      name: np.concatenate([empty.get(name, np.zeros(0)), *parts])
      for name, parts in columns.items()
    },
    lift=np.array(lift),
    chosen_logps=np.array([x.chosen.sum(dtype=np.float64) for x in logps]),
    rejected_logps=np.array([x.rejected.sum(dtype=np.float64) for x in logps]),
    falls=look_ahead.falls(
      [x.chosen_changes for x in logps], [x.rejected_changes for x in logps]
    ),
  )


def share_turned(condition: Condition, dpop_lambda: float) -> float | None:
  """Share of the push down, by size, that a lambda turns round.

  None if nothing is pushed down.
  """
  push = np.maximum(condition.push, 0.0) * condition.is_pushed_down
  is_turned = dpop_lambda * condition.doubt > condition.push
  return summaries.ratio((push * is_turned).sum(), push.sum())


def summary(condition: Condition) -> dict[str, Any]:
  """The section `condition` of a report."""
  is_down = condition.is_pushed_down
  needed = condition.lambda_needed[is_down]
  down, up = condition.push_down_of_pairs(), condition.push_up_of_pairs()
  return {
    "num_pairs": len(condition.lift),
    "num_tokens": len(condition.push),
    "tokens_per_pair": summaries.ratio(
      len(condition.push), len(condition.lift)
    ),
    "share_of_tokens_pushed_down": summaries.share(is_down),
    "push": summaries.distribution(condition.push),
    "push_down_per_pair": summaries.distribution(down),
    "push_up_per_pair": summaries.distribution(up),
    "share_of_push_down": summaries.ratio(down.sum(), down.sum() + up.sum()),
    "lambda_needed": summaries.distribution(needed),
    "share_of_tokens_turned_round": {
      f"{value:g}": summaries.share(
        value * condition.doubt[is_down] > condition.push[is_down]
      )
      for value in LAMBDAS
    },
    "share_of_push_turned_round": {
      f"{value:g}": share_turned(condition, value) for value in LAMBDAS
    },
    "look_ahead_fall": summaries.distribution(condition.falls),
    "chosen_logps": summaries.distribution(condition.chosen_logps),
    "rejected_logps": summaries.distribution(condition.rejected_logps),
  }
