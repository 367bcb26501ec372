"""The command that builds pairs: its files, and how it fails."""

import gzip
import hashlib
import json
import subprocess
import sys

import pytest

from dpop_jax.cli import build_pairs

ROWS = [
  {
    "question": f"What is 1 + {i} + 5?",
    "answer": f"1+{i}=<<1+{i}={1 + i}>>{1 + i}\n"
    f"{1 + i}+5=<<{1 + i}+5={6 + i}>>{6 + i}\n#### {6 + i}",
  }
  for i in range(4)
] + [{"question": "What is 1?", "answer": "One.\n#### 1"}]


@pytest.fixture
def source(tmp_path):
  path = tmp_path / "source.jsonl"
  path.write_text("".join(json.dumps(row) + "\n\n" for row in ROWS))
  return path


def build(source, out, **changes):
  options = dict(kind="maths", num_shots=2, seed=0, unusable="skip")
  return build_pairs.build(
    source=str(source), out=str(out), **(options | changes)
  )


def command(*arguments):
  return subprocess.run(
    [sys.executable, "-m", "dpop_jax.cli.build_pairs", *map(str, arguments)],
    capture_output=True,
    text=True,
  )


def test_the_manifest_accounts_for_every_row_and_byte(source, tmp_path):
  manifest = build(source, tmp_path / "out")
  text = (tmp_path / "out/pairs.jsonl").read_bytes()
  pairs = [json.loads(line) for line in text.splitlines()]
  assert [set(pair) for pair in pairs] == [{"prompt", "chosen", "rejected"}] * 4
  assert manifest == json.loads((tmp_path / "out/manifest.json").read_text())
  assert manifest["source"] == {
    "file": "source.jsonl",
    "sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
    "num_rows": 5,
  }
  assert manifest["options"] == {
    "kind": "maths",
    "num_shots": 2,
    "seed": 0,
    "unusable": "skip",
  }
  assert manifest["num_pairs"] == 4
  assert manifest["skipped"] == {"no_intermediate_result": 1}
  assert manifest["pairs_sha256"] == hashlib.sha256(text).hexdigest()
  names = sorted(path.name for path in (tmp_path / "out").iterdir())
  assert names == ["manifest.json", "pairs.jsonl"]


def test_a_gzipped_source_gives_the_same_pairs(source, tmp_path):
  zipped = tmp_path / "source.jsonl.gz"
  zipped.write_bytes(gzip.compress(source.read_bytes()))
  build(source, tmp_path / "plain")
  build(zipped, tmp_path / "zipped")
  assert (tmp_path / "plain/pairs.jsonl").read_bytes() == (
    tmp_path / "zipped/pairs.jsonl"
  ).read_bytes()


@pytest.mark.parametrize(
  "text, message",
  [
    ("", "none of its 0 rows gives a pair"),
    ('{"question": "?"}\n', "none of its 1 rows gives a pair.*bad_row"),
    ('{"a": 1}\n{"a": \n', "line 2, is not JSON"),
    ("[1]\n", "line 1, holds a list"),
  ],
)
def test_a_source_that_is_of_no_use_leaves_nothing_behind(
  tmp_path, text, message
):
  source = tmp_path / "source.jsonl"
  source.write_text(text)
  with pytest.raises(ValueError, match=message):
    build(source, tmp_path / "out")
  assert not (tmp_path / "out").exists()


def test_too_few_rows_for_the_shots_leave_nothing_behind(source, tmp_path):
  with pytest.raises(ValueError, match=r"source.jsonl: num_shots=5 .* are 4"):
    build(source, tmp_path / "out", num_shots=5)
  assert not (tmp_path / "out").exists()


def test_a_failed_second_run_keeps_the_first_files(source, tmp_path):
  build(source, tmp_path / "out")
  before = (tmp_path / "out/pairs.jsonl").read_bytes()
  with pytest.raises(ValueError, match="Row 4 has no intermediate result"):
    build(source, tmp_path / "out", seed=1, unusable="raise")
  assert (tmp_path / "out/pairs.jsonl").read_bytes() == before


def test_the_command_says_what_it_did(source, tmp_path):
  done = command("--kind=maths", f"--source={source}", f"--out={tmp_path}/out")
  assert done.returncode == 0, done.stderr
  assert done.stdout.splitlines() == [
    f"4 pairs in {tmp_path}/out/pairs.jsonl",
    "1 left out: no_intermediate_result",
  ]


def test_the_command_fails_in_one_sentence(tmp_path):
  missing = tmp_path / "missing.jsonl"
  done = command("--kind=arc", f"--source={missing}", f"--out={tmp_path}/out")
  assert done.returncode == 1
  assert done.stderr == f"Error: There is no file {missing}.\n"
  assert not (tmp_path / "out").exists()


def test_all_of_gsm8k_with_four_shots(shared_data, tmp_path):
  source = shared_data / "gsm8k/train.jsonl"
  manifest = build(source, tmp_path, num_shots=4)
  assert manifest["num_pairs"] + sum(manifest["skipped"].values()) == 7_473
