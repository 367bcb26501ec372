"""The demo; that it shows what it shall is `make demo`'s business."""

import dataclasses

import pytest
import tiny_runs

from dpop_jax import demo, saved_config


def test_a_finished_run_of_other_settings_is_not_reported(tmp_path):
  data = {"train": "pairs.jsonl", "tokenizer": "tokenizer.json"}
  config = tiny_runs.make_config(data)
  saved_config.save(config, str(tmp_path))
  demo.check_settings(config, str(tmp_path))
  # Where its data lies and how often it is saved does not change its numbers.
  moved = tiny_runs.make_config(
    data | {"train": "elsewhere.jsonl"}, checkpoints__save_every_steps=5
  )
  demo.check_settings(moved, str(tmp_path))

  loss = dataclasses.replace(config.loss, dpop_lambda=5.0)
  for changed, message in (
    (dataclasses.replace(config, loss=loss), r"loss.dpop_lambda: 50.0 -> 5.0"),
    (tiny_runs.make_config(data, run__num_steps=9), r"num_steps: 8 -> 9"),
  ):
    with pytest.raises(ValueError, match=f"other settings; .* {message}"):
      demo.check_settings(changed, str(tmp_path))
