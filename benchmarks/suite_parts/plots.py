"""The figures of the suite as pictures."""

import pathlib
from collections.abc import Mapping

import matplotlib
from matplotlib import pyplot

from . import table

_COLOURS = {
  "ours": "#1b6ca8",
  "trl": "#d9822b",
  "tunix": "#7a9e3f",
  "easydel": "#8b5a9f",
}
_ONE = table.Spread(1.0, 1.0, 1.0)


def write(
  reports: table.Reports, titles: Mapping[str, str], path: pathlib.Path
) -> None:
  """CPU-seconds a pair over ours, and peak memory, one group a kind of work.

  The whiskers reach from the lowest to the highest repetition.
  """
  matplotlib.use("Agg")
  works = list(dict.fromkeys(key[0] for key in reports))
  ratios = table.ratios(reports, "cpu_seconds_per_pair")
  ratios |= {(work, table.OURS): _ONE for work in works}
  peaks = {
    key: table.Spread(*(value / table.MIB for value in spread))
    for key, spread in table.figures(reports, "peak_bytes").items()
  }
  figure, all_axes = pyplot.subplots(
    2, 1, figsize=(max(6.0, 1.9 * len(works)), 7.0), layout="constrained"
  )
  for axes, spreads, label, form in (
    (all_axes[0], ratios, "CPU-seconds per pair over ours", "{:.1f}"),
    (all_axes[1], peaks, "peak resident memory, MiB", "{:.0f}"),
  ):
    _draw(axes, spreads, reports, works, form)
    axes.set_ylabel(label)
    names = [f"({work}) " + titles[work].replace(", ", ",\n") for work in works]
    axes.set_xticks(range(len(works)), names, fontsize=8)
    axes.set_xlim(-0.5, len(works) - 0.5)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.margins(y=0.12)
  if all_axes[0].containers:
    all_axes[0].legend(fontsize=8)
  figure.savefig(path, dpi=120)
  pyplot.close(figure)


def _draw(axes, spreads, reports, works, form):
  libraries = list(dict.fromkeys(key[1] for key in reports))
  width = 0.8 / len(libraries)
  for number, library in enumerate(libraries):
    offset = (number - (len(libraries) - 1) / 2) * width
    shown = [
      (place + offset, spreads[work, library])
      for place, work in enumerate(works)
      if (work, library) in spreads
    ]
    if not shown:
      continue
    places, found = zip(*shown, strict=True)
    medians = [spread.median for spread in found]
    whiskers = (
      [spread.median - spread.low for spread in found],
      [spread.high - spread.median for spread in found],
    )
    bars = axes.bar(
      places,
      medians,
      width,
      yerr=whiskers,
      capsize=2,
      label=library,
      color=_COLOURS.get(library),
    )
    axes.bar_label(
      bars, [form.format(m) for m in medians], fontsize=7, padding=2
    )
