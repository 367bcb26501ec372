"""Optimizers and learning rates, as the preference literature uses them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dpop_jax import sharding

# Step, from 0, -> learning rate of that step's update.
Schedule = Callable[[jax.typing.ArrayLike], jax.Array]

# Which options each optimizer has, and what they are unless set.
_OPTIONS = {
  "adamw": {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.0},
  "rmsprop": {"decay": 0.99, "eps": 1e-8},
  "adafactor": {"weight_decay": 0.0},
}
# Progress of the decay, from 0 to 1, -> share of the way from end to peak.
_SCHEDULES = {
  "constant": jnp.ones_like,
  "linear": lambda progress: 1.0 - progress,
  "cosine": lambda progress: 0.5 * (1.0 + jnp.cos(jnp.pi * progress)),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """One optimizer, its learning rate over time, and clipping.

  Options that are None take the default named here; one that the chosen
  optimizer or schedule does not have must stay None. The DPO paper's choice is
  `name="rmsprop", peak_learning_rate=1e-6, warmup_steps=150`.

  Attributes:
    name: "adamw"; "rmsprop", which is PyTorch's (no bias correction, so the
      first steps are up to 1 / sqrt(1 - decay) times the learning rate: warm
      up); or "adafactor", with factored second moments, no first moment,
      updates clipped to RMS 1, and an absolute learning rate (not scaled by the
      parameters).
    peak_learning_rate: Learning rate after warm-up.
    schedule: What follows warm-up: "constant", "linear" or "cosine" decay.
    warmup_steps: Steps of linear warm-up before the peak. It starts above 0:
      step t has (t + 1) / (warmup_steps + 1) of the peak.
    end_learning_rate_fraction: Share of the peak left after the last step (0).
    max_grad_norm: Clip the global norm of the gradient to this; None for never.
    b1: Decay of AdamW's first moment (0.9).
    b2: Decay of AdamW's second moment (0.999).
    decay: Decay of RMSprop's second moment (0.99).
    eps: Added to the root of AdamW's or RMSprop's second moment (1e-8).
    weight_decay: Decoupled, times the learning rate (0); AdamW and Adafactor.
      It spares parameters named `scale` or `bias`.
    host_offload: Keep the state of the layers' matrices in the memory of the
      devices' hosts; an update fetches and returns a layer's at a time. AdamW
      and RMSprop.

  Raises:
    ValueError: A value is out of range, or set where it would be ignored.
  """

  name: str
  peak_learning_rate: float
  schedule: str = "constant"
  warmup_steps: int = 0
  end_learning_rate_fraction: float | None = None
  max_grad_norm: float | None = None
  b1: float | None = None
  b2: float | None = None
  decay: float | None = None
  eps: float | None = None
  weight_decay: float | None = None
  host_offload: bool = False

  def __post_init__(self):
    _check_choice("name", self.name, _OPTIONS)
    _check_choice("schedule", self.schedule, _SCHEDULES)
    for option in ("b1", "b2", "decay", "eps", "weight_decay"):
      allowed = _OPTIONS[self.name]
      if getattr(self, option) is not None and option not in allowed:
        raise ValueError(
          f"optimizer.{option} is set, but {self.name} has no such option; it "
          f"has {', '.join(allowed)}. Leave optimizer.{option} at None."
        )
    if (
      self.schedule == "constant"
      and self.end_learning_rate_fraction is not None
    ):
      raise ValueError(
        "optimizer.end_learning_rate_fraction is set, but a constant schedule "
        "does not end lower. Leave it at None or choose linear or cosine."
      )
    if self.host_offload and self.name == "adafactor":
      raise ValueError(
        "optimizer.host_offload is set, but the state of adafactor is small "
        "and stays on the devices; leave it at False."
      )
    is_positive = lambda value: 0 < value < float("inf")
    is_share = lambda value: 0 <= value <= 1
    is_decay = lambda value: 0 <= value < 1
    is_count = lambda value: 0 <= value < float("inf")
    for option, is_valid, expected in (
      ("peak_learning_rate", is_positive, "positive"),
      ("warmup_steps", is_count, "0 or more"),
      ("end_learning_rate_fraction", is_share, "between 0 and 1"),
      ("max_grad_norm", is_positive, "positive, or None for no clipping"),
      ("b1", is_decay, "at least 0 and below 1"),
      ("b2", is_decay, "at least 0 and below 1"),
      ("decay", is_decay, "at least 0 and below 1"),
      ("eps", is_positive, "positive"),
      ("weight_decay", is_count, "0 or more"),
    ):
      value = getattr(self, option)
      if value is not None and not is_valid(value):
        raise ValueError(f"optimizer.{option} must be {expected}, got {value}.")


def make_optimizer(
  config: OptimizerConfig, *, num_steps: int
) -> tuple[optax.GradientTransformation, Schedule]:
  """Builds the optimizer of a run of `num_steps` updates.

  Parameters must be float32, and so is all of the state. Moments are trees like
  the parameters'. AdamW's and RMSprop's have the parameters' shapes. Adafactor
  factors an array whose two largest axes are both at least 128: `v_row` lacks
  the largest, `v_col` the second largest, and `v` is a dummy [1]; for other
  arrays it is the other way round. So stacked layers, an axis of fewer than
  128, keep statistics of their own; only the clipping of the update to RMS 1
  looks at all layers of an array together.

  Args:
    config: What to build.
    num_steps: Updates in the whole run; a decay ends there.

  Returns:
    The optimizer, and its learning rate at a step (from 0) for the log.

  Raises:
    ValueError: Warm-up would not end within the run. The optimizer's `init`
      raises it for parameters that are not float32.
  """
  if config.warmup_steps >= num_steps:
    raise ValueError(
      f"optimizer.warmup_steps ({config.warmup_steps}) must be below the "
      f"number of training steps ({num_steps}), or the peak learning rate is "
      "never reached. Warm up for fewer steps or train for more."
    )
  schedule = _make_schedule(config, num_steps)
  options = {
    option: default
    if getattr(config, option) is None
    else getattr(config, option)
    for option, default in _OPTIONS[config.name].items()
  }
  if config.name == "adamw":
    preconditioners = [
      _with_standard_promotion(
        optax.scale_by_adam(
          b1=options["b1"], b2=options["b2"], eps=options["eps"]
        )
      )
    ]
  elif config.name == "rmsprop":
    preconditioners = [
      optax.scale_by_rms(
        decay=options["decay"], eps=options["eps"], eps_in_sqrt=False
      )
    ]
  else:
    preconditioners = [
      optax.scale_by_factored_rms(),
      optax.clip_by_block_rms(1.0),
    ]
  before = [_refuse_low_precision()]
  if config.max_grad_norm is not None:
    before.append(optax.clip_by_global_norm(config.max_grad_norm))
  elementwise = preconditioners
  if options.get("weight_decay"):
    # Before the learning rate, which then scales it. optax.adafactor adds it
    # after, so that there a decay of 0.1 takes a tenth off at every step.
    elementwise.append(
      optax.add_decayed_weights(options["weight_decay"], mask=_is_decayed)
    )
  elementwise.append(optax.scale_by_learning_rate(schedule))
  if config.host_offload:
    return _with_state_on_hosts(before, elementwise), schedule
  return optax.chain(*before, *elementwise), schedule


def _with_state_on_hosts(
  before: list[optax.GradientTransformation],
  elementwise: list[optax.GradientTransformation],
) -> optax.GradientTransformation:
  """A chain of both, for a state that is in host memory between updates.

  Of stacked layers, the state of one at a time is fetched and put back. This is
  a loop, for what is not in one the TPU compiler fetches at once, before the
  forward pass.

  Args:
    before: Transformations of all gradients together, whose state is empty.
    elementwise: Those that treat each number by itself.
  """
  rest = optax.chain(*elementwise)

  def update(updates: Any, state: Any, params: Any = None) -> Any:
    own_states, first = state[len(before) :], state[: len(before)]
    result: Any = optax.chain(*before).update(updates, first, params)
    updates, first = result
    treedef = jax.tree.structure(updates)
    is_tree = lambda x: jax.tree.structure(x) == treedef
    nodes, outer = jax.tree.flatten(own_states, is_leaf=is_tree)
    columns = [jax.tree.leaves(x) if is_tree(x) else None for x in nodes]
    new_updates: list[Any] = []
    new_columns: list[list[Any]] = [[] for _ in nodes]
    for i, (path, gradient) in enumerate(
      jax.tree_util.tree_leaves_with_path(updates)
    ):
      # Its name says whether weights decay.
      name = jax.tree_util.keystr(path[-1:], simple=True)

      def run(gradient, held, param, name=name):
        trees = [
          node if column is None else {name: x}
          for node, column, x in zip(nodes, columns, held, strict=True)
        ]
        result: Any = rest.update(
          {name: gradient}, outer.unflatten(trees), {name: param}
        )
        return result[0][name], jax.tree.leaves(result[1])

      held = [column and column[i] for column in columns]
      param = jax.tree.leaves(params)[i]
      new_update, held = _update_by_layers(run, gradient, held, param)
      new_updates.append(new_update)
      for column, x in zip(new_columns, held, strict=True):
        column.append(x)
    nodes = [
      # Step counts: of a parameter that is not in a loop.
      next(x for x in new if x is not None)
      if column is None
      else treedef.unflatten(new)
      for column, new in zip(columns, new_columns, strict=True)
    ]
    after: Any = outer.unflatten(nodes)
    return treedef.unflatten(new_updates), (*first, *after)

  return optax.GradientTransformation(
    optax.chain(*before, *elementwise).init, update
  )


def _update_by_layers(run, gradient, held, param):
  """`run` with one layer's state after the other, if it is on hosts."""
  if not any(x is not None and sharding.is_on_host(x) for x in held):
    return run(gradient, held, param)

  def layer(i, carry):
    gradient, held = carry
    take = lambda x: jax.lax.dynamic_slice_in_dim(x, i, 1)
    fetched = [x if x is None else sharding.fetched(take(x)) for x in held]
    result, after = run(take(gradient), fetched, take(param))
    put = lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, i, 0)
    return put(gradient, result), [
      old if old is None else put(old, sharding.put_back(new))
      for new, old in zip(after, held, strict=True)
    ]

  return jax.lax.fori_loop(0, gradient.shape[0], layer, (gradient, held))


def _make_schedule(config: OptimizerConfig, num_steps: int) -> Schedule:
  end = config.end_learning_rate_fraction or 0.0
  shape = _SCHEDULES[config.schedule]

  def schedule(step: jax.typing.ArrayLike) -> jax.Array:
    step = jnp.asarray(step).astype(jnp.float32)
    # As in the DPO authors' code: a first step of rate 0 would be wasted.
    warmup = jnp.minimum(1.0, (step + 1.0) / (config.warmup_steps + 1))
    # The decay reaches its end one step after the last, for the same reason.
    progress = (step - config.warmup_steps) / (num_steps - config.warmup_steps)
    decay = end + (1.0 - end) * shape(jnp.clip(progress, 0.0, 1.0))
    return config.peak_learning_rate * warmup * decay

  return schedule


def _is_decayed(params: Any) -> Any:
  """Which parameters weight decay acts on, as a tree of bools."""

  # By name, not by number of axes: layers are stacked, so that the scales of
  # all norms together are a matrix.
  def is_decayed(path, _):
    name = jax.tree_util.keystr(path[-1:], simple=True)
    return name not in ("scale", "bias")

  return jax.tree_util.tree_map_with_path(is_decayed, params)


def _refuse_low_precision() -> optax.GradientTransformation:
  """Changes nothing, but insists on float32 parameters."""

  def init(params):
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
      if leaf.dtype != jnp.float32:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        raise ValueError(
          f"The optimizer needs float32 parameters, but {name} is "
          f"{leaf.dtype}, where an update of 1e-6 is rounded away. Keep "
          "parameters in float32 and let the model compute in less."
        )
    return optax.EmptyState()

  return optax.GradientTransformation(
    init, lambda updates, state, params=None: (updates, state)
  )


def _with_standard_promotion(
  transformation: optax.GradientTransformation,
) -> optax.GradientTransformation:
  """Lets Optax's Adam raise a float to an integer step under strict rules."""

  def update(updates, state, params=None):
    with jax.numpy_dtype_promotion("standard"):
      return transformation.update(updates, state, params)

  return optax.GradientTransformation(transformation.init, update)


def _check_choice(option: str, value: str, choices: Any) -> None:
  if value not in choices:
    raise ValueError(
      f"optimizer.{option} must be one of {', '.join(choices)}, got {value!r}."
    )
