"""Many short runs of DPO in one process, which compile their steps once."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpop_jax import config as config_lib
from dpop_jax import evaluate, inputs, sharding, steps
from dpop_jax import metrics as metrics_lib
from dpop_jax import program as program_lib
from dpop_jax.data import dataset, packing
from dpop_jax.data import plan as plan_lib

# What rows hold is rounded up to multiples, so that sets share programs.
_SCORES, _PAIRS = 256, 32


class Trainer:
  """Trains models of one shape on sets of pairs, and scores held-out ones."""

  def __init__(self, config: config_lib.Config):
    """Compiles nothing yet.

    Args:
      config: Of all runs but for their data, seed and start.
    """
    self._config = config
    self._mesh = sharding.make_mesh(config.mesh)
    program_lib.use_compilation_cache(config)
    self._program = program_lib.make_program(
      config, self._mesh, num_steps=config.run.num_steps
    )
    self._compiled: dict[Any, jax.stages.Compiled] = {}

  def load(self, path: str) -> steps.Params:
    """Parameters to start from."""
    run = dataclasses.replace(self._config.run, init_from=path)
    config = dataclasses.replace(self._config, run=run)
    return inputs.initial_params(config, self._mesh)

  def train(
    self,
    start: steps.Params,
    train: dataset.TokenPairs,
    held_out: dataset.TokenPairs,
    *,
    seed: int,
    eval_steps: Sequence[int],
  ) -> dict[int, dict[str, float]]:
    """Metrics on held-out pairs after so many steps of training.

    Args:
      start: What to start from, and the reference.
      train: Pairs to learn from.
      held_out: Pairs to score.
      seed: Of the order of the pairs.
      eval_steps: After which steps to score; the last one ends the run.
    """
    plan = plan_lib.Plan(
      train, self._config.batch, seed=seed, num_steps=max(eval_steps)
    )
    scored = evaluate.make_plan(held_out, self._config.batch)
    # Each step donates its state.
    params = jax.tree.map(jnp.copy, start)
    state = steps.State(
      jnp.int32(0), params, self._program.init_opt_state(params)
    )
    found = {}
    for step in range(max(eval_steps)):
      state, _ = self._run("train_step", state, start, plan, step)
      if step + 1 in eval_steps:
        total = {}
        for i in range(scored.num_steps):
          report = self._run("eval_step", state.params, start, scored, i)
          total = metrics_lib.merge(total, report) if total else report
        found[step + 1] = metrics_lib.means(total)
    return found

  def _run(self, name: str, first, reference, plan, step: int):
    needed = plan.capacity
    capacity = packing.Capacity(
      tokens=needed.tokens,
      scores=-(-needed.scores // _SCORES) * _SCORES,
      links=-(-needed.links // _SCORES) * _SCORES,
      pairs=-(-needed.pairs // _PAIRS) * _PAIRS,
    )
    planned = plan.step(step, capacity=capacity)
    batch = program_lib.put_batch(self._program, planned.batch)
    key = name, capacity, plan.max_microbatches
    if key not in self._compiled:
      abstract = self._program.abstract_state
      self._compiled[key] = program_lib.compile_step(
        getattr(self._program, name),
        self._program,
        abstract if name == "train_step" else abstract.params,
        batch,
      )
    return self._compiled[key](
      first, reference, batch, np.int32(planned.num_microbatches)
    )
