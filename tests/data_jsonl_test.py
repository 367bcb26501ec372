"""JSON lines: what is written is read back, what is not JSON is named."""

import gzip

import pytest

from dpop_jax.data import jsonl


def test_rows_are_read_back_and_stay_readable(tmp_path):
  rows = [{"text": "é\u2028\n"}, {"number": 1.5}]
  path = tmp_path / "rows.jsonl"
  jsonl.write(path, rows)
  assert jsonl.read(path) == rows
  assert "é" in path.read_text(encoding="utf-8")


def test_gzipped_rows_are_read(tmp_path):
  path = tmp_path / "rows.jsonl.gz"
  path.write_bytes(gzip.compress(b'{"a": 1}\n\n{"a": 2}'))
  assert jsonl.read(path) == [{"a": 1}, {"a": 2}]


def test_a_missing_file_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match="There is no file .*rows.jsonl"):
    jsonl.read(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
  "content, message",
  [
    (b'{"a": 1}\n\n{"a":\n', "rows.jsonl, line 3, is not JSON"),
    (b"3\n", "rows.jsonl, line 1, holds a int"),
    (b'{"a": "\xff"}\n', "cannot be read as JSON lines"),
  ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path, content, message):
  path = tmp_path / "rows.jsonl"
  path.write_bytes(content)
  with pytest.raises(ValueError, match=message):
    jsonl.read(path)


def test_a_file_that_only_claims_to_be_gzipped_is_refused(tmp_path):
  path = tmp_path / "rows.jsonl.gz"
  path.write_bytes(b'{"a": 1}\n')
  with pytest.raises(ValueError, match="gzipped only if the name ends in .gz"):
    jsonl.read(path)
  whole = gzip.compress(b'{"a": 1}\n' * 1000)
  for broken in (whole[:40], whole[:12] + b"\xff" * 8 + whole[20:]):
    path.write_bytes(broken)
    with pytest.raises(ValueError, match="cannot be read as JSON lines"):
      jsonl.read(path)
