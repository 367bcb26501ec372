"""Folders that are made once, whole or not at all, and found again by a key."""

import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from etils import epath

from dpop_jax import paths

# In a bucket, the object that is written last.
_COMPLETE = ".complete"


class Kept(NamedTuple):
  """A folder to read from.

  Attributes:
    folder: On this machine.
    was_there: Whether it was, here or in the bucket.
  """

  folder: pathlib.Path
  was_there: bool


def digest(path: epath.PathLike) -> str:
  """SHA-256 of a file's content, as hexadecimal digits."""
  with paths.open_binary(path) as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def version(path: epath.PathLike) -> str:
  """Another text when the content of a file is another.

  Of an object in a bucket it is found without reading it, and changes also when
  the same content is written again.
  """
  if paths.is_remote(path):
    return f"generation {paths.generation(path)}"
  return digest(path)


def key_of(parts: dict[str, Any]) -> str:
  """A folder name for what JSON can say; other parts, other name."""
  text = json.dumps(parts, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def keep(folder: epath.PathLike, write: Callable[[pathlib.Path], None]) -> Kept:
  """As `make`. What is to be kept in a bucket is used in a copy of it.

  Args:
    folder: Its path, local or remote. Of processes that keep the same folder in
      a bucket at the same time, several may upload the same files.
    write: Fills an empty folder on this machine.
  """
  if not paths.is_remote(folder):
    path = pathlib.Path(folder)
    return Kept(path, make(path, write))
  remote, copy = paths.of(folder), paths.local_folder(folder)
  is_uploaded = (remote / _COMPLETE).exists()

  def download(draft):
    names = _names(folder, paths.files_below(folder))
    paths.copy_files(names, remote, draft)

  was_here = make(copy, download if is_uploaded else write)
  if not is_uploaded:
    paths.copy_files(_names(copy, paths.files_below(copy)), copy, remote)
    with paths.explained(folder):
      (remote / _COMPLETE).write_text("")
  return Kept(copy, was_here or is_uploaded)


def _names(folder, files):
  return [os.path.relpath(file, folder) for file in files]


def copy_of(names: Iterable[str], source: epath.PathLike) -> pathlib.Path:
  """A folder on this machine with copies of small files of a remote one.

  What is changed there later makes another folder.

  Args:
    names: Of the files, relative to `source`.
    source: The remote folder.
  """
  with paths.explained(source):
    contents = {name: (paths.of(source) / name).read_bytes() for name in names}
  digests = {n: hashlib.sha256(c).hexdigest() for n, c in contents.items()}

  def write(draft):
    for name, content in contents.items():
      (draft / name).parent.mkdir(parents=True, exist_ok=True)
      (draft / name).write_bytes(content)

  folder = paths.local_folder(source) / key_of(digests)
  make(folder, write)
  return folder


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
