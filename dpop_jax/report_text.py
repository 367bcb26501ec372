"""What a study's numbers say, in sentences computed from them.

Nothing here knows how a study should come out: each claim is counted over the
seeds, and holds or does not.
"""

import decimal
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dpop_jax import study as study_lib

_NAMES = {
  "dpo": "DPO",
  "cdpo": "cDPO",
  "ipo": "IPO",
  "ipo_mean": "IPO (mean)",
  "slic_hinge": "SLiC (hinge)",
  "slic": "SLiC",
  "dpop": "DPOP",
}
_SYMBOLS = {
  study_lib.BETA: "β",
  study_lib.LAMBDA: "λ",
  "optimizer.peak_learning_rate": "learning rate",
}

# More are not told one by one in the verdict.
_MOST_FAILED = 5

INTRODUCTION = (
  "Each setting trained the same model on the same pairs of answers. Where the "
  "two answers of a pair differ in few tokens, the edit, what follows the edit "
  "is alike in both, but in the rejected answer it stands behind something "
  "wrong. The paper argues that DPO then makes what follows less likely in "
  "both, and DPOP adds a penalty on chosen answers that become less likely "
  "than they were."
)


class Claim(NamedTuple):
  """A statement about one setting, and in which seeds it is so.

  Attributes:
    text: The statement.
    holds: One flag per seed.
  """

  text: str
  holds: tuple[bool, ...]

  @property
  def is_shown(self) -> bool:
    """Whether it holds in at least two thirds of the seeds."""
    return 3 * sum(self.holds) >= 2 * len(self.holds)

  @property
  def count(self) -> str:
    return f"{sum(self.holds)} of {seeds(len(self.holds))}"


def name_of(loss: str) -> str:
  """How a loss is written, "DPOP" for "dpop"."""
  return _NAMES.get(loss, loss)


def key_name(key: str) -> str:
  """How a config key is written: "λ", or its last part."""
  return _SYMBOLS.get(key, key.rsplit(".", 1)[-1].replace("_", " "))


def values_text(values: Mapping[str, Any]) -> str:
  """ "DPOP, λ = 50", from config keys and values."""
  parts = [
    name_of(value)
    if key == study_lib.LOSS
    else f"{key_name(key)} = {_of(value)}"
    for key, value in values.items()
  ]
  return ", ".join(parts)


def label(study: study_lib.Study, setting: study_lib.Setting) -> str:
  """What tells a setting from the others: its loss, and what is varied."""
  keys = (study_lib.LOSS, *study.varied)
  return values_text(
    {key: setting.values[key] for key in keys if key in setting.values}
  )


def number(value: float | int) -> str:
  """Three significant digits with a true minus; "not finite" for nan or inf."""
  if not math.isfinite(value):
    return "not finite"
  # Adding 0.0 turns -0.0 into 0.0; a decimal is written without an exponent.
  digits = decimal.Decimal(f"{value + 0.0:.3g}")
  return f"{digits:f}".replace("-", "\N{MINUS SIGN}")


def percent(value: float | int) -> str:
  """A share as per cent, with one decimal."""
  if not math.isfinite(value):
    return "not finite"
  return f"{100 * value:.1f} %"


def seeds(count: int) -> str:
  """ "1 seed", "3 seeds"."""
  return f"{count} seed" if count == 1 else f"{count} seeds"


def spread(values: Sequence[float | int], write=number) -> str:
  """The mean, and the least and greatest of several values in brackets."""
  mean = sum(values) / len(values)
  if len(values) == 1 or not math.isfinite(mean):
    return write(mean)
  return f"{write(mean)} ({write(min(values))} to {write(max(values))})"


def claims(study: study_lib.Study) -> list[Claim]:
  """What the paper says of DPO and DPOP, counted over the seeds.

  Only of those that the study holds: for DPO that the chosen answers become
  less likely than under the reference, and the tokens after the edit too; for
  DPOP that neither happens and that no accuracy is lost.
  """
  start = study.reference.metrics
  found = []
  for setting in study.shown:
    name, text = setting.name, label(study, setting)
    chosen = study.final(name, study_lib.CHOSEN_LOGP)
    before = start[study_lib.CHOSEN_LOGP]
    after_edit, after_before = [], 0.0
    if study.has(study_lib.AFTER_EDIT):
      after_edit = study.final(name, study_lib.AFTER_EDIT)
      after_before = start[study_lib.AFTER_EDIT]
    if setting.is_dpo:
      found.append(
        Claim(
          f"{text} makes the chosen answers less likely than the reference "
          "does.",
          tuple(value < before for value in chosen),
        )
      )
      if after_edit:
        found.append(
          Claim(
            f"{text} makes the tokens after the edit less likely.",
            tuple(value < after_before for value in after_edit),
          )
        )
    if setting.is_dpop:
      found.append(
        Claim(
          f"{text} keeps the chosen answers at least as likely.",
          tuple(value >= before for value in chosen),
        )
      )
      if after_edit:
        found.append(
          Claim(
            f"{text} keeps the tokens after the edit at least as likely.",
            tuple(value >= after_before for value in after_edit),
          )
        )
      reference = study.reference.exact_match
      if reference is not None:
        found.append(
          Claim(
            f"{text} answers at least as many questions rightly as the "
            "reference.",
            tuple(v >= reference for v in study.exact_match(name)),
          )
        )
  return found


def verdict(study: study_lib.Study) -> str:
  """One or two sentences: does the paper's effect show in this study?"""
  found = claims(study)
  shown = study.shown
  if not (any(s.is_dpo for s in shown) and any(s.is_dpop for s in shown)):
    return (
      "The paper's effect is a difference between DPO and DPOP; this study "
      "does not hold both."
    )
  failed = [claim for claim in found if not claim.is_shown]
  if not failed:
    return (
      f"The paper's effect shows: each of the {len(found)} statements below "
      "holds in at least two thirds of the seeds."
    )
  which = " ".join(
    f"“{claim.text}” holds in {claim.count} only." for claim in failed
  )
  if len(failed) > _MOST_FAILED:
    which = "The statements that do not are marked below."
  if len(failed) == len(found):
    return f"The paper's effect does not show here. {which}"
  return (
    f"The paper's effect shows in part: {len(found) - len(failed)} of "
    f"{len(found)} statements hold in at least two thirds of the seeds. {which}"
  )


def observations(study: study_lib.Study) -> list[str]:
  """For each setting, what became of the reference, in one sentence."""
  start = study.reference.metrics
  sentences = []
  for setting in study.shown:
    name = setting.name
    chosen = study.final(name, study_lib.CHOSEN_LOGP)
    before = start[study_lib.CHOSEN_LOGP]
    parts = [
      f"{label(study, setting)}: the log-prob of a chosen answer went from "
      f"{number(before)} to {spread(chosen)} nats and "
      f"{_direction(chosen, before)}"
    ]
    if study.has(study_lib.AFTER_EDIT):
      after_edit = study.final(name, study_lib.AFTER_EDIT)
      before = start[study_lib.AFTER_EDIT]
      parts.append(
        f"per token after the edit from {number(before)} to "
        f"{spread(after_edit)}, which {_direction(after_edit, before)}"
      )
    if study.reference.exact_match is not None:
      parts.append(
        f"exact match from {percent(study.reference.exact_match)} to "
        f"{spread(study.exact_match(name), percent)}"
      )
    sentences.append("; ".join(parts) + ".")
  for failure in study.failures:
    sentences.append(
      f"{failure.setting} with seed {failure.seed} did not reach its end: "
      f"{failure.reason}"
    )
  return sentences


def resolution(study: study_lib.Study) -> str:
  """How fine exact match can be measured with so many questions, or ""."""
  p = study.reference.exact_match
  if p is None:
    return ""
  n = study.num_questions
  error = math.sqrt(p * (1 - p) / n)
  return (
    f"Exact match is over {n:,} questions: one question is {percent(1 / n)}, "
    f"and the standard error at the reference's rate is {percent(error)}."
  )


def _of(value: Any) -> str:
  is_float = isinstance(value, float)
  return f"{value:g}".replace("e-0", "e-") if is_float else str(value)


def _direction(values: Sequence[float | int], start: float | int) -> str:
  num_below = sum(value < start for value in values)
  num_above = sum(value > start for value in values)
  if num_below == len(values):
    return f"is lower in {'each' if num_below > 1 else 'the one'} seed"
  if num_above == len(values):
    return f"is higher in {'each' if num_above > 1 else 'the one'} seed"
  return f"is lower in {num_below} and higher in {num_above} of {len(values)}"
