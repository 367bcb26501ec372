"""From the text of sweeps and settings to configs, and to their names."""

import dataclasses

import pytest
import tiny_runs

from dpop_jax import sweeps

BASE = tiny_runs.make_config({"train": "a.jsonl", "tokenizer": "b.json"})


def expand(*grid, settings=()):
  return sweeps.expand(BASE, grid, settings)


def losses(configs):
  """(name, beta, lambda) of each."""
  found = [config.loss for config in configs.values()]
  return [(loss.name, loss.beta, loss.dpop_lambda) for loss in found]


def test_nothing_to_sweep_is_the_base_alone():
  assert expand() == {"dpop_beta0.3_dpop_lambda50": BASE}


def test_a_grid_is_all_combinations_in_order():
  found = expand("loss.dpop_lambda=0,5", "optimizer.peak_learning_rate=1e-4,1")
  assert [
    (config.loss.dpop_lambda, config.optimizer.peak_learning_rate)
    for config in found.values()
  ] == [(0.0, 1e-4), (0.0, 1.0), (5.0, 1e-4), (5.0, 1.0)]
  # Whatever is not swept stays.
  assert all(config.data == BASE.data for config in found.values())


def test_options_that_a_loss_does_not_have_are_dropped_and_then_told_once():
  found = expand("loss.name=dpo,dpop", "loss.dpop_lambda=5,50")
  assert losses(found) == [
    ("dpo", 0.3, None),
    ("dpop", 0.3, 5.0),
    ("dpop", 0.3, 50.0),
  ]


def test_an_option_that_the_base_lacks_is_taken_where_it_is_used():
  found = expand("loss.name=dpop,cdpo", "loss.label_smoothing=0.1")
  assert [c.loss.label_smoothing for c in found.values()] == [None, 0.1]


def test_listed_settings_come_on_top_of_the_grid():
  found = expand(
    "loss.beta=0.1,0.3",
    settings=["loss.name=ipo,loss.beta=1", "loss.dpop_lambda=5"],
  )
  assert losses(found) == [
    ("dpop", 0.1, 50.0),
    ("dpop", 0.3, 50.0),
    ("ipo", 1.0, None),
    ("dpop", 0.3, 5.0),
  ]
  # Without a grid there is nothing but them.
  assert losses(expand(settings=["loss.name=dpo"])) == [("dpo", 0.3, None)]


def test_values_are_read_as_the_key_has_them():
  found = expand("optimizer.max_grad_norm=None,2", "data.train=2024,c.jsonl")
  assert [
    (c.optimizer.max_grad_norm, c.data.train) for c in found.values()
  ] == [
    (None, "2024"),
    (None, "c.jsonl"),
    (2.0, "2024"),
    (2.0, "c.jsonl"),
  ]


def test_a_name_does_not_depend_on_what_else_is_compared():
  (alone,) = expand(settings=["loss.name=dpo"])
  assert alone == "dpo_beta0.3"
  among = expand("loss.name=dpo,ipo", "optimizer.peak_learning_rate=0.01,0.02")
  # 0.01 is the base's.
  assert list(among) == [
    "dpo_beta0.3",
    "dpo_beta0.3_optimizer.peak_learning_rate0.02",
    "ipo_beta0.3",
    "ipo_beta0.3_optimizer.peak_learning_rate0.02",
  ]


def test_names_that_are_no_folders_are_made_so_and_stay_apart():
  found = expand("data.train=a/b,a-b,a:b," + "x" * 200)
  assert len(found) == 4
  for name in found:
    assert "/" not in name and len(name) <= 110
  seeded = dataclasses.replace(BASE.run, seed=3)
  other = dataclasses.replace(BASE, run=seeded)
  assert sweeps.name_of(other, BASE) == sweeps.name_of(BASE, BASE)


@pytest.mark.parametrize(
  "text, message",
  [
    ("loss.bta=0.1", r"Unknown config key loss.bta; did you mean loss.beta\?"),
    ("nothing.at.all=1", "Unknown config key nothing"),
    ("loss.beta.x=1", "Config key loss.beta.x is within beta"),
    ("loss.beta=abc", "loss.beta must be float or None, got 'abc'"),
    ("loss.beta=-1", "loss.beta must be positive, got -1"),
    ("loss.name=dpo,nope", "loss.name must be one of .* got 'nope'"),
    ("loss.name=sft", "loss.name='sft' learns from single answers"),
    ("loss.name=cdpo", "loss.name='cdpo' needs loss.label_smoothing"),
    ("loss.beta", "--sweep takes a key and its values"),
    ("loss.beta=0.1,", "--sweep takes a key and its values"),
    ("loss.delta=1", "loss.delta is an option of none of the losses .dpop."),
    ("run.seed=0,1", "given as --seeds=0,1,2"),
    ("run.init_from=a,b", "run.init_from is the same for all runs"),
    ("reference.init_from=a", "reference.init_from is the same"),
    ("data.eval=a", "data.eval is the same for all runs"),
    ("loss=dpo", "Config key loss must be a section of keys"),
  ],
)
def test_a_bad_sweep_is_one_sentence(text, message):
  with pytest.raises(ValueError, match=message) as error:
    expand(text)
  assert "\n" not in str(error.value)


def test_a_key_is_swept_once():
  with pytest.raises(ValueError, match="--sweep=loss.beta=... is given twice"):
    expand("loss.beta=0.1", "loss.beta=0.3")


@pytest.mark.parametrize(
  "text, message",
  [
    ("loss.beta", "--setting takes keys with one value each"),
    ("loss.beta=", "--setting takes keys with one value each"),
    # Said by name, so not dropped.
    ("loss.name=dpo,loss.dpop_lambda=5", "does not use it; leave it out"),
  ],
)
def test_a_bad_setting_is_one_sentence(text, message):
  with pytest.raises(ValueError, match=message):
    expand(settings=[text])
