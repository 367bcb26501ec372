"""Rows from files and from the Hugging Face hub, each with its file and number.

A row that cannot be read must be named, so that it can be repaired. `datasets`
cannot do this for text formats: it infers one schema per file, so a broken line
fails the whole file without its number, a key missing in one row comes back as
None, and a CSV row with one cell too many shifts its columns without a word.
JSON and CSV are therefore read by the standard library; `datasets` reads
Parquet, which has a schema of its own, and the hub.
"""

import contextlib
import csv
import glob
import gzip
import io
import json
import pathlib
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from dpop_jax import paths as paths_lib

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
HUB_PREFIX = "hub:"
# Beside data, what says where they come from; no data itself.
MANIFEST = "manifest.json"
_HUB_NAME = re.compile(
  r"(?P<name>[^/@:\s]+/[^/@:\s]+)(/(?P<subset>[^/@:\s]+))?"
  r"(@(?P<revision>[^/@:\s]+))?(:(?P<split>\S+))?"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
# csv refuses cells of more than 128 KiB unless told otherwise.
_MAX_CELL_CHARACTERS = 1 << 30


class Row(NamedTuple):
  """One row of a source.

  Attributes:
    source: The file, or the name on the hub.
    number: Counts from 1: the line of a .jsonl file, else the row, to which the
      header of a .csv file does not belong.
    value: What the row holds; a dict, if the file is right.
    problem: Why the row could not be read, in which case `value` is None; else
      "".
  """

  source: str
  number: int
  value: Any
  problem: str = ""

  @property
  def place(self) -> str:
    """For messages: which row of what."""
    return f"{self.source} row {self.number}"


class HubName(NamedTuple):
  """A data set on the hub: `hub:owner/name[/subset][@revision][:split]`."""

  name: str
  subset: str | None
  revision: str | None
  split: str

  @property
  def is_pinned(self) -> bool:
    """Whether the name will always mean the same rows."""
    return self.revision is not None and bool(_COMMIT.fullmatch(self.revision))


def parse_hub_name(source: str) -> HubName:
  """Takes `hub:owner/name[/subset][@revision][:split]` apart.

  Raises:
    ValueError: If `source` is not written like that.
  """
  match = _HUB_NAME.fullmatch(source.removeprefix(HUB_PREFIX))
  if not source.startswith(HUB_PREFIX) or not match:
    raise ValueError(
      "A data set on the hub is written "
      f"hub:owner/name[/subset][@revision][:split], got {source!r}."
    )
  return HubName(
    match["name"], match["subset"], match["revision"], match["split"] or "train"
  )


def resolve(paths: str | Sequence[str]) -> tuple[str, ...]:
  """Files and hub names that `paths` stands for, in a fixed order.

  Args:
    paths: A file, a folder (all its data files, also those of its subfolders,
      but none called manifest.json), a pattern such as `data/*.jsonl`, a hub
      name, or a sequence of them.

  Raises:
    FileNotFoundError: If a path leads to no file.
    ValueError: If a file has a suffix that is not read here.
  """
  if isinstance(paths, str):
    paths = (paths,)
  found = []
  for path in paths:
    if path.startswith(HUB_PREFIX):
      parse_hub_name(path)
      found.append(path)
    elif paths_lib.of(path).is_dir():
      found.extend(_files_below(path))
    elif paths_lib.of(path).is_file():
      found.append(path)
    else:
      matches = paths_lib.glob(path)
      if not matches:
        raise FileNotFoundError(
          f"There is no file, folder or pattern {path!r} with data; a data set "
          "on the hub is written hub:owner/name:split."
        )
      found.extend(matches)
  for path in found:
    if not path.startswith(HUB_PREFIX) and not _has_data_suffix(path):
      raise ValueError(
        f"{path} should end in one of {', '.join(SUFFIXES)}, or in one of them "
        "and .gz."
      )
  return tuple(found)


def read(source: str) -> Iterator[Row]:
  """Rows of one file or hub name, lazily where the format allows.

  Args:
    source: One of the results of `resolve`.

  Raises:
    ValueError: If the source holds no rows or cannot be read as what its name
      says. Single bad rows of a text file are rows with a `problem` instead.
  """
  if source.startswith(HUB_PREFIX):
    rows = _read_hub(source)
  else:
    rows = {
      ".jsonl": _read_json_lines,
      ".json": _read_json,
      ".csv": _read_csv,
      ".parquet": _read_parquet,
    }[_suffix(source)](source)
  is_empty = True
  try:
    for row in rows:
      is_empty = False
      yield row
  except (EOFError, gzip.BadGzipFile, zlib.error) as error:
    raise ValueError(f"{source} is not a whole gzip file: {error}.") from error
  if is_empty:
    raise ValueError(f"{source} holds no rows.")


def _suffix(path):
  return pathlib.Path(path.removesuffix(".gz")).suffix


def _has_data_suffix(path):
  return _suffix(path) in SUFFIXES


def _files_below(folder):
  files = [
    path
    for path in paths_lib.files_below(folder)
    if _has_data_suffix(path) and not path.endswith(f"/{MANIFEST}")
  ]
  if not files:
    raise FileNotFoundError(
      f"The folder {folder} holds no {', '.join(SUFFIXES)} file, plain or .gz."
    )
  return files


@contextlib.contextmanager
def _open(path) -> Iterator[Any]:
  with contextlib.ExitStack() as stack:
    file = stack.enter_context(paths_lib.open_binary(path))
    if path.endswith(".gz"):
      file = stack.enter_context(gzip.open(file, "rb"))
    yield file


def _read_json_lines(path):
  with _open(path) as file:
    for number, line in enumerate(file, start=1):
      if number == 1:
        line = line.removeprefix(b"\xef\xbb\xbf")
      if not line.strip():
        continue
      try:
        yield Row(path, number, json.loads(line.decode("utf-8")))
      except (ValueError, RecursionError) as error:
        yield Row(path, number, None, _one_line(error))


def _read_json(path):
  with _open(path) as file:
    content = file.read()
  if content.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"{":
    # Many .json files hold one object per line.
    yield from _read_json_lines(path)
    return
  if not content.strip():
    return
  try:
    values = json.loads(content.decode("utf-8-sig"))
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{path} is not JSON: {_one_line(error)}.") from error
  if not isinstance(values, list):
    raise ValueError(
      f"{path} should hold a JSON list of rows, or one row per line, but holds "
      f"a {type(values).__name__}."
    )
  for number, value in enumerate(values, start=1):
    yield Row(path, number, value)


def _read_csv(path):
  old_limit = csv.field_size_limit(_MAX_CELL_CHARACTERS)
  number = 0
  try:
    with _open(path) as file:
      text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
      rows = csv.reader(text, strict=True)
      header = next(rows, [])
      # Spreadsheets leave columns without names behind, which do no harm.
      names = list(filter(None, header))
      if len(set(names)) < len(names):
        raise ValueError(
          f"{path} should give each column another name, got "
          f"{', '.join(names)}."
        )
      for number, cells in enumerate(filter(None, rows), start=1):
        if len(cells) == len(header):
          yield Row(path, number, dict(zip(header, cells, strict=True)))
        else:
          problem = f"{len(cells)} cells under {len(header)} column names"
          yield Row(path, number, None, problem)
  except csv.Error as error:
    # A quote that is not closed swallows the rows behind it, so that there is
    # none to go on with.
    raise ValueError(
      f"{path} is not CSV behind row {number}: {_one_line(error)}."
    ) from error
  except UnicodeDecodeError as error:
    raise ValueError(f"{path} is not CSV: {_one_line(error)}.") from error
  finally:
    csv.field_size_limit(old_limit)


def _read_parquet(path):
  import datasets
  import datasets.exceptions

  with contextlib.ExitStack() as stack:
    # A folder that goes away keeps lock files out of the user's home.
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    file_name = path
    if path.endswith(".gz") or paths_lib.is_remote(path):
      # Parquet is read from its end, which gzip cannot do, and in pieces.
      file_name = str(pathlib.Path(folder) / "rows.parquet")
      with _open(path) as packed, open(file_name, "wb") as plain:
        shutil.copyfileobj(packed, plain)
    with open(file_name, "rb") as file:
      if file.read(4) != b"PAR1":
        raise ValueError(f"{path} is not a Parquet file.")
    try:
      values = datasets.load_dataset(
        "parquet",
        data_files=glob.escape(file_name),
        split="train",
        streaming=True,
        cache_dir=folder,
      )
      for number, value in enumerate(values, start=1):
        yield Row(path, number, value)
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
      raise ValueError(
        f"{path} cannot be read as Parquet: {_one_line(error)}."
      ) from error


def _read_hub(source):
  import datasets
  import datasets.exceptions

  hub_name = parse_hub_name(source)
  try:
    values = datasets.load_dataset(
      hub_name.name,
      hub_name.subset,
      split=hub_name.split,
      revision=hub_name.revision,
    )
  except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
    raise ValueError(
      f"{source} cannot be loaded from the hub: {_one_line(error)}."
    ) from error
  for number, value in enumerate(values, start=1):
    yield Row(source, number, value)


def _one_line(error):
  return " ".join(str(error).split()).rstrip(".")[:300]
