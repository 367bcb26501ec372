"""The plots of a report, as SVG."""

from collections.abc import Mapping

import numpy as np

from dpop_jax import report_plots
from dpop_jax.inspection import condition as condition_lib
from dpop_jax.inspection.pair_statistics import PairStatistics

_CHOSEN, _REJECTED, _THIRD = "#009e73", "#d55e00", "#3d8fd1"
_NUM_BINS = 40


def edit_distances(statistics: PairStatistics) -> str:
  """Histograms of the normalised edit distance, a line per unit."""
  return _histograms(
    "Edit distance",
    {unit: 100 * values for unit, values in statistics.edit_distances.items()},
    label="edit distance [% of the longer answer]",
    colors=(_CHOSEN, _REJECTED, _THIRD),
  )


def lengths(statistics: PairStatistics) -> str:
  """Histograms of the lengths of chosen and rejected answers."""
  return _histograms(
    "Length of the answers",
    {
      "chosen": statistics.chosen_tokens,
      "rejected": statistics.rejected_tokens,
    },
    label="length [tokens]",
    colors=(_CHOSEN, _REJECTED),
  )


def length_differences(statistics: PairStatistics) -> str:
  """How much longer the chosen answers are."""
  return _histograms(
    "Length bias",
    {"pairs": statistics.length_differences},
    label="chosen minus rejected [tokens]",
    colors=(_THIRD,),
    marks={"equal": 0.0},
  )


def first_differences(statistics: PairStatistics) -> str:
  """Where the answers part."""
  return _histograms(
    "First difference",
    {"pairs": 100 * statistics.first_difference},
    label="place of the first difference [% of the chosen answer]",
    colors=(_THIRD,),
    limits=(0.0, 100.0),
  )


def shared_beginnings(statistics: PairStatistics) -> str:
  """Which share of a pair's tokens its prefix tree saves."""
  share = 1 - statistics.tree_tokens / statistics.sequence_tokens
  return _histograms(
    "Tokens saved by sharing a beginning",
    {"pairs": 100 * share},
    label="tokens not run again [%], of a pair by itself",
    colors=(_THIRD,),
    limits=(0.0, 50.0),
  )


def pushes(condition: condition_lib.Condition) -> str:
  """How far DPO pushes right tokens behind the edit, and which way."""

  def draw(axes):
    edges = np.linspace(-1, 1, 2 * _NUM_BINS + 1)
    for values, color, label in (
      (-condition.push[condition.push > 0], _REJECTED, "pushed down"),
      (-condition.push[condition.push <= 0], _CHOSEN, "pushed up, or not"),
    ):
      axes.hist(values, edges, color=color, label=label)
    axes.set_yscale("log")
    axes.set_xlabel("s_l − s_w, DPO's gradient on the right token's logit")
    axes.set_ylabel("tokens behind the edit")
    axes.legend(loc="upper left", frameon=False)

  return report_plots.svg("DPO's push on right tokens", draw)


def lambdas_needed(condition: condition_lib.Condition) -> str:
  """Share of what DPO pushes down that a lambda turns round."""

  def draw(axes):
    is_down = condition.is_pushed_down
    grid = np.logspace(-1, 4, 200)
    needed = condition.lambda_needed[is_down]
    push = condition.push[is_down]
    for weights, color, line, label in (
      (push / max(push.sum(), 1e-30), _THIRD, "-", "of the push"),
      (np.full(len(push), 1 / max(len(push), 1)), _CHOSEN, "--", "of tokens"),
    ):
      order = np.argsort(needed)
      total = np.concatenate([[0], np.cumsum(weights[order])])
      at = np.searchsorted(needed[order], grid)
      axes.plot(grid, 100 * total[at], line, color=color, label=label)
    for value in condition_lib.LAMBDAS:
      axes.axvline(value, color="#8b919b", linestyle=":", linewidth=1.2)
      axes.annotate(f" {value:g}", (value, 2), color="#8b919b")
    axes.set_xscale("log")
    axes.set_ylim(0, 102)
    axes.set_xlabel("lambda")
    axes.set_ylabel("turned round [%]")
    axes.legend(
      loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False
    )

  return report_plots.svg("Lambda that turns the push round", draw)


def pushes_by_place(condition: condition_lib.Condition) -> str:
  """Where behind the edit tokens are pushed down."""

  def draw(axes):
    # Counted from the first token of the pair that both answers share again.
    first = np.full(len(condition.lift), np.iinfo(np.int64).max)
    np.minimum.at(first, condition.pair, condition.place)
    distance = condition.place - first[condition.pair]
    most = int(np.quantile(distance, 0.95)) + 1 if len(distance) else 1
    down = np.maximum(condition.push, 0.0)
    sums = np.bincount(distance, down, minlength=most)[:most]
    counts = np.bincount(distance, minlength=most)[:most]
    means = sums / np.maximum(counts, 1)
    axes.bar(np.arange(most), means, 0.9, color=_REJECTED)
    axes.set_xlabel("tokens behind the first shared one")
    axes.set_ylabel("mean push down")
    axes.xaxis.get_major_locator().set_params(integer=True)

  return report_plots.svg("Push down by place", draw)


def _histograms(
  title: str,
  series: Mapping[str, np.ndarray],
  *,
  label: str,
  colors: tuple[str, ...],
  limits: tuple[float, float] | None = None,
  marks: Mapping[str, float] | None = None,
) -> str:
  """Shares of pairs by value; the few beyond the limits are in the last bars.

  Args:
    title: Of the plot; no two of a page may be the same.
    series: Values of each histogram by its name.
    label: Of the axis of values, with its unit.
    colors: Of each.
    limits: Of the values; None for what 99 % of them are within.
    marks: Vertical lines by name.
  """
  everything = np.concatenate([np.asarray(v) for v in series.values()])
  is_whole = np.issubdtype(everything.dtype, np.integer)
  if limits is None:
    limits = tuple(np.quantile(everything, [0.005, 0.995]))
  low, high = limits
  if is_whole:
    # Bins of whole numbers, else some would hold one more than others.
    low, high = np.floor(low), np.ceil(high)
    width = max(1, int(np.ceil((high - low + 1) / _NUM_BINS)))
    edges = np.arange(low, high + width + 0.5, width) - 0.5
  else:
    high = max(high, low + 1e-9)
    edges = np.linspace(low, high, _NUM_BINS + 1)

  def draw(axes):
    for (name, values), color in zip(series.items(), colors, strict=True):
      values = np.clip(values, edges[0], np.nextafter(edges[-1], -np.inf))
      counts, _ = np.histogram(values, edges)
      shares = 100 * counts / max(len(values), 1)
      if len(series) == 1:
        axes.stairs(shares, edges, fill=True, color=color)
      else:
        axes.stairs(shares, edges, color=color, linewidth=1.7, label=name)
    for name, value in (marks or {}).items():
      axes.axvline(value, color="#8b919b", linestyle=":", label=name)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(label)
    axes.set_ylabel("pairs [%]")
    if len(series) > 1:
      # Above the axes, where it can cover nothing.
      axes.legend(
        loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False
      )

  return report_plots.svg(title, draw)
