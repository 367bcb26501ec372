"""Paths of users: on a file system, or gs:// in Google Cloud Storage.

Everything below takes paths as text and makes them here, once, so that what
differs between the two is known in one place. A bucket

  - holds whole objects: writing one is atomic, appending to one is impossible;
  - has no folders: one is there as soon as an object's name begins with it,
    and is neither made, locked nor renamed in one piece;
  - can be read by libraries of C (memory maps, tokenizers) only in copies,
    see `local_folder`.
"""

import contextlib
import functools
import glob as glob_lib
import importlib.util
import io
import logging
import os
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

from etils import epath

# Otherwise epath takes TensorFlow for gs:// wherever that happens to be
# installed, which behaves and fails in other ways than fsspec.
os.environ.setdefault("EPATH_USE_TF", "0")

_REMOTE = "gs://"
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_READ_AHEAD_BYTES = 1 << 20


def is_remote(path: epath.PathLike) -> bool:
  """Whether a path is in a bucket."""
  return os.fspath(path).startswith(_REMOTE)


def of(path: epath.PathLike) -> epath.Path:
  """The path that a user has written.

  Raises:
    ValueError: It is a URL of another kind, or gcsfs is not installed.
    OSError: It is in a bucket that is not there or not open to this process.
  """
  text = os.fspath(path)
  if not is_remote(text):
    if match := _SCHEME.match(text):
      raise ValueError(
        f"Paths are local or begin with {_REMOTE}; {match[0]} in {text!r} is "
        "not supported."
      )
    return epath.Path(text)
  bucket = text.removeprefix(_REMOTE).split("/")[0]
  if not bucket:
    raise ValueError(f"{text!r} should name a bucket: {_REMOTE}BUCKET/NAME.")
  _check_bucket(bucket)
  return epath.Path(text)


def absolute(path: epath.PathLike) -> epath.Path:
  """As `of`; absolute if it is local."""
  # epath would put the current folder in front of gs:// as well.
  return of(path) if is_remote(path) else of(path).resolve()


def local(path: epath.PathLike, name: str) -> pathlib.Path:
  """A path that has to be on this machine.

  Args:
    path: As the user has written it.
    name: What the user calls it, such as `--out`.

  Raises:
    ValueError: It is a URL.
  """
  if match := _SCHEME.match(os.fspath(path)):
    raise ValueError(
      f"{name} must be a path on this machine, but {os.fspath(path)!r} begins "
      f"with {match[0]}; write there and copy the files."
    )
  return pathlib.Path(path)


def check_folder(path: epath.PathLike, name: str) -> None:
  """Raises ValueError if there is a file where a folder is to be written to.

  Args:
    path: As the user has written it.
    name: What the user calls it, such as `--out`.
  """
  if of(path).is_file():
    raise ValueError(
      f"{name} must be a folder, but {os.fspath(path)} is a file."
    )


def local_folder(path: epath.PathLike) -> pathlib.Path:
  """Where copies of what is in a remote folder are kept on this machine.

  `$XDG_CACHE_HOME`/dpop_jax/BUCKET/NAME, with ~/.cache if that is not set. It
  may be deleted at any time that nothing runs.
  """
  cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  return pathlib.Path(cache, "dpop_jax", os.fspath(path)[len(_REMOTE) :])


@contextlib.contextmanager
def open_binary(path: epath.PathLike) -> Iterator[Any]:
  """A file to read bytes or lines from."""
  with contextlib.ExitStack() as stack:
    file: Any = stack.enter_context(of(path).open("rb"))
    if is_remote(path):
      # fsspec looks for the end of each line by itself, which is slow.
      file = stack.enter_context(io.BufferedReader(file, _READ_AHEAD_BYTES))
    yield file


def copy_files(
  names: Iterable[str], source: epath.PathLike, target: epath.PathLike
) -> None:
  """Copies files from one folder to another; each of them may be remote.

  Args:
    names: Of the files, relative to both; copied in this order.
    source: The folder they are in.
    target: The folder to copy them to.
  """
  for name in names:
    path = of(target) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with explained(source), explained(target):
      (of(source) / name).copy(path, overwrite=True)


def generation(path: epath.PathLike) -> str:
  """Of a remote object: another one whenever anything is written to it."""
  with explained(path):
    info = _file_system().info(os.fspath(of(path)))
  return str(info["generation"])


def files_below(folder: epath.PathLike) -> list[str]:
  """All files of a folder and its subfolders, sorted; hidden ones left out."""
  root = of(folder)
  if is_remote(root):
    found = map(_with_scheme, _file_system().find(os.fspath(root)))
    names = [path.removeprefix(f"{os.fspath(root)}/") for path in found]
  else:
    found = (path for path in pathlib.Path(root).rglob("*") if path.is_file())
    names = [path.relative_to(root).as_posix() for path in found]
  return sorted(os.fspath(root / name) for name in filter(_is_visible, names))


def glob(pattern: str) -> list[str]:
  """The files that a shell finds for `pattern`, with ** as well; sorted."""
  if not is_remote(pattern):
    found = glob_lib.glob(pattern, recursive=True)
    return sorted(path for path in found if pathlib.Path(path).is_file())
  of(pattern)
  entries = _file_system().glob(pattern, detail=True)
  found = [_with_scheme(n) for n, e in entries.items() if e["type"] == "file"]
  # The folders in front of the first wildcard may be hidden ones.
  fixed, slash, _ = re.split(r"[*?\[]", pattern)[0].rpartition("/")
  names = [path.removeprefix(fixed + slash) for path in found]
  return sorted(fixed + slash + name for name in filter(_is_visible, names))


def _is_visible(name):
  return not any(part.startswith(".") for part in name.split("/"))


@contextlib.contextmanager
def explained(path: epath.PathLike) -> Iterator[None]:
  """Makes one sentence of what goes wrong with a bucket in the block.

  Args:
    path: What the block reads or writes; nothing is changed if it is local.

  Raises:
    FileNotFoundError: There is no such bucket or object.
    PermissionError: The bucket refuses.
    OSError: It cannot be reached.
  """
  if not is_remote(path):
    yield
    return
  import aiohttp
  import gcsfs.retry
  import google.api_core.exceptions
  import google.auth.exceptions

  try:
    yield
  except FileNotFoundError as error:
    raise FileNotFoundError(f"There is no {os.fspath(path)}.") from error
  except (
    OSError,
    aiohttp.ClientError,
    gcsfs.retry.HttpError,
    google.api_core.exceptions.GoogleAPICallError,
    google.auth.exceptions.GoogleAuthError,
  ) as error:
    text = " ".join(str(error).split())
    is_refused = getattr(error, "code", None) in (401, 403)
    if is_refused or text.startswith("Forbidden"):
      raise PermissionError(
        f"Permission denied for {os.fspath(path)} ({text}); log in with "
        "`gcloud auth application-default login`, or give the account of this "
        "machine the roles Storage Object Admin and Storage Legacy Bucket "
        "Reader for that bucket."
      ) from error
    raise OSError(f"{os.fspath(path)} cannot be used: {text}") from error


@functools.cache
def _check_bucket(bucket):
  """Raises OSError, in one sentence, unless the bucket can be listed."""
  file_system = _file_system()
  with explained(_REMOTE + bucket):
    file_system.call("GET", "b/{}/o", bucket, maxResults=1)


@functools.cache
def _file_system() -> Any:
  """The one that epath uses as well."""
  if importlib.util.find_spec("gcsfs") is None:
    raise ValueError("gs:// paths need gcsfs: pip install 'dpop_jax[gcs]'.")
  from etils.epath import backend

  # What it logs with a traceback it raises as well.
  logging.getLogger("gcsfs").addFilter(lambda record: not record.exc_info)
  file_system = backend.fsspec_backend.fs(_REMOTE)
  # TensorStore writes behind its back, and so do other processes.
  file_system.dircache.use_listings_cache = False
  file_system.invalidate_cache()
  return file_system


def _with_scheme(name):
  return _REMOTE + name
