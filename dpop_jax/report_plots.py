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
from typing import Any

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
  "slic": "#3d8fd1",
  "dpop": "#009e73",
}
_OTHER_COLORS = ("#e69f00", "#7a6fd0", "#b3a125", "#a0522d")
_LINES = {"dpo": "-", "ipo": "--", "slic": "-.", "dpop": "-"}


def by_step(
  study: study_lib.Study, metric: str, *, title: str, label: str
) -> str:
  """A metric against steps: a line per loss, a band from least to greatest.

  Args:
    study: Where the numbers are.
    metric: One of `study.METRICS`.
    title: What the plot is called, for those who cannot see it; no two plots of
      a page may be called the same.
    label: The name of the vertical axis.

  Returns:
    An SVG element.
  """

  def draw(axes):
    if metric in study.reference.metrics:
      axes.axhline(
        study.reference.metrics[metric],
        color=_REFERENCE_COLOR,
        linestyle=":",
        linewidth=1.4,
        label="SFT",
      )
    for loss in study.losses:
      runs = study.runs_of(loss)
      values = [[record[metric] for record in run.records] for run in runs]
      columns = list(zip(*values, strict=True))
      color = _color(study, loss)
      axes.plot(
        runs[0].steps,
        [sum(column) / len(column) for column in columns],
        color=color,
        linestyle=_LINES.get(loss, "-"),
        linewidth=2.2 if loss == "dpop" else 1.7,
        marker="o" if len(columns) == 1 else None,
        label=report_text.name_of(loss),
      )
      axes.fill_between(
        runs[0].steps,
        [min(column) for column in columns],
        [max(column) for column in columns],
        color=color,
        alpha=0.18,
        linewidth=0,
      )
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.xaxis.get_major_locator().set_params(integer=True, nbins=6)
    axes.margins(x=0.02)
    _legend(axes)

  return _svg(title, draw)


def by_region(study: study_lib.Study) -> str:
  """Log-prob per token of the chosen answer before, at and after the edit."""
  regions = {
    "before the edit": study_lib.BEFORE_EDIT,
    "at the edit": study_lib.AT_EDIT,
    "after the edit": study_lib.AFTER_EDIT,
  }

  def draw(axes):
    num_bars = len(study.losses) + 1
    width = 0.8 / num_bars
    for index, loss in enumerate((None, *study.losses)):
      for region, metric in enumerate(regions.values()):
        if loss is None:
          values = [study.reference.metrics[metric]]
        else:
          values = study.final(loss, metric)
        center = region + (index - (num_bars - 1) / 2) * width
        label = _label(loss) if region == 0 else None
        _bar(axes, center, width, values, _color(study, loss), label)
    axes.axhline(0, color=_INK, linewidth=0.8)
    axes.set_xticks(range(len(regions)), list(regions))
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel("log-prob per token [nats]")
    _legend(axes)

  return _svg("Log-prob per token by region of the chosen answer", draw)


def exact_match(study: study_lib.Study) -> str:
  """Exact match of the reference and each loss, each seed as a dot."""

  def draw(axes):
    losses = (None, *study.losses)
    for index, loss in enumerate(losses):
      if loss is None:
        values = [study.reference.exact_match]
      else:
        values = study.exact_match(loss)
      percents = [100 * value for value in values]
      _bar(axes, index, 0.62, percents, _color(study, loss), None)
      mean = sum(percents) / len(percents)
      if math.isfinite(mean):
        top = max(percents)
        axes.annotate(
          f"{mean:.0f}",
          (index, top),
          xytext=(0, 6),
          textcoords="offset points",
          ha="center",
        )
    axes.axhline(
      100 * study.reference.exact_match,
      color=_REFERENCE_COLOR,
      linestyle=":",
      linewidth=1.4,
    )
    axes.set_xticks(range(len(losses)), [_label(loss) for loss in losses])
    axes.tick_params(axis="x", length=0)
    axes.set_ylim(0, 112)
    axes.set_yticks(range(0, 101, 25))
    axes.set_ylabel("questions answered rightly [%]")

  return _svg("Exact match by loss", draw)


def _bar(
  axes,
  center: float | int,
  width: float,
  values: Sequence[float | int],
  color: str,
  label: str | None,
) -> None:
  mean = sum(values) / len(values)
  axes.bar(center, mean, 0.92 * width, color=color, label=label)
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


def _label(loss: str | None) -> str:
  return "SFT" if loss is None else report_text.name_of(loss)


def _color(study: study_lib.Study, loss: str | None) -> str:
  if loss is None:
    return _REFERENCE_COLOR
  others = [other for other in study.losses if other not in _COLORS]
  if loss in others:
    return _OTHER_COLORS[others.index(loss) % len(_OTHER_COLORS)]
  return _COLORS[loss]


def _legend(axes) -> None:
  # Above the axes, where it can cover nothing.
  axes.legend(
    loc="lower center",
    bbox_to_anchor=(0.45, 1.0),
    ncols=5,
    frameon=False,
    handlelength=1.6,
    columnspacing=1.2,
    borderaxespad=0.3,
  )


def _svg(title: str, draw: Callable[[Any], None]) -> str:
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
