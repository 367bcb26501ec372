"""Trains a model.

  python -m dpop_jax.cli.train --config=configs/X.py --workdir=DIR \\
      --config.loss.beta=0.1

The same command again continues a run that was stopped or killed. On SIGTERM it
saves and exits with code 143. On several hosts it is started on each of them;
see dpop_jax/processes.py and launch/.
"""

from absl import flags
from ml_collections import config_flags

from dpop_jax import processes
from dpop_jax.cli import command

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Config file; override with --config.section.key=value."
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of the run: checkpoints, metrics, config."
)


def main() -> int:
  from dpop_jax import config, train  # noqa: PLC0415 (slow to import)

  result = train.train(config.from_config_dict(_CONFIG.value), _WORKDIR.value)
  if processes.is_first():
    for name, value in (result.eval_metrics or {}).items():
      print(f"{name:45s} {value: .6g}")
  return 0 if result.is_complete else command.EXIT_TERMINATED


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "workdir"])
  command.run(main, in_several_processes=True)
