"""What commands share: one sentence for a mistake, and an exit code."""

import os
import sys
import traceback
from collections.abc import Callable, Sequence

from absl import app, flags, logging

from dpop_jax import processes

# What a process that ends on SIGTERM is expected to return.
EXIT_TERMINATED = 128 + 15


def run(
  main: Callable[[], int | None], *, in_several_processes: bool = False
) -> None:
  """Runs a command's `main` once flags are parsed, and exits with its result.

  Errors that a user can cause end the process with one sentence on standard
  error and exit code 1.

  Args:
    main: Returns the exit code, or None for 0.
    in_several_processes: Whether the command may be started on several hosts,
      as one run; see `processes`. One that ends because another one has ended
      returns 75.
  """

  def parse(arguments):
    check_config_file(arguments)
    try:
      return flags.FLAGS(arguments)
    except (AttributeError, KeyError) as error:
      # From ConfigDict, for `--config.section.key` that is not in the file.
      return _fail(_unknown_key(error, arguments))
    except (flags.Error, TypeError, ValueError, OSError, ImportError) as error:
      return _fail(str(_first(error)))

  def checked_main(arguments):
    if len(arguments) > 1:
      _fail(f"Expected only flags, got {' '.join(arguments[1:])}.")
    logging.set_verbosity(logging.WARNING)
    try:
      if in_several_processes:
        processes.initialize()
      return main()
    except Exception as error:
      code = 1
      if processes.has_lost_another(error):
        code = processes.EXIT_LOST_ANOTHER
        _tell(
          "Another process of this run has ended or cannot be reached any more "
          f"({str(error).splitlines()[0]}). Its output says why; the same "
          "command on all hosts continues from the newest checkpoint."
        )
      elif isinstance(error, (ValueError, OSError, FloatingPointError)):
        _tell(str(error))
      elif processes.are_connected():
        traceback.print_exc()
      else:
        raise
      processes.leave(code)
      return code

  app.run(checked_main, flags_parser=parse)


def check_config_file(arguments: Sequence[str]) -> None:
  """Ends the process with one sentence if the file of `--config` is missing."""
  # ConfigDict would tell of its attempts.
  for argument in arguments:
    if argument.startswith("--config="):
      path = argument.removeprefix("--config=").split(":")[0]
      if not os.path.isfile(path):
        _fail(f"There is no config file {path!r}.")


def _first(error: BaseException) -> BaseException:
  """The error behind one that ConfigDict has wrapped a whole traceback in."""
  while "Traceback" in str(error) and error.__context__ is not None:
    error = error.__context__
  return error


def _unknown_key(error: Exception, arguments: Sequence[str]) -> str:
  """For an override of a section or key that is not there."""
  if error.args and isinstance(error.args[0], KeyError):
    error = error.args[0]
  # The text of a KeyError is the repr of its message, which begins with the
  # key.
  text = str(error.args[0])
  unknown = text.split("\n")[0].strip("'")
  names = [a.split("=")[0].removeprefix("--config.") for a in arguments]
  key = next((n for n in names if unknown in n.split(".")), unknown)
  hint = " ".join(text.split("\n")[1:])
  return f"Unknown config key {key}. {hint}"


def _fail(message: str):
  _tell(message)
  sys.exit(1)


def _tell(message: str) -> None:
  print(f"Error: {' '.join(message.split())}", file=sys.stderr, flush=True)
