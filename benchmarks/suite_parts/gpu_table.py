"""What benchmarks/gpu.py measured, as figures and as a table.

Pure: reports in, text out.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from . import gpu_work, table

# bfloat16 operations a second, without sparsity, from NVIDIA's data sheets, by
# what the kind of a device begins with; the longest that fits counts.
PEAKS = {
  "NVIDIA H100": 989.4e12,
  "NVIDIA H100 PCIe": 756e12,
  "NVIDIA H100 NVL": 835e12,
  "NVIDIA H200": 989.4e12,
  "NVIDIA A100": 312e12,
  "NVIDIA L40S": 362e12,
  "NVIDIA B200": 2250e12,
}

# (shape, load, library) to what `gpu_runs.run` returned.
Reports = Mapping[tuple[str, str, str], Mapping[str, Any]]


class Figures(NamedTuple):
  """Of the measured updates of a library on a load.

  An MFU is operations that the model needs for a work, a second, over a rate:
  the card's published one, or that of a product which was measured. "naive"
  counts every sequence by itself, as if nothing were shared; so with sharing it
  may be more than the card can do.

  Attributes:
    pairs: A second.
    unique_tokens: A second.
    naive_tokens: A second.
    unique_flops: A second.
    naive_flops: A second.
    unique_mfu: None where the card is not in PEAKS.
    naive_mfu: Likewise.
    unique_of_product: Against the measured product; None if there is none.
    naive_of_product: Likewise.
  """

  pairs: float
  unique_tokens: float
  naive_tokens: float
  unique_flops: float
  naive_flops: float
  unique_mfu: float | None
  naive_mfu: float | None
  unique_of_product: float | None
  naive_of_product: float | None


def peak_of(device_kind: str) -> float | None:
  """The published rate of a card; None where it is not known."""
  fitting = [name for name in PEAKS if device_kind.startswith(name)]
  return PEAKS[max(fitting, key=len)] if fitting else None


def figures(
  report: Mapping[str, Any],
  shape: gpu_work.Shape,
  load: gpu_work.Load,
  amounts: gpu_work.Amounts,
  *,
  peak: float | None,
  product: float | None,
) -> Figures:
  """What a report says of a load.

  Args:
    report: From `gpu_runs.run`.
    shape: The model.
    load: What it was trained on.
    amounts: Of the load.
    peak: FLOPs a second that are published of the card.
    product: FLOPs a second that a product was measured with.
  """
  per_second = 1 / report["wall_seconds_per_pair"]
  num_pairs = load.pairs * (load.updates - gpu_work.WARM_UP_UPDATES)
  rate = lambda amount: amount * per_second / num_pairs
  flops = [rate(gpu_work.model_flops(shape, work)) for work in amounts]
  over = lambda limit: [x / limit if limit else None for x in flops]
  return Figures(
    per_second,
    *(rate(work.positions) for work in amounts),
    *flops,
    *over(peak),
    *over(product),
  )


def markdown(
  found: Mapping[tuple[str, str, str], Figures],
  reports: Reports,
  titles: Mapping[tuple[str, str], str],
) -> str:
  """One table a shape and load, in the order of the reports."""
  lines = []
  for key in dict.fromkeys(key[:2] for key in reports):
    lines += [
      f"### {titles[key]}",
      "",
      "| library | pairs/s | unique tokens/s | naive tokens/s "
      "| MFU, unique-token | MFU, naive-token "
      "| of a measured product, unique (naive) | peak GiB | first loss |",
      "|---|---|---|---|---|---|---|---|---|",
    ]
    for shape, load, library in reports:
      if (shape, load) != key:
        continue
      report = reports[shape, load, library]
      if "error" in report:
        reason = report["error"].replace("|", "/")
        lines.append(f"| {library} | skipped: {reason} | | | | | | | |")
        continue
      mine = found[shape, load, library]
      peak = report["gpu_peak_bytes"]
      lines.append(
        f"| {library} | {mine.pairs:.2f} | {mine.unique_tokens:,.0f} "
        f"| {mine.naive_tokens:,.0f} | {_share(mine.unique_mfu)} "
        f"| {_share(mine.naive_mfu)} | {_share(mine.unique_of_product)} "
        f"({_share(mine.naive_of_product)}) "
        f"| {f'{peak / 2**30:.1f}' if peak else 'not known'} "
        f"| {report['losses'][0]:.4f} |"
      )
    lines.append("")
  return "\n".join(lines)


def complaints(reports: Reports) -> list[str]:
  """What shows that the libraries did not do the same; see `table.check`."""
  return [
    line
    for key in dict.fromkeys(key[:2] for key in reports)
    for line in table.check(
      {
        (" ".join(key), library, 0): report
        for (*mine, library), report in reports.items()
        if tuple(mine) == key
      }
    )
  ]


def _share(value: float | None) -> str:
  return "not known" if value is None else f"{value:.1%}"
