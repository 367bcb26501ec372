"""Tells whether a run fits a TPU slice, without the slice.

  python -m dpop_jax.cli.plan --config=configs/smaug_72b.py \\
      --topology=v5p:4x4x4 --config.mesh.fsdp=16

compiles the step that `train` would run with the real TPU compiler
(`pip install "dpop_jax[tpu]"`), which takes about a minute, and prints what it
takes of each chip's memory, what it computes, what the chips send to each
other, and the least time of a step. GB are 1e9 bytes. `--quick` compiles only
until all memory is laid out, which takes a tenth of the time; what the program
itself takes, 0.1 GB or so, is then left out. `--search` tries meshes, remat
policies and numbers of rows instead of the config's, prints what fits, best
first, and compiles the first to the end; interrupted (Ctrl-C, SIGTERM), it
prints what it has found so far. `--json` adds one JSON object on the last line.
It exits with code 1 if nothing fits, 130 if it was interrupted.

Without data on this machine, pairs are assumed to be `--tokens_per_pair` long
(data.max_length, if not given) and scored everywhere.
"""

import json
import signal
import sys

from absl import flags
from ml_collections import config_flags

from dpop_jax.cli import command
from dpop_jax.planning import chips

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Config file; override with --config.section.key=value."
)
_TOPOLOGY = flags.DEFINE_string(
  "topology", None, "Chip and shape of a slice, such as v5p:4x4x4 or v5e:4x4."
)
_NUM_SLICES = flags.DEFINE_integer(
  "num_slices", 1, "Slices; mesh.data must be a multiple of it."
)
_TOKENS_PER_PAIR = flags.DEFINE_integer(
  "tokens_per_pair", None, "Tokens of a pair's tree, where there are no data."
)
_QUICK = flags.DEFINE_bool(
  "quick", False, "Compile until memory is laid out, and make no code."
)
_SEARCH = flags.DEFINE_bool(
  "search", False, "Try meshes, remat policies and rows per microbatch."
)
_MAX_COMPILES = flags.DEFINE_integer(
  "max_compiles", 24, "Most layouts that a search compiles."
)
_JSON = flags.DEFINE_bool("json", False, "A JSON object on the last line.")
# As of a process that SIGINT ends.
_EXIT_INTERRUPTED = 128 + 2


def main() -> int:
  # Slow to import.
  from dpop_jax import config as config_lib
  from dpop_jax.planning import batch_shapes, plan, plan_text

  slices = chips.parse(_TOPOLOGY.value, _NUM_SLICES.value)
  config = config_lib.from_config_dict(_with_data(_CONFIG.value))
  shapes = batch_shapes.of_config(
    config, tokens_per_pair=_TOKENS_PER_PAIR.value
  )
  if _SEARCH.value:
    if _QUICK.value:
      raise ValueError("--search is quick by itself; leave --quick out.")
    return _search(config, slices, shapes)
  if not _QUICK.value:
    _tell("Compiling; this takes about a minute.")
  found = plan.make_plan(config, slices, shapes, has_code=not _QUICK.value)
  print(plan_text.describe(found))
  if _JSON.value:
    print(json.dumps(plan_text.to_dict(found)))
  return 0 if found.fits else 1


def _search(config, slices, shapes) -> int:
  from dpop_jax.planning import plan, plan_search, plan_text

  candidates = plan_search.layouts(config, slices, shapes)
  capacity = slices.chip.hbm_bytes
  possible = [c for c in candidates if c.least_bytes <= capacity]
  _tell(
    f"{len(candidates)} layouts, of which {len(possible)} may fit; laying out "
    f"up to {_MAX_COMPILES.value} of them."
  )
  if not possible:
    least = min(candidates, key=lambda candidate: candidate.least_bytes)
    raise ValueError(
      f"Nothing fits {slices.topology}: arguments, gradients and what the "
      f"layers keep take {least.least_bytes / 1e9:.1f} GB of each chip, and "
      f"{capacity / 1e9:.1f} GB are there. Take more chips."
    )
  searched = []
  stopped = None
  signal.signal(signal.SIGTERM, signal.default_int_handler)
  try:
    for layout, found in plan_search.search(
      candidates, slices, shapes, max_compiles=_MAX_COMPILES.value
    ):
      if found is None:
        mesh = "x".join(map(str, layout.mesh))
        _tell(
          f"[{len(searched) + 1}] {mesh}, {layout.config.model.remat}, "
          f"{layout.config.batch.rows_per_microbatch} rows ..."
        )
      else:
        searched.append((layout, found))
        _tell(plan_text.row(found))
    if len(searched) == _MAX_COMPILES.value:
      stopped = "--max_compiles"
  except KeyboardInterrupt:
    stopped = "interrupt"
  plans = plan_search.best_first([found for _, found in searched])
  print(f"{slices.topology}, batches {shapes.source}.")
  print(plan_text.table(plans))
  print(_rest(len(searched), len(possible), stopped), flush=True)
  is_interrupted = stopped == "interrupt"
  has_one = bool(plans) and plans[0].fits
  if has_one and not is_interrupted:
    _tell("Compiling the first of them to the end.")
    # That hears of signals only when it is done: let them end it at once.
    for number in (signal.SIGINT, signal.SIGTERM):
      signal.signal(number, signal.SIG_DFL)
    best = next(layout for layout, found in searched if found is plans[0])
    plans[0] = plan.make_plan(best.config, slices, shapes)
    print(f"\nThe first of them:\n\n{plan_text.describe(plans[0])}")
  if _JSON.value:
    dicts = [plan_text.to_dict(found) for found in plans]
    result = {
      "plans": dicts,
      "num_layouts": len(candidates),
      "num_too_large": len(candidates) - len(possible),
      "num_compiled": len(searched),
      "stopped_by": stopped,
    }
    print(json.dumps(result))
  if is_interrupted:
    return _EXIT_INTERRUPTED
  return 0 if has_one else 1


def _rest(num_searched, num_possible, stopped) -> str:
  """What is to be said of the layouts that are not in the table."""
  from dpop_jax.planning import plan_search

  num = num_possible - num_searched
  if stopped:
    return f"Stopped by {stopped}: {num} others may fit, and be faster."
  return (
    f"Of the {num} others, none is likely to fit and to be faster than "
    f"{plan_search.NUM_BEST} of these."
  )


def _tell(message: str) -> None:
  print(message, file=sys.stderr, flush=True)


def _with_data(config):
  """The config with names in place of data that are not given."""
  for name in ("train", "tokenizer"):
    if config.data[name] is None and not (
      name == "tokenizer" and config.run.init_from is not None
    ):
      config.data[name] = "-"
  return config


if __name__ == "__main__":
  chips.prepare_environment()
  flags.mark_flags_as_required(["config", "topology"])
  command.run(main)
