"""Folders that are made once, whole or not at all, and found again by a key."""

import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable
from typing import Any


def digest(path: pathlib.Path | str) -> str:
  """SHA-256 of a file's content, as hexadecimal digits."""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def key_of(parts: dict[str, Any]) -> str:
  """A folder name for what JSON can say; other parts, other name."""
  text = json.dumps(parts, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def make(folder: pathlib.Path, write: Callable[[pathlib.Path], None]) -> bool:
  """Makes a folder unless it is there.

  Args:
    folder: Its path.
    write: Fills an empty folder. It works on a draft, which is renamed at the
      end, so nobody ever finds half of it, and of several processes one wins.

  Returns:
    Whether the folder was there already.
  """
  if folder.is_dir():
    return True
  folder.parent.mkdir(parents=True, exist_ok=True)
  draft = pathlib.Path(tempfile.mkdtemp(prefix=".draft-", dir=folder.parent))
  try:
    # mkdtemp makes folders that only their owner may read.
    umask = os.umask(0)
    os.umask(umask)
    draft.chmod(0o777 & ~umask)
    write(draft)
    try:
      os.rename(draft, folder)
    except OSError:
      # Another process may have been faster; what it wrote is the same.
      if not folder.is_dir():
        raise
  finally:
    shutil.rmtree(draft, ignore_errors=True)
  return False
