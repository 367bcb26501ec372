"""JSON lines: one object per line, read with line numbers, written whole."""

import contextlib
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

from etils import epath

from dpop_jax import atomic_files, paths


def read(path: epath.PathLike) -> list[dict[str, Any]]:
  """The objects of a .jsonl file, or of a gzipped .jsonl.gz; empty lines pass.

  Raises:
    FileNotFoundError: There is no such file.
    ValueError: A line is not a JSON object, or the file is not UTF-8 text; the
      message names the file and the line.
  """
  path = paths.of(path)
  if not path.is_file():
    raise FileNotFoundError(f"There is no file {path}.")
  rows = []
  try:
    with contextlib.ExitStack() as stack:
      file = stack.enter_context(paths.open_binary(path))
      if path.suffix == ".gz":
        file = stack.enter_context(gzip.GzipFile(fileobj=file))
      lines = stack.enter_context(io.TextIOWrapper(file, encoding="utf-8"))
      for number, line in enumerate(lines, start=1):
        if not line.strip():
          continue
        try:
          row = json.loads(line)
        except json.JSONDecodeError as error:
          raise ValueError(
            f"{path}, line {number}, is not JSON ({error.msg}); expected one "
            "object per line."
          ) from None
        if not isinstance(row, dict):
          raise ValueError(
            f"{path}, line {number}, holds a {type(row).__name__}; expected "
            "one JSON object per line."
          )
        rows.append(row)
  except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
    raise ValueError(
      f"{path} cannot be read as JSON lines ({error}); expected UTF-8 text, "
      "gzipped only if the name ends in .gz."
    ) from None
  return rows


def dumps(rows: Iterable[Mapping[str, Any]]) -> str:
  """The text of a .jsonl file; non-ASCII characters stay readable."""
  return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write(path: epath.PathLike, rows: Iterable[Mapping[str, Any]]) -> None:
  """Writes one object per line, the whole file or nothing."""
  atomic_files.write_text(path, dumps(rows))
