"""What a folder says of the model in it, and what a config makes of that."""

import json
import pathlib

import jax
import numpy as np
import pytest
import tiny_runs

from dpop_jax import checkpoints, model_folders, program, sharding
from dpop_jax import config as config_lib
from dpop_jax.models import decoder, decoder_config

DATA = {"train": "pairs.jsonl", "tokenizer": "tokenizer.json"}
QWEN = {"attention_bias": True, "rope_theta": 5e5, "rms_norm_eps": 1e-6}


def read(model=None, data=None, **run):
  """A config whose `model` section has no sizes, with keys of `run`."""
  sections = tiny_runs.make_sections(DATA | (data or {}))
  sections["model"] = model or {}
  sections["run"] |= run
  return config_lib.from_config_dict(config_lib.config_dict(**sections))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("models") / "qwen"
  return tiny_runs.write_model(path, **QWEN)


def test_a_section_without_sizes_is_the_model_of_init_from(folder):
  config = read({"dtype": "bfloat16", "remat": "full"}, init_from=folder)
  sizes = tiny_runs.SECTIONS["model"]
  assert config.model == decoder.DecoderConfig(
    **sizes | QWEN, dtype="bfloat16", remat="full"
  )


def test_what_contradicts_the_model_of_init_from_is_named(folder):
  assert read({"rope_theta": 5e5}, init_from=folder).model.rope_theta == 5e5
  message = r"another: model.rope_theta is 10000.0 instead of 500000.0. Leave"
  with pytest.raises(ValueError, match=message):
    read({"rope_theta": 1e4}, init_from=folder)
  scaling = {"rope_type": "linear", "factor": 2.0}
  with pytest.raises(ValueError, match="model.rope_scaling.factor is 2.0 ins"):
    read({"rope_scaling": scaling}, init_from=folder)


def test_without_sizes_and_without_a_folder_there_is_no_model():
  message = "model.vocab_size is missing, and so are .* run.init_from to a fol"
  with pytest.raises(ValueError, match=message):
    read()


def test_sizes_may_come_later_than_the_file():
  sections = tiny_runs.make_sections(DATA)
  sizes, sections["model"] = sections["model"], {}
  values = config_lib.config_dict(**sections)
  values.model.update(sizes)
  model = config_lib.from_config_dict(values).model
  assert model == decoder.DecoderConfig(**sizes)


def test_the_tokenizer_is_that_of_init_from_unless_another_is_named(folder):
  assert read(init_from=folder).data.tokenizer == "tokenizer.json"
  assert read(data={"tokenizer": None}, init_from=folder).data.tokenizer == (
    folder
  )


def test_a_folder_that_says_nothing_is_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match="Nothing in '.*' says what mode"):
    read(init_from=str(tmp_path))
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(ValueError, match="config.json is not JSON"):
    read(init_from=str(tmp_path))


def test_an_unknown_architecture_is_named_before_anything_is_read(tmp_path):
  content = {"architectures": ["BertModel"], "model_type": "bert"}
  (tmp_path / "config.json").write_text(json.dumps(content))
  with pytest.raises(ValueError, match="config.json: .* BertModel; supported"):
    read(init_from=str(tmp_path))


def test_an_unknown_option_can_be_ignored_by_name(folder, tmp_path):
  content = json.loads(pathlib.Path(folder, "config.json").read_text())
  (tmp_path / "config.json").write_text(json.dumps(content | {"colour": 1}))
  with pytest.raises(ValueError, match="colour"):
    read(init_from=str(tmp_path))
  config = read(init_from=str(tmp_path), ignored_options=("colour",))
  assert config.model == read(init_from=folder).model


def test_a_workdir_says_what_its_model_is(tmp_path):
  config = tiny_runs.make_config(DATA, model__sliding_window=4)
  values = config_lib.to_dict(config)
  (tmp_path / "config.json").write_text(json.dumps(values))
  mesh = sharding.make_mesh(config.mesh)
  params = decoder.make_params(jax.random.key(0), config.model, mesh)
  checkpoints.save_params(str(tmp_path), params)
  for path in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints/0"):
    assert read(init_from=str(path)).model == config.model
    loaded = model_folders.load_params(str(path), config.model, mesh)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
  pinned = model_folders.pin(str(tmp_path), key="run.init_from")
  assert pinned == str(tmp_path / "checkpoints" / "0")


def test_a_slash_behind_a_folder_makes_no_other_run_of_it(folder, tmp_path):
  (tmp_path / "checkpoints" / "0" / "params").mkdir(parents=True)
  for path in (folder, str(tmp_path / "checkpoints" / "0")):
    assert model_folders.pin(f"{path}/", key="run.init_from") == path


def test_the_reference_may_be_another_model(folder, tmp_path):
  other = tiny_runs.write_model(tmp_path / "other", hidden_size=32)
  sections = tiny_runs.make_sections(DATA)
  sections["reference"] = {"init_from": other, "param_dtype": "bfloat16"}
  sections["model"] |= {"dtype": "bfloat16", "remat": "dots"}
  model = config_lib.reference_model(config_lib.from_dict(sections))
  assert model == decoder.DecoderConfig(
    **tiny_runs.SECTIONS["model"] | {"hidden_size": 32},
    dtype="bfloat16",
    param_dtype="bfloat16",
    remat="dots",
  )
  with pytest.raises(ValueError, match="reference.init_from is .*'sft' has no"):
    sections["loss"] = {"name": "sft"}
    config_lib.from_dict(sections)


def test_short_rope_factors_hold_for_short_sequences_only(tmp_path):
  scaling = decoder_config.RopeScaling(
    rope_type="longrope",
    short_factor=(1.0,) * 4,
    long_factor=(2.0,) * 4,
    original_max_position_embeddings=24,
    attention_factor=1.1,
  )
  path = tiny_runs.write_model(tmp_path / "phi", rope_scaling=scaling)
  config = read({}, init_from=path)
  mesh = sharding.make_mesh(config.mesh)

  def check(config):
    program.check(config, mesh, reference_model=config.model)

  with pytest.raises(
    ValueError, match="up to 32 tokens, but the short fac.*24"
  ):
    check(config)
  check(read({}, init_from=path, data={"max_length": 24}))
  long = {"rope_scaling": {"use_long_factor": True}}
  check(read(long, init_from=path))
