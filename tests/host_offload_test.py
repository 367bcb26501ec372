"""State and reference in host memory: the same run."""

import functools
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_runs

from dpop_jax import evaluate, inputs, optim, program, sharding, train

# Clipping looks at all gradients, and decay at the names of parameters.
OPTIMIZER = dict(
  optimizer__max_grad_norm=0.1, optimizer__weight_decay=0.1, run__num_steps=6
)
NO_EVALUATION = dict(data__num_eval_pairs=0, run__eval_every_steps=None)
OFFLOAD = dict(optimizer__host_offload=True, reference__host_offload=True)


def kinds(tree):
  """By path, the kind of memory of what is in `layers`, and of the rest."""
  found = {"layers": set(), "rest": set()}
  for path, x in jax.tree_util.tree_leaves_with_path(tree):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    is_matrix = "layers/" in name and not name.endswith(("scale", "bias"))
    found["layers" if is_matrix else "rest"].add(x.sharding.memory_kind)
  return found


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return tiny_runs.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def result(data, tmp_path_factory):
  """Of a run that keeps everything on the devices."""
  config = tiny_runs.make_config(data, **OPTIMIZER, **NO_EVALUATION)
  return train.train(config, str(tmp_path_factory.mktemp("run")))


def test_a_run_is_the_same_also_where_only_a_part_of_it_offloads(
  data, result, tmp_path, monkeypatch
):
  """Three steps with the state on hosts are saved, and three without follow."""
  workdir = str(tmp_path / "run")
  # Asked after every step.
  stop = mock.Mock(side_effect=[False, False, True])
  with monkeypatch.context() as patch:
    patch.setattr(train.checkpoints.Preemption, "requested", stop)
    config = tiny_runs.make_config(
      data, **OPTIMIZER, **OFFLOAD, **NO_EVALUATION
    )
    first = train.train(config, workdir)
    assert (first.step, first.is_complete) == (3, False)
  config = tiny_runs.make_config(
    data, **OPTIMIZER, **NO_EVALUATION, reference__host_offload=True
  )
  second = train.train(config, workdir)
  # A loop over layers is fused otherwise, which changes the last bits.
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  jax.tree.map(close, second.params, result.params)


def test_a_reference_on_hosts_scores_the_same_to_the_bit(data, tmp_path):
  found = []
  for is_offloaded in (False, True):
    config = tiny_runs.make_config(
      data, **OPTIMIZER, reference__host_offload=is_offloaded
    )
    mesh = sharding.make_mesh(config.mesh)
    made = program.make_program(config, mesh, num_steps=4)
    params = inputs.initial_params(config, mesh)
    reference = inputs.load_reference(config, mesh, initial=params)
    # Another policy than the reference, and the reference's arrays its own.
    policy = jax.tree.map(lambda x: 1.1 * x, params)
    pairs = inputs.load_data(config, str(tmp_path)).eval
    the_plan = evaluate.make_plan(pairs, config.batch)
    evaluator = evaluate.Evaluator(made, the_plan, config.batch)
    found.append(evaluator(policy, reference))
  assert found[0] == found[1]
  assert abs(found[0]["logratios/chosen"]) > 1e-3


def test_the_matrices_of_layers_are_on_hosts(data):
  config = tiny_runs.make_config(data, **OPTIMIZER, **OFFLOAD)
  mesh = sharding.make_mesh(config.mesh)
  made = program.make_program(config, mesh, num_steps=4)
  on_hosts = {"layers": {"pinned_host"}, "rest": {"device"}}
  params = inputs.initial_params(config, mesh)
  opt_state = made.init_opt_state(params)
  for state in (made.abstract_state.opt_state, opt_state):
    assert kinds(state) == on_hosts
  reference = inputs.load_reference(config, mesh, initial=params)
  for tree in (made.abstract_reference, reference):
    assert kinds(tree) == on_hosts
  assert kinds(params) == {"layers": {"device"}, "rest": {"device"}}


@pytest.mark.parametrize("name", ["adamw", "rmsprop"])
def test_an_update_is_the_same_and_its_state_stays_on_hosts(name):
  options = dict(name=name, peak_learning_rate=0.1, warmup_steps=2)
  options |= dict(max_grad_norm=1.0)
  if name == "adamw":
    options["weight_decay"] = 0.1
  make = lambda **more: optim.make_optimizer(
    optim.OptimizerConfig(**options, **more), num_steps=4
  )[0]
  plain, offloaded = make(), make(host_offload=True)
  keys = iter(jax.random.split(jax.random.key(0), 8))
  shapes = {
    "embedding": (8, 4),
    "layers": {"gate": {"kernel": (3, 4, 6)}, "norm": {"scale": (3, 4)}},
  }
  fill = lambda: jax.tree.map(
    lambda shape: jax.random.normal(next(keys), shape),
    shapes,
    is_leaf=lambda x: isinstance(x, tuple),
  )
  params, gradients = fill(), fill()
  state = plain.init(params)
  mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  state = jax.device_put(state, jax.tree.map(lambda _: place, state))
  held = jax.device_put(state, sharding.on_host(state))
  assert jax.tree.structure(offloaded.init(params)) == jax.tree.structure(held)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
  for _ in range(3):
    want, state = jax.jit(plain.update)(gradients, state, params)
    got, held = jax.jit(offloaded.update)(gradients, held, params)
    jax.tree.map(close, got, want)
    jax.tree.map(close, held, state)
    assert kinds(held)["layers"] == {"pinned_host"}
    params = optax.apply_updates(params, want)


def test_what_cannot_be_offloaded_is_refused(data):
  with pytest.raises(
    ValueError, match="optimizer.host_offload is set, but the"
  ):
    optim.OptimizerConfig(
      name="adafactor", peak_learning_rate=0.1, host_offload=True
    )
  with pytest.raises(
    ValueError, match="reference.host_offload is True, but lo"
  ):
    tiny_runs.make_config(data, loss__name="sft", reference__host_offload=True)
  device = types.SimpleNamespace(
    platform="abacus",
    addressable_memories=lambda: [types.SimpleNamespace(kind="device")],
  )
  with pytest.raises(
    ValueError, match="reference.host_offload is set, but the"
  ):
    sharding.check_host_memory(device, "reference.host_offload")


def test_outside_of_a_loop_nothing_is_fetched():
  x = jnp.ones(3)
  assert not sharding.is_on_host(x) and sharding.fetched(x) is x
