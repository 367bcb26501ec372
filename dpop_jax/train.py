"""The training loop, top to bottom."""

import concurrent.futures
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpop_jax import (
  checkpoints,
  evaluate,
  exchange,
  folder_locks,
  hugging_face_files,
  inputs,
  metric_writers,
  model_folders,
  paths,
  progress,
  reference_cache,
  saved_config,
  sharding,
  steps,
  training_log,
)
from dpop_jax import config as config_lib
from dpop_jax import program as program_lib
from dpop_jax.data import plan as plan_lib


class Result(NamedTuple):
  """How a run ended.

  Attributes:
    step: Updates made in all.
    is_complete: False if the run was asked to stop before its end.
    eval_metrics: Means on the held-out pairs at the end, if there are any.
    params: The policy; None if it was asked to stop before it had any.
  """

  step: int
  is_complete: bool
  eval_metrics: dict[str, float] | None
  params: steps.Params | None


def train(config: config_lib.Config, workdir: str) -> Result:
  """Trains, or continues what a killed or preempted run left in `workdir`.

  Args:
    config: What to do.
    workdir: Folder of checkpoints/, metrics.jsonl, tensorboard/, tokens/,
      config.json and data.json.

  Raises:
    FileNotFoundError: A file of the config is missing.
    ValueError: The config, the data and the mesh do not fit together, the
      workdir holds another run, another process is at work in it, or the
      processes were not started alike.
    FloatingPointError: Something went non-finite.
  """
  saved_config.check_started_alike(config)
  config = inputs.pin_models(config)
  inputs.check_start(config)
  reference_model = config_lib.reference_model(config)
  differences = saved_config.check_same_run(config, workdir)
  program_lib.use_compilation_cache(config)
  mesh = sharding.make_mesh(config.mesh)
  # Before the data is read: whatever can be refused is refused early.
  program_lib.check(config, mesh, reference_model=reference_model)
  exchange.check_shared(workdir)
  data = inputs.load_data(config, workdir)
  saved_config.check_same_data(data, workdir)
  num_steps = config.run.steps_for(len(data.train), config.batch.batch_size)
  program = program_lib.make_program(
    config, mesh, num_steps=num_steps, reference_model=reference_model
  )
  exchange.check_equal(
    {
      "data": saved_config.digests(data),
      "run.init_from": config.run.init_from,
      "reference.init_from": config.reference.init_from,
      "the newest checkpoint": checkpoints.newest(workdir),
    }
  )
  plan = plan_lib.Plan(
    data.train,
    config.batch,
    seed=config.run.seed,
    num_steps=num_steps,
    share=exchange.share,
  )
  plans = {"train": plan}
  if data.eval is not None:
    plans["eval"] = evaluate.make_plan(data.eval, config.batch)
  # Only now, so that a mistake above leaves no folder behind.
  with folder_locks.alone_in(workdir, "training"):
    return _train(config, workdir, program, data, plans, differences)


def _train(config, workdir, program, data, plans, differences) -> Result:
  """What writes to the workdir."""
  plan = plans["train"]
  is_primary = jax.process_index() == 0
  if is_primary:
    saved_config.save(config, workdir)
    saved_config.save_data(data, workdir)
    hugging_face_files.keep(
      paths.of(workdir) / model_folders.HUGGING_FACE,
      init_from=config.run.init_from,
      data=config.data,
    )
  with (
    checkpoints.Checkpoints(workdir, config.checkpoints) as saved,
    checkpoints.Preemption() as preemption,
  ):
    first_step = saved.latest_step()
    started = _start(config, program, saved, plans, preemption)
    if started is None:
      if is_primary:
        print(
          "Asked to stop while the reference was scored. Run again to "
          "continue.",
          file=sys.stderr,
        )
      return Result(first_step or 0, False, None, None)
    state, reference = started
    with (
      metric_writers.MetricWriter(
        workdir, resume_step=first_step, is_primary=is_primary
      ) as writer,
      progress.Progress(
        "train",
        num_steps=plan.num_steps,
        first_step=first_step or 0,
        is_shown=is_primary,
      ) as bar,
    ):
      for difference in differences:
        bar.print(f"Changed since the last start: {difference}")
      bar.print(_describe(data, plan, first_step))
      if data.eval is None:
        evaluator = None
      else:
        evaluator = evaluate.Evaluator(program, plans["eval"], config.batch)
      log = training_log.TrainingLog(config, program, plan, writer, bar)
      log.continue_from(saved.notes())
      result = _run(
        config,
        program,
        plan,
        evaluator,
        state,
        reference,
        saved=saved,
        preemption=preemption,
        log=log,
      )
      if not result.is_complete:
        bar.print(
          f"Asked to stop: saved step {result.step}. Run again to continue."
        )
      return result


def _run(
  config,
  program,
  plan,
  evaluator,
  state,
  reference,
  *,
  saved,
  preemption,
  log,
) -> Result:
  """The loop itself, from the state's step to the plan's last."""
  step, num_steps = int(state.step), plan.num_steps
  eval_metrics = None
  log.check_state(step, state)
  if evaluator and (step == 0 or step >= num_steps):
    eval_metrics = evaluator(state.params, reference)
  if step >= num_steps:
    # The run was complete already, and so are its metrics on disk.
    return Result(step, True, eval_metrics, state.params)
  if eval_metrics:
    log.add_evaluation(step, eval_metrics)
  train_step = program_lib.compile_step(
    program.train_step, program, program.abstract_state, plan.empty_batch()
  )
  log.restart_clock()
  is_complete = True
  num_rows = config.batch.rows_per_microbatch
  rows = program_lib.local_rows(program, num_rows)
  with concurrent.futures.ThreadPoolExecutor(1) as pool:

    def prepare(step):
      planned = plan.step(step, rows)
      batch = program_lib.put_batch(program, planned.batch, num_rows=num_rows)
      return planned._replace(batch=None), batch

    upcoming = pool.submit(prepare, step)
    while step < num_steps:
      planned, batch = upcoming.result()
      if step + 1 < num_steps:
        upcoming = pool.submit(prepare, step + 1)
      state, report = train_step(
        state, reference, batch, np.int32(planned.num_microbatches)
      )
      step += 1
      # While this step runs, the host deals with the one before.
      log.add(step, planned, report)
      is_last = step == num_steps
      is_stopped = preemption.requested()
      every = config.run.eval_every_steps
      is_eval_due = evaluator and (is_last or (every and step % every == 0))
      is_save_due = is_last or is_stopped or saved.is_due(step)
      if is_eval_due or is_save_due:
        log.flush()
      # Before the save: a resumed run does not evaluate its first step again.
      if is_eval_due:
        eval_metrics = evaluator(state.params, reference)
        log.add_evaluation(step, eval_metrics)
        log.restart_clock()
      if is_save_due:
        # The report tells of the state before the update.
        log.check_state(step, state)
        saved.save(step, state, log.keep())
      if is_stopped and not is_last:
        upcoming.cancel()
        is_complete = False
        break
  return Result(step, is_complete, eval_metrics, state.params)


def _start(config, program, saved, plans, preemption):
  """The state to go on from, and the reference if the steps take it.

  None if the run was asked to stop meanwhile.
  """
  first_step = saved.latest_step()
  is_resumed = first_step is not None
  params = reference = None
  if not is_resumed:
    params = inputs.initial_params(config, program.mesh)
  if config.loss.name != "sft":
    reference = inputs.load_reference(config, program.mesh, initial=params)
  if program.abstract_scored is not None:
    if not reference_cache.attach(
      config,
      program,
      reference,
      plans,
      first_step=first_step or 0,
      is_stopped=preemption.requested,
    ):
      return None
    # Freed before there is an optimizer state, unless the policy is it.
    reference = None
  if is_resumed:
    return saved.restore(program.abstract_state), reference
  if params is reference:
    # The state is donated step by step, so it needs arrays of its own.
    params = jax.tree.map(jnp.copy, params)
  zero = jax.device_put(jnp.int32(0), program.abstract_state.step.sharding)
  return steps.State(zero, params, program.init_opt_state(params)), reference


def _describe(data, plan, first_step) -> str:
  held_out = "" if data.eval is None else f", {len(data.eval)} held out"
  start = "" if first_step is None else f" Continuing from step {first_step}."
  return (
    f"{len(data.train)} pairs{held_out}; {plan.num_steps} steps in rows of "
    f"{plan.capacity.tokens} tokens, at most {plan.max_microbatches} "
    f"microbatches each.{start}"
  )
