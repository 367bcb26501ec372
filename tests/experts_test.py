"""The sparse MLP against all experts one by one, on one and eight devices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import plain
import pytest

from dpop_jax import sharding
from dpop_jax.models import decoder, experts

SPARSE = decoder.DecoderConfig(
  vocab_size=8,
  hidden_size=8,
  intermediate_size=12,
  num_hidden_layers=1,
  num_attention_heads=2,
  num_key_value_heads=2,
  num_experts=5,
  num_experts_per_tok=2,
)
CONFIGS = {
  "mixtral": SPARSE,
  "qwen3_moe": dataclasses.replace(
    SPARSE, norm_topk_prob=False, num_experts_per_tok=3, remat="dots"
  ),
  "one": dataclasses.replace(
    SPARSE, num_experts_per_tok=1, hidden_act="gelu", remat="full"
  ),
}
X = np.random.default_rng(0).normal(size=(8, 3, 8)).astype(np.float32)
WEIGHTS = np.random.default_rng(1).normal(size=X.shape).astype(np.float32)


def random_params(config):
  params = plain.random_params(config)["layers"]["mlp"]
  return jax.tree.map(lambda leaf: 3 * leaf[0], params)


def sparse(params, x, config):
  return experts.SparseMLP(config).apply({"params": params}, x)


def dense(params, x, config):
  return jax.vmap(lambda row: plain.mlp(row, params, config))(x)


@functools.partial(jax.jit, static_argnums=(0, 3))
def value_and_gradients(function, params, x, config):
  if config.remat != "none":
    policy = decoder.REMAT_POLICIES[config.remat]
    function = jax.checkpoint(function, policy=policy, static_argnums=2)
  out, pull = jax.vjp(lambda *inputs: function(*inputs, config), params, x)
  return out, pull(WEIGHTS.astype(out.dtype))


def assert_same(got, want):
  for (path, a), b in zip(
    jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True
  ):
    name = jax.tree_util.keystr(path)
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5, err_msg=name)


def on_mesh(params, config):
  """The mesh of eight devices, and the parameters where they belong."""
  mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
  shardings = decoder.param_shardings(config, mesh)["layers"]["mlp"]

  def put(leaf, whole):
    spec = jax.sharding.PartitionSpec(*whole.spec[1:])
    return jax.device_put(leaf, jax.sharding.NamedSharding(mesh, spec))

  return mesh, jax.tree.map(put, params, shardings)


@pytest.mark.parametrize("name", CONFIGS)
def test_value_and_gradients_are_those_of_a_loop_over_experts(name):
  config = CONFIGS[name]
  params = random_params(config)
  assert params["gate"]["kernel"].shape == (5, 8, 12)
  want = value_and_gradients(dense, params, X, config)
  assert_same(value_and_gradients(sparse, params, X, config), want)
  if name == "one":
    return  # One mesh with and one without remat are enough.
  mesh, sharded = on_mesh(params, config)
  for kernel in (sharded["gate"]["kernel"], sharded["down"]["kernel"]):
    # Split over fsdp and tensor.
    assert kernel.addressable_shards[0].data.size == kernel.size // 4
  with jax.set_mesh(mesh):
    assert_same(value_and_gradients(sparse, sharded, X, config), want)


def test_experts_without_tokens_and_with_all_of_them():
  params = random_params(SPARSE)
  # All tokens like experts 3 and 1 best.
  router = np.zeros((8, 5), np.float32)
  router[:, 3], router[:, 1] = 2.0, 1.0
  params["router"]["kernel"] = router
  x = np.abs(X)
  want = value_and_gradients(dense, params, x, SPARSE)
  got = value_and_gradients(sparse, params, x, SPARSE)
  assert_same(got, want)
  gate = np.abs(got[1][0]["gate"]["kernel"]).max(axis=(1, 2))
  np.testing.assert_array_equal(gate > 0, [False, True, False, True, False])


def test_zeros_are_not_nan():
  params = random_params(SPARSE)
  out, gradients = value_and_gradients(sparse, params, 0 * X, SPARSE)
  np.testing.assert_array_equal(out, 0.0)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_bfloat16_is_as_exact_as_in_the_loop():
  config = dataclasses.replace(SPARSE, dtype="bfloat16")
  params = random_params(SPARSE)
  x = jnp.asarray(X, jnp.bfloat16)
  run = jax.jit(lambda f, p, x, config: f(p, x, config), static_argnums=(0, 3))
  exact = run(dense, params, x.astype(jnp.float32), SPARSE)

  def error(function, params):
    out = run(function, params, x, config)
    assert out.dtype == jnp.bfloat16
    return np.sqrt(np.mean((np.asarray(out, np.float32) - exact) ** 2))

  slow = error(dense, params)
  assert 1e-3 < error(sparse, params) < 1.2 * slow
  mesh, sharded = on_mesh(params, config)
  with jax.set_mesh(mesh):
    # What the devices of the tensor axis add up is rounded once more.
    assert error(sparse, sharded) < 1.5 * slow


def test_gathered_weights_are_not_kept():
  params = random_params(SPARSE)
  mesh, sharded = on_mesh(params, SPARSE)
  total = lambda params, x: sparse(params, x, SPARSE).sum()
  with jax.set_mesh(mesh):
    program = str(jax.make_jaxpr(jax.grad(total, (0, 1)))(sharded, X))
  # Router, gate, up and down, once forward and once more backward.
  assert program.count("all_gather[") == 8


def test_experts_are_split_over_fsdp_and_tensor_but_not_by_expert():
  mesh, _ = on_mesh(random_params(SPARSE), SPARSE)
  found = decoder.param_shardings(SPARSE, mesh)["layers"]["mlp"]
  fsdp, tensor = sharding.FSDP, sharding.TENSOR
  for name, spec in (
    ("router", (None, fsdp, None)),
    ("gate", (None, None, fsdp, tensor)),
    ("up", (None, None, fsdp, tensor)),
    ("down", (None, None, tensor, fsdp)),
  ):
    wanted = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    assert found[name]["kernel"].is_equivalent_to(wanted, len(spec)), name
