"""Paths: the local ones stay as they were, and errors name the remote ones."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

from dpop_jax import atomic_files, paths


@pytest.fixture
def bucket(gcs):
  gcs.buckets["paths"] = {}
  return gcs


def test_local_paths_are_as_written():
  assert os.fspath(paths.of("a/b")) == "a/b"
  assert paths.absolute("a/b") == pathlib.Path.cwd() / "a/b"
  assert paths.local("a/b", "--out") == pathlib.Path("a/b")


def test_remote_paths_have_no_current_folder(bucket):
  path = "gs://paths/a/b"
  assert os.fspath(paths.of(path)) == path
  assert os.fspath(paths.absolute(path)) == path
  assert paths.is_remote(paths.of(path) / "c")


@pytest.mark.parametrize("path", ["s3://bucket/a", "https://host/a"])
def test_other_schemes_are_refused(path):
  scheme = path.split("/")[0]
  with pytest.raises(ValueError, match=f"{scheme}// in '{path}' is not supp"):
    paths.of(path)


def test_a_path_without_a_bucket_is_refused():
  with pytest.raises(ValueError, match="should name a bucket"):
    paths.of("gs:///a")


def test_what_has_to_be_local_refuses_a_bucket():
  with pytest.raises(ValueError, match="--out must be a path on this machine"):
    paths.local("gs://bucket/a", "--out")


def test_missing_gcsfs_is_named_with_what_installs_it(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  paths._file_system.cache_clear()
  with pytest.raises(ValueError, match=r"need gcsfs: pip install 'dpop_jax\["):
    paths.of("gs://some-bucket/a")


def test_a_bucket_that_is_not_there_is_named(gcs):
  with pytest.raises(FileNotFoundError, match=r"^There is no gs://nowhere\.$"):
    paths.of("gs://nowhere/a")


def test_a_bucket_that_refuses_is_named_with_what_to_do(gcs):
  gcs.buckets["secret"] = {}
  gcs.forbidden.add("secret")
  with pytest.raises(PermissionError) as caught:
    paths.of("gs://secret/a")
  assert str(caught.value).startswith("Permission denied for gs://secret (")
  assert "gcloud auth application-default login" in str(caught.value)
  assert "\n" not in str(caught.value)


def test_a_bucket_that_may_only_be_read_is_named_when_written_to(gcs):
  path = gcs.write("public/a", "1")
  gcs.read_only.add("public")
  assert paths.of(path).read_text() == "1"
  with pytest.raises(PermissionError, match="Permission denied for gs://pub"):
    atomic_files.write_text("gs://public/b", "2")
  assert gcs.names("public/") == ["a"]


def test_a_remote_file_is_replaced_whole_or_not_at_all(bucket):
  path = bucket.write("paths/whole/a.txt", "old")
  with pytest.raises(KeyError):
    with atomic_files.replacing(path) as temporary:
      temporary.write_text("half")
      raise KeyError
  assert bucket.text("paths/whole/a.txt") == "old"
  atomic_files.write_text(path, "nëw\r\n")
  assert bucket.text("paths/whole/a.txt") == "nëw\r\n"
  assert bucket.names("paths/whole/") == ["a.txt"]


# aiohttp of the blocks of 5 MiB that gcsfs hands to it.
@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")
@pytest.mark.parametrize("size", [0, 1 << 18, (11 << 20) + 1])
def test_files_of_any_size_are_copied_there_and_back(bucket, tmp_path, size):
  content = os.urandom(size)
  (tmp_path / "here/a").mkdir(parents=True)
  (tmp_path / "here/a/b").write_bytes(content)
  paths.copy_files(["a/b"], tmp_path / "here", "gs://paths/there")
  assert bucket.buckets["paths"]["there/a/b"].content == content
  paths.copy_files(["a/b"], "gs://paths/there", tmp_path / "back")
  assert (tmp_path / "back/a/b").read_bytes() == content


@pytest.fixture(params=["local", "remote"])
def tree(request, tmp_path):
  """A folder with the same eight files, and its path."""
  names = ["a/2.txt", "a/b/1.txt", "a/b/3.csv", "a/.hidden/1.txt", ".x/1.txt"]
  names += ["c.txt", "d.txt", "e.txt"]
  if request.param == "remote":
    gcs = request.getfixturevalue("gcs")
    for name in names:
      gcs.write(f"tree/root/{name}", name)
    return "gs://tree/root"
  for name in names:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(name)
  return str(tmp_path)


def test_files_below_a_folder_are_those_that_are_not_hidden(tree):
  expected = ["a/2.txt", "a/b/1.txt", "a/b/3.csv", "c.txt", "d.txt", "e.txt"]
  assert paths.files_below(tree) == [f"{tree}/{name}" for name in expected]


@pytest.mark.parametrize(
  ("pattern", "expected"),
  [
    ("*.txt", ["c.txt", "d.txt", "e.txt"]),
    ("a/*/[1-2].txt", ["a/b/1.txt"]),
    ("a", []),
    ("none/*", []),
  ],
)
def test_patterns_find_files(tree, pattern, expected):
  found = paths.glob(f"{tree}/{pattern}")
  assert found == [f"{tree}/{name}" for name in expected]


def test_a_remote_file_is_read_by_lines(bucket):
  lines = [b"line %d\r\n" % i for i in range(2000)]
  path = bucket.write("paths/lines", b"".join(lines))
  with paths.open_binary(path) as file:
    assert list(file) == lines


def test_what_another_process_writes_is_seen_at_once(bucket):
  folder = paths.of("gs://paths/seen")
  assert not folder.exists()
  bucket.write("paths/seen/1", "")
  assert folder.is_dir() and not folder.is_file()
  assert [path.name for path in folder.iterdir()] == ["1"]
  bucket.write("paths/seen/2", "")
  assert [path.name for path in folder.iterdir()] == ["1", "2"]


def test_tensorflow_is_never_asked_for():
  code = (
    "from dpop_jax import paths; from etils.epath import backend, gpath;"
    "import importlib.util; importlib.util.find_spec = lambda name: 1;"
    "print(gpath.PosixGPath('gs://a/b')._backend is backend.fsspec_backend)"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  assert done.stdout == "True\n"


def test_a_file_is_no_folder_to_write_to(tmp_path):
  paths.check_folder(tmp_path, "--out")
  paths.check_folder(tmp_path / "new", "--out")
  (tmp_path / "file").touch()
  with pytest.raises(ValueError, match="^--out must be a folder, but .*file"):
    paths.check_folder(tmp_path / "file", "--out")
