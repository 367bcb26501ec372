import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpop_jax import optim

# As the decoder has them: layers stacked, scales and biases being matrices.
PARAMS = {
  "layers": {
    "dense": {
      "kernel": jnp.array([[[2.0, -1.0]], [[0.5, 4.0]]]),
      "bias": jnp.array([[1.0, 1.0], [2.0, 2.0]]),
    },
    "norm": {"scale": jnp.array([[1.0, 1.0], [1.0, 3.0]])},
  },
}
GRADIENTS = jax.tree.map(lambda x: -0.25 * x, PARAMS)


def make_config(name="adamw", **options):
  return optim.OptimizerConfig(
    **{"name": name, "peak_learning_rate": 0.1} | options
  )


def first_update(config, gradients=GRADIENTS, params=PARAMS, num_steps=10):
  optimizer, _ = optim.make_optimizer(config, num_steps=num_steps)
  updates, _ = jax.jit(optimizer.update)(
    gradients, optimizer.init(params), params
  )
  return updates


def assert_trees_close(tree, expected):
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), tree, expected
  )


# After bias correction AdamW's moments are the gradient and its square:
# g / (|g| + eps).
def test_first_adamw_update_is_the_learning_rate_times_the_sign():
  updates = first_update(make_config())
  assert_trees_close(
    updates, jax.tree.map(lambda g: -0.1 * jnp.sign(g), GRADIENTS)
  )


def test_second_adamw_update():
  config = make_config(b1=0.5, b2=0.75, eps=1.0)
  optimizer, _ = optim.make_optimizer(config, num_steps=10)
  params, state = jnp.array([1.0]), None
  state = optimizer.init(params)
  _, state = optimizer.update(jnp.array([2.0]), state, params)
  updates, _ = optimizer.update(jnp.array([4.0]), state, params)
  # First moment .5 * (.5 * 2) + .5 * 4 = 2.5, over 1 - .5**2 = .75; second
  # .75 * (.25 * 4) + .25 * 16 = 4.75, over 1 - .75**2 = .4375.
  expected = -0.1 * (2.5 / 0.75) / (math.sqrt(4.75 / 0.4375) + 1.0)
  np.testing.assert_allclose(updates, [expected], rtol=1e-6)


def test_first_rmsprop_update_has_no_bias_correction():
  # The second moment is (1 - decay) g**2, hence g / (0.5 |g| + eps).
  config = make_config("rmsprop", decay=0.75, eps=0.5)
  updates = first_update(config, jnp.array([3.0]), jnp.array([1.0]))
  np.testing.assert_allclose(updates, [-0.1 * 3.0 / (1.5 + 0.5)], rtol=1e-6)


def test_rmsprop_is_by_default_that_of_the_dpo_authors():
  # PyTorch's: decay 0.99, and eps beside the root, where 1e-4 outweighs 1e-8.
  updates = first_update(
    make_config("rmsprop"), jnp.array([1e-4]), jnp.array([1.0])
  )
  np.testing.assert_allclose(
    updates, [-0.1 * 1e-4 / (0.1 * 1e-4 + 1e-8)], rtol=1e-5
  )


def test_first_adafactor_update_of_small_arrays_is_the_sign():
  # Nothing is factored, the decay at step 0 is 0, and the update has RMS 1.
  updates = first_update(make_config("adafactor"))
  assert_trees_close(
    updates, jax.tree.map(lambda g: -0.1 * jnp.sign(g), GRADIENTS)
  )


def test_adafactor_treats_each_of_stacked_layers_like_an_array_of_its_own():
  gradients = jax.random.normal(jax.random.key(0), (3, 128, 160))
  params = jnp.ones_like(gradients)
  optimizer, _ = optim.make_optimizer(make_config("adafactor"), num_steps=10)
  updates, state = optimizer.update(gradients, optimizer.init(params), params)
  factored = optax.tree.get(state, "FactoredState")
  assert factored.v_row.shape == (3, 128)
  assert factored.v_col.shape == (3, 160)
  assert factored.v.shape == (1,)

  # The paper's factored second moment: row means times column means over the
  # mean; then all layers are divided by their common RMS where it is above 1.
  squares = np.square(np.asarray(gradients, np.float64))
  rows = squares.mean(axis=2, keepdims=True)
  columns = squares.mean(axis=1, keepdims=True)
  moments = rows * columns / squares.mean(axis=(1, 2), keepdims=True)
  expected = gradients / np.sqrt(moments)
  expected /= max(1.0, math.sqrt(np.square(expected).mean()))
  np.testing.assert_allclose(updates, -0.1 * expected, rtol=1e-4)


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_weight_decay_is_scaled_by_the_learning_rate_and_spares_scales(name):
  plain = first_update(make_config(name, warmup_steps=1))
  decayed = first_update(make_config(name, warmup_steps=1, weight_decay=0.3))
  difference = jax.tree.map(jnp.subtract, decayed, plain)
  # The first of one warm-up step has half the learning rate, 0.05.
  expected = jax.tree.map(jnp.zeros_like, PARAMS)
  kernel = PARAMS["layers"]["dense"]["kernel"]
  expected["layers"]["dense"]["kernel"] = -0.05 * 0.3 * kernel
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, atol=1e-7),
    difference,
    expected,
  )


def test_gradients_are_clipped_by_their_norm_over_all_parameters():
  # Norm 5; with eps this large AdamW hardly rescales: g / (|g| + 1e6).
  gradients = {"a": jnp.array([3.0]), "b": {"c": jnp.array([4.0])}}
  params = jax.tree.map(jnp.ones_like, gradients)

  def update(max_grad_norm):
    config = make_config(
      peak_learning_rate=1e6, eps=1e6, max_grad_norm=max_grad_norm
    )
    return first_update(config, gradients, params)

  unclipped = {"a": [-3.0], "b": {"c": [-4.0]}}
  is_list = lambda x: isinstance(x, list)
  for max_grad_norm, share in ((None, 1.0), (10.0, 1.0), (1.0, 1 / 5)):
    expected = jax.tree.map(
      lambda x, share=share: share * np.array(x), unclipped, is_leaf=is_list
    )
    assert_trees_close(update(max_grad_norm), expected)


@pytest.mark.parametrize(
  "options, step, expected",
  [
    # The DPO paper: 150 steps of warm-up, and as in its code 1/151 to start.
    (dict(warmup_steps=150), 0, 1 / 151),
    (dict(warmup_steps=150), 75, 76 / 151),
    (dict(warmup_steps=150), 149, 150 / 151),
    (dict(warmup_steps=150), 150, 1.0),
    (dict(warmup_steps=150), 199, 1.0),
    (dict(), 0, 1.0),
    # From the peak at step 100 to 0 one step after the last.
    (dict(schedule="linear", warmup_steps=100), 50, 51 / 101),
    (dict(schedule="linear", warmup_steps=100), 100, 1.0),
    (dict(schedule="linear", warmup_steps=100), 150, 0.5),
    (dict(schedule="linear", warmup_steps=100), 199, 0.01),
    (dict(schedule="linear", warmup_steps=100), 200, 0.0),
    (dict(schedule="linear", warmup_steps=100), 999, 0.0),
    (dict(schedule="linear"), 0, 1.0),
    (dict(schedule="linear", end_learning_rate_fraction=0.2), 100, 0.6),
    (dict(schedule="linear", end_learning_rate_fraction=0.2), 200, 0.2),
    (dict(schedule="cosine"), 0, 1.0),
    (dict(schedule="cosine"), 50, (1 + math.sqrt(0.5)) / 2),
    (dict(schedule="cosine"), 100, 0.5),
    (dict(schedule="cosine", end_learning_rate_fraction=0.1), 100, 0.55),
    (dict(schedule="cosine", end_learning_rate_fraction=0.1), 200, 0.1),
  ],
)
def test_learning_rates_of_a_run_of_200_steps(options, step, expected):
  config = make_config(peak_learning_rate=1e-6, **options)
  _, schedule = optim.make_optimizer(config, num_steps=200)
  for compute in (schedule, jax.jit(schedule)):
    rate = compute(step)
    assert rate.dtype == jnp.float32
    np.testing.assert_allclose(rate, 1e-6 * expected, rtol=1e-5, atol=1e-13)


def test_updates_follow_the_schedule():
  config = make_config(schedule="linear", warmup_steps=2)
  optimizer, schedule = optim.make_optimizer(config, num_steps=6)
  params = jnp.array([1.0])
  state = optimizer.init(params)
  for step in range(6):
    updates, state = optimizer.update(params, state, params)
    # AdamW's direction is 1 as long as the gradient stays the same, but for
    # 1 - 0.999**step, which float32 rounds by 6e-8 / 1e-3 = 6e-5.
    np.testing.assert_allclose(updates, [-schedule(step)], rtol=1e-4)


@pytest.mark.parametrize("name", ["adamw", "rmsprop", "adafactor"])
def test_state_is_float32_and_keeps_its_types_and_shapes(name):
  config = make_config(name, max_grad_norm=1.0)
  optimizer, _ = optim.make_optimizer(config, num_steps=10)
  state = jax.eval_shape(optimizer.init, PARAMS)
  for leaf in jax.tree.leaves(state):
    assert leaf.dtype == (jnp.int32 if leaf.shape == () else jnp.float32)
  updates, new_state = jax.eval_shape(
    optimizer.update, GRADIENTS, state, PARAMS
  )
  as_types = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert as_types(new_state) == as_types(state)
  assert as_types(updates) == as_types(PARAMS)


@pytest.mark.parametrize(
  "name, moments", [("adamw", ["mu", "nu"]), ("rmsprop", ["nu"])]
)
def test_moments_are_trees_like_the_parameters(name, moments):
  optimizer, _ = optim.make_optimizer(make_config(name), num_steps=10)
  state = optimizer.init(PARAMS)
  for moment in moments:
    tree = optax.tree.get(state, moment)
    assert jax.tree.structure(tree) == jax.tree.structure(PARAMS)
    jax.tree.map(
      lambda x, y: np.testing.assert_equal(x.shape, y.shape), tree, PARAMS
    )


def test_low_precision_parameters_are_refused_by_name():
  optimizer, _ = optim.make_optimizer(make_config(), num_steps=10)
  params = {"head": {"kernel": jnp.zeros(2, jnp.bfloat16)}}
  with pytest.raises(ValueError, match="head/kernel is bfloat16"):
    optimizer.init(params)


def test_warm_up_beyond_the_run_is_refused():
  config = make_config(warmup_steps=10)
  optim.make_optimizer(config, num_steps=11)
  with pytest.raises(ValueError, match=r"optimizer\.warmup_steps \(10\)"):
    optim.make_optimizer(config, num_steps=10)


@pytest.mark.parametrize(
  "name, options",
  [
    ("adamw", {"decay": 0.9}),
    ("rmsprop", {"b1": 0.9}),
    ("rmsprop", {"b2": 0.9}),
    ("rmsprop", {"weight_decay": 0.0}),
    ("adafactor", {"b1": 0.9}),
    ("adafactor", {"b2": 0.9}),
    ("adafactor", {"decay": 0.9}),
    ("adafactor", {"eps": 1e-8}),
  ],
)
def test_options_that_would_be_ignored_are_refused(name, options):
  (option,) = options
  with pytest.raises(
    ValueError, match=rf"optimizer\.{option} is set, but {name}"
  ):
    make_config(name, **options)


def test_end_of_a_constant_schedule_is_refused():
  with pytest.raises(ValueError, match="end_learning_rate_fraction is set"):
    make_config(end_learning_rate_fraction=0.1)


@pytest.mark.parametrize(
  "options",
  [
    {"name": "adam"},
    {"schedule": "step"},
    {"peak_learning_rate": 0.0},
    {"peak_learning_rate": math.nan},
    {"peak_learning_rate": math.inf},
    {"warmup_steps": -1},
    {"schedule": "linear", "end_learning_rate_fraction": 1.5},
    {"max_grad_norm": 0.0},
    {"b1": 1.0},
    {"b2": -0.1},
    {"name": "rmsprop", "decay": 1.0},
    {"eps": 0.0},
    {"weight_decay": -0.1},
  ],
)
def test_values_out_of_range_are_refused_by_name(options):
  option = list(options)[-1]
  with pytest.raises(ValueError, match=rf"optimizer\.{option} must be"):
    make_config(**options)


def test_configs_are_frozen():
  with pytest.raises(dataclasses.FrozenInstanceError):
    make_config().name = "rmsprop"
