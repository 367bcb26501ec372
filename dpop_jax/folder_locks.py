"""A folder in which only one run is at work."""

import contextlib
import errno
import fcntl
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
from absl import logging
from etils import epath

from dpop_jax import exchange, paths

_NAME = "lock"
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


@contextlib.contextmanager
def alone_in(folder: epath.PathLike, doing: str) -> Iterator[None]:
  """Holds a folder until the block ends, or the process does, however.

  Called by all processes of a run alike; the first one holds it for all. A
  bucket has no locks, nor have some file systems: there a second run is not
  noticed.

  Args:
    folder: Is made if it is not there. Has a file `lock` afterwards.
    doing: What another run would be doing there, for the error.

  Raises:
    ValueError: Another run holds it; in all processes alike.
  """
  with contextlib.ExitStack() as stack:
    if not paths.is_remote(folder):
      exchange.after_first(lambda: _hold(pathlib.Path(folder), doing, stack))
    yield


def _hold(folder, doing, stack):
  if jax.process_index() != 0:
    return
  folder.mkdir(parents=True, exist_ok=True)
  file: Any = stack.enter_context((folder / _NAME).open("w"))
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    raise ValueError(
      f"Another process is {doing} in {folder}; wait for it, or use another "
      "--workdir."
    ) from None
  except OSError as error:
    if error.errno not in _WITHOUT_LOCKS:
      raise
    logging.warning(
      "%s is on a file system without locks: nothing keeps a second run from "
      "starting in it.",
      folder,
    )
