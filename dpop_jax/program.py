"""The compiled functions of a run, built in one place.

Whoever needs to know what a run does to a machine compiles exactly these.
"""

import ctypes
import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dpop_jax import config as config_lib
from dpop_jax import optim, paths, sharding, steps
from dpop_jax import pairs as pairs_lib
from dpop_jax.models import decoder


class Program(NamedTuple):
  """What is needed to compile and run the steps of a config on a mesh.

  Attributes:
    mesh: Where everything lies.
    abstract_state: `steps.State` of shapes, dtypes and shardings.
    abstract_reference: The reference's parameters likewise; None for SFT, and
      where its log-probs come with the batch.
    abstract_scored: Those parameters where they score these log-probs before
      the first step; else None.
    batch_sharding: Of the arrays of a PackedBatch [microbatches, rows, ...].
    init_opt_state: Parameters to a fresh optimizer state, born sharded.
    train_step: Jitted `steps.train_step`; donates the state.
    eval_step: Jitted `steps.eval_step`.
    score_step: Jitted `steps.score_step` of `abstract_scored`, if that is not
      None; its result is on all devices.
  """

  mesh: jax.sharding.Mesh
  abstract_state: steps.State
  abstract_reference: steps.Params | None
  abstract_scored: steps.Params | None
  batch_sharding: NamedSharding
  init_opt_state: Callable[[steps.Params], optax.OptState]
  train_step: jax.stages.Wrapped
  eval_step: jax.stages.Wrapped
  score_step: jax.stages.Wrapped | None


def make_program(
  config: config_lib.Config,
  mesh: jax.sharding.Mesh,
  *,
  num_steps: int,
  reference_model: decoder.DecoderConfig | None = None,
) -> Program:
  """Builds the steps of a run; nothing is compiled yet.

  Args:
    config: The run.
    mesh: Devices; may be those of a machine that is not there.
    num_steps: Updates of the whole run, for the learning rate.
    reference_model: `config_lib.reference_model`; None for the policy's.

  Raises:
    ValueError: The mesh does not divide the model or the rows.
  """
  reference_model = reference_model or config.model
  check(config, mesh, reference_model=reference_model)
  optimizer, schedule = optim.make_optimizer(
    config.optimizer, num_steps=num_steps
  )
  objective = config_lib.make_objective(config.loss)
  params = decoder.abstract_params(config.model, mesh)
  replicated = NamedSharding(mesh, P())
  opt_state = _abstract_opt_state(optimizer, params, replicated)
  shardings = functools.partial(jax.tree.map, lambda x: x.sharding)
  if config.optimizer.host_offload:
    opt_state = _on_host(opt_state)
  state = steps.State(
    step=jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated),
    params=params,
    opt_state=opt_state,
  )
  reference = scored = None
  if not objective.is_sft:
    reference = decoder.abstract_params(reference_model, mesh)
    if config.reference.host_offload:
      reference = _on_host(reference)
  if config.reference.cache_dir is not None:
    reference, scored = None, reference
  batch_sharding = NamedSharding(mesh, P(None, sharding.ROW_AXES))
  inputs = (shardings(reference), batch_sharding, replicated)
  step = functools.partial(
    steps.train_step,
    config=config.model,
    reference_config=reference_model,
    objective=objective,
    optimizer=optimizer,
    schedule=schedule,
  )
  evaluate = functools.partial(
    steps.eval_step,
    config=config.model,
    reference_config=reference_model,
    objective=objective,
  )
  return Program(
    mesh=mesh,
    abstract_state=state,
    abstract_reference=reference,
    abstract_scored=scored,
    batch_sharding=batch_sharding,
    init_opt_state=jax.jit(
      optimizer.init,
      in_shardings=(shardings(params),),
      out_shardings=shardings(opt_state),
    ),
    train_step=jax.jit(
      step,
      in_shardings=(shardings(state), *inputs),
      out_shardings=(shardings(state), replicated),
      donate_argnums=0,
    ),
    eval_step=jax.jit(
      evaluate,
      in_shardings=(shardings(params), *inputs),
      out_shardings=replicated,
    ),
    score_step=scored
    and jax.jit(
      functools.partial(steps.score_step, config=reference_model),
      in_shardings=(shardings(scored), batch_sharding),
      out_shardings=replicated,
    ),
  )


def check(
  config: config_lib.Config,
  mesh: jax.sharding.Mesh,
  *,
  reference_model: decoder.DecoderConfig,
) -> None:
  """Raises ValueError if the mesh does not divide the models or the rows.

  Also where its devices cannot keep on their hosts what should be there.
  """
  for name in ("optimizer", "reference"):
    if getattr(config, name).host_offload:
      sharding.check_host_memory(mesh.devices.flat[0], f"{name}.host_offload")
  for model in dict.fromkeys((config.model, reference_model)):
    try:
      model.check_mesh(mesh)
      _check_length(config, model)
    except ValueError as error:
      if model == config.model:
        raise
      raise ValueError(f"Of the reference: {error}") from error
  num_shards = sharding.num_row_shards(mesh)
  if config.batch.rows_per_microbatch % num_shards:
    raise ValueError(
      f"batch.rows_per_microbatch ({config.batch.rows_per_microbatch}) must be "
      f"a multiple of mesh.data * mesh.fsdp ({num_shards}), so that every "
      "device has the same number of rows."
    )


def _check_length(config, model):
  scaling = model.rope_scaling
  limit = scaling.original_max_position_embeddings
  longest = config.data.max_length or config.batch.row_length
  is_short = scaling.rope_type == "longrope" and not scaling.use_long_factor
  if is_short and longest > limit:
    raise ValueError(
      f"Sequences may have up to {longest} tokens, but the short factors of "
      f"model.rope_scaling hold up to {limit}; set data.max_length to that, or "
      "model.rope_scaling.use_long_factor to True for sequences of all lengths."
    )


def use_compilation_cache(config: config_lib.Config) -> None:
  """Keeps what is compiled from now on where the config says, if it does."""
  path = config.run.compilation_cache_dir
  if path is not None:
    jax.config.update("jax_compilation_cache_dir", str(paths.of(path)))


def compile_step(
  step: jax.stages.Wrapped,
  program: Program,
  first: steps.State | steps.Params,
  batch: pairs_lib.PackedBatch,
  options: Mapping[str, Any] | None = None,
) -> jax.stages.Compiled:
  """Compiles a step of the program once, for all batches of one shape.

  Args:
    step: `program.train_step` or `program.eval_step`.
    program: The program.
    first: Abstract first argument: the state or the parameters.
    batch: A batch, or its shapes and dtypes.
    options: Of XLA, beyond its own choice.
  """
  batch = abstract_batch(program, batch)
  count = jax.ShapeDtypeStruct((), jnp.int32)
  with jax.set_mesh(program.mesh):
    lowered = step.lower(first, program.abstract_reference, batch, count)
    return _compiled(lowered, options)


def compile_score_step(
  program: Program,
  batch: pairs_lib.PackedBatch,
  options: Mapping[str, Any] | None = None,
) -> jax.stages.Compiled:
  """Compiles `program.score_step` for batches of one shape, of one microbatch.

  Args:
    program: One whose reference's log-probs come with the batch.
    batch: As of `compile_step`, of any number of microbatches.
    options: Likewise.
  """
  batch = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), batch
  )
  batch = _abstract(program, batch)
  with jax.set_mesh(program.mesh):
    lowered = program.score_step.lower(program.abstract_scored, batch)
    return _compiled(lowered, options)


def _compiled(
  lowered: jax.stages.Lowered, options: Mapping[str, Any] | None
) -> jax.stages.Compiled:
  """Compiles, and returns to the system what the compiler has freed.

  The C library keeps it for later: some 400 MB beside a small model.
  """
  compiled = lowered.compile(compiler_options=options and dict(options))
  if sys.platform == "linux":
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
      trim(0)
  return compiled


def abstract_batch(
  program: Program, batch: pairs_lib.PackedBatch
) -> pairs_lib.PackedBatch:
  """Shape, dtype and sharding of the arrays of a batch as steps take it."""
  if program.abstract_scored is not None:
    logps = jax.ShapeDtypeStruct(batch.answer_lengths.shape, jnp.float32)
    batch = batch._replace(reference_logps=logps)
  return _abstract(program, batch)


def _abstract(program, batch):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=program.batch_sharding
    ),
    batch,
  )


def local_rows(program: Program, num_rows: int) -> np.ndarray:
  """Which rows of a microbatch devices of this process hold, ascending.

  Args:
    program: The program.
    num_rows: Rows of a microbatch over all devices.
  """
  indices = program.batch_sharding.addressable_devices_indices_map(
    (1, num_rows)
  )
  rows = [np.arange(num_rows)[index[1]] for index in indices.values()]
  return np.unique(np.concatenate(rows))


def put_batch(
  program: Program,
  batch: pairs_lib.PackedBatch,
  *,
  num_rows: int | None = None,
) -> pairs_lib.PackedBatch:
  """A batch on the mesh.

  Args:
    program: The program.
    batch: NumPy arrays [microbatches, rows, ...] of the `local_rows`, or of all
      rows.
    num_rows: Rows of a microbatch over all devices; None if the batch has all.
  """
  if num_rows is None:
    num_rows = batch.tokens.shape[1]
    rows = np.arange(num_rows)
  else:
    rows = local_rows(program, num_rows)

  def put(x):
    def part(index):
      return x[:, np.searchsorted(rows, np.arange(num_rows)[index[1]])]

    shape = (x.shape[0], num_rows, *x.shape[2:])
    return jax.make_array_from_callback(shape, program.batch_sharding, part)

  return jax.tree.map(put, batch)


def _on_host(tree):
  return jax.tree.map(
    lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
    tree,
    sharding.on_host(tree),
  )


def _abstract_opt_state(
  optimizer: optax.GradientTransformation, params, replicated: NamedSharding
):
  """Moments are sharded like the parameters they have the shape of."""
  state = jax.eval_shape(optimizer.init, params)

  def place(leaf, param):
    # Adafactor's row and column statistics have other shapes and are small.
    is_like = leaf.shape == param.shape
    return jax.ShapeDtypeStruct(
      leaf.shape,
      leaf.dtype,
      sharding=param.sharding if is_like else replicated,
    )

  return optax.tree_utils.tree_map_params(
    optimizer,
    place,
    state,
    params,
    transform_non_params=lambda leaf: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=replicated
    ),
  )
