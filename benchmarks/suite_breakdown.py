r"""Where the time of our own step goes, and at what rate it multiplies.

  DPOP_SHARED_DATA=DATA taskset -c 0 python benchmarks/suite_breakdown.py \
    --out=DIR --work=a,large

Compiles the step that training runs, counts CPU-seconds of some updates, traces
one, and sorts the time of its operations by the function they come from. In the
same process it multiplies matrices, for a rate to compare with. Writes
DIR/breakdown_<work>.json and breakdown.md. The pairs are those of suite.py.
"""

import json
import os
import pathlib

from absl import app, flags
from suite_parts import breakdown, table
from suite_parts import work as work_lib

_OUT = flags.DEFINE_string("out", None, "Folder for results.", required=True)
_WORK = flags.DEFINE_list("work", list(work_lib.WORK), "Kinds of work.")
_UPDATES = flags.DEFINE_integer("updates", 3, "Updates measured of each.")
_DATA = flags.DEFINE_string(
  "data", os.environ.get("DPOP_SHARED_DATA", "."), "As of suite.py."
)
# Of the rate of products, on the wide model.
_RATE_BAR = 0.6


def main(_) -> None:
  out = pathlib.Path(_OUT.value)
  data = pathlib.Path(_DATA.value)
  lines = []
  for name in _WORK.value:
    if name not in work_lib.WORK:
      raise app.UsageError(
        f"--work knows {', '.join(work_lib.WORK)}; got {name!r}."
      )
    file = work_lib.make(
      name,
      out / "pairs",
      data=data,
      tokenizer=str(data / "tokenizers" / "gpt-neox-olmo"),
    )
    found = breakdown.measure(name, work_lib.load(file), updates=_UPDATES.value)
    (out / f"breakdown_{name}.json").write_text(json.dumps(found, indent=2))
    lines += _lines(found)
    (out / "breakdown.md").write_text("\n".join(lines))
    print("\n".join(lines[-len(_lines(found)) :]), flush=True)


def _lines(found) -> list[str]:
  giga = lambda rate: f"{rate / 1e9:.1f}"
  rates = ", ".join(f"{s} {giga(r)}" for s, r in found["product_rates"].items())
  per_pair = sum(found["cpu_seconds"]) / len(found["cpu_seconds"])
  per_pair /= found["pairs"]
  lines = [
    f"### ({found['work']}) {found['title']}",
    "",
    "| part | share of the time of operations |",
    "|---|---|",
    *(f"| {part} | {share:.1%} |" for part, share in found["shares"].items()),
    "",
    f"- {per_pair:.3f} CPU-seconds a pair; temporaries "
    f"{found['temporary_bytes'] / table.MIB:.0f} MiB.",
    f"- {giga(found['flops_per_cpu_second'])} GFLOP per CPU-second, "
    f"{giga(found['useful_flops_per_cpu_second'])} without recomputation.",
    f"- Products alone, GFLOP per CPU-second: {rates}.",
    f"- {found['share_of_product_rate']:.0%} of the best of them "
    f"({found['useful_share_of_product_rate']:.0%} without recomputation)"
    + (f"; the bar is {_RATE_BAR:.0%}." if found["work"] == "large" else "."),
    "",
  ]
  return lines


if __name__ == "__main__":
  app.run(main)
