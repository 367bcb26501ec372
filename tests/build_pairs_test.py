"""The command that builds pairs: its files, and how it fails."""

import gzip
import hashlib
import json
import random
import subprocess
import sys

import pytest

from dpop_jax.data import pair_sets, preferences, sources

ROWS = [
  {
    "question": f"What is 1 + {i} + 5?",
    "answer": f"1+{i}=<<1+{i}={1 + i}>>{1 + i}\n"
    f"{1 + i}+5=<<{1 + i}+5={6 + i}>>{6 + i}\n#### {6 + i}",
  }
  for i in range(20)
]
NONE = {"question": "What is 1?", "answer": "One.\n#### 1"}


def write(path, rows):
  path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
  return path


@pytest.fixture
def source(tmp_path):
  return write(tmp_path / "source.jsonl", [*ROWS, NONE])


def build(source, out, **changes):
  config = pair_sets.BuildConfig(
    **{"kind": "maths", "source": str(source), "out": str(out)} | changes
  )
  return pair_sets.build(config)


def read(folder):
  """The pairs of a folder, as a training run finds them."""
  return [
    row.value
    for file in sources.resolve(str(folder))
    for row in sources.read(file)
  ]


def command(*arguments):
  return subprocess.run(
    [sys.executable, "-m", "dpop_jax.cli.build_pairs", *map(str, arguments)],
    capture_output=True,
    text=True,
  )


def asked(prompt):
  return prompt.split("Question: ")[-1].split("\n")[0]


def shot_questions(prompt):
  return [part.split("\n")[0] for part in prompt.split("Question: ")[1:-1]]


def test_the_manifest_accounts_for_every_row_and_byte(source, tmp_path):
  manifest = build(source, tmp_path / "out", num_shots=2)
  text = (tmp_path / "out/pairs.jsonl").read_bytes()
  pairs = [json.loads(line) for line in text.splitlines()]
  assert [set(pair) for pair in pairs] == [
    {"prompt", "chosen", "rejected"}
  ] * 20
  assert manifest == json.loads((tmp_path / "out/manifest.json").read_text())
  assert manifest["source"] == [
    {
      "file": "source.jsonl",
      "sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
      "num_rows": 21,
    }
  ]
  options = manifest["options"]
  assert (options["kind"], options["num_shots"], options["seed"]) == (
    "maths", 2, 0
  )  # fmt: skip
  assert (manifest["num_rows"], manifest["num_pairs"]) == (21, 20)
  assert manifest["skipped"] == {"no_intermediate_result": 1}
  assert manifest["skipped_examples"] == {
    "no_intermediate_result": [
      "source.jsonl row 41: it has no intermediate result to corrupt."
    ]
  }
  assert manifest["files"] == [
    {
      "file": "pairs.jsonl",
      "num_pairs": 20,
      "sha256": hashlib.sha256(text).hexdigest(),
    }
  ]
  names = sorted(path.name for path in (tmp_path / "out").iterdir())
  assert names == ["manifest.json", "pairs.jsonl"]
  # A folder is what data.train takes; the manifest in it is no data.
  assert read(tmp_path / "out") == pairs


@pytest.mark.parametrize("layout", ["shuffled", "gzipped", "json", "split"])
def test_neither_order_nor_format_nor_sharding_of_the_source_matters(
  source, tmp_path, layout
):
  rows = [*ROWS, NONE]
  random.Random(0).shuffle(rows)
  other = tmp_path / "other.jsonl"
  if layout == "shuffled":
    write(other, rows)
  elif layout == "gzipped":
    other = tmp_path / "other.jsonl.gz"
    other.write_bytes(gzip.compress(source.read_bytes()))
  elif layout == "json":
    other = tmp_path / "other.json"
    other.write_text(json.dumps(rows))
  else:
    other = tmp_path / "parts"
    other.mkdir()
    write(other / "1.jsonl", rows[:7])
    write(other / "2.jsonl", rows[7:])
  for name, path in {"a": source, "b": other}.items():
    build(path, tmp_path / name, num_shots=2, num_shards=3)
  for i in range(3):
    name = f"pairs-{i:05}-of-00003.jsonl"
    text = (tmp_path / "a" / name).read_bytes()
    assert text and text == (tmp_path / "b" / name).read_bytes()


def test_shards_hold_every_pair_once(source, tmp_path):
  build(source, tmp_path / "one")
  manifest = build(source, tmp_path / "many", num_shards=4)
  assert read(tmp_path / "one") == read(tmp_path / "many")
  assert [file["num_pairs"] for file in manifest["files"]] == [5] * 4
  # Other shards take the place of the old ones.
  build(source, tmp_path / "many", num_shards=1)
  assert read(tmp_path / "one") == read(tmp_path / "many")


def test_a_row_gives_the_same_pair_alone(source, tmp_path):
  build(source, tmp_path / "all")
  for i in (0, 7):
    alone = write(tmp_path / "alone.jsonl", [ROWS[i]])
    build(alone, tmp_path / "out")
    (pair,) = read(tmp_path / "out")
    assert pair in read(tmp_path / "all")


def test_held_out_rows_are_no_shots_and_keep_their_questions_together(
  tmp_path,
):
  rows = [
    row | {"original_question": f"{i // 2}"} for i, row in enumerate(ROWS)
  ]
  source = write(tmp_path / "source.jsonl", rows)
  evaluation = tmp_path / "eval"
  build(
    source,
    tmp_path / "out",
    num_shots=3,
    num_eval_rows=6,
    eval_out=str(evaluation),
  )
  train, held_out = read(tmp_path / "out"), read(evaluation)
  assert (len(train), len(held_out)) == (14, 6)
  original = {row["question"]: row["original_question"] for row in rows}
  groups = [
    {original[asked(pair["prompt"])] for pair in side}
    for side in (train, held_out)
  ]
  assert len(groups[1]) == 3 and not groups[0] & groups[1]
  for pair in train + held_out:
    shots = shot_questions(pair["prompt"])
    assert len(set(shots)) == 3
    assert not {original[shot] for shot in shots} & groups[1]
    assert original[asked(pair["prompt"])] not in [original[s] for s in shots]
  assert json.loads((evaluation / "manifest.json").read_text())["set"] == "eval"


def test_questions_of_the_evaluation_are_left_out(source, tmp_path):
  # Written a little differently.
  asked_there = [
    {"question": f"what is  1 + {i} + 5? ", "answer": "#### 1"}
    for i in range(0, 20, 2)
  ]
  evaluation = write(tmp_path / "eval.jsonl", asked_there)
  manifest = build(
    source, tmp_path / "out", num_shots=4, eval_source=str(evaluation)
  )
  assert manifest["num_pairs"] == 10
  assert manifest["skipped"]["question_in_evaluation"] == 10
  assert manifest["eval_source"][0]["num_rows"] == 10
  odd = {f"What is 1 + {i} + 5?" for i in range(1, 20, 2)} | {"What is 1?"}
  for pair in read(tmp_path / "out"):
    assert {asked(pair["prompt"]), *shot_questions(pair["prompt"])} <= odd
  write(evaluation, [{"answer": "#### 1"}])
  with pytest.raises(ValueError, match="eval.jsonl row 1 is not known"):
    build(source, tmp_path / "out", eval_source=str(evaluation))


def test_shots_may_come_from_elsewhere_and_be_fixed(source, tmp_path):
  others = [
    {"question": f"Other {i}?", "answer": f"1+1=2\n#### {i}"} for i in range(9)
  ]
  evaluation = write(tmp_path / "eval.jsonl", others[:4])
  manifest = build(
    source,
    tmp_path / "out",
    num_shots=3,
    shots="fixed",
    shots_source=str(write(tmp_path / "shots.jsonl", others)),
    eval_source=str(evaluation),
  )
  assert manifest["shots_source"][0]["num_rows"] == 9
  (shots,) = {
    tuple(shot_questions(pair["prompt"])) for pair in read(tmp_path / "out")
  }
  assert len(set(shots)) == 3 and set(shots) <= {
    f"Other {i}?" for i in range(4, 9)
  }


def test_chat_pairs_are_what_the_loader_reads(source, tmp_path):
  build(source, tmp_path / "plain")
  build(source, tmp_path / "chat", num_shots=1, format="chat")
  plain = {pair["chosen"]: pair for pair in read(tmp_path / "plain")}
  for row in read(tmp_path / "chat"):
    pair = preferences.parse_preference(row)
    assert [turn["role"] for turn in pair.prompt] == [
      "user", "assistant", "user"
    ]  # fmt: skip
    assert pair.prompt[2]["content"] == asked(plain[pair.chosen]["prompt"])
    assert pair.rejected == plain[pair.chosen]["rejected"]


@pytest.mark.parametrize(
  "text, message",
  [
    ("\n", "source.jsonl holds no rows"),
    ('{"question": "?"}\n', "none of its 1 rows gives a pair.*bad_row"),
    ('{"a": 1}\n{"a": \n', "'unreadable': 1.*source.jsonl row 1 cannot be"),
    ("[1]\n", "it should be an object"),
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


def test_a_build_that_fails_while_it_writes_leaves_nothing_behind(
  source, tmp_path
):
  with pytest.raises(ValueError, match="num_shots=21"):
    build(source, tmp_path / "out", num_shots=21)
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["out", "eval_out"])
def test_a_file_in_the_place_of_a_folder_is_told_before_the_work(
  source, tmp_path, name
):
  path = tmp_path / "file"
  path.write_text("mine")
  folders = {"out": tmp_path / "out", "eval_out": tmp_path / "eval"}
  folders = {key: str(value) for key, value in folders.items()}
  with pytest.raises(ValueError, match=f"^{name} must be a folder, but"):
    build(source, num_eval_rows=3, **(folders | {name: str(path)}))
  assert path.read_text() == "mine"
  assert sorted(p.name for p in tmp_path.iterdir()) == [
    "file", "source.jsonl"
  ]  # fmt: skip


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(num_shots=21), r"source.jsonl: num_shots=21 .* are 20"),
    (dict(num_shards=21), "num_shards=21 is more than the 20 rows"),
    (dict(num_eval_rows=20, eval_out="x"), "nothing to train on"),
    (dict(num_eval_rows=3), "eval_out go together"),
    (dict(unusable="raise"), "source.jsonl row 41: it has no intermediate"),
    (dict(kind="sums"), "kind must be one of maths, arc"),
    (dict(seed=-1), "seed must be at least 0"),
    (dict(strip_brackets=True), "for the kind 'hellaswag' only"),
    (dict(shots="fixed"), "of no use with num_shots=0"),
    (dict(shots_source="x"), "of no use with num_shots=0"),
    (dict(kind="sampled"), "takes a checker"),
  ],
)
def test_a_failed_second_run_keeps_the_first_files(
  source, tmp_path, changes, message, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  build(source, tmp_path / "out")
  before = (tmp_path / "out/pairs.jsonl").read_bytes()
  with pytest.raises(ValueError, match=message):
    build(source, tmp_path / "out", **changes)
  names = sorted(path.name for path in (tmp_path / "out").iterdir())
  assert names == ["manifest.json", "pairs.jsonl"]
  assert (tmp_path / "out/pairs.jsonl").read_bytes() == before


def test_the_command_says_what_it_did(source, tmp_path):
  done = command("--kind=maths", f"--source={source}", f"--out={tmp_path}/out")
  assert done.returncode == 0, done.stderr
  assert done.stdout.splitlines() == [
    f"20 pairs in {tmp_path}/out/pairs.jsonl",
    "1 left out: no_intermediate_result",
  ]


def test_the_command_fails_in_one_sentence(tmp_path):
  missing = tmp_path / "missing.jsonl"
  done = command("--kind=arc", f"--source={missing}", f"--out={tmp_path}/out")
  assert done.returncode == 1
  assert done.stderr.startswith("Error: There is no file, folder or pattern")
  assert done.stderr.count("\n") == 1
  assert not (tmp_path / "out").exists()


def test_all_of_gsm8k_with_four_shots(shared_data, tmp_path):
  source = shared_data / "gsm8k/train.jsonl"
  done = command(
    "--kind=maths",
    f"--source={source}",
    f"--out={tmp_path}/out",
    "--num_shots=4",
  )
  assert done.returncode == 0, done.stderr
  manifest = json.loads((tmp_path / "out/manifest.json").read_text())
  assert manifest["num_pairs"] + sum(manifest["skipped"].values()) == 7_473
