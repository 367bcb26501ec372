"""Notices that chosen answers become less likely, and says so in words, once.

It is the failure that DPOP is there to prevent. Losses and margins do not show
it: both get better while it happens.
"""

from collections.abc import Mapping
from typing import Any

from dpop_jax import config as config_lib

# A run is warned of after so many evaluations in a row that are all low.
_NUM_EVALUATIONS = 2
# Less than this, in nats, is nothing: rounding, and what DPOP itself leaves on
# answers it has not seen.
_LEAST_FALL = 0.01
# What some chosen answers lost is so many times what the others gained.
_LEAST_OUTWEIGHED = 2.0

_RATIO, _PENALTY = "logratios/chosen", "dpop/penalty"


class ChosenWatch:
  """Looks at the evaluations of one run, in their order.

  An evaluation is low if, on the held-out pairs, the mean log-ratio of chosen
  answers to the reference is below zero by more than 0.01 nat, and below what
  it was before the first step; and if this is not a few pairs' doing: what the
  chosen answers that fell have lost is at least twice what those that rose have
  gained. The warning comes with the second low evaluation in a row after step
  0, and then never again in this run.
  """

  def __init__(self, config: config_lib.Config):
    """Starts with a run that was not evaluated yet."""
    self._config = config
    self._start = 0.0
    self._num_low = 0
    self._has_warned = False

  def add(self, step: int, values: Mapping[str, float]) -> str | None:
    """Takes an evaluation.

    Args:
      step: Updates made before it.
      values: Means over the held-out pairs; supervised runs have no log-ratios,
        and are never warned of.

    Returns:
      The warning if it is due now, else None.
    """
    if _RATIO not in values:
      return None
    ratio = values[_RATIO]
    if step == 0:
      # A reference that is another model may be ahead from the beginning.
      self._start = min(0.0, ratio)
      return None
    self._num_low = self._num_low + 1 if self._is_low(values) else 0
    if self._num_low < _NUM_EVALUATIONS or self._has_warned:
      return None
    self._has_warned = True
    return (
      f"WARNING: In {self._num_low} evaluations in a row the chosen answers of "
      "held-out pairs were less likely than under the reference, now by "
      f"{-ratio:.3g} nats on average (logratios/chosen). The model moves away "
      "from the preferred answers too, which DPOP exists to prevent. "
      f"{self._advice()}"
    )

  def notes(self) -> dict[str, Any]:
    """What a continued run needs to know, as JSON has it."""
    return {
      "start": self._start,
      "num_low": self._num_low,
      "has_warned": self._has_warned,
    }

  def continue_from(self, notes: Mapping[str, Any]) -> None:
    """Goes on where `notes` were taken; empty ones are of an older version."""
    self._start = notes.get("start", 0.0)
    self._num_low = notes.get("num_low", 0)
    self._has_warned = notes.get("has_warned", False)

  def _is_low(self, values):
    ratio, lost = values[_RATIO], values[_PENALTY]
    gained = ratio + lost
    return (
      ratio < self._start - _LEAST_FALL and lost >= _LEAST_OUTWEIGHED * gained
    )

  def _advice(self):
    loss = self._config.loss
    rate = self._config.optimizer.peak_learning_rate
    if loss.name != "dpop":
      return (
        f"loss.name={loss.name!r} allows it; use loss.name='dpop' with "
        "loss.dpop_lambda=50, the paper's."
      )
    if not loss.dpop_lambda:
      return (
        "With loss.dpop_lambda=0 the loss is DPO, which allows it; the paper's "
        "is 50."
      )
    return (
      "The penalty acts on the pairs that are trained on, and does not carry "
      f"over: lower optimizer.peak_learning_rate, now {rate:g}, or raise "
      f"loss.dpop_lambda, now {loss.dpop_lambda:g}."
    )
