"""Loading the `data` section: what is kept, left out, held out and cached."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from dpop_jax import pairs
from dpop_jax.data import dataset, kept_folders, tokenizers

PAIRS = [
  {"prompt": "ab", "chosen": "c", "rejected": "d"},
  {"prompt": "ab", "chosen": "c", "rejected": "e"},
  {"prompt": "b", "chosen": "cc", "rejected": "d"},
]
BAD_ROWS = [
  {"prompt": "a", "chosen": "c"},
  {"prompt": "a", "chosen": "c", "rejected": "c"},
  {"prompt": "a", "chosen": "c", "rejected": 3},
  {"prompt": "a", "completion": "c", "label": True},
]


@pytest.fixture
def tokenizer_file(tmp_path):
  """One id per character: `^` begins and `$` ends a sequence."""
  import tokenizers as hf_tokenizers

  vocabulary = {piece: i for i, piece in enumerate("?^$ abcdefghij")}
  tokenizer = hf_tokenizers.Tokenizer(
    hf_tokenizers.models.WordLevel(vocabulary, unk_token="?")
  )
  tokenizer.pre_tokenizer = hf_tokenizers.pre_tokenizers.Split("", "isolated")
  tokenizer.decoder = hf_tokenizers.decoders.Fuse()
  path = tmp_path / "tokenizer.json"
  tokenizer.save(str(path))
  return str(path)


@pytest.fixture
def load(tmp_path, tokenizer_file):
  """Writes rows to files and loads them."""

  def load(rows, *, eval_rows=None, is_sft=False, row_length=32, **options):
    options = {
      "train": write(tmp_path / "train.jsonl", rows),
      "tokenizer": tokenizer_file,
      "bos_token": "^",
      "eos_token": "$",
    } | options
    if eval_rows is not None:
      options["eval"] = write(tmp_path / "eval.jsonl", eval_rows)
    config = dataset.DataConfig(**options)
    return dataset.load(config, is_sft=is_sft, row_length=row_length)

  return load


def write(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(path)


def lists(token_pairs):
  return [[ids.tolist() for ids in pair] for pair in token_pairs]


# Ids: ^ 1, $ 2, a 4, b 5 and so on.
LISTS = [
  [[1, 4, 5], [6, 2], [7, 2]],
  [[1, 4, 5], [6, 2], [8, 2]],
  [[1, 5], [6, 6, 2], [7, 2]],
]


def test_pairs_are_stored_and_found_again(tmp_path):
  given = [
    pairs.TokenPair(*(np.array(ids, np.int32) for ids in pair))
    for pair in (*LISTS, [[1], [6, 2], []])
  ]
  token_pairs = dataset.TokenPairs.of(given)
  token_pairs.save(tmp_path / "pairs")
  for found in (token_pairs, dataset.TokenPairs.open(tmp_path / "pairs")):
    assert len(found) == 4
    assert lists(found) == lists(given)
    assert lists([found[-1]]) == [[[1], [6, 2], []]]
    assert found[0].prompt.dtype == np.int32
    assert found.lengths().tolist() == [
      [3, 2, 2],
      [3, 2, 2],
      [2, 3, 2],
      [1, 2, 0],
    ]
    with pytest.raises(IndexError):
      found[4]


def test_pairs_on_disk_are_mapped_and_not_read(tmp_path):
  dataset.TokenPairs.of([]).save(tmp_path / "none")
  dataset.TokenPairs.of([pairs.TokenPair(*[np.zeros(1, np.int32)] * 3)]).save(
    tmp_path / "one"
  )
  found = dataset.TokenPairs.open(tmp_path / "one")
  assert isinstance(found.tokens.base, np.memmap)
  assert not found.tokens.flags.writeable


def test_pairs_of_files_and_their_report(load):
  loaded = load(PAIRS, eval_rows=PAIRS[2:])
  assert lists(loaded.train) == LISTS
  assert lists(loaded.eval) == LISTS[2:]
  train = loaded.report["train"]
  assert (train["num_rows"], train["num_pairs"]) == (3, 3)
  # Prompts of 3, 3, 2; chosen of 2, 2, 3; rejected of 2, 2, 2.
  assert train["num_tokens"] == 21
  assert train["tokens"]["prompt"] == {"mean": 8 / 3, "max": 3}
  assert train["tokens"]["rejected"] == {"mean": 2.0, "max": 2}
  assert train["left_out"] == ""
  assert loaded.report["eval"]["num_pairs"] == 1
  tokenizer = loaded.report["tokenizer"]
  assert [tokenizer[key] for key in ("vocab_size", "bos_id", "eos_id")] == [
    14,
    1,
    2,
  ]
  assert json.loads(json.dumps(loaded.report)) == loaded.report


def test_supervised_data_has_one_answer(load):
  loaded = load([{"prompt": "a", "completion": "b"}, *PAIRS], is_sft=True)
  assert lists(loaded.train)[0] == [[1, 4], [5, 2], []]
  assert loaded.train.lengths()[:, 2].tolist() == [0, 0, 0, 0]


def test_bad_rows_are_skipped_and_counted_by_reason(load, tmp_path):
  loaded = load([*BAD_ROWS, BAD_ROWS[0], *PAIRS])
  assert lists(loaded.train) == LISTS
  train = loaded.report["train"]
  assert train["num_rows"] == 8
  assert train["bad_rows"] == {
    "missing key": 2,
    "identical answers": 1,
    "wrong type": 1,
    "unpaired": 1,
  }
  path = tmp_path / "train.jsonl"
  assert train["rows_left_out"][1] == (
    f"{path} row 2: identical answers: `chosen` and `rejected` are the same"
  )
  assert train["left_out"].startswith(
    "5 of 8 rows are unusable (2 missing key, 1 identical answers, "
  )


@pytest.mark.parametrize("row", BAD_ROWS)
def test_bad_rows_are_raised_by_file_and_number(load, row):
  with pytest.raises(ValueError, match=r"train.jsonl row 2: ") as caught:
    load([PAIRS[0], row, PAIRS[1]], on_bad_row="raise")
  assert 'data.on_bad_row = "skip"' in str(caught.value)


def test_broken_lines_are_bad_rows(load, tmp_path):
  path = tmp_path / "broken.jsonl"
  path.write_text(json.dumps(PAIRS[0]) + "\n{oops\n")
  loaded = load([], train=str(path))
  assert loaded.report["train"]["bad_rows"] == {"unreadable": 1}
  with pytest.raises(ValueError, match="broken.jsonl row 2: unreadable: Expe"):
    load([], train=str(path), on_bad_row="raise")


def test_no_usable_row_is_one_sentence_with_the_reasons(load):
  with pytest.raises(
    ValueError, match=r"data.train: none of 2 rows .*\(2 missing key\).* row 1"
  ):
    load([BAD_ROWS[0]] * 2)
  with pytest.raises(ValueError, match="data.eval: none of 1 rows"):
    load(PAIRS, eval_rows=BAD_ROWS[:1])


def test_answers_that_do_not_fit_follow_the_policy(load):
  rows = [*PAIRS, {"prompt": "a", "chosen": "bcdefghi", "rejected": "c"}]
  loaded = load(rows, max_answer_length=4)
  assert lists(loaded.train) == LISTS
  assert loaded.report["train"]["num_dropped_for_length"] == 1
  loaded = load(rows, max_answer_length=4, on_long_answer="truncate")
  assert lists(loaded.train)[3] == [[1, 4], [5, 6, 7, 8], [6, 2]]
  assert loaded.report["train"]["num_truncated_answers"] == 1
  with pytest.raises(ValueError, match="row 4: .* data.on_long_answer"):
    load(rows, max_answer_length=4, on_long_answer="raise")


def test_pairs_fit_the_row_as_prefix_trees(load):
  # ^ab, cdj$ and cdi$ share c and d: 3 + 4 + 4 - 2 = 9.
  row = {"prompt": "ab", "chosen": "cdj", "rejected": "cdi"}
  loaded = load([row], row_length=9)
  assert loaded.report["train"]["num_cut_prompts"] == 0
  loaded = load([row], row_length=8)
  assert lists(loaded.train)[0][0] == [1, 5]
  assert loaded.report["train"]["num_cut_prompts"] == 1
  assert loaded.report["train"]["num_cut_prompt_tokens"] == 1


def test_max_pairs_are_the_first_usable_ones(load):
  loaded = load([BAD_ROWS[0], *PAIRS], max_pairs=2)
  assert lists(loaded.train) == LISTS[:2]
  assert loaded.report["train"]["num_rows"] == 3


def test_several_files_in_the_order_given(load, tmp_path):
  first = write(tmp_path / "b.jsonl", PAIRS[:1])
  second = write(tmp_path / "a.jsonl", PAIRS[1:])
  loaded = load([], train=(first, second))
  assert lists(loaded.train) == LISTS
  assert loaded.report["train"]["files"] == [first, second]


MANY = [
  {"prompt": prompt, "chosen": chosen, "rejected": "j"}
  for prompt in "abcde"
  for chosen in "abcd"
]


def test_held_out_pairs_are_whole_prompts_and_the_rest_is_trained_on(load):
  loaded = load(MANY, num_eval_pairs=8)
  assert (len(loaded.train), len(loaded.eval)) == (12, 8)
  prompts = [
    {tuple(pair.prompt.tolist()) for pair in side}
    for side in (loaded.train, loaded.eval)
  ]
  assert not prompts[0] & prompts[1]
  whole = sorted(lists(load(MANY).train))
  assert sorted(lists(loaded.train) + lists(loaded.eval)) == whole
  assert loaded.report["eval"]["num_pairs"] == 8


def test_held_out_pairs_depend_on_the_seed_alone(load):
  held_out = lambda seed: lists(
    load(MANY, num_eval_pairs=4, holdout_seed=seed).eval
  )
  assert held_out(1) == held_out(1)
  assert len({str(held_out(seed)) for seed in range(5)}) > 1


def test_prompts_that_were_cut_differently_stay_together(load):
  rows = [
    {"prompt": "abcd", "chosen": "a" * n, "rejected": "b"} for n in (1, 4)
  ]
  other = {"prompt": "j", "chosen": "a", "rejected": "b"}
  loaded = load([*rows, other], max_length=8, num_eval_pairs=1)
  assert lists(loaded.eval)[0][0] == [1, 13]


def test_rows_without_a_prompt_can_be_held_out(load):
  rows = [{"prompt": "", "completion": letter} for letter in "abcd"]
  loaded = load(rows, is_sft=True, num_eval_pairs=1)
  assert (len(loaded.train), len(loaded.eval)) == (3, 1)


@pytest.mark.parametrize("num_eval_pairs", [3, 20])
def test_holding_out_nothing_or_everything_is_refused(load, num_eval_pairs):
  # Pairs come in fours.
  with pytest.raises(ValueError, match="data.num_eval_pairs"):
    load(MANY, num_eval_pairs=num_eval_pairs)


def test_second_start_needs_no_tokenizer(load, tmp_path, monkeypatch):
  options = {"cache_dir": str(tmp_path / "cache"), "num_eval_pairs": 4}
  first = load(MANY, **options)
  monkeypatch.setattr(tokenizers, "load", None)
  second = load(MANY, **options)
  assert isinstance(second.train.tokens.base, np.memmap)
  assert lists(second.train) == lists(first.train)
  assert lists(second.eval) == lists(first.eval)
  assert not first.report["is_cached"]
  assert second.report == first.report | {"is_cached": True}
  # Without holding out there is no second set.
  with pytest.raises(TypeError):
    load(MANY, cache_dir=options["cache_dir"])


@pytest.mark.parametrize(
  "change",
  [
    {"max_length": 20},
    {"max_answer_length": 20},
    {"row_length": 31},
    {"is_sft": True},
    {"add_bos": False},
    {"bos_token": None},
    {"eos_token": "j"},
    {"chat_template": "{{ messages }}"},
    {"on_bad_row": "raise"},
    {"on_long_answer": "truncate"},
    {"max_pairs": 2},
    {"num_eval_pairs": 1},
    {"eval_rows": PAIRS},
  ],
  ids=str,
)
def test_other_options_do_not_find_the_old_tokens(load, tmp_path, change):
  cache_dir = str(tmp_path / "cache")
  load(PAIRS, cache_dir=cache_dir)
  assert load(PAIRS, cache_dir=cache_dir).report["is_cached"]
  loaded = load(PAIRS, cache_dir=cache_dir, **change)
  assert not loaded.report["is_cached"]


def test_other_content_does_not_find_the_old_tokens(
  load, tmp_path, tokenizer_file
):
  options = {"cache_dir": str(tmp_path / "cache")}
  template = tmp_path / "template.jinja"
  template.write_text("{{ messages }}")
  options["chat_template"] = str(template)
  load(PAIRS, **options)
  # The same paths throughout.
  loaded = load(PAIRS[::-1], **options)
  assert lists(loaded.train) == LISTS[::-1]
  template.write_text("{{ messages }}!")
  assert not load(PAIRS, **options).report["is_cached"]
  assert load(PAIRS, **options).report["is_cached"]
  path = pathlib.Path(tokenizer_file)
  path.write_text(path.read_text().replace('"i"', '"k"'))
  assert not load(PAIRS, **options).report["is_cached"]


def test_other_code_does_not_find_the_old_tokens(load, tmp_path, monkeypatch):
  options = {"cache_dir": str(tmp_path / "cache")}
  load(PAIRS, **options)
  monkeypatch.setattr(dataset.tokenization, "VERSION", 0)
  assert not load(PAIRS, **options).report["is_cached"]


def test_failed_starts_leave_nothing_behind(load, tmp_path):
  cache_dir = tmp_path / "cache"
  with pytest.raises(ValueError, match="row 1"):
    load(BAD_ROWS, on_bad_row="raise", cache_dir=str(cache_dir))
  assert list(cache_dir.iterdir()) == []


def test_damaged_tokens_are_named(load, tmp_path):
  cache_dir = tmp_path / "cache"
  load(PAIRS, cache_dir=str(cache_dir))
  (entry,) = cache_dir.iterdir()
  tokens = entry / "train" / "tokens.npy"
  tokens.write_bytes(tokens.read_bytes()[:-4])
  with pytest.raises(ValueError, match="delete that folder"):
    load(PAIRS, cache_dir=str(cache_dir))


def test_of_two_processes_one_wins_and_both_find_it(tmp_path):
  folder = tmp_path / "cache" / "key"

  def write_late(draft):
    (draft / "a").write_text("late")
    # Meanwhile the other process finishes.
    assert not kept_folders.make(folder, lambda d: (d / "a").write_text("1st"))

  assert not kept_folders.make(folder, write_late)
  assert (folder / "a").read_text() == "1st"
  assert [path.name for path in folder.parent.iterdir()] == ["key"]


def test_hub_data_is_kept_only_under_a_commit(load, tmp_path, monkeypatch):
  import datasets

  rows = datasets.Dataset.from_list(PAIRS)
  monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
  cache_dir = str(tmp_path / "cache")
  for name, is_kept in (
    ("hub:o/n@main", False),
    (f"hub:o/n@{'a1' * 20}", True),
  ):
    for is_second in (False, True):
      loaded = load([], train=name, cache_dir=cache_dir)
      assert lists(loaded.train) == LISTS
      assert loaded.report["is_cached"] == (is_kept and is_second)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"train": ""}, "data.train must name a file"),
    ({"tokenizer": ""}, "data.tokenizer must name a file"),
    ({"num_eval_pairs": -1}, "data.num_eval_pairs must not be negative"),
    ({"eval": "b", "num_eval_pairs": 3}, "of no use with data.eval"),
    ({"max_pairs": 0}, "data.max_pairs must be at least 1"),
    ({"max_length": 1}, "data.max_length must be at least 2"),
    ({"max_answer_length": 0}, "data.max_answer_length must be at least 1"),
    ({"on_bad_row": "ignore"}, "data.on_bad_row must be one of skip, raise"),
    ({"on_long_answer": "cut"}, "data.on_long_answer must be one of drop"),
  ],
)
def test_wrong_options_are_named(options, message):
  with pytest.raises(ValueError, match=message):
    dataset.DataConfig(**{"train": "a", "tokenizer": "t"} | options)


def test_missing_files_are_named_by_their_key(load, tmp_path):
  with pytest.raises(FileNotFoundError, match="data.train: There is no file"):
    load([], train=str(tmp_path / "trian.jsonl"))
  with pytest.raises(FileNotFoundError, match="data.eval: There is no file"):
    load(PAIRS, eval=str(tmp_path / "evil.jsonl"))
  for options in ({}, {"cache_dir": str(tmp_path / "cache")}):
    with pytest.raises(FileNotFoundError, match="data.tokenizer should be"):
      load(PAIRS, tokenizer=str(tmp_path / "nowhere"), **options)


def test_importing_loads_no_tokenizer_library():
  code = (
    "import sys; from dpop_jax.data import dataset; "
    "heavy = {'transformers', 'datasets', 'sentencepiece', 'tokenizers'}; "
    "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
  )
  subprocess.run([sys.executable, "-c", code], check=True)


def test_real_chat_pairs_load_in_every_row_length(shared_data, tmp_path):
  config = dataset.DataConfig(
    train=str(shared_data / "prefs/llamafactory_dpo_en_demo.json"),
    tokenizer=str(shared_data / "tokenizers/gpt-neox-olmo"),
    chat_template="chatml",
    num_eval_pairs=30,
    cache_dir=str(tmp_path),
  )
  for row_length in (1024, 8192):
    loaded = dataset.load(config, is_sft=False, row_length=row_length)
    train = loaded.report["train"]
    assert train["bad_rows"] == {}
    num_pairs = len(loaded.train) + len(loaded.eval)
    assert num_pairs + train["num_dropped_for_length"] == 300
    assert len(loaded.eval) == 30
    for pair in loaded.train:
      assert pair.chosen[-1] == pair.rejected[-1] == 50279
      branches = pair.chosen.tolist(), pair.rejected.tolist()
      paths = {tuple(b[: i + 1]) for b in branches for i in range(len(b))}
      assert len(pair.prompt) + len(paths) <= row_length
  # The longest conversation has about 5,000 tokens, so nothing was cut.
  assert num_pairs == 300
