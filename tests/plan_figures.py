"""What plans say of the large models, kept in plan_figures.json.

  python tests/plan_figures.py [NAME ...]

compiles what is named there, or everything, with the real TPU compiler
(`pip install "dpop_jax[tpu]"`) and writes the file anew; its changes belong
into the commit of what made them. Each takes about 15 CPU-seconds, because no
code is made.
"""

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent
PATH = pathlib.Path(__file__).with_suffix(".json")
# Of bytes; compilers differ a little from release to release.
TOLERANCE = 0.02
# What is smaller than this may change by any factor.
_SMALL = 2e7


def read() -> dict[str, Any]:
  """By name, the command's `arguments` and what it said."""
  return json.loads(PATH.read_text())


def plan(arguments: list[str]) -> dict[str, Any]:
  """The figures of one plan, with `--quick`.

  Without code, which takes ten times as long to make, and of a chip's memory
  0.1 GB; all else is the same.
  """
  return figures(arguments, told(["--quick", *arguments]))


def told(arguments: list[str]) -> dict[str, Any]:
  """The JSON that the command ends with.

  Raises:
    RuntimeError: It failed; with what it wrote.
  """
  # As a user runs it, whatever the tests set for themselves.
  environment = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(("JAX_", "TPU_"))
  }
  done = subprocess.run(
    [sys.executable, "-m", "dpop_jax.cli.plan", "--json", *arguments],
    cwd=ROOT,
    env=environment,
    capture_output=True,
    text=True,
    check=False,
  )
  if not done.stdout:
    raise RuntimeError(f"{' '.join(arguments)}: {done.stderr}")
  return json.loads(done.stdout.splitlines()[-1])


def figures(arguments: list[str], told: dict[str, Any]) -> dict[str, Any]:
  """What is kept of a plan's JSON."""
  kept = ("fits", "mesh", "hbm_bytes_per_chip", "host_bytes_per_chip")
  kept += ("flops_per_step", "sent_bytes_per_chip")
  collectives = [
    {name: entry[name] for name in ("kind", "mesh_axes", "purpose")}
    | {"megabytes": round(entry["bytes_per_chip"] / 1e6, 1)}
    for entry in told["collectives"]
  ]
  between_slices = {}
  if told["num_slices"] > 1:
    between_slices = {
      "bytes_per_chip": told["sent_bytes_to_other_slices_per_chip"],
      "least_seconds": told["least_step_seconds"]["dcn"],
    }
  return {
    "arguments": arguments,
    **{name: told[name] for name in kept},
    "between_slices": between_slices,
    "collectives": collectives,
    "least_step_seconds": told["least_step_seconds"]["step"],
  }


def differences(kept: dict[str, Any], found: dict[str, Any]) -> list[str]:
  """In a sentence each, what is not as it was."""
  result = []
  sections = ("hbm_bytes_per_chip", "sent_bytes_per_chip", "between_slices")
  for section in sections:
    names = kept[section].keys() | found[section].keys()
    for name in sorted(names):
      old, new = (x[section].get(name) or 0 for x in (kept, found))
      if abs(new - old) > max(TOLERANCE * old, _SMALL):
        result.append(f"{section}.{name} is {new:.4g} and was {old:.4g}.")
  for name in ("fits", "mesh", "flops_per_step"):
    if kept[name] != found[name]:
      result.append(f"{name} is {found[name]} and was {kept[name]}.")
  old, new = map(_reasons, (kept, found))
  result += [f"New: {reason}." for reason in sorted(new - old)]
  result += [f"No longer: {reason}." for reason in sorted(old - new)]
  return result


def _reasons(found):
  return {
    f"{entry['kind']} over {', '.join(entry['mesh_axes'])}: {entry['purpose']}"
    for entry in found["collectives"]
    if entry["megabytes"] >= 1.0 or not entry["purpose"]
  }


def main(names: list[str]) -> None:
  kept = read()
  unknown = set(names) - kept.keys()
  if unknown:
    raise SystemExit(f"There is no {', '.join(unknown)} in {PATH.name}.")
  for name in names or kept:
    print(f"{name} ...", flush=True)
    found = plan(kept[name]["arguments"])
    for difference in differences(kept[name], found):
      print(f"  {difference}")
    kept[name] = found
    PATH.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
  main(sys.argv[1:])
