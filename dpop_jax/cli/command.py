"""What commands share: one sentence for a mistake, and an exit code."""

import os
import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging


def run(main: Callable[[], int | None]) -> None:
  """Runs a command's `main` once flags are parsed, and exits with its result.

  Errors that a user can cause end the process with one sentence on standard
  error and exit code 1.
  """

  def parse(arguments):
    _check_config_file(arguments)
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
      return main()
    except (ValueError, OSError, FloatingPointError) as error:
      return _fail(str(error))

  app.run(checked_main, flags_parser=parse)


def _check_config_file(arguments: Sequence[str]) -> None:
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
  print(f"Error: {' '.join(message.split())}", file=sys.stderr)
  sys.exit(1)
