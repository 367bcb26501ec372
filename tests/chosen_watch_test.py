"""The warning comes when chosen answers fall, once, and never otherwise."""

import json
import math
from unittest import mock

import pytest
import tiny_runs

from dpop_jax import (
  chosen_watch,
  metric_writers,
  program,
  progress,
  sharding,
  training_log,
)
from dpop_jax.data import plan


def make_watch(**changes):
  data = {"train": "pairs.jsonl", "tokenizer": "tokenizer.json"}
  return chosen_watch.ChosenWatch(tiny_runs.make_config(data, **changes))


def values(*logratios):
  """Means over pairs with these log-ratios of chosen answers."""
  return {
    "logratios/chosen": sum(logratios) / len(logratios),
    "dpop/penalty": sum(max(0.0, -r) for r in logratios) / len(logratios),
  }


def warnings(watch, *evaluations):
  """What is said at each, from step 0 on."""
  return [watch.add(10 * i, found) for i, found in enumerate(evaluations)]


START, LOW = values(0.0, 0.0), values(-1.0, -3.0)


def test_the_second_low_evaluation_in_a_row_warns_and_no_other():
  found = warnings(make_watch(), START, LOW, LOW, LOW, START, LOW, LOW)
  assert [bool(text) for text in found] == [False] * 2 + [True] + [False] * 4
  assert "2 evaluations in a row" in found[2] and "by 2 nats" in found[2]
  assert found[2].startswith("WARNING: ")


def test_low_evaluations_that_do_not_follow_each_other_say_nothing():
  assert not any(warnings(make_watch(), START, LOW, START, LOW, START, LOW))


@pytest.mark.parametrize(
  "harmless",
  [
    # Up, and equal.
    values(0.5, 0.7),
    values(0.0, 0.0),
    # Below by less than counts: 0.009 nat.
    values(-0.009, -0.009),
    # Two lost 1.9 nats and the others gained 1, so the mean is below zero.
    values(-1.5, 0.5, 0.5, -0.4),
  ],
)
def test_there_is_no_false_alarm(harmless):
  assert not any(warnings(make_watch(), START, *[harmless] * 5))


def test_losses_that_outweigh_gains_twofold_are_a_fall():
  # Lost 2 and 0, gained 1: on the edge.
  edge = values(-2.0, 1.0)
  assert any(warnings(make_watch(), START, edge, edge))
  above = values(-1.9, 1.0)
  assert not any(warnings(make_watch(), START, above, above))


def test_a_policy_that_began_below_another_reference_has_not_fallen():
  behind, further = values(-2.0, -2.0), values(-2.5, -2.5)
  assert not any(warnings(make_watch(), behind, behind, behind, behind))
  assert any(warnings(make_watch(), behind, further, further))


def test_supervised_runs_are_never_warned_of():
  assert not any(warnings(make_watch(), *[{"logps/chosen": -9.0}] * 4))


@pytest.mark.parametrize(
  "changes, advice",
  [
    (dict(loss__name="dpo"), "use loss.name='dpop' with loss.dpop_lambda=50"),
    (dict(loss__name="ipo"), "loss.name='ipo' allows it; use loss.name='dpop'"),
    (dict(loss__dpop_lambda=0.0), "With loss.dpop_lambda=0 the loss is DPO"),
    (
      dict(loss__dpop_lambda=5.0),
      "lower optimizer.peak_learning_rate, now 0.01, or raise "
      "loss.dpop_lambda, now 5.",
    ),
  ],
)
def test_it_says_what_to_change(changes, advice):
  assert advice in warnings(make_watch(**changes), START, LOW, LOW)[-1]


def resumed(watch):
  other = make_watch()
  other.continue_from(json.loads(json.dumps(watch.notes())))
  return other


def test_a_resumed_run_counts_on_and_does_not_warn_twice():
  watch = make_watch()
  warnings(watch, START, LOW)
  watch = resumed(watch)
  assert watch.add(20, LOW)
  assert not resumed(watch).add(30, LOW)


def test_a_run_of_an_older_version_is_watched_from_where_it_goes_on():
  watch = make_watch()
  watch.continue_from({})
  assert [bool(watch.add(step, LOW)) for step in (50, 60)] == [False, True]


def make_log(config):
  """A log whose bar is a mock; no step is made, so the program is not used."""
  spec = lambda cls: mock.create_autospec(cls, instance=True)
  program_spec = spec(program.Program)
  program_spec.abstract_state.params = {}
  program_spec.mesh = sharding.make_mesh(config.mesh)
  bar = spec(progress.Progress)
  log = training_log.TrainingLog(
    config,
    program_spec,
    spec(plan.Plan),
    spec(metric_writers.MetricWriter),
    bar,
  )
  return log, bar


def lines(bar):
  return [call.args[0] for call in bar.print.call_args_list]


def test_the_log_says_it_below_the_evaluation_and_takes_it_along():
  config = tiny_runs.make_config({"train": "a.jsonl", "tokenizer": "b"})
  log, bar = make_log(config)
  log.add_evaluation(0, START | {"loss": math.log(2)})
  log.add_evaluation(5, LOW)
  assert len(lines(bar)) == 2
  notes = json.loads(json.dumps(log.keep()))
  log, bar = make_log(config)
  log.continue_from(notes)
  log.add_evaluation(10, LOW)
  log.add_evaluation(15, LOW)
  first, warning, last = lines(bar)
  assert first.startswith("eval   step 10:") and "WARNING" in warning
  assert last.startswith("eval   step 15:")
