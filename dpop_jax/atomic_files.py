"""Files that are either there whole or not there at all."""

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Iterator

from etils import epath

from dpop_jax import paths


@contextlib.contextmanager
def replacing(path: epath.PathLike) -> Iterator[pathlib.Path]:
  """A temporary file that takes the place of `path` when the block ends.

  If the block raises, or the process dies in it, `path` is as it was before.
  Missing folders above `path` are made. The file is beside `path`, or in the
  system's folder for such files if `path` is remote.

  Args:
    path: The file to write or to replace.

  Yields:
    The path of the (empty) temporary file to write to.
  """
  if paths.is_remote(path):
    with tempfile.TemporaryDirectory() as folder:
      temporary = pathlib.Path(folder, "file")
      temporary.touch()
      yield temporary
      # An object is replaced when all of it has arrived.
      with paths.explained(path):
        paths.of(temporary).copy(paths.of(path), overwrite=True)
    return
  path = pathlib.Path(paths.of(path))
  path.parent.mkdir(parents=True, exist_ok=True)
  handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
  os.close(handle)
  temporary = pathlib.Path(name)
  try:
    yield temporary
    # mkstemp makes files that only their owner may read.
    umask = os.umask(0)
    os.umask(umask)
    temporary.chmod(0o666 & ~umask)
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def write_text(path: epath.PathLike, text: str) -> None:
  """Writes `text` to `path` as UTF-8, byte for byte, whole or not at all."""
  with replacing(path) as temporary:
    temporary.write_bytes(text.encode())
