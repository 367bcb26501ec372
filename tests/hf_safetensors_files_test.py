"""Safetensors files: rectangles out of them, and errors that name the fault."""

import errno
import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as library

from dpop_jax.hf import safetensors_files

BFLOAT16 = jnp.dtype("bfloat16")


def numbers(*shape, dtype=np.float32):
  # Also float16 holds them all.
  return (np.arange(np.prod(shape)) % 2048).reshape(shape).astype(dtype)


def write_raw(path, header, data):
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def entry(dtype, shape, *offsets):
  return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def read(folder, name, *ranges):
  tensor = safetensors_files.tensors(folder)[name]
  shape = [last - first for first, last in ranges]
  out = np.empty(shape, safetensors_files.DTYPES[tensor.dtype])
  with safetensors_files.OpenFile(folder / tensor.file) as file:
    file.read(tensor, ranges, out)
  return out


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BFLOAT16])
@pytest.mark.parametrize(
  "shape, ranges",
  [
    ((7,), [(2, 5)]),
    ((6, 5), [(0, 6), (0, 5)]),
    ((6, 5), [(2, 4), (0, 5)]),
    # Short runs, which are cut out of whole rows.
    ((6, 5), [(1, 6), (2, 4)]),
    # More of them than are read at once.
    ((3000, 700), [(5, 2999), (699, 700)]),
    # Long runs, which are read alone.
    ((3, 9000), [(1, 3), (100, 8999)]),
    ((4, 3, 5), [(1, 3), (0, 3), (0, 5)]),
    ((4, 3, 5), [(1, 3), (1, 2), (2, 5)]),
  ],
)
def test_reads_a_rectangle(tmp_path, dtype, shape, ranges):
  array = numbers(*shape, dtype=dtype)
  other = numbers(3, dtype=np.float32)
  library.save_file(
    {"other": other, "x": array}, tmp_path / safetensors_files.SINGLE
  )
  expected = array[tuple(slice(*r) for r in ranges)]
  actual = read(tmp_path, "x", *ranges)
  assert actual.dtype == expected.dtype
  np.testing.assert_array_equal(actual, expected)


def test_what_it_writes_the_library_reads(tmp_path):
  arrays = {
    "x": numbers(2, 3),
    "y": numbers(5, dtype=BFLOAT16),
    "z": numbers(1, dtype=np.float16),
  }
  codes = {"x": "F32", "y": "BF16", "z": "F16"}
  path = tmp_path / safetensors_files.SINGLE
  safetensors_files.write(
    path,
    {name: (codes[name], array.shape) for name, array in arrays.items()},
    # In pieces that do not end where tensors do not.
    iter([arrays["x"][:1], arrays["x"][1:], arrays["y"], arrays["z"]]),
  )
  loaded = library.load_file(path)
  assert list(loaded) == list(arrays)
  for name, array in arrays.items():
    assert loaded[name].dtype == array.dtype
    np.testing.assert_array_equal(loaded[name], array)
  with library.safe_open(path, "np") as file:
    assert file.metadata() == {"format": "pt"}
  assert [child.name for child in tmp_path.iterdir()] == [path.name]


def test_a_file_that_cannot_be_finished_is_not_there(tmp_path):
  def data():
    yield numbers(2)
    raise RuntimeError("lost the device")

  with pytest.raises(RuntimeError, match="lost the device"):
    safetensors_files.write(tmp_path / "x", {"a": ("F32", (4,))}, data())
  assert not list(tmp_path.iterdir())


def sharded(folder):
  library.save_file({"a": numbers(2, 3)}, folder / "one.safetensors")
  library.save_file({"b": numbers(4)}, folder / "two.safetensors")
  weight_map = {"a": "one.safetensors", "b": "two.safetensors"}
  index = {"metadata": {}, "weight_map": weight_map}
  (folder / safetensors_files.INDEX).write_text(json.dumps(index))


def test_a_full_disk_is_named(tmp_path):
  def data():
    raise OSError(errno.ENOSPC, "No space left on device")
    yield

  with pytest.raises(OSError, match="No space left on device: '.*/x'"):
    safetensors_files.write(tmp_path / "x", {"a": ("F32", (4,))}, data())
  assert list(tmp_path.iterdir()) == []


def test_finds_tensors_of_all_shards(tmp_path):
  sharded(tmp_path)
  found = safetensors_files.tensors(tmp_path)
  assert {n: (t.file, t.dtype, t.shape) for n, t in found.items()} == {
    "a": ("one.safetensors", "F32", (2, 3)),
    "b": ("two.safetensors", "F32", (4,)),
  }
  np.testing.assert_array_equal(read(tmp_path, "b", (1, 3)), [1.0, 2.0])


def break_index(folder, **weight_map):
  index = {"weight_map": weight_map}
  (folder / safetensors_files.INDEX).write_text(json.dumps(index))


def cut(path, num_bytes):
  path.write_bytes(path.read_bytes()[:num_bytes])


def lengthen(path):
  path.write_bytes(path.read_bytes() + b"more")


@pytest.mark.parametrize(
  "damage, message",
  [
    (
      lambda f: (f / "two.safetensors").unlink(),
      "names files that are not there: two.safetensors;",
    ),
    (
      lambda f: break_index(f, a="one.safetensors", b="one.safetensors"),
      "not in their files: b in one.safetensors;",
    ),
    (
      lambda f: (f / safetensors_files.INDEX).write_text("{"),
      "not an index of weights",
    ),
    (lambda f: break_index(f, a=3), "not an index of weights"),
    (
      lambda f: cut(f / "two.safetensors", -1),
      r"two.safetensors is truncated: it should have 8\d bytes and has",
    ),
    (
      lambda f: cut(f / "two.safetensors", 20),
      "two.safetensors is truncated: it should have at least",
    ),
    (lambda f: cut(f / "two.safetensors", 5), "it has no header"),
    (
      lambda f: (f / "two.safetensors").write_text("version https://git-lfs"),
      "pointer of Git LFS",
    ),
    (
      lambda f: lengthen(f / "two.safetensors"),
      "but its header accounts for",
    ),
    (
      lambda f: write_raw(f / "two.safetensors", b"{]", b""),
      "has a broken header",
    ),
    (
      lambda f: write_raw(
        f / "two.safetensors", {"b": entry("F32", [4], 0, 8)}, bytes(8)
      ),
      r"b, F32 \[4\], needs 16 bytes and is given 8",
    ),
    (
      lambda f: write_raw(
        f / "two.safetensors",
        {"b": entry("F32", [4], 0, 16), "c": entry("F32", [4], 8, 24)},
        bytes(24),
      ),
      "c begins at byte 8 of the data, where byte 16 was expected",
    ),
    (
      lambda f: write_raw(
        f / "two.safetensors", {"b": entry("F32", [-4], 0, 16)}, bytes(16)
      ),
      "has a broken header",
    ),
    (
      lambda f: write_raw(f / "two.safetensors", {"b": {"shape": []}}, b""),
      "has a broken header",
    ),
  ],
)
def test_a_damaged_folder_is_named_in_one_sentence(tmp_path, damage, message):
  sharded(tmp_path)
  damage(tmp_path)
  with pytest.raises(ValueError, match=message) as error:
    safetensors_files.tensors(tmp_path)
  assert "\n" not in str(error.value)


def test_other_dtypes_are_stepped_over(tmp_path):
  arrays = {"ids": np.arange(3), "x": numbers(2)}
  library.save_file(arrays, tmp_path / safetensors_files.SINGLE)
  assert safetensors_files.tensors(tmp_path)["ids"].dtype == "I64"
  np.testing.assert_array_equal(read(tmp_path, "x", (0, 2)), [0.0, 1.0])


def test_pickles_are_refused_with_the_conversion_to_do(tmp_path):
  (tmp_path / "pytorch_model-00001-of-00002.bin").write_bytes(b"")
  with pytest.raises(ValueError, match="safe_serialization=True"):
    safetensors_files.tensors(tmp_path)


def test_no_weights_says_what_is_there_instead(tmp_path):
  with pytest.raises(ValueError, match="found nothing"):
    safetensors_files.tensors(tmp_path)
  (tmp_path / "config.json").write_text("{}")
  with pytest.raises(ValueError, match="found config.json"):
    safetensors_files.tensors(tmp_path)
  with pytest.raises(ValueError, match="There is no folder"):
    safetensors_files.tensors(tmp_path / "none")


@pytest.fixture
def bucket(gcs):
  gcs.buckets["bucket"] = {}
  return "gs://bucket/model"


def test_buckets_are_written_to_and_read_from(bucket, gcs):
  array = numbers(300, 500)
  path = f"{bucket}/{safetensors_files.SINGLE}"
  safetensors_files.write(path, {"x": ("F32", array.shape)}, [array])
  found = safetensors_files.tensors(bucket)
  out = np.empty((200, 10), np.float32)
  with safetensors_files.OpenFile(path) as file:
    file.read(found["x"], [(50, 250), (7, 17)], out)
  np.testing.assert_array_equal(out, array[50:250, 7:17])
  assert list(gcs.objects("bucket")) == [f"model/{safetensors_files.SINGLE}"]

  def broken():
    yield array[:100]
    raise KeyError

  with pytest.raises(KeyError):
    safetensors_files.write(path, {"x": ("F32", array.shape)}, broken())
  assert not gcs.objects("bucket")
