"""Folders that are there whole or not at all, written by several processes."""

import contextlib
from collections.abc import Iterator

import jax
from etils import epath
from jax.experimental import multihost_utils

from dpop_jax import exchange, paths


@contextlib.contextmanager
def new(path: epath.PathLike) -> Iterator[epath.Path]:
  """A new folder that is moved to `path` when the block ends.

  If the block raises, nothing is at `path`. In a bucket, where nothing can be
  moved, the block writes to `path` itself; what says that the folder is
  complete should then be written last. Called by all processes alike.

  Args:
    path: The folder to make; its parents are made, too.

  Yields:
    The folder to write to, the same one in all processes.

  Raises:
    FileExistsError: There is something at `path`.
    ValueError: The processes mean different folders.
  """
  target = paths.absolute(path)
  exchange.check_equal({"the folder to make": str(target)})
  exchange.check_shared(target.parent)
  is_remote = paths.is_remote(target)
  draft = target if is_remote else target.parent / f".{target.name}.draft"
  is_primary = jax.process_index() == 0
  if target.exists() and (not target.is_dir() or any(target.iterdir())):
    raise FileExistsError(
      f"There is something in {target} already; name another folder, or remove "
      "it."
    )
  # All have looked before the first one writes.
  _wait_for_all("look")
  if is_primary:
    # What a killed process has left.
    if not is_remote and draft.exists():
      draft.rmtree()
    draft.mkdir(parents=True, exist_ok=True)
  _wait_for_all("make")
  try:
    yield draft
    _wait_for_all("write")
    if is_primary and not is_remote:
      if target.exists():
        target.rmdir()
      draft.rename(target)
    _wait_for_all("move")
  except BaseException:
    if is_primary and not is_remote and draft.exists():
      draft.rmtree()
    raise


def _wait_for_all(name):
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(f"dpop_jax.whole_folders.{name}")
