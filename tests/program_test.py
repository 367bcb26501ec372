"""Where a program puts what, and the meshes it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from dpop_jax import config as config_lib
from dpop_jax import optim, program, sharding
from dpop_jax.data import dataset, plan
from dpop_jax.models import decoder

# Large enough for Adafactor to factor the embedding.
MODEL = decoder.DecoderConfig(
  vocab_size=256,
  hidden_size=128,
  intermediate_size=64,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  tie_word_embeddings=True,
)


def make_config(*, loss="dpop", optimizer="adamw", model=MODEL, rows=8):
  hyper_parameters = dict(beta=0.1, dpop_lambda=5.0) if loss == "dpop" else {}
  return config_lib.Config(
    model=model,
    data=dataset.DataConfig(train="-", tokenizer="-"),
    batch=plan.BatchConfig(
      batch_size=8, row_length=32, rows_per_microbatch=rows
    ),
    loss=config_lib.LossConfig(name=loss, **hyper_parameters),
    optimizer=optim.OptimizerConfig(name=optimizer, peak_learning_rate=1e-3),
    run=config_lib.RunConfig(num_steps=4),
  )


@pytest.fixture(scope="module")
def mesh():
  return sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))


def make_program(mesh, **options):
  return program.make_program(make_config(**options), mesh, num_steps=4)


@pytest.mark.parametrize(
  ("optimizer", "moments"), [("adamw", ("mu", "nu")), ("rmsprop", ("nu",))]
)
def test_moments_lie_where_their_parameters_lie(optimizer, moments, mesh):
  state = make_program(mesh, optimizer=optimizer).abstract_state
  assert state.params["embedding"].sharding.spec == P("tensor", "fsdp")
  for name in moments:
    found = optax.tree_utils.tree_get(state.opt_state, name)
    is_same = jax.tree.map(
      lambda moment, param: (
        moment.sharding == param.sharding and moment.shape == param.shape
      ),
      found,
      state.params,
    )
    assert jax.tree.all(is_same), is_same


def test_factored_statistics_are_on_every_device(mesh):
  state = make_program(mesh, optimizer="adafactor").abstract_state
  get = lambda name: optax.tree_utils.tree_get(state.opt_state, name)
  row, column = get("v_row")["embedding"], get("v_col")["embedding"]
  assert {row.shape, column.shape} == {(256,), (128,)}
  for leaf in (row, column, get("v")["embedding"]):
    assert leaf.sharding.is_fully_replicated
  # What is too small to factor has a statistic of its own shape and place.
  gate = lambda tree: tree["layers"]["mlp"]["gate"]["kernel"]
  assert gate(get("v")).sharding == gate(state.params).sharding
  assert not gate(get("v")).sharding.is_fully_replicated


def test_the_rest_of_the_state_is_on_every_device(mesh):
  state = make_program(mesh).abstract_state
  count = optax.tree_utils.tree_get(
    state.opt_state, "count", filtering=lambda path, _: "Adam" in str(path)
  )
  for scalar in (state.step, count):
    assert scalar.shape == () and scalar.dtype == jnp.int32
    assert scalar.sharding.is_fully_replicated


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_optimizer_states_are_born_as_announced(optimizer, mesh):
  made = make_program(mesh, optimizer=optimizer)
  params = jax.tree.map(
    lambda x: jax.device_put(jnp.zeros(x.shape, x.dtype), x.sharding),
    made.abstract_state.params,
  )
  opt_state = made.init_opt_state(params)
  announced = made.abstract_state.opt_state
  assert jax.tree.structure(opt_state) == jax.tree.structure(announced)
  for got, want in zip(
    jax.tree.leaves(opt_state), jax.tree.leaves(announced), strict=True
  ):
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    assert got.sharding.is_equivalent_to(want.sharding, got.ndim)


def test_only_preferences_have_a_reference(mesh):
  made = make_program(mesh)
  assert made.abstract_reference == made.abstract_state.params
  assert make_program(mesh, loss="sft").abstract_reference is None


def test_rows_are_split_and_microbatches_are_not(mesh):
  made = make_program(mesh)
  pairs = dataset.TokenPairs(
    np.arange(1, 10, dtype=np.int32), np.array([[0, 3, 6, 9]])
  )
  the_plan = plan.Plan(
    pairs, make_config().batch, seed=0, num_steps=1, is_shuffled=False
  )
  batch = the_plan.step(0).batch
  placed = program.put_batch(made, batch)
  for got, want in zip(placed[:-1], batch[:-1], strict=True):
    np.testing.assert_array_equal(got, want)
    pieces = {piece.data.shape for piece in got.addressable_shards}
    assert pieces == {(1, 2, *want.shape[2:])}


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (
      dict(rows=6),
      r"batch.rows_per_microbatch \(6\) must be a multiple of "
      r"mesh.data \* mesh.fsdp \(4\)",
    ),
    (
      dict(model=dataclasses.replace(MODEL, vocab_size=255)),
      r"model.vocab_size \(255\) must be a multiple of mesh.tensor \(2\)",
    ),
    (
      dict(model=dataclasses.replace(MODEL, hidden_size=129, head_dim=32)),
      r"model.hidden_size \(129\) must be a multiple of mesh.fsdp \(2\)",
    ),
  ],
)
def test_a_mesh_that_does_not_divide_is_one_sentence(options, message, mesh):
  with pytest.raises(ValueError, match=message) as caught:
    make_program(mesh, **options)
  assert str(caught.value).endswith(".") and "\n" not in str(caught.value)
