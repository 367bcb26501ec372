"""A file is there whole, or as it was before."""

import os
import stat

import pytest

from dpop_jax import atomic_files


def test_folders_are_made_and_text_is_written_byte_for_byte(tmp_path):
  path = tmp_path / "a/b/text.txt"
  atomic_files.write_text(path, "é\r\n\n")
  assert path.read_bytes() == b"\xc3\xa9\r\n\n"


def test_a_block_that_raises_leaves_the_file_as_it_was(tmp_path):
  path = tmp_path / "text.txt"
  path.write_text("before")
  with pytest.raises(KeyError), atomic_files.replacing(path) as temporary:
    temporary.write_text("half")
    raise KeyError
  assert path.read_text() == "before"
  assert list(tmp_path.iterdir()) == [path]


def test_nothing_is_seen_at_the_path_before_the_block_ends(tmp_path):
  path = tmp_path / "text.txt"
  with atomic_files.replacing(path) as temporary:
    temporary.write_text("half")
    assert not path.exists() and temporary.parent == path.parent
  assert path.read_text() == "half"


def test_others_may_read_what_the_umask_lets_them(tmp_path):
  path = tmp_path / "text.txt"
  before = os.umask(0o027)
  try:
    atomic_files.write_text(path, "")
  finally:
    os.umask(before)
  assert stat.S_IMODE(path.stat().st_mode) == 0o640
