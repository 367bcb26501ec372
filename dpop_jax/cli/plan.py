"""Tells whether a run fits a TPU slice, without the slice.

  python -m dpop_jax.cli.plan --config=configs/smaug_72b.py \\
      --topology=v5p:4x4x4 --config.mesh.fsdp=16

compiles the step that `train` would run with the real TPU compiler
(`pip install "dpop_jax[tpu]"`), which takes about a minute, and prints what it
takes of each chip's memory, what it computes, what the chips send to each
other, and the least time of a step. GB are 1e9 bytes. `--search` tries meshes,
remat policies and numbers of rows instead of the config's, and prints what
fits, best first. `--json` adds one JSON object on the last line. It exits with
code 1 if nothing fits.

Without data on this machine, pairs are assumed to be `--tokens_per_pair` long
(data.max_length, if not given) and scored everywhere.
"""

import json
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
_SEARCH = flags.DEFINE_bool(
  "search", False, "Try meshes, remat policies and rows per microbatch."
)
_MAX_COMPILES = flags.DEFINE_integer(
  "max_compiles", 8, "Most compilations of a search."
)
_JSON = flags.DEFINE_bool("json", False, "A JSON object on the last line.")


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
    return _search(config, slices, shapes)
  print("Compiling; this takes about a minute.", file=sys.stderr, flush=True)
  found = plan.make_plan(config, slices, shapes)
  print(plan_text.describe(found))
  if _JSON.value:
    print(json.dumps(plan_text.to_dict(found)))
  return 0 if found.fits else 1


def _search(config, slices, shapes) -> int:
  from dpop_jax.planning import plan_search, plan_text

  candidates = plan_search.layouts(config, slices, shapes)
  capacity = slices.chip.hbm_bytes
  possible = [c for c in candidates if c.least_bytes <= capacity]
  print(
    f"{len(candidates)} layouts, of which {len(possible)} may fit; compiling "
    f"up to {_MAX_COMPILES.value} of them, a minute or more each.",
    file=sys.stderr,
  )
  if not possible:
    least = min(candidates, key=lambda candidate: candidate.least_bytes)
    raise ValueError(
      f"Nothing fits {slices.topology}: arguments, gradients and what the "
      f"layers keep take {least.least_bytes / 1e9:.1f} GB of each chip, and "
      f"{capacity / 1e9:.1f} GB are there. Take more chips."
    )
  plans = []
  for layout, found in plan_search.search(
    candidates, slices, shapes, max_compiles=_MAX_COMPILES.value
  ):
    if found is None:
      mesh = "x".join(map(str, layout.mesh))
      print(
        f"[{len(plans) + 1}] {mesh}, {layout.config.model.remat}, "
        f"{layout.config.batch.rows_per_microbatch} rows ...",
        file=sys.stderr,
        flush=True,
      )
    else:
      plans.append(found)
      print(plan_text.row(found), file=sys.stderr, flush=True)
  plans = plan_search.best_first(plans)
  print(f"{slices.topology}, batches {shapes.source}.")
  print(plan_text.table(plans))
  if _JSON.value:
    dicts = [plan_text.to_dict(found) for found in plans]
    result = {
      "plans": dicts,
      "num_layouts": len(candidates),
      "num_too_large": len(candidates) - len(possible),
      "num_compiled": len(plans),
    }
    print(json.dumps(result))
  return 0 if any(found.fits for found in plans) else 1


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
