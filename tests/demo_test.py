"""The demo; that it shows what it shall is `make demo`'s business."""

import dataclasses
import importlib.util
import json
import pathlib
from unittest import mock

import pytest
import tiny_runs

from dpop_jax import compare, demo, report, saved_config, train
from dpop_jax import config as config_lib
from dpop_jax.data import arithmetic

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"


def test_a_finished_run_of_other_settings_is_not_reported(tmp_path):
  data = {"train": "pairs.jsonl", "tokenizer": "tokenizer.json"}
  config = tiny_runs.make_config(data)
  saved_config.save(config, str(tmp_path))
  compare.check_settings(config, str(tmp_path))
  # Where its data lies and how often it is saved does not change its numbers.
  moved = tiny_runs.make_config(
    data | {"train": "elsewhere.jsonl"}, checkpoints__save_every_steps=5
  )
  compare.check_settings(moved, str(tmp_path))

  loss = dataclasses.replace(config.loss, dpop_lambda=5.0)
  for changed, message in (
    (dataclasses.replace(config, loss=loss), r"loss.dpop_lambda: 50.0 -> 5.0"),
    (tiny_runs.make_config(data, run__num_steps=9), r"num_steps: 8 -> 9"),
  ):
    with pytest.raises(ValueError, match=f"other settings; .*{message}"):
      compare.check_settings(changed, str(tmp_path))


def stages(stage, values):
  """The stages of configs/demo.py, as the command gives them to the demo."""
  spec = importlib.util.spec_from_file_location(
    "demo_config", CONFIGS / "demo.py"
  )
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config(stage)
  config.update_from_flattened_dict(values)
  return config_lib.from_config_dict(config)


def test_it_supervises_one_model_and_compares_losses_from_it(tmp_path):
  small = arithmetic.ArithmeticConfig(
    num_sft=200, num_train_pairs=20, num_eval_pairs=4, num_eval_questions=3
  )
  with (
    mock.patch.object(arithmetic, "ArithmeticConfig", return_value=small),
    mock.patch.object(train, "train") as trained,
    mock.patch.object(compare, "compare") as compared,
    mock.patch.object(report, "write") as written,
  ):
    written.return_value = {"report.html": tmp_path / "report.html"}
    page = demo.run(str(tmp_path), stages, seeds=[0, 1])
  assert page == tmp_path / "report.html"
  sft, place = trained.call_args.args
  assert sft.loss.name == "sft" and place == str(tmp_path / "sft")
  configs, folder = compared.call_args.args
  assert list(configs) == [
    "dpo_beta0.3",
    "ipo_beta0.3",
    "slic_hinge_beta0.3",
    "dpop_beta0.3_dpop_lambda50",
  ]
  assert all(c.run.init_from == place for c in configs.values())
  assert {c.data.eval for c in configs.values()} == {
    str(tmp_path / "corpus" / "pairs_eval.jsonl")
  }
  asked = compared.call_args.kwargs["questions"]
  assert len(asked.prompts) == 3
  # What the corpus itself answers is right.
  row = json.loads(
    (tmp_path / "corpus" / "sft_train.jsonl").read_text().split("\n")[0]
  )
  assert asked.final(row["completion"]) == row["completion"].split()[-1]
  assert compared.call_args.kwargs["seeds"] == [0, 1]
  assert written.call_args.args == (compared.return_value, tmp_path)
  assert folder == str(tmp_path)


def test_a_supervised_stage_that_was_stopped_is_said_to_be(tmp_path):
  config = stages(
    "sft",
    {"data.train": "a.jsonl", "data.tokenizer": "b.model"},
  )
  stopped = train.Result(3, False, None, {})
  with (
    mock.patch.object(train, "train", return_value=stopped),
    pytest.raises(compare.Stopped, match="Asked to stop in the supervised"),
  ):
    demo.supervise(config, str(tmp_path))
