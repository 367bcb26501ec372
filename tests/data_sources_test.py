"""Rows of every kind of file, and what is said of those that are unreadable."""

import gzip
import json

import pytest

from dpop_jax.data import sources

ROWS = [
  {"prompt": "2+2", "chosen": " = 4", "rejected": " = 5"},
  {"prompt": "Grüße,\n“x”", "chosen": "None", "rejected": "72"},
]


def write_json_lines(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_json(path, rows):
  path.write_text(json.dumps(rows, indent=2))


def write_csv(path, rows):
  cells = [list(rows[0]), *(list(row.values()) for row in rows)]
  path.write_text(
    "".join(",".join(f'"{cell}"' for cell in line) + "\n" for line in cells)
  )


def write_parquet(path, rows):
  import pyarrow
  from pyarrow import parquet

  parquet.write_table(pyarrow.Table.from_pylist(rows), path)


WRITERS = {
  "jsonl": write_json_lines,
  "json": write_json,
  "csv": write_csv,
  "parquet": write_parquet,
}


def values(path):
  return [row.value for row in sources.read(str(path))]


@pytest.mark.parametrize("is_gzipped", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("suffix", WRITERS)
def test_every_format_gives_the_same_rows(tmp_path, suffix, is_gzipped):
  path = tmp_path / f"rows.{suffix}"
  WRITERS[suffix](path, ROWS)
  if is_gzipped:
    packed = tmp_path / f"rows.{suffix}.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    path = packed
  rows = list(sources.read(str(path)))
  assert [row.value for row in rows] == ROWS
  assert [row.number for row in rows] == [1, 2]
  assert rows[1].place == f"{path} row 2"


@pytest.mark.parametrize("is_gzipped", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("suffix", WRITERS)
def test_every_format_gives_the_same_rows_from_a_bucket(
  tmp_path, gcs, suffix, is_gzipped
):
  WRITERS[suffix](tmp_path / "rows", ROWS)
  content = (tmp_path / "rows").read_bytes()
  name = f"sources/rows.{suffix}"
  if is_gzipped:
    name, content = f"{name}.gz", gzip.compress(content)
  path = gcs.write(name, content)
  rows = list(sources.read(path))
  assert [row.value for row in rows] == ROWS
  assert rows[1].place == f"{path} row 2"


def test_files_folders_and_patterns_of_a_bucket_are_found(gcs):
  for name in ("b.jsonl", "a.csv.gz", "sub/c.json", ".x/d.json", "notes.txt"):
    gcs.write(f"found/data/{name}", "{}")
  root = "gs://found/data"
  folder = [f"{root}/a.csv.gz", f"{root}/b.jsonl", f"{root}/sub/c.json"]
  assert list(sources.resolve(root)) == folder
  assert sources.resolve(f"{root}/b.jsonl") == (f"{root}/b.jsonl",)
  assert sources.resolve(f"{root}/**/*.json") == (f"{root}/sub/c.json",)
  with pytest.raises(FileNotFoundError, match="'gs://found/none' with data"):
    sources.resolve("gs://found/none")
  with pytest.raises(FileNotFoundError, match="There is no gs://not-found"):
    sources.resolve("gs://not-found/rows.jsonl")


def test_reading_parquet_leaves_nothing_in_the_home(tmp_path, monkeypatch):
  import datasets

  home = tmp_path / "home"
  monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(home))
  write_parquet(tmp_path / "rows.parquet", ROWS)
  assert values(tmp_path / "rows.parquet") == ROWS
  assert not home.exists()


def test_rows_of_differing_types_and_keys_stay_as_written(tmp_path):
  # One schema for all rows would make null of the missing key.
  rows = [{"prompt": "a", "chosen": "b"}, {"prompt": 5, "rejected": ["c"]}]
  for suffix in ("jsonl", "json"):
    WRITERS[suffix](tmp_path / f"rows.{suffix}", rows)
    assert values(tmp_path / f"rows.{suffix}") == rows


def test_csv_cells_stay_text(tmp_path):
  path = tmp_path / "rows.csv"
  path.write_text("prompt,chosen,rejected\n1,007,NA\n2,,null\n")
  assert values(path) == [
    {"prompt": "1", "chosen": "007", "rejected": "NA"},
    {"prompt": "2", "chosen": "", "rejected": "null"},
  ]


def test_long_csv_cells_are_read(tmp_path):
  path = tmp_path / "rows.csv"
  path.write_text("prompt\n" + "x" * 200_000 + "\n")
  assert values(path) == [{"prompt": "x" * 200_000}]


def test_csv_rows_with_another_number_of_cells_are_named(tmp_path):
  path = tmp_path / "rows.csv"
  path.write_text("prompt,chosen\na,b\na,b,c\na\n")
  rows = list(sources.read(str(path)))
  assert [row.problem for row in rows] == [
    "",
    "3 cells under 2 column names",
    "1 cells under 2 column names",
  ]


def test_broken_lines_are_named_and_the_rest_is_read(tmp_path):
  path = tmp_path / "rows.jsonl"
  path.write_bytes(b'{"a": 1}\n\n{"a": \n{"a": "\xff"}\n{"a": 2}\n')
  rows = list(sources.read(str(path)))
  assert [(row.number, row.value) for row in rows] == [
    (1, {"a": 1}),
    (3, None),
    (4, None),
    (5, {"a": 2}),
  ]
  assert "Expecting value" in rows[1].problem
  assert "utf-8" in rows[2].problem


def test_json_files_may_hold_lines_and_a_byte_order_mark(tmp_path):
  path = tmp_path / "rows.json"
  path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n{"a": 2}\n')
  assert values(path) == [{"a": 1}, {"a": 2}]
  path.write_bytes(b'\xef\xbb\xbf[{"a": 1}]')
  assert values(path) == [{"a": 1}]


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("rows.jsonl", b"", "holds no rows"),
    ("rows.jsonl", b"\n \n", "holds no rows"),
    ("rows.json", b"", "holds no rows"),
    ("rows.json", b"[]", "holds no rows"),
    ("rows.json", b'[{"a": 1}', "is not JSON: Expecting ',' delimiter"),
    ("rows.json", b"3", "holds a int"),
    ("rows.csv", b"", "holds no rows"),
    ("rows.csv", b"prompt,chosen\n", "holds no rows"),
    ("rows.csv", b'prompt\na\n"never closed\n', "is not CSV behind row 1: "),
    ("rows.csv", b"a,b,a,,\n1,2,3,,\n", "another name, got a, b, a"),
    ("rows.csv", b"prompt\n\xff\xfe\n", "is not CSV"),
    ("rows.parquet", b"", "is not a Parquet file"),
    ("rows.parquet", b"hello, world", "is not a Parquet file"),
    ("rows.jsonl.gz", b"hello, world", "is not a whole gzip file"),
    (
      "rows.jsonl.gz",
      gzip.compress(b"[]" * 99, mtime=0)[:-9],
      "not a whole gzip",
    ),
  ],
)
def test_unreadable_files_are_one_sentence(tmp_path, name, content, message):
  path = tmp_path / name
  path.write_bytes(content)
  with pytest.raises(ValueError, match=message) as caught:
    list(sources.read(str(path)))
  assert str(path) in str(caught.value)
  assert "\n" not in str(caught.value)


def test_parquet_cut_short_is_one_sentence(tmp_path):
  path = tmp_path / "rows.parquet"
  write_parquet(path, ROWS)
  path.write_bytes(path.read_bytes()[:-20])
  with pytest.raises(ValueError, match="cannot be read as Parquet"):
    list(sources.read(str(path)))


def test_folders_patterns_and_sequences_are_resolved_in_order(tmp_path):
  for name in (
    "b.jsonl",
    "a.json",
    "sub/c.csv.gz",
    ".hidden/d.json",
    "LICENSE",
  ):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("x")
  names = lambda *paths: [
    path.removeprefix(f"{tmp_path}/") for path in sources.resolve(paths)
  ]
  assert names(str(tmp_path)) == ["a.json", "b.jsonl", "sub/c.csv.gz"]
  assert names(f"{tmp_path}/*.json*") == ["a.json", "b.jsonl"]
  assert names(f"{tmp_path}/b.jsonl", f"{tmp_path}/a.json") == [
    "b.jsonl",
    "a.json",
  ]
  assert sources.resolve(f"{tmp_path}/b.jsonl") == (f"{tmp_path}/b.jsonl",)


def test_paths_to_nothing_and_other_files_are_errors(tmp_path):
  with pytest.raises(FileNotFoundError, match="no file, folder or pattern"):
    sources.resolve(str(tmp_path / "trian.jsonl"))
  with pytest.raises(FileNotFoundError, match="holds no .jsonl, .json"):
    sources.resolve(str(tmp_path))
  (tmp_path / "rows.txt").write_text("x")
  with pytest.raises(ValueError, match="rows.txt should end in one of"):
    sources.resolve(str(tmp_path / "rows.txt"))


def test_hub_names_are_taken_apart():
  assert sources.parse_hub_name("hub:owner/name") == (
    sources.HubName("owner/name", None, None, "train")
  )
  commit = "0123456789" * 4
  full = sources.parse_hub_name(f"hub:o-1/n.2/main@{commit}:test[:10%]")
  assert full == sources.HubName("o-1/n.2", "main", commit, "test[:10%]")
  assert full.is_pinned
  assert not sources.parse_hub_name("hub:owner/name@main").is_pinned
  with pytest.raises(ValueError, match="is written hub:owner/name"):
    sources.parse_hub_name("hub:name")


def test_hub_rows_come_through_datasets(monkeypatch):
  import datasets

  calls = []

  def load_dataset(*args, **kwargs):
    calls.append((args, kwargs))
    return datasets.Dataset.from_list(ROWS)

  monkeypatch.setattr(datasets, "load_dataset", load_dataset)
  source = "hub:owner/name:test"
  assert sources.resolve(source) == (source,)
  rows = list(sources.read(source))
  assert [row.value for row in rows] == ROWS
  assert rows[1].place == "hub:owner/name:test row 2"
  assert calls == [(("owner/name", None), {"split": "test", "revision": None})]


def test_hub_name_that_does_not_load_is_one_sentence():
  # conftest switches the network off, so no name is found.
  with pytest.raises(ValueError, match="hub:owner/name cannot be loaded"):
    list(sources.read("hub:owner/name"))


@pytest.mark.parametrize(
  ("name", "num_rows"),
  [
    ("gsm8k/train.jsonl", 7473),
    ("hellaswag/val_even.jsonl.gz", 5021),
    ("prefs/llamafactory_dpo_en_demo.json", 300),
  ],
)
def test_real_files_are_read_whole(shared_data, name, num_rows):
  rows = list(sources.read(str(shared_data / name)))
  assert len(rows) == rows[-1].number == num_rows
  assert not any(row.problem for row in rows)
