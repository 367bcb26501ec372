"""What the measurements say: medians, ratios, bars, as text.

Pure: reports in, text out.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

OURS = "ours"
# The most that our peak may be of the best other library's.
MEMORY_BAR = 0.5
_LN_2 = 0.693147
_MAX_LOSS_ERROR = 1e-4
MIB = 2**20

# (work, library, repetition) to what `runs.run` returned.
Key = tuple[str, str, int]
Reports = Mapping[Key, Mapping[str, Any]]


class Skipped(Exception):
  """A library that cannot be measured; its text is the reason."""


class Spread(NamedTuple):
  """Of the repetitions of one figure."""

  median: float
  low: float
  high: float

  @classmethod
  def of(cls, values: Sequence[float]) -> "Spread":
    return cls(statistics.median(values), min(values), max(values))


class Bar(NamedTuple):
  """What was to be reached, and what was.

  Attributes:
    text: Of what.
    wanted: The bar.
    found: The figure, or None if there is none.
    is_at_least: Whether more is better.
  """

  text: str
  wanted: float
  found: float | None
  is_at_least: bool = True

  @property
  def verdict(self) -> str:
    """ "reached", "missed" or "not measured"."""
    if self.found is None:
      return "not measured"
    is_reached = (
      self.found >= self.wanted
      if self.is_at_least
      else self.found <= self.wanted
    )
    return "reached" if is_reached else "missed"


def figures(reports: Reports, figure: str) -> dict[tuple[str, str], Spread]:
  """The spread of a figure over the repetitions, by (work, library)."""
  values: dict[tuple[str, str], list[float]] = {}
  for (work, library, _), report in reports.items():
    if figure in report:
      values.setdefault((work, library), []).append(report[figure])
  return {key: Spread.of(found) for key, found in values.items()}


def ratios(reports: Reports, figure: str) -> dict[tuple[str, str], Spread]:
  """How many times ours the others are, from the same repetition each time."""
  values: dict[tuple[str, str], list[float]] = {}
  for (work, library, repetition), report in reports.items():
    ours = reports.get((work, OURS, repetition), {})
    if library != OURS and figure in report and figure in ours:
      ratio = report[figure] / ours[figure]
      values.setdefault((work, library), []).append(ratio)
  return {key: Spread.of(found) for key, found in values.items()}


def check(reports: Reports) -> list[str]:
  """What shows that a run was not on the same work; nothing if all is well.

  Everybody must have scored the same number of answer tokens, and begin at
  ln 2, as policy and reference begin as one model.
  """
  complaints = []
  for (work, library, repetition), report in reports.items():
    if "error" in report:
      continue
    name = f"{work}, {library}, repetition {repetition}"
    first = report["losses"][0] if report["losses"] else float("nan")
    if not abs(first - _LN_2) <= _MAX_LOSS_ERROR:
      complaints.append(f"{name}: the first loss is {first}, not ln 2.")
    ours = reports.get((work, OURS, repetition), {})
    expected = ours.get("answer_tokens", report["answer_tokens"])
    if report["answer_tokens"] != expected:
      complaints.append(
        f"{name}: {report['answer_tokens']} answer tokens, ours {expected}."
      )
  return complaints


def bars(reports: Reports, wanted: Mapping[str, float]) -> list[Bar]:
  """The bars of speed and memory.

  Args:
    reports: Of the runs with the reference in the step.
    wanted: Of each kind of work, the ratio of CPU-seconds a pair.
  """
  found = []
  speed = ratios(reports, "cpu_seconds_per_pair")
  peaks = figures(reports, "peak_bytes")
  libraries = dict.fromkeys(key[1] for key in reports if key[1] != OURS)
  for work, ratio in wanted.items():
    for library in libraries:
      spread = speed.get((work, library))
      found.append(
        Bar(
          f"({work}) {library}: CPU-seconds a pair over ours",
          ratio,
          spread and spread.median,
        )
      )
  for work in dict.fromkeys(key[0] for key in reports):
    others = [
      peaks[work, library].median
      for library in libraries
      if (work, library) in peaks
    ]
    ours = peaks.get((work, OURS))
    share = ours.median / min(others) if ours and others else None
    text = f"({work}) our peak memory over the best other one's"
    found.append(Bar(text, MEMORY_BAR, share, is_at_least=False))
  return found


def markdown(reports: Reports, titles: Mapping[str, str]) -> str:
  """One table a kind of work, in the order of the reports."""
  speed = figures(reports, "cpu_seconds_per_pair")
  wall = figures(reports, "wall_seconds_per_pair")
  peak = figures(reports, "peak_bytes")
  start = figures(reports, "seconds_to_first_step")
  start_cpu = figures(reports, "cpu_seconds_to_first_step")
  over_ours = ratios(reports, "cpu_seconds_per_pair")
  lines = []
  for work in dict.fromkeys(key[0] for key in reports):
    lines += [
      f"### ({work}) {titles[work]}",
      "",
      "| library | pairs per CPU-s | CPU-s per pair (low to high) "
      "| CPU-s over ours | pairs per wall s | peak MiB "
      "| s to first step (CPU-s) | first loss |",
      "|---|---|---|---|---|---|---|---|",
    ]
    for library in dict.fromkeys(k[1] for k in reports if k[0] == work):
      key = work, library
      mine = [r for k, r in reports.items() if k[:2] == key]
      if key not in speed:
        reason = next((r["error"] for r in mine if "error" in r), "no report")
        reason = reason.replace("|", "/")
        lines.append(f"| {library} | skipped: {reason} | | | | | | |")
        continue
      ratio = over_ours.get(key)
      losses = {f"{r['losses'][0]:.4f}" for r in mine if r.get("losses")}
      lines.append(
        f"| {library} | {1 / speed[key].median:.3f} | {_span(speed[key])} "
        f"| {_span(ratio, 2) if ratio else '1'} | {1 / wall[key].median:.3f} "
        f"| {peak[key].median / MIB:.0f} | {start[key].median:.1f} "
        f"({start_cpu[key].median:.1f}) | {', '.join(sorted(losses))} |"
      )
    lines.append("")
  return "\n".join(lines)


def bars_markdown(found: Sequence[Bar]) -> str:
  """The bars as a table."""
  lines = ["| bar | wanted | found | |", "|---|---|---|---|"]
  for bar in found:
    sign = "at least" if bar.is_at_least else "at most"
    value = "" if bar.found is None else f"{bar.found:.2f}"
    lines.append(
      f"| {bar.text} | {sign} {bar.wanted:g} | {value} | {bar.verdict} |"
    )
  return "\n".join(lines) + "\n"


def _span(spread: Spread, digits: int = 3) -> str:
  if spread.low == spread.high:
    return f"{spread.median:.{digits}f}"
  low, high = (f"{x:.{digits}f}" for x in spread[1:])
  return f"{spread.median:.{digits}f} ({low} to {high})"
