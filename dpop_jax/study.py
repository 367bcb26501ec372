"""A comparison of losses: what was measured, by loss, seed and step.

Plain numbers, whoever measured them; `report` turns them into pages.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

CHOSEN_LOGP = "logps/chosen"
REJECTED_LOGP = "logps/rejected"
ACTIVE_FRACTION = "dpop/active_fraction"
PENALTY = "dpop/penalty"
BEFORE_EDIT = "logps_per_token/chosen_before_edit"
AT_EDIT = "logps_per_token/chosen_at_edit"
AFTER_EDIT = "logps_per_token/chosen_after_edit"

LOGP_METRICS = (CHOSEN_LOGP, REJECTED_LOGP, BEFORE_EDIT, AT_EDIT, AFTER_EDIT)
METRICS = (*LOGP_METRICS, ACTIVE_FRACTION, PENALTY)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference:
  """The supervised model that every run starts from.

  Attributes:
    metrics: LOGP_METRICS on the held-out pairs, in nats.
    exact_match: Share of the held-out questions answered rightly, 0 to 1.
  """

  metrics: Mapping[str, float | int]
  exact_match: float | int

  def __post_init__(self):
    _require(self.metrics, LOGP_METRICS, "The reference")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """One training with one loss and one seed.

  Attributes:
    loss: Its name, such as "dpop".
    seed: The seed of the run.
    records: By step, from the first evaluation to the last: "step" and METRICS
      on the held-out pairs. Other keys do no harm.
    exact_match: Share of the held-out questions answered rightly in the end.
  """

  loss: str
  seed: int
  records: tuple[Mapping[str, float | int], ...]
  exact_match: float | int

  def __post_init__(self):
    if not self.records:
      raise ValueError(
        f"The run of {self.loss!r} with seed {self.seed} has no records; it "
        "needs at least the evaluation after the last step."
      )
    for record in self.records:
      _require(
        record,
        ("step", *METRICS),
        f"A record of {self.loss!r} with seed {self.seed}",
      )
    steps = self.steps
    if list(steps) != sorted(set(steps)):
      raise ValueError(
        f"The steps of {self.loss!r} with seed {self.seed} must increase, got "
        f"{steps}."
      )

  @property
  def steps(self) -> tuple[int, ...]:
    return tuple(int(record["step"]) for record in self.records)

  @property
  def final(self) -> Mapping[str, float | int]:
    """The last record."""
    return self.records[-1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
  """Several losses, each trained with the same seeds from one reference.

  Attributes:
    settings: What was set, for the record; values may be mappings again.
    reference: The model before preference training.
    runs: Every loss with every seed, in the order losses are to be shown.
    num_questions: How many questions exact match was measured on.
    example: A pair ("prompt", "chosen", "rejected") to show, or None.
  """

  settings: Mapping[str, Any]
  reference: Reference
  runs: tuple[Run, ...]
  num_questions: int
  example: Mapping[str, str] | None = None

  def __post_init__(self):
    if not self.runs:
      raise ValueError("A study needs at least one run, got none.")
    if self.num_questions < 1:
      raise ValueError(
        f"num_questions must be at least 1, got {self.num_questions}."
      )
    if self.example is not None:
      _require(self.example, ("prompt", "chosen", "rejected"), "The example")
    for loss in self.losses:
      runs = self.runs_of(loss)
      seeds = tuple(run.seed for run in runs)
      if seeds != self.seeds:
        raise ValueError(
          "Every loss needs one run per seed, the same seeds for all: "
          f"{self.losses[0]!r} has {self.seeds}, but {loss!r} has {seeds}."
        )
      if len({run.steps for run in runs}) != 1:
        raise ValueError(
          f"The runs of {loss!r} must be evaluated at the same steps, got "
          f"{[run.steps for run in runs]}."
        )

  @property
  def losses(self) -> tuple[str, ...]:
    """Names, in the order of their first run."""
    return tuple(dict.fromkeys(run.loss for run in self.runs))

  @property
  def seeds(self) -> tuple[int, ...]:
    return tuple(run.seed for run in self.runs_of(self.losses[0]))

  def runs_of(self, loss: str) -> tuple[Run, ...]:
    """The runs of a loss, by seed."""
    runs = (run for run in self.runs if run.loss == loss)
    return tuple(sorted(runs, key=lambda run: run.seed))

  def final(self, loss: str, metric: str) -> list[float | int]:
    """A metric after the last step, one value per seed."""
    return [run.final[metric] for run in self.runs_of(loss)]

  def exact_match(self, loss: str) -> list[float | int]:
    """Exact match after the last step, one value per seed."""
    return [run.exact_match for run in self.runs_of(loss)]

  def chosen_logratios(self, loss: str) -> list[float | int]:
    """Mean log-ratio of the chosen answers to the reference, per seed."""
    start = self.reference.metrics[CHOSEN_LOGP]
    return [value - start for value in self.final(loss, CHOSEN_LOGP)]

  def summary(self) -> dict[str, Any]:
    """The result in a few numbers that JSON can hold; None for nan and inf."""
    reference = self.reference
    return {
      "settings": dict(self.settings),
      "seeds": list(self.seeds),
      "sft": {
        "chosen_logp": _finite(reference.metrics[CHOSEN_LOGP]),
        # To itself.
        "chosen_logratio": 0.0,
        "post_edit_logp": _finite(reference.metrics[AFTER_EDIT]),
        "exact_match": _finite(reference.exact_match),
      },
      "losses": {
        loss: {
          "chosen_logratio": [*map(_finite, self.chosen_logratios(loss))],
          "post_edit_logp": [*map(_finite, self.final(loss, AFTER_EDIT))],
          "exact_match": [*map(_finite, self.exact_match(loss))],
        }
        for loss in self.losses
      },
    }


def _finite(value: float | int) -> float | None:
  return float(value) if math.isfinite(value) else None


def _require(
  given: Mapping[str, Any], names: tuple[str, ...], owner: str
) -> None:
  missing = [name for name in names if name not in given]
  if missing:
    raise ValueError(f"{owner} lacks {missing}; it has {sorted(given)}.")
