"""Config files, and what is said about the mistakes in them."""

import json
import math
import pathlib
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import tiny_runs
from absl import flags
from ml_collections import config_flags

from dpop_jax import config as config_lib
from dpop_jax import config_values, program, sharding

# ml_collections loads config files in a way that Python 3.12 drops.
pytestmark = pytest.mark.filterwarnings(
  "ignore:the load_module:DeprecationWarning"
)
CONFIGS_DIR = pathlib.Path(__file__).parent.parent / "configs"
# What a user has to fill in on the command line.
DATA = {"train": "pairs.jsonl", "tokenizer": "tokenizer.json"}
PATHS = [f"--config.data.{key}={value}" for key, value in DATA.items()]


def read(path, *overrides):
  """What a command makes of `--config=path --config.a.b=c`."""
  flag_values = flags.FlagValues()
  holder = config_flags.DEFINE_config_file("config", flag_values=flag_values)
  arguments = ["command", f"--config={path}", *overrides]
  # ConfigDict looks there for what is to be overridden.
  with mock.patch.object(sys, "argv", arguments):
    flag_values(arguments)
  return config_lib.from_config_dict(holder.value)


def read_sections(**sections):
  return config_lib.from_config_dict(config_lib.config_dict(**sections))


def sections(**changes):
  return tiny_runs.make_sections(DATA, **changes)


def section_names():
  return [path.stem for path in sorted(CONFIGS_DIR.glob("*.py"))]


@pytest.mark.parametrize("name", section_names())
def test_every_config_file_loads(name, tmp_path):
  path = CONFIGS_DIR / f"{name}.py"
  assert f"--config=configs/{name}.py" in path.read_text() or name == "demo"
  # The demo fills its holes itself.
  paths = list(PATHS)
  if name in ("smaug_mixture", "smaug_cpu"):
    paths[0] = (
      "--config.data.train=('pairs.jsonl', 'pairs.jsonl', 'more.jsonl')"
    )
  if "init_from=MODEL_FOLDER" in path.read_text():
    model = tiny_runs.write_model(tmp_path / "model")
    paths.append(f"--config.run.init_from={model}")
  loaded = read(path, *paths)
  assert "pairs.jsonl" in loaded.data.train
  again = json.loads(json.dumps(config_lib.to_dict(loaded)))
  assert config_lib.from_dict(again) == loaded


@pytest.mark.parametrize(
  ("name", "num_devices", "num_billions"),
  [("smaug_7b", 8, 6.74), ("smaug_34b", 64, 34.39), ("smaug_72b", 64, 72.29)],
)
def test_the_models_of_the_paper_fit_their_mesh(
  name, num_devices, num_billions
):
  config = read(CONFIGS_DIR / f"{name}.py", *PATHS)
  assert (config.loss.beta, config.loss.dpop_lambda) == (0.3, 50.0)
  data, fsdp, tensor = config.mesh.data, config.mesh.fsdp, config.mesh.tensor
  fsdp = num_devices // (data * tensor) if fsdp == -1 else fsdp
  tensor = num_devices // (data * fsdp) if tensor == -1 else tensor
  assert data * fsdp * tensor == num_devices
  # Only its shape is looked at, so one device can stand for all.
  devices = np.full((data, fsdp, tensor), jax.devices()[0])
  mesh = jax.sharding.Mesh(devices, sharding.MESH_AXES)
  program.check(config, mesh, reference_model=config.model)
  model = config.model
  # Embeddings in and out; of a layer four projections of attention with heads
  # as wide as the model, or fewer for keys and values, three biases or none,
  # the MLP, two norms; one norm.
  hidden = model.hidden_size
  shared = model.num_key_value_heads / model.num_attention_heads
  layer = (
    (2 + 2 * shared) * hidden**2
    + 3 * hidden * model.intermediate_size
    + 2 * hidden
  )
  layer += 3 * hidden * model.attention_bias
  total = 2 * model.vocab_size * hidden + model.num_hidden_layers * layer
  assert round((total + hidden) / 1e9, 2) == num_billions


def test_sections_become_frozen_dataclasses_with_defaults():
  config = read_sections(**sections(data__train=["a.jsonl", "b.jsonl"]))
  assert config.data.train == ("a.jsonl", "b.jsonl")
  assert config.optimizer.peak_learning_rate == 1e-2
  assert config.optimizer.schedule == "constant"
  assert config.checkpoints.keep == 2
  with pytest.raises(AttributeError):
    config.run.seed = 1


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"loss__betta": 0.1}, "Unknown config key loss.betta; did you mean loss"),
    ({"run__colour": 1}, "Unknown config key run.colour; known here are num_s"),
    ({"model__hidden_size": None}, "key model.hidden_size is missing; set it"),
    ({"data__train": None}, "data.train is missing; .* --config.data.train="),
    ({"batch__batch_size": 4.5}, "batch.batch_size must be int, got 4.5"),
    ({"run__seed": True}, "run.seed must be int, got True"),
    ({"loss__beta": "high"}, "loss.beta must be float or None, got 'high'"),
    ({"data__train": 3}, "data.train must be str or tuple.*, got 3"),
    ({"model__remat": None}, "model.remat must be str, got None"),
    ({"batch__batch_size": 0}, "batch.batch_size must be at least 1, got 0"),
    ({"loss__beta": -1.0}, "loss.beta must be positive, got -1.0"),
    ({"loss__beta": math.nan}, "loss.beta must be positive, got nan"),
    ({"loss__name": "kto"}, "loss.name must be one of dpop, dpo.*'kto'"),
    ({"loss__beta": None}, "loss.name='dpop' needs loss.beta"),
    ({"loss__delta": 1.0}, "loss.delta is 1.0, but loss.name='dpop' does not"),
    ({"run__num_epochs": 1.0}, "one of run.num_steps and run.num_epochs"),
    ({"run__num_steps": None}, "one of run.num_steps and run.num_epochs"),
    (
      {"run__num_steps": None, "run__num_epochs": math.inf},
      "run.num_epochs must be positive, got inf",
    ),
    ({"run__seed": -1}, "run.seed must be at least 0 and below .*, got -1"),
    ({"run__seed": 2**32}, "run.seed must be at least 0 and below .*, got 42"),
    ({"data__holdout_seed": -1}, "data.holdout_seed must not be negative"),
    ({"mesh__data": -1, "mesh__fsdp": -1}, "at most one of them -1"),
  ],
)
def test_a_mistake_is_one_sentence_that_names_the_key(changes, message):
  given = tiny_runs.make_sections(DATA)
  for name, value in changes.items():
    section, key = name.split("__")
    given[section][key] = value
  for read_it in (read_sections, lambda **x: config_lib.from_dict(x)):
    with pytest.raises(ValueError, match=message) as error:
      read_it(**given)
    assert "\n" not in str(error.value)


def test_a_section_that_is_missing_or_none_is_named():
  given = sections()
  del given["run"]
  with pytest.raises(ValueError, match="one of run.num_steps"):
    read_sections(**given)
  with pytest.raises(ValueError, match="Config key run is missing"):
    config_lib.from_dict(given)
  with pytest.raises(ValueError, match="Config key run must be a section"):
    read_sections(**given | {"run": 3})
  with pytest.raises(ValueError, match="Unknown config key runn; .* run?"):
    read_sections(**given | {"runn": {}})


def test_the_command_line_reaches_keys_that_the_file_does_not_mention(tmp_path):
  path = tmp_path / "tiny.py"
  path.write_text(
    "from dpop_jax import config\n"
    f"def get_config():\n  return config.config_dict(**{sections()!r})\n"
  )
  config = read(
    path,
    "--config.run.init_from=sft",
    "--config.optimizer.max_grad_norm=1",
    "--config.data.max_pairs=7",
    "--config.data.add_bos=false",
    "--config.mesh.fsdp=4",
    "--config.loss.beta=0.1",
  )
  assert config.run.init_from == "sft"
  assert config.optimizer.max_grad_norm == 1.0
  assert config.data.max_pairs == 7
  assert config.data.add_bos is False
  assert (config.mesh.fsdp, config.loss.beta) == (4, 0.1)
  with pytest.raises(AttributeError, match="betta"):
    read(path, "--config.loss.betta=0.1")


def test_differences_name_keys_and_both_values():
  old = config_lib.to_dict(config_lib.from_dict(sections()))
  new = config_lib.to_dict(
    config_lib.from_dict(sections(loss__beta=0.1, data__train=["a", "b"]))
  )
  assert config_values.differences(old, old) == []
  assert config_values.differences(json.loads(json.dumps(new)), new) == []
  assert config_values.differences(old, new) == [
    "data.train: pairs.jsonl -> ['a', 'b']",
    "loss.beta: 0.3 -> 0.1",
  ]
  del old["loss"]["beta"]
  assert "loss.beta: not set -> 0.1" in config_values.differences(old, new)


def test_a_config_dict_that_is_filled_by_hand_is_checked_as_well():
  config = ml_collections.ConfigDict(sections())
  config.loss.dpop_lambda = 0
  assert config_lib.from_config_dict(config).loss.dpop_lambda == 0.0


OPTIONS = {
  "beta": 0.5,
  "dpop_lambda": 3.0,
  "label_smoothing": 0.1,
  "delta": 2.0,
  "likelihood_weight": 0.5,
}
# Of one pair: the policy's log-probs -4 and -7, the reference's -5 and -6, with
# 2 and 4 tokens. Log-ratios 1 and -1, so there is no penalty.
SOFTPLUS = lambda x: math.log1p(math.exp(x))
EXPECTED = {
  "dpop": SOFTPLUS(-0.5 * 2),
  "dpo": SOFTPLUS(-0.5 * 2),
  "cdpo": 0.9 * SOFTPLUS(-0.5 * 2) + 0.1 * SOFTPLUS(0.5 * 2),
  "ipo": (2 - 1 / (2 * 0.5)) ** 2,
  "ipo_mean": (1 / 2 + 1 / 4 - 1 / (2 * 0.5)) ** 2,
  "slic_hinge": max(0, 1 - 0.5 * 2),
  "slic": max(0, 2 - (-4 + 7)) + 0.5 * 4,
  "sft": 4.0,
}


@pytest.mark.parametrize("name", config_lib.LOSSES)
def test_every_loss_gets_its_own_arguments_and_options(name):
  options = {key: OPTIONS[key] for key in config_lib.LOSSES[name].options}
  config = config_lib.LossConfig(name=name, **options)
  objective = config_lib.make_objective(config)
  assert objective.is_sft == (name == "sft")
  assert objective.beta == options.get("beta", 1.0)
  value = objective.pair_losses(
    jnp.array([[-4.0, -7.0]]),
    jnp.array([[-5.0, -6.0]]),
    jnp.array([[2, 4]]),
  )
  np.testing.assert_allclose(value, [EXPECTED[name]], rtol=1e-6)


@pytest.mark.parametrize(
  ("name", "expected"),
  [
    ("dpop", math.log(2)),
    ("dpo", math.log(2)),
    ("cdpo", math.log(2)),
    ("ipo", 1.0),  # (0 - 1 / (2 * 0.5)) ** 2
    ("ipo_mean", 1.0),
    ("slic_hinge", 1.0),
    ("slic", None),
    ("sft", None),
  ],
)
def test_the_loss_of_equal_models(name, expected):
  options = {key: OPTIONS[key] for key in config_lib.LOSSES[name].options}
  config = config_lib.LossConfig(name=name, **options)
  assert config_lib.initial_loss(config) == (
    None if expected is None else pytest.approx(expected, rel=1e-6)
  )
