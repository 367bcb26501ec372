r"""dpop_jax and TRL on one GPU, on the same pairs.

  DPOP_SHARED_DATA=DATA python benchmarks/gpu.py --out=DIR
  python benchmarks/gpu.py --out=DIR --smoke

Trains models of the shapes of Qwen2.5-0.5B and Llama-3-8B, with random weights
and products in bfloat16, on GSM8K pairs with 4 shots (a) and on conversations
(c), each library in a process and an environment of its own. DIR then holds

  gpu.json   every report, and what follows from it
  gpu.md     tables: pairs and tokens a second, MFU, peak memory
  runs/      orders, logs and reports of the processes

MFU is given twice: of what the distinct tokens of an update need (unique-token)
and of what its sequences one by one would (naive-token); what is computed a
second time for the backward pass counts in neither. Shapes and loads are in
suite_parts/gpu_work.py, what TRL is set to in peers/gpu_trl.py. TRL gets an
environment in --environments, or the interpreter of --trl_python; where it
cannot be had, it is skipped and the table says why. What is in DIR already is
not measured again. With --smoke everything is tiny and runs on the CPU, TRL
only with --trl_python: it shows that all of this works, and measures nothing.
"""

import json
import os
import pathlib
import sys

from absl import app, flags
from suite_parts import environments, gpu_runs, gpu_table, gpu_work, table
from suite_parts import work as work_lib

_OUT = flags.DEFINE_string("out", None, "Folder for results.", required=True)
_SMOKE = flags.DEFINE_bool("smoke", False, "Tiny, on the CPU.")
_SHAPES = flags.DEFINE_list(
  "shapes", ["0.5b", "8b"], "Models; not with --smoke."
)
_LIBRARIES = flags.DEFINE_list(
  "libraries", list(gpu_runs.LIBRARIES), "Who takes part."
)
_DATA = flags.DEFINE_string(
  "data", os.environ.get("DPOP_SHARED_DATA", "."), "As of suite.py."
)
_TOKENIZER = flags.DEFINE_string(
  "tokenizer", None, "As data.tokenizer; DATA/tokenizers/gpt-neox-olmo."
)
_ENVIRONMENTS = flags.DEFINE_string(
  "environments",
  str(pathlib.Path.home() / ".cache" / "dpop_jax_benchmarks"),
  "Where TRL's environment is kept.",
)
_PIP_OPTIONS = flags.DEFINE_list(
  "pip_options", [], "For pip, such as --extra-index-url=URL."
)
_TRL_PYTHON = flags.DEFINE_string(
  "trl_python", None, "An interpreter with TRL, in place of an environment."
)


def main(_) -> None:
  shapes = ["tiny"] if _SMOKE.value else _SHAPES.value
  _check_names(shapes)
  platform, kind = ("cpu", "cpu")
  if not _SMOKE.value:
    platform, kind = gpu_runs.device_of(sys.executable)
    if platform != "gpu":
      raise app.UsageError(
        f"This needs a GPU, and JAX finds a device of the platform {platform}; "
        'install "dpop_jax[gpu]" on a machine with one, or try --smoke.'
      )
  out = pathlib.Path(_OUT.value).resolve()
  out.mkdir(parents=True, exist_ok=True)
  pythons, skipped = _pythons()
  reports, amounts = {}, {}
  for key in gpu_work.LOADS:
    if key[0] not in shapes:
      continue
    file = _pairs_file(key, out)
    amounts[key] = gpu_work.amounts(gpu_work.LOADS[key], work_lib.load(file))
    for library in _LIBRARIES.value:
      if library in skipped:
        report = {"error": skipped[library]}
      else:
        report = gpu_runs.run(
          key,
          library=library,
          python=pythons[library],
          pairs_file=file,
          folder=out / "runs" / "_".join((*key, library)),
          is_smoke=_SMOKE.value,
        )
      reports[*key, library] = report
      print(*key, library, report.get("error", "done"), flush=True)
    _write(reports, amounts, kind, pythons, out)
  print((out / "gpu.md").read_text())


def _check_names(shapes):
  for flag, known in (
    (_SHAPES, {key[0] for key in gpu_work.LOADS}),
    (_LIBRARIES, gpu_runs.LIBRARIES),
  ):
    for name in flag.value:
      if name not in known:
        raise app.UsageError(
          f"--{flag.name} knows {', '.join(sorted(known))}; got {name!r}."
        )


def _pythons():
  """The interpreter of each library, and why others are skipped."""
  pythons, skipped = {"ours": sys.executable}, {}
  if "trl" not in _LIBRARIES.value:
    return pythons, skipped
  if _TRL_PYTHON.value is not None:
    pythons["trl"] = _TRL_PYTHON.value
  elif _SMOKE.value:
    skipped["trl"] = "--smoke makes no environment; name one by --trl_python."
  else:
    try:
      pythons["trl"] = environments.python_of(
        "trl_gpu",
        pathlib.Path(_ENVIRONMENTS.value),
        pip_options=tuple(_PIP_OPTIONS.value),
      )
    except table.Skipped as reason:
      skipped["trl"] = str(reason)
  return pythons, skipped


def _pairs_file(key, out):
  load, data = gpu_work.LOADS[key], pathlib.Path(_DATA.value)
  return work_lib.make(
    load.source,
    out / "pairs" / key[0],
    data=data,
    tokenizer=_TOKENIZER.value or str(data / "tokenizers" / "gpt-neox-olmo"),
    work=load.work,
  )


def _write(reports, amounts, kind, pythons, out):
  product = next(
    (r["product_flops_per_second"] for r in reports.values()
     if "product_flops_per_second" in r),
    None,
  )  # fmt: skip
  peak = gpu_table.peak_of(kind)
  found = {
    key: gpu_table.figures(
      report,
      gpu_work.SHAPES[key[0]],
      gpu_work.LOADS[key[:2]],
      amounts[key[:2]],
      peak=peak,
      product=product,
    )
    for key, report in reports.items()
    if "error" not in report
  }
  titles = {
    key: f"{gpu_work.SHAPES[key[0]].title}, "
    f"{work_lib.WORK[gpu_work.LOADS[key].source].title}"
    for key in amounts
  }
  tera = lambda rate: "not known" if rate is None else f"{rate / 1e12:.1f}"
  complaints = gpu_table.complaints(reports)
  text = (
    f"{kind}: {tera(peak)} TFLOP/s published, {tera(product)} measured.\n\n"
  )
  text += gpu_table.markdown(found, reports, titles)
  text += "".join(f"\nNot the same work: {line}\n" for line in complaints)
  (out / "gpu.md").write_text(text)
  results = {
    "device": kind,
    "published_flops_per_second": peak,
    "measured_flops_per_second": product,
    "reports": [
      dict(zip(("shape", "load", "library"), key, strict=True))
      | report
      | (found[key]._asdict() if key in found else {})
      for key, report in reports.items()
    ],
    "complaints": complaints,
    "installed": {
      library: environments.versions(python)
      for library, python in pythons.items()
    },
  }
  (out / "gpu.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
  app.run(main)
