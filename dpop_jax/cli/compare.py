"""Compares losses and settings, trained from one model on one set of pairs.

  python -m dpop_jax.cli.compare --config=configs/X.py --workdir=DIR \\
      --config.run.init_from=MODEL --seeds=0,1,2 \\
      --sweep=loss.name=dpo,ipo,slic_hinge,dpop --sweep=loss.beta=0.1,0.3

trains every combination of what is swept, and writes DIR/report.html,
DIR/report.md and DIR/report.json. `--setting=loss.name=dpop,loss.dpop_lambda=5`
adds one more. The same command again continues where it was stopped or killed,
and does nothing that is done; with more sweeps, settings or seeds it trains
what is new. In one process; see docs/compare.md.
"""

from absl import flags
from ml_collections import config_flags

from dpop_jax.cli import command

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Config file; override with --config.section.key=value."
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of everything.", required=True
)
_SWEEP = flags.DEFINE_multi_string(
  "sweep", [], "A key and its values: loss.beta=0.1,0.3. Several: all of them."
)
_SETTING = flags.DEFINE_multi_string(
  "setting", [], "One more setting: loss.name=dpop,loss.dpop_lambda=5."
)
_SEEDS = flags.DEFINE_list("seeds", ["0"], "Seeds of each setting.")
_QUESTIONS = flags.DEFINE_string(
  "questions", None, "A .jsonl file of `prompt` and `answer` for exact match."
)
_CHECKER = flags.DEFINE_enum(
  "checker",
  "number",
  ["number", "letter", "exact"],
  "What of an answer counts: its final number, its letter, or all of it.",
)
_MAX_NEW_TOKENS = flags.DEFINE_integer(
  "max_new_tokens", 256, "Of an answer to a question.", lower_bound=1
)


def main() -> int:
  # Slow to import.
  from dpop_jax import compare, config, questions, report, report_tables, sweeps

  base = config.from_config_dict(_CONFIG.value)
  try:
    seeds = [int(seed) for seed in _SEEDS.value]
  except ValueError:
    raise ValueError(
      f"--seeds takes whole numbers, 0,1,2; got {','.join(_SEEDS.value)!r}."
    ) from None
  asked = None
  if _QUESTIONS.value is not None:
    asked = questions.load(
      _QUESTIONS.value,
      checker=_CHECKER.value,
      max_new_tokens=_MAX_NEW_TOKENS.value,
    )
  try:
    study = compare.compare(
      sweeps.expand(base, _SWEEP.value, _SETTING.value),
      _WORKDIR.value,
      seeds=seeds,
      questions=asked,
      options=config.to_dict(base),
    )
  except compare.Stopped as stopped:
    print(stopped, flush=True)
    return command.EXIT_TERMINATED
  written = report.write(study, _WORKDIR.value)
  print()
  print(report_tables.plain(report_tables.brief(study)))
  for failure in study.failures:
    print(f"{failure.setting}, seed {failure.seed}: {failure.reason}")
  print(f"\nThe report is at {written['report.html']}")
  return 0


if __name__ == "__main__":
  flags.mark_flags_as_required(["config"])
  command.run(main)
