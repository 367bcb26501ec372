"""What becomes of the reports of steps: checked, averaged, written, shown."""

import math
import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dpop_jax import (
  checkpoints,
  chosen_watch,
  metric_writers,
  name_lists,
  progress,
  steps,
)
from dpop_jax import config as config_lib
from dpop_jax import metrics as metrics_lib
from dpop_jax import pairs as pairs_lib
from dpop_jax import program as program_lib
from dpop_jax.data import plan as plan_lib

# Policy and reference start equal. What their loss may be off by, relative to
# what it should be or to 1, whichever is larger, by the dtype of activations.
_INITIAL_LOSS_TOLERANCES = {"float32": 1e-4, "bfloat16": 1e-3}

_UNWRITTEN = "unwritten metrics"
_WATCHED = "watched evaluations"


class TrainingLog:
  """Deals with the report of a step while the next one runs."""

  def __init__(
    self,
    config: config_lib.Config,
    program: program_lib.Program,
    plan: plan_lib.Plan,
    writer: metric_writers.MetricWriter,
    bar: progress.Progress,
  ):
    """Starts the clock."""
    self._config, self._program, self._plan = config, program, plan
    self._writer, self._bar = writer, bar
    self._waiting = None
    self._param_names = _names(program.abstract_state.params)
    replicated = NamedSharding(program.mesh, P())
    self._are_finite = jax.jit(_are_finite, out_shardings=replicated)
    self._watch = chosen_watch.ChosenWatch(config)
    self._metrics: steps.Metrics = {}
    self._planned: list[plan_lib.PlannedStep] = []
    self._clock = time.perf_counter()
    self._seconds = 0.0

  def restart_clock(self) -> None:
    """Leaves out what has passed since the last step was dealt with."""
    self._clock = time.perf_counter()

  def add(
    self, step: int, planned: plan_lib.PlannedStep, report: steps.StepReport
  ) -> None:
    """Takes a step that may still be running; deals with the one before it.

    Raises:
      FloatingPointError: That one has metrics or gradients that are not finite.
      ValueError: It is the first, and its loss is not the expected one.
    """
    self.flush()
    self._waiting = (step, planned, report)

  def flush(self) -> None:
    """Deals with the step that waits, if any, when it is done; see `add`."""
    if self._waiting is None:
      return
    step, planned, report = self._waiting
    self._waiting = None
    report = jax.device_get(report)
    now = time.perf_counter()
    self._seconds += now - self._clock
    self._clock = now
    self._check_finite(step, report)
    if step == 1:
      check_initial_loss(
        self._config, metrics_lib.means(report.metrics)["loss"]
      )
    self._planned.append(planned)
    self._metrics = (
      metrics_lib.merge(self._metrics, report.metrics)
      if self._metrics
      else report.metrics
    )
    is_last = step == self._plan.num_steps
    if step % self._config.run.log_every_steps and not is_last:
      self._bar.update(step)
      return
    values = metrics_lib.means(self._metrics) | self._speed()
    values |= {
      "grad_norm": float(report.grad_norm),
      "learning_rate": float(report.learning_rate),
      "epoch": self._plan.epoch(step),
    }
    self._writer.write(step, "train", values)
    self._bar.update(step, headline(values))
    self._metrics, self._planned, self._seconds = {}, [], 0.0

  def add_evaluation(self, step: int, values: dict[str, float]) -> None:
    """Writes and shows means over the held-out pairs.

    Raises:
      FloatingPointError: One of them is not finite.
      ValueError: No step is made yet, and the loss is not the expected one.
    """
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if bad:
      raise _not_finite(step, "The evaluation at", bad)
    self._writer.write(step, "eval", values)
    shown = ", ".join(f"{k} {v:.4g}" for k, v in headline(values).items())
    self._bar.print(f"eval   step {step}: {shown}")
    if step == 0:
      check_initial_loss(self._config, values["loss"])
    if warning := self._watch.add(step, values):
      self._bar.print(warning)

  def keep(self) -> checkpoints.Notes:
    """Makes what was written outlive the process, whatever the workdir is.

    Returns:
      What is averaged and not written yet, and what the evaluations gave
      reason to watch, for `continue_from`.
    """
    self._writer.flush()
    return {
      _UNWRITTEN: {
        name: [float(value.total), float(value.weight)]
        for name, value in self._metrics.items()
      },
      _WATCHED: self._watch.notes(),
    }

  def continue_from(self, notes: checkpoints.Notes) -> None:
    """Goes on with the averages of the process that saved.

    Args:
      notes: What `keep` returned there. Of its steps, only the speed is lost.
    """
    self._metrics = {
      name: pairs_lib.WeightedSum(np.float32(total), np.float32(weight))
      for name, (total, weight) in notes.get(_UNWRITTEN, {}).items()
    }
    self._watch.continue_from(notes.get(_WATCHED, {}))

  def check_state(self, step: int, state: steps.State) -> None:
    """Raises FloatingPointError, with names, if not all of it is finite."""
    flags = jax.device_get(self._are_finite(state))
    bad = [
      name
      for name, is_finite in zip(_names(state), flags, strict=True)
      if not is_finite
    ]
    if bad:
      raise _not_finite(step, "The state after", bad)

  def _speed(self):
    """Of the steps since the last record; tokens are those of the trees."""
    total = lambda name: sum(getattr(p, name) for p in self._planned)
    config = self._config.batch
    capacity = (
      total("num_microbatches")
      * config.rows_per_microbatch
      * self._plan.capacity.tokens
    )
    tokens = total("num_tokens")
    pairs = len(self._planned) * config.batch_size
    return {
      "perf/pairs_per_second": pairs / self._seconds,
      "perf/tokens_per_second": tokens / self._seconds,
      "perf/packing_fill": tokens / capacity,
      "perf/sharing": total("num_sequence_tokens") / tokens,
    }

  def _check_finite(self, step, report):
    bad = [
      name
      for name, value in report.metrics.items()
      if not math.isfinite(value.total)
    ]
    bad += [
      f"the gradient of {name}"
      for name, norm in zip(self._param_names, report.grad_norms, strict=True)
      if not math.isfinite(norm)
    ]
    if bad:
      raise _not_finite(step, "The update of", bad)


def check_initial_loss(config: config_lib.Config, loss: float) -> None:
  """Raises ValueError unless the loss is that of two equal models.

  A reference that is another model may give any loss.
  """
  expected = config_lib.initial_loss(config.loss)
  if expected is None or config.reference.init_from is not None:
    return
  tolerance = _INITIAL_LOSS_TOLERANCES[config.model.dtype]
  if abs(loss - expected) <= tolerance * max(1.0, expected):
    return
  raise ValueError(
    f"The first loss is {loss:.6f} instead of {expected:.6f}: policy and "
    "reference score the same answers differently although they are the same "
    "model. Compute both in model.dtype='float32', with reference.param_dtype "
    "as model.param_dtype"
    + (
      "."
      if config.reference.cache_dir is None
      else ", or set reference.cache_dir to None."
    )
  )


def headline(values: Mapping[str, float]) -> dict[str, float]:
  """The few numbers that fit beside a progress bar."""
  names = (
    "loss",
    "rewards/accuracies",
    "logratios/chosen",
    "dpop/active_fraction",
    "perf/pairs_per_second",
  )
  return {name: values[name] for name in names if name in values}


def _are_finite(tree):
  """bool [leaves]."""
  return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)])


def _names(tree) -> list[str]:
  return [
    jax.tree_util.keystr(path, simple=True, separator="/")
    for path, _ in jax.tree.leaves_with_path(tree)
  ]


def _not_finite(step: int, what: str, names: list[str]) -> FloatingPointError:
  advice = (
    "Nothing of it was saved; lower optimizer.peak_learning_rate or set "
    "optimizer.max_grad_norm, in another --workdir."
    if step
    else "That is what the run starts from; check run.init_from."
  )
  return FloatingPointError(
    f"{what} step {step} is not finite: {name_lists.listed(names)}. {advice}"
  )
