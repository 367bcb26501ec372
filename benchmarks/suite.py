r"""dpop_jax beside TRL, Tunix and EasyDeL, on the same pairs.

  DPOP_SHARED_DATA=DATA python benchmarks/suite.py --out=DIR

Every library trains the same model with AdamW in float32 on the same token
pairs, batched as its documentation tells, in a process and an environment of
its own; repetitions take turns, so that what else runs on the machine meets all
of them. What is in DIR already is not measured again, so a suite that was ended
goes on, and --repetitions=5 adds two to three. DIR then holds

  results.json   every report, the ratios and the bars
  results.md     the same as tables
  results.png    and as a picture
  runs/          orders, logs and reports of the processes

The kinds of work are in suite_parts/work.py, what each library is set to in
peers/train_<library>.py, and environments are kept in --environments. By
default a process has one processor and one thread: threads that wait for each
other while something else runs count CPU-seconds, and not the same in each
library. Linux.
"""

import json
import os
import pathlib

from absl import app, flags
from suite_parts import environments, plots, runs, table
from suite_parts import work as work_lib

_OUT = flags.DEFINE_string("out", None, "Folder for results.", required=True)
_WORK = flags.DEFINE_list("work", list(work_lib.WORK), "Kinds of work.")
_LIBRARIES = flags.DEFINE_list(
  "libraries", ["ours", *environments.REQUIREMENTS], "Who takes part."
)
_REPETITIONS = flags.DEFINE_integer(
  "repetitions", 3, "Processes of each library and work.", lower_bound=1
)
_CACHED = flags.DEFINE_bool(
  "cached_reference",
  False,
  "Score the reference before training instead of in the step, where a library "
  "can; results are kept apart.",
)
_CORES = flags.DEFINE_integer(
  "cores", 1, "Processors, and threads, of a process.", lower_bound=1
)
_DATA = flags.DEFINE_string(
  "data",
  os.environ.get("DPOP_SHARED_DATA", "."),
  "Folder with gsm8k/, arc/, prefs/ and tokenizers/.",
)
_TOKENIZER = flags.DEFINE_string(
  "tokenizer", None, "As data.tokenizer; DATA/tokenizers/gpt-neox-olmo."
)
_ENVIRONMENTS = flags.DEFINE_string(
  "environments",
  str(pathlib.Path.home() / ".cache" / "dpop_jax_benchmarks"),
  "Where the libraries' environments are kept.",
)
_PIP_OPTIONS = flags.DEFINE_list(
  "pip_options", [], "For pip, such as --extra-index-url=URL."
)

# These have no way to score the reference beforehand.
_NEVER_CACHED = {"tunix": "Tunix scores the reference in every step."}


def main(_) -> None:
  out = pathlib.Path(_OUT.value).resolve()
  out.mkdir(parents=True, exist_ok=True)
  _check_names()
  data = pathlib.Path(_DATA.value)
  tokenizer = _TOKENIZER.value or str(data / "tokenizers" / "gpt-neox-olmo")
  files = {
    name: work_lib.make(
      name, out / "pairs", data=data, tokenizer=str(tokenizer)
    )
    for name in _WORK.value
  }
  pythons, skipped = _environments()
  reports = {}
  for repetition in range(_REPETITIONS.value):
    for name in _WORK.value:
      for library in _LIBRARIES.value:
        key = name, library, repetition
        if library in skipped:
          reports[key] = {"error": skipped[library]}
          continue
        reports[key] = _report(
          key, pythons[library], files[name], tokenizer, out / "runs"
        )
        print(_line(key, reports[key]), flush=True)
    _write(reports, pythons, out)
  print((out / _name("md")).read_text())


def _check_names():
  for flag, known in (
    (_WORK, work_lib.WORK),
    (_LIBRARIES, ("ours", *environments.REQUIREMENTS)),
  ):
    for name in flag.value:
      if name not in known:
        raise app.UsageError(
          f"--{flag.name} knows {', '.join(known)}; got {name!r}."
        )
  available = len(os.sched_getaffinity(0))
  if _CORES.value > available:
    raise app.UsageError(
      f"--cores is {_CORES.value}, but this process may use {available}."
    )


def _environments():
  """The interpreter of each library, and why others are skipped."""
  pythons, skipped = {}, {}
  for library in _LIBRARIES.value:
    if _CACHED.value and library in _NEVER_CACHED:
      skipped[library] = _NEVER_CACHED[library]
      continue
    try:
      pythons[library] = environments.python_of(
        library,
        pathlib.Path(_ENVIRONMENTS.value),
        pip_options=tuple(_PIP_OPTIONS.value),
      )
    except table.Skipped as reason:
      skipped[library] = str(reason)
      print(f"{library}: skipped. {reason}", flush=True)
  return pythons, skipped


def _report(key, python, pairs_file, tokenizer, folder):
  name, library, repetition = key
  return runs.run(
    name,
    library=library,
    python=python,
    pairs_file=pairs_file,
    tokenizer=tokenizer,
    is_reference_cached=_CACHED.value,
    folder=folder / f"{_name(name)}_{library}_{repetition}",
    num_cores=_CORES.value,
  )


def _name(name):
  """Of a file or folder: "results.md", or "a" of a run."""
  options = "_cached" if _CACHED.value else ""
  if _CORES.value > 1:
    options += f"_{_CORES.value}_cores"
  if name in ("md", "json", "png"):
    return f"results{options}.{name}"
  return name + options


def _line(key, report):
  title = " ".join(map(str, key))
  if "error" in report:
    return f"{title}: {report['error']}"
  return (
    f"{title}: {report['cpu_seconds_per_pair']:.3f} CPU-s per pair, "
    f"{report['peak_bytes'] / table.MIB:.0f} MiB, first loss "
    f"{report['losses'][0]:.4f}"
  )


def _write(reports, pythons, out):
  titles = {name: work_lib.WORK[name].title for name in _WORK.value}
  wanted = {
    name: work_lib.WORK[name].bar
    for name in _WORK.value
    if work_lib.WORK[name].bar is not None
  }
  bars = table.bars(reports, wanted)
  complaints = table.check(reports)
  text = table.markdown(reports, titles) + "\n" + table.bars_markdown(bars)
  text += "".join(f"\nNot the same work: {line}\n" for line in complaints)
  (out / _name("md")).write_text(text)
  results = {
    "reports": [
      dict(zip(("work", "library", "repetition"), key, strict=True)) | report
      for key, report in reports.items()
    ],
    "bars": [bar._asdict() | {"verdict": bar.verdict} for bar in bars],
    "complaints": complaints,
    "installed": {
      library: environments.versions(python)
      for library, python in pythons.items()
    },
  }
  (out / _name("json")).write_text(json.dumps(results, indent=2) + "\n")
  plots.write(reports, titles, out / _name("png"))


if __name__ == "__main__":
  app.run(main)
