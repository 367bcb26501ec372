"""A comparison of settings: what was measured, by setting, seed and step.

Plain numbers, whoever measured them; `report` turns them into pages.
"""

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

CHOSEN_LOGP = "logps/chosen"
REJECTED_LOGP = "logps/rejected"
ACCURACY = "rewards/accuracies"
ACTIVE_FRACTION = "dpop/active_fraction"
PENALTY = "dpop/penalty"
BEFORE_EDIT = "logps_per_token/chosen_before_edit"
AT_EDIT = "logps_per_token/chosen_at_edit"
AFTER_EDIT = "logps_per_token/chosen_after_edit"

# Pairs may have no token in one of these, and then there is no such metric.
REGIONS = (BEFORE_EDIT, AT_EDIT, AFTER_EDIT)
METRICS = (CHOSEN_LOGP, REJECTED_LOGP, ACCURACY, ACTIVE_FRACTION, PENALTY)

LOSS, BETA, LAMBDA = "loss.name", "loss.beta", "loss.dpop_lambda"
# More lines than this in a plot cannot be told apart.
_MOST_LINES = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference:
  """The model that every run starts from.

  Attributes:
    metrics: Log-probs on the held-out pairs, in nats: CHOSEN_LOGP,
      REJECTED_LOGP and those of REGIONS that there are.
    exact_match: Share of the questions answered rightly, 0 to 1; None if none
      were asked.
  """

  metrics: Mapping[str, float | int]
  exact_match: float | int | None = None

  def __post_init__(self):
    _require(self.metrics, (CHOSEN_LOGP, REJECTED_LOGP), "The reference")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
  """What was set in the runs of one kind, by config key.

  Attributes:
    name: Names it; no two are alike.
    values: "loss.name", the options of this loss, and whatever else differs
      between the settings of a study. Not the seed.
  """

  name: str
  values: Mapping[str, Any]

  def __post_init__(self):
    _require(self.values, (LOSS,), f"The setting {self.name!r}")

  @property
  def loss(self) -> str:
    return self.values[LOSS]

  @property
  def is_dpo(self) -> bool:
    """Whether it is DPO, also as DPOP with a penalty of weight 0."""
    return self.loss == "dpo" or (
      self.loss == "dpop" and not self.values.get(LAMBDA, 1.0)
    )

  @property
  def is_dpop(self) -> bool:
    """Whether it is DPOP, with a penalty that counts."""
    return self.loss == "dpop" and not self.is_dpo


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """One training with one setting and one seed.

  Attributes:
    setting: The name of the setting.
    seed: The seed of the run.
    records: By step, from the first evaluation to the last: "step", METRICS and
      those of REGIONS that there are, on the held-out pairs. Other keys do no
      harm.
    exact_match: Share of the questions answered rightly in the end, or None.
  """

  setting: str
  seed: int
  records: tuple[Mapping[str, float | int], ...]
  exact_match: float | int | None = None

  def __post_init__(self):
    who = f"{self.setting!r} with seed {self.seed}"
    if not self.records:
      raise ValueError(
        f"The run of {who} has no records; it needs at least the evaluation "
        "after the last step."
      )
    for record in self.records:
      _require(record, ("step", *METRICS), f"A record of {who}")
    if list(self.steps) != sorted(set(self.steps)):
      raise ValueError(f"The steps of {who} must increase, got {self.steps}.")

  @property
  def steps(self) -> tuple[int, ...]:
    return tuple(int(record["step"]) for record in self.records)

  @property
  def final(self) -> Mapping[str, float | int]:
    """The last record."""
    return self.records[-1]


class Failure(NamedTuple):
  """A run that did not reach its end, and never would.

  Attributes:
    setting: The name of the setting.
    seed: The seed of the run.
    reason: A sentence.
  """

  setting: str
  seed: int
  reason: str


class Group(NamedTuple):
  """Settings that are shown together.

  Attributes:
    values: What they have in common and other groups have not, by config key.
    settings: In the order they are to be shown.
  """

  values: Mapping[str, Any]
  settings: tuple[Setting, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
  """Several settings, each trained with the same seeds from one reference.

  Attributes:
    settings: In the order they are to be shown.
    reference: The model before preference training.
    runs: One per setting and seed, in any order.
    failures: The runs that are missing.
    options: What else was set, for the record; values may be mappings again.
    num_questions: How many questions exact match was measured on; 0 for none.
    example: A pair ("prompt", "chosen", "rejected") to show, or None.
  """

  settings: tuple[Setting, ...]
  reference: Reference
  runs: tuple[Run, ...]
  failures: tuple[Failure, ...] = ()
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  num_questions: int = 0
  example: Mapping[str, str] | None = None

  def __post_init__(self):
    if not self.runs:
      raise ValueError("A study needs at least one run, got none.")
    if self.num_questions < 0:
      raise ValueError(
        f"num_questions must be 0 or more, got {self.num_questions}."
      )
    if self.example is not None:
      _require(self.example, ("prompt", "chosen", "rejected"), "The example")
    names = [setting.name for setting in self.settings]
    seeds = {
      name: sorted(
        found.seed
        for found in (*self.runs, *self.failures)
        if found.setting == name
      )
      for name in names
    }
    unknown = sorted({run.setting for run in self.runs} - set(names))
    if unknown or len(set(names)) < len(names):
      raise ValueError(
        f"Every run needs one setting of its name; there are {names}, and runs "
        f"of {unknown or 'two of one name'}."
      )
    for name in names:
      if seeds[name] != seeds[names[0]] or not seeds[name]:
        raise ValueError(
          "Every setting needs one run per seed, the same seeds for all: "
          f"{names[0]!r} has {seeds[names[0]]}, but {name!r} has {seeds[name]}."
        )
      runs = self.runs_of(name)
      if len({run.steps for run in runs}) > 1:
        raise ValueError(
          f"The runs of {name!r} must be evaluated at the same steps, got "
          f"{[run.steps for run in runs]}."
        )
    asked = {run.exact_match is not None for run in self.runs}
    asked |= {self.reference.exact_match is not None}
    if asked != {self.num_questions > 0}:
      raise ValueError(
        f"With num_questions={self.num_questions}, exact match must be there "
        "for the reference and every run, or for none where it is 0."
      )

  @property
  def seeds(self) -> tuple[int, ...]:
    found = {run.seed for run in self.runs}
    return tuple(sorted(found | {failure.seed for failure in self.failures}))

  @property
  def shown(self) -> tuple[Setting, ...]:
    """The settings of which a run reached its end, by loss and by values."""
    losses, keys = self.losses, self.varied

    def place(setting):
      values = [setting.values[key] for key in keys if key in setting.values]
      return losses.index(setting.loss), list(map(_rank, values))

    shown = [s for s in self.settings if self.runs_of(s.name)]
    return tuple(sorted(shown, key=place))

  @property
  def losses(self) -> tuple[str, ...]:
    """Names of losses, in the order of their first setting."""
    return tuple(dict.fromkeys(setting.loss for setting in self.settings))

  @property
  def varied(self) -> tuple[str, ...]:
    """The keys, without the loss, that have several values."""
    return varied(self.settings)

  def runs_of(self, name: str) -> tuple[Run, ...]:
    """The runs of a setting, by seed."""
    runs = (run for run in self.runs if run.setting == name)
    return tuple(sorted(runs, key=lambda run: run.seed))

  def has(self, metric: str) -> bool:
    """Whether all runs, and for log-probs the reference, have a metric."""
    return all(metric in run.final for run in self.runs) and (
      metric not in REGIONS or metric in self.reference.metrics
    )

  def final(self, name: str, metric: str) -> list[float | int]:
    """A metric after the last step, one value per seed; see `has`."""
    return [run.final[metric] for run in self.runs_of(name)]

  def exact_match(self, name: str) -> list[float | int]:
    """Exact match after the last step, one per seed, if it was measured."""
    return [
      run.exact_match
      for run in self.runs_of(name)
      if run.exact_match is not None
    ]

  def logratios(self, name: str, metric: str) -> list[float | int]:
    """Mean log-ratio of whole answers to the reference, one per seed.

    Args:
      name: Of the setting.
      metric: CHOSEN_LOGP or REJECTED_LOGP.
    """
    start = self.reference.metrics[metric]
    return [value - start for value in self.final(name, metric)]

  def panels(self) -> list[Group]:
    """The settings, few enough together to be told apart in a plot.

    Where there are many, those with another value of a key that all of them
    have (not the loss) are apart.
    """
    shown = self.shown
    keys = () if len(shown) <= _MOST_LINES else self.varied
    shared = [key for key in keys if all(key in s.values for s in shown)]
    return [
      Group(values, settings) for values, settings in _grouped(shown, shared)
    ]

  def series(self, key: str) -> list[Group]:
    """Settings that differ in `key` only, by what they have in common."""
    shown = [setting for setting in self.shown if key in setting.values]
    others = [LOSS, *(other for other in self.varied if other != key)]
    return [
      Group(values, settings)
      for values, settings in _grouped(shown, others)
      if len(settings) > 1
    ]

  def summary(self) -> dict[str, Any]:
    """All of it in what JSON can hold; None for nan and inf."""
    return {
      "seeds": list(self.seeds),
      "num_questions": self.num_questions,
      "reference": {
        **{name: _finite(value) for name, value in self._logps().items()},
        "exact_match": _finite(self.reference.exact_match),
      },
      "settings": {s.name: self._summary_of(s) for s in self.settings},
      "failures": [failure._asdict() for failure in self.failures],
      "options": dict(self.options),
    }

  def _logps(self):
    names = (CHOSEN_LOGP, REJECTED_LOGP, *REGIONS)
    metrics = self.reference.metrics
    return {name: metrics[name] for name in names if name in metrics}

  def _summary_of(self, setting):
    runs = self.runs_of(setting.name)
    results = {
      "chosen_logratio": self.logratios(setting.name, CHOSEN_LOGP),
      "rejected_logratio": self.logratios(setting.name, REJECTED_LOGP),
      **{
        name: self.final(setting.name, name)
        for name in (*METRICS, *REGIONS)
        if self.has(name)
      },
    }
    if self.num_questions:
      results["exact_match"] = self.exact_match(setting.name)
    return {
      "values": dict(setting.values),
      "seeds": [run.seed for run in runs],
      "final": {name: spread(values) for name, values in results.items()},
      "curves": [
        {
          name: [_finite(record.get(name)) for record in run.records]
          for name in ("step", *METRICS, *REGIONS)
        }
        for run in runs
      ],
    }


def varied(settings: Sequence[Setting]) -> tuple[str, ...]:
  """The keys, without the loss, that have several values among settings."""
  values: dict[str, set] = {}
  for setting in settings:
    for key, value in setting.values.items():
      values.setdefault(key, set()).add(repr(value))
  return tuple(k for k, found in values.items() if len(found) > 1 and k != LOSS)


def in_order(values: Iterable[Any]) -> list[Any]:
  """Different values of a config key: numbers by size, then others."""
  return sorted(dict.fromkeys(values), key=_rank)


def spread(values: Sequence[float | int]) -> dict[str, Any]:
  """Values by seed with their mean, and sample standard deviation if several.

  None for what is not finite, or not there.
  """
  is_there = bool(values) and all(math.isfinite(v) for v in values)
  several = is_there and len(values) > 1
  return {
    "by_seed": [_finite(value) for value in values],
    "mean": statistics.fmean(values) if is_there else None,
    "std": statistics.stdev(values) if several else None,
    "min": min(values) if is_there else None,
    "max": max(values) if is_there else None,
  }


def _grouped(settings, keys):
  """(values, settings) of equal values of `keys`, in order."""
  groups: dict[str, tuple[dict, list]] = {}
  for setting in settings:
    values = {key: setting.values[key] for key in keys if key in setting.values}
    groups.setdefault(repr(values), (values, []))[1].append(setting)
  return [(values, tuple(found)) for values, found in groups.values()]


def _rank(value):
  is_number = isinstance(value, int | float)
  return (0, value, "") if is_number else (1, 0, str(value))


def _finite(value: float | int | None) -> float | int | None:
  if value is None or not math.isfinite(value):
    return None
  return value


def _require(
  given: Mapping[str, Any], names: Sequence[str], owner: str
) -> None:
  missing = [name for name in names if name not in given]
  if missing:
    raise ValueError(f"{owner} lacks {missing}; it has {sorted(given)}.")
