"""Sets with weights: each pair as often as it should come, every time alike."""

import collections
import json
import logging

import numpy as np
import pytest
import tiny_runs

from dpop_jax import config as config_lib
from dpop_jax.data import dataset, mixtures


def draw(sizes, weights, prompts=None, seed=0):
  source_ids = np.repeat(np.arange(len(sizes)), sizes)
  keys = np.arange(len(source_ids)) if prompts is None else np.array(prompts)
  return mixtures.draw(source_ids, keys, weights, seed=seed)


def test_whole_weights_repeat_every_pair():
  drawn = draw([2, 3], (1.0, 2.0))
  assert drawn.ids.tolist() == [0, 1, 2, 2, 3, 3, 4, 4]
  assert drawn.counts == [(2, 2), (3, 6)]


def test_fractions_take_a_part_that_the_seed_decides():
  parts = []
  for seed in range(5):
    drawn = draw([100, 10], (0.25, 1.5), seed=seed)
    times = collections.Counter(drawn.ids.tolist())
    assert drawn.counts == [(100, 25), (10, 15)]
    assert {times[i] for i in range(100)} == {0, 1}
    assert {times[i] for i in range(100, 110)} == {1, 2}
    parts.append(tuple(drawn.ids))
  assert len(set(parts)) == 5
  assert tuple(draw([100, 10], (0.25, 1.5), seed=0).ids) == parts[0]


def test_a_part_has_whole_prompts_but_for_the_last():
  prompts = np.repeat(np.arange(20), 3)
  times = collections.Counter(prompts[draw([60], (0.5,), prompts).ids].tolist())
  assert sorted(times.values()) == [3] * 10


def test_a_set_of_which_nothing_is_left_is_an_error():
  with pytest.raises(ValueError, match="0.01 of the 10 pairs of source 2 are"):
    draw([5, 10], (1.0, 0.01))


@pytest.fixture
def files(tmp_path):
  """Two files whose pairs are told apart by their chosen answer."""
  rows = {
    "first": [
      {"prompt": p, "chosen": "c", "rejected": "d"} for p in "abcdefgh"
    ],
    "second": [{"prompt": p, "chosen": "e", "rejected": "f"} for p in "abcd"],
  }
  paths = [
    tiny_runs.write_rows(tmp_path / f"{name}.jsonl", of_file)
    for name, of_file in rows.items()
  ]
  tokenizer = tiny_runs.write_tokenizer(tmp_path / "tokenizer.json")
  return dict(
    train=tuple(paths), tokenizer=tokenizer, bos_token="^", eos_token="$"
  )


def load(**section):
  config = dataset.DataConfig(**section)
  return dataset.load(config, is_sft=False, row_length=16)


def chosen(pairs):
  return collections.Counter(
    tiny_runs.CHARACTERS[pair.chosen[0]] for pair in pairs
  )


def test_a_mixture_is_loaded_reported_and_kept(files, tmp_path, caplog):
  files["weights"] = (0.5, 3.0)
  with caplog.at_level(logging.INFO, logger="absl"):
    loaded = load(**files, cache_dir=str(tmp_path / "cache"))
  assert chosen(loaded.train) == {"c": 4, "e": 12}
  assert loaded.report["train"]["num_pairs"] == 16
  assert loaded.report["train"]["mixture"] == [
    {
      "source": path, "weight": weight, "num_pairs": own, "num_drawn": drawn
    }
    for path, weight, own, drawn in zip(
      files["train"], (0.5, 3.0), (8, 4), (4, 12), strict=True
    )
  ]  # fmt: skip
  if caplog.text:
    assert "12 of the 4 of" in caplog.text
  again = load(**files, cache_dir=str(tmp_path / "cache"))
  assert again.report["is_cached"]
  assert again.train.digest() == loaded.train.digest()
  assert json.dumps(again.report)
  other = load(**files | {"weights": (0.5, 2.0)})
  assert other.train.digest() != loaded.train.digest()


def test_without_weights_each_pair_comes_once(files):
  assert chosen(load(**files).train) == {"c": 8, "e": 4}


def test_no_repeat_of_a_held_out_pair_is_trained_on(files):
  loaded = load(**files, weights=(1.0, 4.0), num_eval_pairs=4)
  prompts = [
    {int(pair.prompt[-1]) for pair in pairs}
    for pairs in (loaded.train, loaded.eval)
  ]
  assert not prompts[0] & prompts[1]
  held_out = chosen(loaded.eval)
  assert chosen(loaded.train) == {
    "c": 8 - held_out["c"], "e": 4 * (4 - held_out["e"])
  }  # fmt: skip


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(weights=(1.0,)), "has 1 entries, but data.train has 2"),
    (dict(weights=(1.0, 0.0)), "data.weights must be positive"),
    (dict(weights=(1.0, float("nan"))), "data.weights must be positive"),
    (dict(weights=(1.0, 1.0), max_pairs=3), "data.max_pairs takes the first"),
  ],
)
def test_bad_weights_are_named(files, changes, message):
  with pytest.raises(ValueError, match=message):
    load(**files | changes)


def test_weights_may_be_whole_numbers_in_a_config(files):
  sections = tiny_runs.make_sections(files, data__weights=[1, 0.5])
  assert config_lib.from_dict(sections).data.weights == (1.0, 0.5)
  sections["data"]["weights"] = [True, 1]
  with pytest.raises(ValueError, match="data.weights must be"):
    config_lib.from_dict(sections)
