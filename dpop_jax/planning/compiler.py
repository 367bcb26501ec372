"""What the TPU compiler makes of a step, and what that takes of a chip.

How much memory a program takes is read from the report that the compiler writes
once it has laid out all buffers, which is what it accepts or refuses a program
by. The `temp_size_in_bytes` of JAX's `memory_analysis` is another number: of
our large steps it is two to five GB more, also where the compiler takes a
program that with so much would not fit its chip.
"""

import dataclasses
import multiprocessing
import pathlib
import re
import signal
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax

_REFUSAL = re.compile(
  r"total memory required for HLO temporaries \(([\d.]+)([KMGT]?)\)"
  r"|Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm"
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_HBM = re.compile(r"^Memory Space: default.*\nTotal bytes: (\d+)", re.MULTILINE)
# What the compiler writes, in this order; then it makes code, for minutes.
_PROGRAM = "*after_optimizations.txt"
_REPORT = "*memory-usage-report.txt"
_LAST = "*after_buffer_assignment.txt"
_ERROR = "error"
_POLL_SECONDS = 0.2
# Compiles a program with the options that it is given.
Compile = Callable[[dict[str, Any]], jax.stages.Compiled]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
  """What came of a compilation.

  Attributes:
    hbm_bytes: Of a chip, for arguments, results and temporaries.
    text: The program; None if it does not fit.
    argument_bytes: Those of `hbm_bytes`; None without code.
    code_bytes: Beside `hbm_bytes`; None without code.
  """

  hbm_bytes: int
  text: str | None = None
  argument_bytes: int | None = None
  code_bytes: int | None = None


def compiled(compile_: Compile) -> Outcome:
  """Compiles a program.

  Raises:
    ValueError: The compiler fails for another reason than memory.
  """
  with tempfile.TemporaryDirectory() as folder:
    try:
      program = compile_({"xla_dump_to": folder})
    except jax.errors.JaxRuntimeError as error:
      return _refused(str(error), folder)
    hbm_bytes = _laid_out_bytes(folder)
  found: Any = program.memory_analysis()
  if hbm_bytes is None:
    # Another compiler, which reports nothing.
    hbm_bytes = found.argument_size_in_bytes + found.temp_size_in_bytes
    hbm_bytes += found.output_size_in_bytes - found.alias_size_in_bytes
  return Outcome(
    hbm_bytes=hbm_bytes,
    text=program.as_text() or "",
    argument_bytes=found.argument_size_in_bytes,
    code_bytes=found.generated_code_size_in_bytes,
  )


def laid_out(make_compile: Callable[..., Compile], *arguments: Any) -> Outcome:
  """Compiles a program in another process until its buffers are laid out.

  That takes a tenth of the time, or less: most of it goes into code, which is
  not made here.

  Args:
    make_compile: A function of a module, called in the other process.
    arguments: Its arguments; are sent there.

  Raises:
    ValueError: The compiler fails for another reason than memory.
  """
  with tempfile.TemporaryDirectory() as folder:
    process = multiprocessing.get_context("spawn").Process(
      target=_compile_into, args=(folder, make_compile, *arguments), daemon=True
    )
    process.start()
    try:
      while process.is_alive() and not _found(folder, _LAST):
        time.sleep(_POLL_SECONDS)
    finally:
      process.kill()
      process.join()
    error = pathlib.Path(folder, _ERROR)
    if error.exists():
      return _refused(error.read_text(), folder)
    hbm_bytes, program = _laid_out_bytes(folder), _found(folder, _PROGRAM)
    if hbm_bytes is None or program is None:
      raise ValueError(
        "The TPU compiler wrote no report of its memory; install the libtpu "
        "that constraints.txt pins, or leave --search out."
      )
    return Outcome(hbm_bytes=hbm_bytes, text=program.read_text())


def refused_bytes(message: str) -> int | None:
  """What the compiler says a program would take that does not fit."""
  found = _REFUSAL.search(message)
  if found is None:
    return None
  number, unit = (found[1], found[2]) if found[1] else (found[3], found[4])
  return int(float(number) * _UNITS[unit])


def _compile_into(folder, make_compile, *arguments):
  # A Ctrl-C is for the one that waits, which then ends this one.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  try:
    make_compile(*arguments)({"xla_dump_to": folder})
  except jax.errors.JaxRuntimeError as error:
    pathlib.Path(folder, _ERROR).write_text(str(error))


def _refused(message, folder) -> Outcome:
  rounded = refused_bytes(message)
  if rounded is None:
    raise ValueError(f"The TPU compiler failed: {message.splitlines()[0]}")
  return Outcome(hbm_bytes=_laid_out_bytes(folder) or rounded)


def _laid_out_bytes(folder) -> int | None:
  report = _found(folder, _REPORT)
  found = report and _HBM.search(report.read_text())
  return int(found[1]) if found else None


def _found(folder, pattern) -> pathlib.Path | None:
  return next(pathlib.Path(folder).glob(pattern), None)
