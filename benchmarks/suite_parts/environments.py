"""An environment of its own for each library."""

import pathlib
import subprocess
import sys

from . import table

# What pip is asked for. `torch` of this version has no GPU libraries on indexes
# that carry the CPU build under the plain name; elsewhere use --pip_options.
REQUIREMENTS = {
  "trl": ("trl==1.16.0", "transformers==5.23.0", "torch==2.13.0"),
  "tunix": ("google-tunix==0.1.7", "jax==0.10.2", "flax==0.12.8"),
  # Without pillow and torch, a model of EasyDeL's cannot be imported.
  "easydel": ("easydel==0.3.0", "pillow==13.0.0", "torch==2.13.0"),
}
# Of benchmarks/gpu.py. The torch has to be one for GPUs; transformers is the
# last one that takes a version of `kernels` that there is.
GPU_REQUIREMENTS = {
  "trl_gpu": (
    *("trl==1.16.0", "transformers==5.22.2", "torch==2.13.0"),
    *("liger-kernel==0.8.5", "kernels==0.17.2"),
  ),
}
_STAMP = "requirements.txt"
_IMPORTS = {
  "trl": "trl",
  "trl_gpu": "trl, kernels, liger_kernel, torch; torch.zeros(1).cuda()",
  "tunix": "tunix",
  "easydel": "easydel",
}


def python_of(
  library: str, folder: pathlib.Path, *, pip_options: tuple[str, ...] = ()
) -> str:
  """The interpreter of a library's environment, made if it is not there.

  Args:
    library: "ours", which is the interpreter that runs this, or a key of
      REQUIREMENTS or GPU_REQUIREMENTS.
    folder: Where environments are kept; one made from other requirements is
      made again.
    pip_options: For `pip install`.

  Raises:
    table.Skipped: It cannot be had; says why.
  """
  if library == "ours":
    return sys.executable
  environment = folder / library
  python = environment / "bin" / "python"
  requirements = (REQUIREMENTS | GPU_REQUIREMENTS)[library]
  wanted = "\n".join(requirements) + "\n"
  stamp = environment / _STAMP
  if stamp.exists() and stamp.read_text() == wanted:
    return str(python)
  folder.mkdir(parents=True, exist_ok=True)
  for command in (
    [sys.executable, "-m", "venv", "--clear", str(environment)],
    [
      str(python),
      *("-m", "pip", "install", "--quiet", "--disable-pip-version-check"),
      *pip_options,
      *requirements,
    ],
    [str(python), "-c", f"import {_IMPORTS[library]}"],
  ):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
      said = (done.stderr or done.stdout).strip().splitlines()
      raise table.Skipped(
        f"Its environment could not be made: {said[-1] if said else 'no word'}"
      )
  stamp.write_text(wanted)
  return str(python)


def versions(python: str) -> list[str]:
  """Everything that is installed, as `pip freeze` says it."""
  command = [python, "-m", "pip", "freeze", "--disable-pip-version-check"]
  done = subprocess.run(command, capture_output=True, text=True)
  return done.stdout.split("\n")[:-1]
