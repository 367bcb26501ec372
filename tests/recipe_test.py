"""The sets of the paper, from rows in their own layouts to a training step."""

import dataclasses
import pathlib
import re

import numpy as np
import pytest
import tiny_runs
from absl import flags
from config_test import CONFIGS_DIR, read

from dpop_jax import config as config_lib
from dpop_jax import inputs
from dpop_jax.data import dataset, pair_sets, plan

# ml_collections loads config files in a way that Python 3.12 drops.
pytestmark = pytest.mark.filterwarnings(
  "ignore:the load_module:DeprecationWarning"
)
DOCS = pathlib.Path(__file__).parents[1] / "docs"
TOKENIZER = "--config.data.tokenizer=tokenizer.json"
ROWS = {
  "metamath": [
    {
      "query": f"{letter}?",
      "response": f"{i} + 1 = {i + 1}, {i + 1} * 2 = {2 * i + 2}. "
      f"The answer is: {2 * i + 2}",
    }
    for i, letter in enumerate("abcdefgh")
  ],
  "arc": [
    {
      "question": f"{letter}?",
      "choices": {"text": ["a", "b", "c"], "label": ["1", "2", "3"]},
      "answerKey": "2",
    }
    for letter in "abcd"
  ],
  "hellaswag": [
    {"ctx": f"{letter} a", "endings": ["b", "c", "d", "e"], "label": "3"}
    for letter in "abcd"
  ],
}


@pytest.fixture
def built(tmp_path, monkeypatch):
  """runs/pairs with small sets, in the folder that is worked in."""
  monkeypatch.chdir(tmp_path)
  for name, rows in ROWS.items():
    source = tiny_runs.write_rows(tmp_path / f"{name}.jsonl", rows)
    kind = "maths" if name == "metamath" else name
    pair_sets.build(
      pair_sets.BuildConfig(kind=kind, source=source, out=f"runs/pairs/{name}")
    )
  digits = tiny_runs.CHARACTERS + "0123456789"
  monkeypatch.setattr(tiny_runs, "CHARACTERS", digits)
  return tiny_runs.write_tokenizer(tmp_path / "tokenizer.json")


def stand_in(config, tokenizer):
  """The config with a tiny model on the devices of a test."""
  sections = config_lib.to_dict(config)
  tiny = tiny_runs.make_sections({"train": "", "tokenizer": tokenizer})
  for name in ("model", "batch", "mesh", "checkpoints"):
    sections[name] = tiny[name]
  sections["model"]["vocab_size"] = 32
  sections["batch"] |= {"row_length": 128, "batch_size": 8}
  sections["data"] |= {
    "tokenizer": tokenizer,
    "bos_token": "^",
    "eos_token": "$",
    "num_eval_pairs": 0,
  }
  sections["optimizer"]["warmup_steps"] = 0
  # Rounding would be told as a difference to the policy.
  sections["reference"]["param_dtype"] = None
  sections["run"] |= {
    "num_steps": 1,
    "num_epochs": None,
    "eval_every_steps": None,
  }
  return config_lib.from_dict(sections)


@pytest.mark.parametrize("name", list(ROWS))
def test_each_set_of_the_paper_is_read_by_its_config(name, built):
  config = read(f"{CONFIGS_DIR}/paper_sets.py:{name}", TOKENIZER)
  assert (config.loss.beta, config.loss.dpop_lambda) == (0.3, 50.0)
  config = stand_in(config, built)
  loaded = dataset.load(config.data, is_sft=False, row_length=128)
  sizes = {"metamath": 8, "arc": 4 * 2, "hellaswag": 4 * 3}
  assert len(loaded.train) == sizes[name]
  assert not loaded.report["train"]["rows_left_out"]


def test_supervised_training_takes_the_chosen_answers_of_all(built):
  config = read(f"{CONFIGS_DIR}/paper_sets.py:sft", TOKENIZER)
  config = stand_in(config, built)
  assert config.loss == config_lib.LossConfig(name="sft")
  loaded = dataset.load(config.data, is_sft=True, row_length=128)
  assert len(loaded.train) == 8 + 4 * 2 + 4 * 3


@pytest.mark.parametrize("size", ["7b", "34b", "72b"])
def test_the_mixture_is_the_run_of_its_size_with_other_data(size):
  mixture = read(f"{CONFIGS_DIR}/smaug_mixture.py:{size}", TOKENIZER)
  train_on = "--config.data.train=pairs.jsonl"
  alone = read(f"{CONFIGS_DIR}/smaug_{size}.py", TOKENIZER, train_on)
  rows = dataclasses.replace(mixture.batch, row_length=alone.batch.row_length)
  assert dataclasses.replace(mixture, data=alone.data, batch=rows) == alone
  assert mixture.batch.row_length == 2 * mixture.data.max_length
  assert len(mixture.data.train) == len(mixture.data.weights) == 3
  more = read(
    f"{CONFIGS_DIR}/smaug_mixture.py:{size}",
    TOKENIZER,
    "--config.data.train=('a.jsonl', 'b.jsonl')",
    "--config.data.weights=(1.0, 0.5)",
  )
  assert (more.data.train, more.data.weights) == (
    ("a.jsonl", "b.jsonl"), (1.0, 0.5)
  )  # fmt: skip


def test_the_small_mixture_learns_its_answers_first(tmp_path):
  model = tiny_runs.write_model(tmp_path / "model")
  sft, dpop = (
    read(
      f"{CONFIGS_DIR}/smaug_cpu.py:{stage}", f"--config.run.init_from={model}"
    )
    for stage in ("sft", "dpop")
  )
  assert sft.loss == config_lib.LossConfig(name="sft")
  assert (dpop.loss.name, dpop.loss.beta, dpop.loss.dpop_lambda) == (
    "dpop", 0.3, 50.0
  )  # fmt: skip
  assert sft.model == dpop.model
  mixture = read(f"{CONFIGS_DIR}/smaug_mixture.py", TOKENIZER).data
  for config in (sft, dpop):
    assert config.data.train == mixture.train
    assert len(config.data.weights) == 3


@pytest.mark.parametrize("name", ["paper_sets", "smaug_mixture", "smaug_cpu"])
def test_another_set_or_size_is_an_error(name):
  with pytest.raises(flags.Error, match=f"configs/{name}.py has the"):
    read(f"{CONFIGS_DIR}/{name}.py:13b", TOKENIZER)


def test_the_steps_of_a_run_on_the_mixture(built):
  config = stand_in(
    read(
      f"{CONFIGS_DIR}/smaug_mixture.py:72b",
      TOKENIZER,
      "--config.data.weights=(0.5, 2.0, 1.0)",
    ),
    built,
  )
  data = inputs.load_data(config, "runs/mixture")
  # 8, 4 x 2 and 4 x 3 pairs.
  drawn = [part["num_drawn"] for part in data.report["train"]["mixture"]]
  assert drawn == [4, 16, 12] and len(data.train) == 32
  the_plan = plan.Plan(data.train, config.batch, seed=0, num_steps=4)
  seen = np.concatenate([the_plan.pair_ids(step) for step in range(4)])
  assert sorted(seen) == list(range(32)) and the_plan.epoch(4) == 1.0
  assert sum(the_plan.step(step).num_rows for step in range(4)) >= 4


def test_the_commands_of_the_pages_name_configs_and_flags_that_are_there():
  for page in ("recipe.md", "building_pairs.md"):
    text = (DOCS / page).read_text()
    for name in re.findall(r"configs/(\w+)\.py", text):
      assert (CONFIGS_DIR / f"{name}.py").exists(), name
    commands = re.findall(
      r"python -m dpop_jax\.cli\.(\w+)((?:[^\n`]|\\\n)*)", text
    )
    assert commands
    for name, arguments in commands:
      file = pathlib.Path(inputs.__file__).parent / "cli" / f"{name}.py"
      known = set(re.findall(r'"([\w.]+)"', file.read_text()))
      for helper in ("finished_run", "mesh_flag"):
        path = file.with_name(f"{helper}.py")
        known |= set(re.findall(r'"([\w.]+)"', path.read_text()))
      for flag in re.findall(r"--([\w.]+)", arguments):
        assert flag in known or flag.startswith("config."), (name, flag)
