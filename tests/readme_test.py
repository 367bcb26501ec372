"""What the README shows is true."""

import json
import pathlib
import re

import jax.numpy as jnp
import numpy as np
import tiny_runs

from dpop_jax import config, losses
from dpop_jax.data import preferences

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()


def blocks(language):
  return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_loss_gives_the_value_that_is_shown():
  setup, call = blocks("python")[0].split("losses.dpop_loss(")
  names = {}
  exec(setup, names)
  value = eval("losses.dpop_loss(" + call.strip(), names)
  shown = float(re.search(r"nats: \[(.*)\]", call)[1])
  np.testing.assert_allclose(value, [shown], rtol=1e-6)
  assert names["losses"] is losses and isinstance(value, jnp.ndarray)


def test_the_config_is_one(tmp_path):
  model = tiny_runs.write_model(tmp_path / "model")
  text = blocks("python")[1].replace("MODEL_FOLDER", model)
  read = config.from_config_dict(eval(text, {"config": config}))
  assert read.loss.dpop_lambda == 50.0
  assert (read.model.vocab_size, read.data.tokenizer) == (16, model)


def test_the_rows_are_read():
  lines = blocks("json")[0].splitlines()
  assert len(lines) == 6
  for number, line in enumerate(lines, start=1):
    is_supervised = number == len(lines)
    parse = (
      preferences.parse_supervised
      if is_supervised
      else preferences.parse_preference
    )
    assert (parse(json.loads(line)).rejected is None) == is_supervised


def test_it_is_shorter_than_200_lines():
  assert len(README.splitlines()) < 200
