"""Scores held-out pairs with the newest checkpoint of a run.

  python -m dpop_jax.cli.evaluate --workdir=DIR

prints a table of metrics; the reference is what the run started from. `--data`
names other pairs than those that the run held out, and with `--json` the last
line is the same numbers as JSON.
"""

import json
import math

from absl import flags

from dpop_jax import processes
from dpop_jax.cli import command, finished_run

_DATA = flags.DEFINE_string(
  "data", None, "Pairs to score, written as data.train in a config."
)
_JSON = flags.DEFINE_bool("json", False, "End with one line of JSON.")


def main() -> None:
  from dpop_jax import evaluate

  metrics = evaluate.evaluate_run(
    finished_run.load_config(), finished_run.workdir(), data=_DATA.value
  )
  if not processes.is_first():
    return
  for name, value in sorted(metrics.items()):
    print(f"{name:45s} {value: .6g}")
  if _JSON.value:
    # JSON has no numbers that are not finite.
    values = {k: v if math.isfinite(v) else str(v) for k, v in metrics.items()}
    print(json.dumps(values, sort_keys=True))


if __name__ == "__main__":
  command.run(main, in_several_processes=True)
