"""A study's plots as SVG, in the colours of the page they are put in.

Each is one small panel, so that it can be read on a phone. Ink and grid take
their colours from the page (`currentColor`, `--grid`), so they fit light and
dark.
"""

import html
import io
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from dpop_jax import report_text
from dpop_jax import study as study_lib

_SIZE_INCHES = (5.2, 3.3)
# Stand-ins that are replaced in the SVG; nothing else has these colours.
_INK, _GRID = "#010203", "#040506"
_REFERENCE_COLOR = "#8b919b"
# Told apart by eyes of all kinds, on white and on black (after Okabe and Ito).
_COLORS = {
  "dpo": "#d55e00",
  "ipo": "#cc79a7",
  "slic_hinge": "#3d8fd1",
  "dpop": "#009e73",
}
_OTHER_COLORS = ("#e69f00", "#7a6fd0", "#b3a125", "#a0522d")
_LINES = ("-", "--", "-.", ":")
_FIRST_LINE = {"ipo": 1, "slic_hinge": 2}
_REGION_NAMES = {
  study_lib.BEFORE_EDIT: "before the edit",
  study_lib.AT_EDIT: "at the edit",
  study_lib.AFTER_EDIT: "after the edit",
}


class _Style(NamedTuple):
  """How a setting looks: of one loss in one hue, paler one after the other."""

  color: str
  alpha: float
  line: str
  label: str


def by_step(
  study: study_lib.Study,
  settings: Sequence[study_lib.Setting],
  metric: str,
  *,
  title: str,
  label: str,
) -> str:
  """A metric against steps: a line per setting, a band from least to greatest.

  Args:
    study: Where the numbers are.
    settings: Those to show.
    metric: One that all runs have.
    title: What the plot is called, for those who cannot see it; no two plots of
      a page may be called the same.
    label: The name of the vertical axis.

  Returns:
    An SVG element.
  """

  def draw(axes):
    if metric in study.reference.metrics:
      _reference_line(axes, study.reference.metrics[metric], "reference")
    for setting, style in _styled(study, settings):
      runs = study.runs_of(setting.name)
      values = [[record[metric] for record in run.records] for run in runs]
      columns = list(zip(*values, strict=True))
      axes.plot(
        runs[0].steps,
        [sum(column) / len(column) for column in columns],
        color=style.color,
        alpha=style.alpha,
        linestyle=style.line,
        linewidth=2.0,
        marker="o" if len(columns) == 1 else None,
        label=style.label,
      )
      axes.fill_between(
        runs[0].steps,
        [min(column) for column in columns],
        [max(column) for column in columns],
        color=style.color,
        alpha=0.18,
        linewidth=0,
      )
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.xaxis.get_major_locator().set_params(integer=True, nbins=6)
    axes.margins(x=0.02)
    _legend(axes)

  return svg(title, draw)


def by_region(
  study: study_lib.Study,
  settings: Sequence[study_lib.Setting],
  *,
  title: str,
) -> str:
  """Log-prob per token of the chosen answer before, at and after the edit.

  Regions without a token are left out; see `by_step` for the arguments.
  """
  regions = [metric for metric in study_lib.REGIONS if study.has(metric)]

  def draw(axes):
    num_bars = len(settings) + 1
    width = 0.8 / num_bars
    for place, metric in enumerate(regions):
      first = place - (num_bars - 1) / 2 * width
      reference = _Style(_REFERENCE_COLOR, 1.0, ":", "reference")
      value = study.reference.metrics[metric]
      _bar(axes, first, width, [value], reference, is_named=place == 0)
      for index, (setting, style) in enumerate(_styled(study, settings), 1):
        values = study.final(setting.name, metric)
        center = first + index * width
        _bar(axes, center, width, values, style, is_named=place == 0)
    axes.axhline(0, color=_INK, linewidth=0.8)
    axes.set_xticks(range(len(regions)), [_REGION_NAMES[m] for m in regions])
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel("log-prob per token [nats]")
    _legend(axes)

  return svg(title, draw)


def shares(
  study: study_lib.Study,
  settings: Sequence[study_lib.Setting],
  values: Callable[[str], Sequence[float | int]],
  *,
  reference: float | int | None,
  title: str,
  label: str,
) -> str:
  """A bar per setting of something between 0 and 1, each seed as a dot.

  Args:
    study: Where the numbers are.
    settings: Those to show.
    values: From the name of a setting to a share per seed.
    reference: The reference's share, if it has one.
    title: See `by_step`.
    label: The name of the vertical axis.
  """

  def draw(axes):
    for place, (setting, style) in enumerate(_styled(study, settings)):
      percents = [100 * value for value in values(setting.name)]
      _bar(axes, place, 0.62, percents, style, is_named=True)
      mean = sum(percents) / len(percents)
      if math.isfinite(mean):
        axes.annotate(
          f"{mean:.0f}",
          (place, max(percents)),
          xytext=(0, 6),
          textcoords="offset points",
          ha="center",
        )
    if reference is not None:
      _reference_line(axes, 100 * reference, "reference")
    axes.set_xticks([])
    axes.set_ylim(0, 112)
    axes.set_yticks(range(0, 101, 25))
    axes.set_ylabel(label)
    _legend(axes)

  return svg(title, draw)


def by_value(
  study: study_lib.Study,
  key: str,
  groups: Sequence[study_lib.Group],
  values: Callable[[str], Sequence[float | int]],
  *,
  reference: float | int | None,
  title: str,
  label: str,
) -> str:
  """A result against the values of a config key, which are equally far apart.

  Args:
    study: Where the numbers are.
    key: The config key.
    groups: A line each, of settings that differ in this key only.
    values: From the name of a setting to a result per seed.
    reference: The reference's, if it has one.
    title: See `by_step`.
    label: The name of the vertical axis.
  """
  # Each group is in order, but may lack some of the values.
  settings = [setting for group in groups for setting in group.settings]
  every = study_lib.in_order(setting.values[key] for setting in settings)
  ticks = [report_text.values_text({key: value}) for value in every]

  def draw(axes):
    if reference is not None:
      _reference_line(axes, reference, "reference")
    firsts = [group.settings[0] for group in groups]
    for group, (_, style) in zip(groups, _styled(study, firsts), strict=True):
      places = [every.index(s.values[key]) for s in group.settings]
      results = [values(setting.name) for setting in group.settings]
      axes.plot(
        places,
        [sum(found) / len(found) for found in results],
        color=style.color,
        alpha=style.alpha,
        linestyle=style.line,
        linewidth=2.0,
        marker="o",
        label=report_text.values_text(group.values),
      )
      for place, found in zip(places, results, strict=True):
        if len(found) > 1:
          axes.vlines(place, min(found), max(found), color=style.color)
    axes.set_xticks(range(len(every)), ticks)
    axes.margins(x=0.08)
    axes.set_ylabel(label)
    _legend(axes)

  return svg(title, draw)


def _reference_line(axes, value, label) -> None:
  axes.axhline(
    value, color=_REFERENCE_COLOR, linestyle=":", linewidth=1.4, label=label
  )


def _bar(
  axes,
  center: float | int,
  width: float,
  values: Sequence[float | int],
  style: _Style,
  *,
  is_named: bool,
) -> None:
  mean = sum(values) / len(values)
  label = style.label if is_named else None
  axes.bar(
    center,
    mean,
    0.92 * width,
    color=style.color,
    alpha=style.alpha,
    label=label,
  )
  if len(values) > 1:
    # Side by side where they would lie upon each other.
    step = width / (len(values) + 1)
    places = [
      center + (i - (len(values) - 1) / 2) * step for i in range(len(values))
    ]
    axes.plot(
      places,
      values,
      "o",
      markersize=4,
      markerfacecolor="white",
      markeredgecolor=_INK,
      markeredgewidth=0.8,
      clip_on=False,
      zorder=3,
    )


def _styled(study, settings) -> list[tuple[study_lib.Setting, _Style]]:
  others = [loss for loss in study.losses if loss not in _COLORS]
  keys = (study_lib.LOSS, *study_lib.varied(settings))
  seen: dict[str, int] = {}
  found = []
  for setting in settings:
    loss = setting.loss
    count = sum(other.loss == loss for other in settings)
    index = seen.get(loss, 0)
    seen[loss] = index + 1
    if loss in others:
      color = _OTHER_COLORS[others.index(loss) % len(_OTHER_COLORS)]
    else:
      color = _COLORS[loss]
    line = _LINES[(_FIRST_LINE.get(loss, 0) + index) % len(_LINES)]
    # From pale to full, in their order.
    alpha = 1.0 if count == 1 else 0.4 + 0.6 * index / (count - 1)
    values = {key: setting.values[key] for key in keys if key in setting.values}
    name = report_text.values_text(values)
    found.append((setting, _Style(color, alpha, line, name)))
  return found


def _legend(axes) -> None:
  # Above the axes, where it can cover nothing.
  _, labels = axes.get_legend_handles_labels()
  longest = max(map(len, labels), default=0)
  axes.legend(
    loc="lower center",
    bbox_to_anchor=(0.45, 1.0),
    ncols=5 if longest < 14 and len(labels) < 6 else 3,
    frameon=False,
    handlelength=1.6,
    columnspacing=1.2,
    borderaxespad=0.3,
  )


def svg(title: str, draw: Callable[[Any], None]) -> str:
  """Runs `draw` on fresh axes and returns them as an <svg> element."""
  # Slow to import, and nobody else needs it.
  import matplotlib
  from matplotlib import figure

  name = re.sub(r"\W+", "-", title.lower())
  style: dict[Any, Any] = {
    "svg.fonttype": "none",
    # The same plot is the same file.
    "svg.hashsalt": name,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    **{
      key: _INK
      for key in (
        "text.color",
        "axes.labelcolor",
        "axes.edgecolor",
        "xtick.color",
        "ytick.color",
      )
    },
  }
  with matplotlib.rc_context(style):
    # Not by way of pyplot: no display, no state shared with anybody.
    canvas = figure.Figure(figsize=_SIZE_INCHES, layout="constrained")
    axes = canvas.add_subplot()
    draw(axes)
    buffer = io.StringIO()
    canvas.savefig(
      buffer, format="svg", transparent=True, metadata={"Date": None}
    )
  text = buffer.getvalue()
  text = text[text.index("<svg") :]
  # Several plots share a page, and ids must not be shared.
  text = re.sub(r'\bid="', f'id="{name}-', text)
  text = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", text)
  text = text.replace(_INK, "currentColor").replace(_GRID, "var(--grid)")
  text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
  # The page sets the width and the typeface.
  text = re.sub(r"'DejaVu Sans'[^;\"]*", "sans-serif", text)
  head, body = text.split(">", 1)
  head = re.sub(r' (width|height)="[^"]*"', "", head)
  return f'{head} role="img" aria-label="{html.escape(title)}">{body}'
