"""What a study's numbers say, in sentences computed from them.

Nothing here knows how a study should come out: each claim is counted over the
seeds, and holds or does not.
"""

import decimal
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dpop_jax import study as study_lib

_NAMES = {"dpo": "DPO", "ipo": "IPO", "slic": "SLiC", "dpop": "DPOP"}

INTRODUCTION = (
  "Each loss trained the same supervised model on the same pairs of answers. "
  "The two answers of a pair differ in one place, the edit; what follows it is "
  "right, but in the rejected answer it stands behind something wrong. The "
  "paper argues that DPO then makes what follows less likely in both, and DPOP "
  "adds a penalty on chosen answers that become less likely than they were."
)


class Claim(NamedTuple):
  """A statement about one run, and in which seeds it is so.

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


class Table(NamedTuple):
  """Column names and rows of text; the first column names the row."""

  header: tuple[str, ...]
  rows: tuple[tuple[str, ...], ...]


def name_of(loss: str) -> str:
  """How a loss is written, "DPOP" for "dpop"."""
  return _NAMES.get(loss, loss)


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
  reference = study.reference
  before = reference.metrics

  def below(loss: str, metric: str) -> tuple[bool, ...]:
    return tuple(v < before[metric] for v in study.final(loss, metric))

  def not_below(loss: str, metric: str) -> tuple[bool, ...]:
    return tuple(v >= before[metric] for v in study.final(loss, metric))

  found = []
  if "dpo" in study.losses:
    found += [
      Claim(
        "DPO makes the chosen answers less likely than the reference does.",
        below("dpo", study_lib.CHOSEN_LOGP),
      ),
      Claim(
        "DPO makes the tokens after the edit less likely.",
        below("dpo", study_lib.AFTER_EDIT),
      ),
    ]
  if "dpop" in study.losses:
    found += [
      Claim(
        "DPOP keeps the chosen answers at least as likely.",
        not_below("dpop", study_lib.CHOSEN_LOGP),
      ),
      Claim(
        "DPOP keeps the tokens after the edit at least as likely.",
        not_below("dpop", study_lib.AFTER_EDIT),
      ),
      Claim(
        "DPOP answers at least as many questions rightly as the reference.",
        tuple(v >= reference.exact_match for v in study.exact_match("dpop")),
      ),
    ]
  return found


def verdict(study: study_lib.Study) -> str:
  """One or two sentences: does the paper's effect show in this study?"""
  found = claims(study)
  if not {"dpo", "dpop"} <= set(study.losses):
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
  if len(failed) == len(found):
    return f"The paper's effect does not show here. {which}"
  return (
    f"The paper's effect shows in part: {len(found) - len(failed)} of "
    f"{len(found)} statements hold in at least two thirds of the seeds. {which}"
  )


def observations(study: study_lib.Study) -> list[str]:
  """For each loss, what became of the reference, in one sentence."""
  reference = study.reference
  sentences = []
  for loss in study.losses:
    chosen = study.final(loss, study_lib.CHOSEN_LOGP)
    after_edit = study.final(loss, study_lib.AFTER_EDIT)
    exact_match = study.exact_match(loss)
    sentences.append(
      f"{name_of(loss)}: the log-prob of a chosen answer went from "
      f"{number(reference.metrics[study_lib.CHOSEN_LOGP])} to "
      f"{spread(chosen)} nats and "
      f"{_direction(chosen, reference.metrics[study_lib.CHOSEN_LOGP])}; per "
      "token after the edit from "
      f"{number(reference.metrics[study_lib.AFTER_EDIT])} to "
      f"{spread(after_edit)}, which "
      f"{_direction(after_edit, reference.metrics[study_lib.AFTER_EDIT])}; "
      f"exact match from {percent(reference.exact_match)} to "
      f"{spread(exact_match, percent)}."
    )
  return sentences


def resolution(study: study_lib.Study) -> str:
  """How fine exact match can be measured with so many questions."""
  n = study.num_questions
  p = study.reference.exact_match
  error = math.sqrt(p * (1 - p) / n)
  return (
    f"Exact match is over {n:,} questions: one question is {percent(1 / n)}, "
    f"and the standard error at the reference's rate is {percent(error)}."
  )


def results(study: study_lib.Study) -> Table:
  """The reference and each loss: log-probs and exact match after training."""
  columns = {
    "chosen": study_lib.CHOSEN_LOGP,
    "rejected": study_lib.REJECTED_LOGP,
    "before edit": study_lib.BEFORE_EDIT,
    "at edit": study_lib.AT_EDIT,
    "after edit": study_lib.AFTER_EDIT,
  }
  reference = study.reference
  rows = [
    (
      "SFT reference",
      *(number(reference.metrics[metric]) for metric in columns.values()),
      percent(reference.exact_match),
    )
  ]
  for loss in study.losses:
    rows.append(
      (
        name_of(loss),
        *(spread(study.final(loss, metric)) for metric in columns.values()),
        spread(study.exact_match(loss), percent),
      )
    )
  return Table(("", *columns, "exact match"), tuple(rows))


def settings(study: study_lib.Study) -> Table:
  """The settings, those of nested mappings by their dotted names."""
  rows = []

  def add(prefix: str, value) -> None:
    if isinstance(value, Mapping):
      for key, inner in value.items():
        add(f"{prefix}.{key}" if prefix else str(key), inner)
    else:
      rows.append((prefix, str(value)))

  add("", study.settings)
  return Table(("setting", "value"), tuple(rows))


def markdown(study: study_lib.Study) -> str:
  """The whole report as Markdown, without its plots."""
  found = claims(study)
  parts = [
    "# Losses compared",
    verdict(study),
    INTRODUCTION,
    *(["## Statements", _markdown_claims(found)] if found else []),
    "## Results",
    f"Mean over {seeds(len(study.seeds))} (least to greatest), in nats: the "
    "log-prob of an answer (chosen, rejected), and per token of the chosen "
    "answer before, at and after the edit. Held-out pairs and questions.",
    _markdown_table(results(study)),
    "\n".join(f"- {sentence}" for sentence in observations(study)),
    resolution(study),
    "## Settings",
    _markdown_table(settings(study)),
    "The plots are in report.html, the numbers in summary.json.",
  ]
  return "\n\n".join(parts) + "\n"


def _markdown_claims(found: Sequence[Claim]) -> str:
  rows = tuple((claim.text, claim.count) for claim in found)
  return _markdown_table(Table(("statement", "holds in"), rows))


def _markdown_table(table: Table) -> str:
  lines = [table.header, ("---",) * len(table.header), *table.rows]
  return "\n".join(
    "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |"
    for line in lines
  )


def _direction(values: Sequence[float | int], start: float | int) -> str:
  num_below = sum(value < start for value in values)
  num_above = sum(value > start for value in values)
  if num_below == len(values):
    return f"is lower in {'each' if num_below > 1 else 'the one'} seed"
  if num_above == len(values):
    return f"is higher in {'each' if num_above > 1 else 'the one'} seed"
  return f"is lower in {num_below} and higher in {num_above} of {len(values)}"
