"""A study's numbers in tables, for a page, for Markdown and for a terminal."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from dpop_jax import report_text
from dpop_jax import study as study_lib

_NONE = "–"
_REFERENCE = "reference"


class Table(NamedTuple):
  """Column names and rows of text; the first column names the row."""

  header: tuple[str, ...]
  rows: tuple[tuple[str, ...], ...]


class _Column(NamedTuple):
  """A result: its title, the reference's value, and those of a setting."""

  title: str
  reference: float | int | None
  values: Callable[[str], Sequence[float | int]]
  write: Callable[[float | int], str] = report_text.number


def results(study: study_lib.Study) -> Table:
  """The reference and each setting: what is left after training."""
  return _table(study, study.shown, first="")


def ablation(study: study_lib.Study, key: str, group: study_lib.Group) -> Table:
  """The same of settings that differ in one key, by its value."""
  name = report_text.key_name(key)
  return _table(
    study,
    group.settings,
    first=name,
    row_name=lambda s: report_text.values_text({key: s.values[key]}),
  )


def brief(study: study_lib.Study) -> Table:
  """The same in few columns."""
  return _table(study, study.shown, first="", is_brief=True)


def options(study: study_lib.Study) -> Table:
  """What was set, that of nested mappings by dotted names."""
  rows = []

  def add(prefix: str, value) -> None:
    if isinstance(value, Mapping):
      for key, inner in value.items():
        add(f"{prefix}.{key}" if prefix else str(key), inner)
    else:
      rows.append((prefix, str(value)))

  add("", study.options)
  return Table(("setting", "value"), tuple(rows))


def ablations(
  study: study_lib.Study,
) -> list[tuple[str, list[study_lib.Group]]]:
  """The varied keys with the series of settings that show what they do."""
  found = [(key, study.series(key)) for key in study.varied]
  return [(key, groups) for key, groups in found if groups]


def markdown(study: study_lib.Study) -> str:
  """The whole report as Markdown, without its plots."""
  found = report_text.claims(study)
  statements = Table(
    ("statement", "holds in"),
    tuple((claim.text, claim.count) for claim in found),
  )
  parts = [
    "# Settings compared",
    report_text.verdict(study),
    report_text.INTRODUCTION,
    *(["## Statements", _markdown(statements)] if found else []),
    "## Results",
    f"Mean over {report_text.seeds(len(study.seeds))} (least to greatest). "
    f"{units(study)}",
    _markdown(results(study)),
    "\n".join(f"- {text}" for text in report_text.observations(study)),
    report_text.resolution(study),
  ]
  for key, groups in ablations(study):
    parts.append(f"## By {report_text.key_name(key)}")
    for group in groups:
      parts += [
        report_text.values_text(group.values) + ":",
        _markdown(ablation(study, key, group)),
      ]
  parts += [
    "## Options",
    _markdown(options(study)),
    "The plots are in report.html, the numbers in report.json.",
  ]
  return "\n\n".join(part for part in parts if part) + "\n"


def units(study: study_lib.Study) -> str:
  """What the columns are, in a sentence or two."""
  per_token = (
    ", and per token of the chosen answer before, at and after the edit"
    if study.has(study_lib.AFTER_EDIT)
    else ""
  )
  return (
    "On held-out pairs, in nats: the log-ratio of whole answers to the "
    f"reference (chosen, rejected), the chosen answer's log-prob{per_token}"
    ". Accuracy is the share of pairs whose chosen answer gained more than the "
    "rejected one."
  )


def plain(table: Table) -> str:
  """A table in aligned columns, for a terminal."""
  lines = [table.header, *table.rows]
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  return "\n".join(
    "  ".join(
      cell.ljust(width) if i == 0 else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(line, widths, strict=True))
    ).rstrip()
    for line in lines
  )


def _columns(study: study_lib.Study, *, is_brief: bool) -> list[_Column]:
  def logratio(metric):
    return lambda name: study.logratios(name, metric)

  def final(metric):
    return lambda name: study.final(name, metric)

  start = study.reference.metrics
  columns = [
    _Column("chosen log-ratio", 0.0, logratio(study_lib.CHOSEN_LOGP)),
    _Column("rejected log-ratio", 0.0, logratio(study_lib.REJECTED_LOGP)),
  ]
  regions = {
    "before edit": study_lib.BEFORE_EDIT,
    "at edit": study_lib.AT_EDIT,
    "after edit": study_lib.AFTER_EDIT,
  }
  if is_brief:
    regions = {"after edit": study_lib.AFTER_EDIT}
  else:
    metric = study_lib.CHOSEN_LOGP
    columns.append(_Column("chosen log-prob", start[metric], final(metric)))
  columns += [
    _Column(title, start[metric], final(metric))
    for title, metric in regions.items()
    if study.has(metric)
  ]
  columns.append(
    _Column("accuracy", None, final(study_lib.ACCURACY), report_text.percent)
  )
  if study.num_questions:
    columns.append(
      _Column(
        "exact match",
        study.reference.exact_match,
        study.exact_match,
        report_text.percent,
      )
    )
  return columns


def _table(study, settings, *, first, row_name=None, is_brief=False) -> Table:
  columns = _columns(study, is_brief=is_brief)
  row_name = row_name or (lambda s: report_text.label(study, s))
  rows = [
    (
      _REFERENCE,
      *(
        _NONE if c.reference is None else c.write(c.reference) for c in columns
      ),
    )
  ]
  for setting in settings:
    rows.append(
      (
        row_name(setting),
        *(report_text.spread(c.values(setting.name), c.write) for c in columns),
      )
    )
  return Table((first, *(column.title for column in columns)), tuple(rows))


def _markdown(table: Table) -> str:
  lines = [table.header, ("---",) * len(table.header), *table.rows]
  return "\n".join(
    "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |"
    for line in lines
  )
