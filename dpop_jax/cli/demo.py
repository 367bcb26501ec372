"""The paper's argument on a laptop: trains four losses and writes a report.

python -m dpop_jax.cli.demo --workdir=runs/demo
"""

import importlib.util
import pathlib

from absl import flags

from dpop_jax.cli import command

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of everything.")
_CONFIG = flags.DEFINE_string(
  "config", "configs/demo.py", "File whose get_config takes the stage."
)
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of each loss.")


def main() -> int:
  from dpop_jax import compare, config, demo  # Slow to import.

  seeds = [int(seed) for seed in _SEEDS.value]
  if not seeds or len(set(seeds)) < len(seeds):
    raise ValueError(
      f"--seeds must be different numbers, at least one; got {seeds}."
    )
  path = pathlib.Path(_CONFIG.value)
  if not path.exists():
    raise FileNotFoundError(
      f"There is no config file {path}; run from the repository, or give "
      "--config."
    )
  spec = importlib.util.spec_from_file_location("demo_config", path)
  stages = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(stages)

  def config_of(stage, values):
    stage_config = stages.get_config(stage)
    stage_config.update_from_flattened_dict(values)
    return config.from_config_dict(stage_config)

  try:
    page = demo.run(_WORKDIR.value, config_of, seeds=seeds)
  except compare.Stopped as stopped:
    print(stopped, flush=True)
    return command.EXIT_TERMINATED
  print((page.parent / "report.md").read_text())
  print(f"The report is at {page}")
  return 0


if __name__ == "__main__":
  flags.mark_flags_as_required(["workdir"])
  command.run(main)
