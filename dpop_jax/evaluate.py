"""Metrics of a policy on held-out pairs."""

import dataclasses

from dpop_jax import (
  checkpoints,
  exchange,
  inputs,
  saved_config,
  sharding,
  steps,
)
from dpop_jax import config as config_lib
from dpop_jax import metrics as metrics_lib
from dpop_jax import program as program_lib
from dpop_jax.data import dataset
from dpop_jax.data import plan as plan_lib


def make_plan(
  pairs: dataset.TokenPairs, batch: plan_lib.BatchConfig
) -> plan_lib.Plan:
  """All pairs once, in their order."""
  return plan_lib.Plan(
    pairs,
    batch,
    seed=0,
    num_steps=-(-len(pairs) // batch.batch_size),
    is_shuffled=False,
    share=exchange.share,
  )


class Evaluator:
  """Scores the same pairs whenever it is called; compiled once."""

  def __init__(
    self,
    program: program_lib.Program,
    plan: plan_lib.Plan,
    batch: plan_lib.BatchConfig,
  ):
    """Compiles the evaluation step for the batches of a plan."""
    self._program, self._plan = program, plan
    self._num_rows = batch.rows_per_microbatch
    self._rows = program_lib.local_rows(program, self._num_rows)
    self._step = program_lib.compile_step(
      program.eval_step,
      program,
      program.abstract_state.params,
      self._plan.empty_batch(),
    )

  def __call__(
    self, params: steps.Params, reference: steps.Params | None
  ) -> dict[str, float]:
    """Means over all pairs, by metric name."""
    total: steps.Metrics = {}
    for step in range(self._plan.num_steps):
      planned = self._plan.step(step, self._rows)
      batch = program_lib.put_batch(
        self._program, planned.batch, num_rows=self._num_rows
      )
      report = self._step(params, reference, batch, planned.num_microbatches)
      total = metrics_lib.merge(total, report) if total else report
    return metrics_lib.means(total)


def evaluate_run(
  config: config_lib.Config, workdir: str, *, data: str | None = None
) -> dict[str, float]:
  """Metrics of a run's newest checkpoint against what the run started from.

  Args:
    config: Of the run. Its mesh may be another than in training; rows are added
      to a microbatch where the mesh asks for more.
    workdir: Of the run.
    data: Pairs to score, as `data.train`; None for those that the run held out.

  Returns:
    Means over all pairs, by metric name.

  Raises:
    FileNotFoundError: A file is missing.
    ValueError: There is no checkpoint, or nothing is held out, or config, data
      and mesh do not fit together, or the processes were not started alike.
  """
  if data is not None:
    section = dataclasses.replace(
      config.data,
      train=data,
      weights=None,
      eval=None,
      num_eval_pairs=0,
      max_pairs=None,
    )
    config = dataclasses.replace(config, data=section)
  elif config.data.eval is None and not config.data.num_eval_pairs:
    raise ValueError(
      f"The run in {workdir} held nothing out (data.eval, "
      "data.num_eval_pairs); name pairs to score with --data."
    )
  saved_config.check_started_alike(config)
  program_lib.use_compilation_cache(config)
  mesh = sharding.make_mesh(config.mesh)
  num_shards = sharding.num_row_shards(mesh)
  rows = -(-config.batch.rows_per_microbatch // num_shards) * num_shards
  batch = dataclasses.replace(config.batch, rows_per_microbatch=rows)
  # Once is not worth keeping the reference's log-probs for.
  scored = dataclasses.replace(config.reference, cache_dir=None)
  config = dataclasses.replace(config, batch=batch, reference=scored)
  # For its learning rates, which play no part here.
  num_steps = config.optimizer.warmup_steps + 1
  program = program_lib.make_program(
    config,
    mesh,
    num_steps=num_steps,
    reference_model=config_lib.reference_model(config),
  )
  params = checkpoints.load_params(workdir, program.abstract_state.params)
  reference = None
  if program.abstract_reference is not None:
    reference = inputs.load_reference(config, mesh)
  loaded = inputs.load_data(config, workdir)
  exchange.check_equal({"data": saved_config.digests(loaded)})
  pairs = loaded.eval if data is None else loaded.train
  plan = make_plan(pairs, batch)
  return Evaluator(program, plan, batch)(params, reference)
