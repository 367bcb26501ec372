"""The package as others meet it: its version, its cost, its modules."""

import importlib
import importlib.metadata
import pathlib
import subprocess
import sys

import pytest

import dpop_jax

PACKAGE_DIR = pathlib.Path(dpop_jax.__file__).parent
SOURCES = sorted(PACKAGE_DIR.rglob("*.py"))
MODULES = [
  ".".join(path.relative_to(PACKAGE_DIR.parent).with_suffix("").parts)
  for path in SOURCES
  if path.name != "__init__.py"
]
MAX_LINES = 400


def test_installed_version_is_the_one_in_the_source():
  try:
    installed = importlib.metadata.version("dpop_jax")
  except importlib.metadata.PackageNotFoundError:
    pytest.skip("dpop_jax is not installed here; `make setup` installs it")
  assert installed == dpop_jax.__version__


def test_type_checkers_are_told_of_the_annotations():
  assert (PACKAGE_DIR / "py.typed").is_file()


def test_importing_the_package_is_cheap():
  # The cost of the interpreter itself is included.
  code = (
    "import dpop_jax, resource\n"
    "usage = resource.getrusage(resource.RUSAGE_SELF)\n"
    "print(usage.ru_utime + usage.ru_stime)"
  )
  result = subprocess.run(
    [sys.executable, "-c", code],
    cwd=PACKAGE_DIR.parent,
    capture_output=True,
    text=True,
    check=True,
  )
  assert float(result.stdout) < 1.5  # CPU-seconds


@pytest.mark.parametrize("module", MODULES)
def test_every_module_imports(module):
  if module.startswith("dpop_jax.cli."):
    # Commands define flags when imported, and two may define the same one.
    subprocess.run(
      [sys.executable, "-W", "error", "-c", f"import {module}"],
      cwd=PACKAGE_DIR.parent,
      check=True,
    )
  else:
    importlib.import_module(module)


def test_no_module_is_longer_than_one_noun_needs():
  num_lines = {
    str(path.relative_to(PACKAGE_DIR)): len(
      path.read_text(encoding="utf-8").splitlines()
    )
    for path in SOURCES
  }
  assert {
    name: lines for name, lines in num_lines.items() if lines > MAX_LINES
  } == {}
