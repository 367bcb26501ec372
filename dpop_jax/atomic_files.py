"""Files that are either there whole or not there at all."""

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def replacing(path: pathlib.Path | str) -> Iterator[pathlib.Path]:
  """A temporary file beside `path` that takes its place when the block ends.

  If the block raises, or the process dies in it, `path` is as it was before.
  Missing folders above `path` are made.

  Args:
    path: The file to write or to replace.

  Yields:
    The path of the (empty) temporary file to write to.
  """
  path = pathlib.Path(path)
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


def write_text(path: pathlib.Path | str, text: str) -> None:
  """Writes `text` to `path` as UTF-8, byte for byte, whole or not at all."""
  with replacing(path) as temporary:
    temporary.write_bytes(text.encode())
