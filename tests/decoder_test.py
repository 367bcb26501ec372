"""The decoder against the slow one, and its weights on every mesh."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import plain
import pytest
from jax.sharding import PartitionSpec as P

from dpop_jax import sharding
from dpop_jax.models import decoder, embeddings

GROUPED = decoder.DecoderConfig(
  vocab_size=40,
  hidden_size=16,
  intermediate_size=24,
  num_hidden_layers=3,
  num_attention_heads=4,
  num_key_value_heads=2,
)
CONFIGS = {
  "grouped": GROUPED,
  # Values that differ from the defaults, so that ignoring one would show.
  "bias": dataclasses.replace(
    GROUPED,
    attention_bias=True,
    num_key_value_heads=1,
    head_dim=6,
    rope_theta=100.0,
    rms_norm_eps=0.1,
  ),
  "tied": dataclasses.replace(
    GROUPED, tie_word_embeddings=True, num_key_value_heads=4
  ),
}
TOKENS = np.random.default_rng(0).integers(0, 40, (2, 12)).astype(np.int32)
POSITIONS = np.tile(np.arange(12, dtype=np.int32), (2, 1))


@functools.partial(jax.jit, static_argnames="config")
def run(params, positions, *, config):
  """float32 logits [2, 12, vocab_size] of TOKENS as two causal rows."""
  until = jnp.full_like(positions, 12)
  hidden, cache = decoder.Decoder(config).apply(
    {"params": params}, jnp.asarray(TOKENS), positions, until
  )
  assert cache is None
  assert hidden.dtype == config.dtype
  return decoder.logits(params, hidden, config)


@functools.partial(jax.jit, static_argnames="config")
def run_plainly(params, *, config):
  logits = functools.partial(plain.sequence_logits, params, config)
  return jax.vmap(logits)(TOKENS)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_those_of_the_slow_decoder(name):
  config = CONFIGS[name]
  params = plain.random_params(config)
  assert ("unembedding" in params) == (name != "tied")
  assert ("bias" in params["layers"]["attention"]["key"]) == (name == "bias")
  np.testing.assert_allclose(
    run(params, POSITIONS, config=config),
    run_plainly(params, config=config),
    atol=2e-5,
  )


def test_bfloat16_is_as_exact_as_in_the_slow_decoder():
  config = dataclasses.replace(GROUPED, dtype="bfloat16")
  params = plain.random_params(GROUPED)
  exact = run_plainly(params, config=GROUPED)
  error = lambda logits: np.sqrt(np.mean((logits - exact) ** 2))
  slow = run_plainly(params, config=config)
  assert error(slow) > 1e-3, "bfloat16 was not used"
  assert error(run(params, POSITIONS, config=config)) < 1.5 * error(slow)


def test_only_distances_between_positions_matter():
  params = plain.random_params(GROUPED)
  logits = run(params, POSITIONS, config=GROUPED)
  np.testing.assert_allclose(
    run(params, POSITIONS + 100, config=GROUPED), logits, atol=1e-4
  )
  stretched = run(params, 2 * POSITIONS, config=GROUPED)
  assert np.abs(stretched - logits).max() > 1e-2


def test_rotation_turns_each_pair_of_dimensions_by_its_own_angle():
  # Dimensions 0 and 2 form a pair that turns by 1 a position, 1 and 3 one that
  # turns by theta ** (-1 / 2) = 0.1 for theta = 100.
  x = jnp.array([1.0, 10.0, 2.0, 20.0])[None, None, None]
  (rotated,) = embeddings.rotate(x, jnp.array([[3]]), 100.0)[0, 0]
  cos, sin = math.cos, math.sin
  expected = [
    1 * cos(3) - 2 * sin(3),
    10 * cos(0.3) - 20 * sin(0.3),
    2 * cos(3) + 1 * sin(3),
    20 * cos(0.3) + 10 * sin(0.3),
  ]
  np.testing.assert_allclose(rotated, expected, rtol=1e-5)


def test_a_rotation_keeps_bfloat16():
  x = jnp.ones((1, 1, 1, 4), jnp.bfloat16)
  assert embeddings.rotate(x, jnp.array([[7]]), 1e4).dtype == jnp.bfloat16


def test_what_is_kept_for_the_backward_pass_changes_no_gradient():
  weights = np.random.default_rng(1).normal(size=(2, 12, 40))
  weights = weights.astype(np.float32)
  params = plain.random_params(GROUPED)

  def loss(params, config):
    return (run(params, POSITIONS, config=config) * weights).sum()

  def compiled(remat):
    config = dataclasses.replace(GROUPED, remat=remat)
    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    return gradient.lower(params, config).compile()

  programs = {remat: compiled(remat) for remat in decoder.REMAT_POLICIES}
  expected = programs["none"](params)
  for remat in ("dots", "full"):
    for got, want in zip(
      jax.tree.leaves(programs[remat](params)),
      jax.tree.leaves(expected),
      strict=True,
    ):
      np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
  # A product of a remat block with weights runs once more: 3 passes become 4.
  flops = {r: p.cost_analysis()["flops"] for r, p in programs.items()}
  assert flops["full"] > flops["dots"] > flops["none"], flops


def test_a_cache_gives_what_all_tokens_at_once_give():
  params = plain.random_params(GROUPED)
  expected = run(params, POSITIONS, config=GROUPED)

  @jax.jit
  def step(params, tokens, positions, cache):
    hidden, cache = decoder.Decoder(GROUPED).apply(
      {"params": params}, tokens, positions, cache=cache
    )
    return decoder.logits(params, hidden, GROUPED), cache

  cache = decoder.empty_cache(GROUPED, batch=2, length=12)
  assert cache.keys.shape == (3, 2, 12, 2, 4)
  # Row 1 is two tokens behind row 0: what is outside the cache is not written.
  first = np.array([[0, 1, 2, 3], [0, 1, 99, 99]])
  for index in [first, *([[i], [i - 2]] for i in range(4, 12))]:
    index = np.asarray(index, np.int32)
    tokens = np.take_along_axis(TOKENS, np.minimum(index, 11), axis=1)
    logits, cache = step(params, tokens, index, cache)
    for row in range(2):
      for place, position in enumerate(index[row]):
        if position < 12:
          np.testing.assert_allclose(
            logits[row, place], expected[row, position], atol=2e-5
          )


def test_either_trees_or_a_cache():
  apply = functools.partial(
    decoder.Decoder(GROUPED).apply,
    {"params": {}},
    jnp.asarray(TOKENS),
    jnp.asarray(POSITIONS),
  )
  cache = decoder.empty_cache(GROUPED, batch=2, length=12)
  for arguments in ((), (jnp.asarray(POSITIONS + 1), cache)):
    with pytest.raises(ValueError, match="either visible_until or a cache"):
      apply(*arguments)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(vocab_size=0), "model.vocab_size must be positive, got 0"),
    (dict(rope_theta=-1.0), "model.rope_theta must be positive, got -1.0"),
    (
      dict(num_key_value_heads=3),
      r"model.num_attention_heads \(4\) must be a multiple of "
      r"model.num_key_value_heads \(3\)",
    ),
    (
      dict(hidden_size=18),
      r"model.hidden_size \(18\) must be a multiple of "
      r"model.num_attention_heads \(4\); otherwise set model.head_dim",
    ),
    (dict(head_dim=0), "model.head_dim must be positive, got 0"),
    (dict(head_dim=5), "model.head_dim must be even .* got 5"),
    (dict(hidden_size=20), "model.head_dim must be even .* got 5"),
    (dict(dtype="float16"), "model.dtype must be one of .* got 'float16'"),
    (dict(param_dtype="int8"), "model.param_dtype must be one of .* 'int8'"),
    (dict(remat="some"), "model.remat must be one of .*dots.* got 'some'"),
  ],
)
def test_a_bad_config_names_its_key(changes, message):
  with pytest.raises(ValueError, match=message) as caught:
    dataclasses.replace(GROUPED, **changes)
  assert "\n" not in str(caught.value)


def mesh_of(*shape):
  sizes = dict(zip(sharding.MESH_AXES, shape, strict=True))
  devices = jax.devices()[: math.prod(shape)]
  return sharding.make_mesh(sharding.MeshConfig(**sizes), devices)


@pytest.mark.parametrize(
  ("shape", "changes", "message"),
  [
    (
      (1, 1, 8),
      {},
      r"model.num_key_value_heads \(2\) must be a multiple of "
      r"mesh.tensor \(8\)",
    ),
    (
      (1, 8, 1),
      dict(hidden_size=20, head_dim=4),
      r"model.hidden_size \(20\) must be a multiple of mesh.fsdp \(8\)",
    ),
    ((4, 1, 2), dict(vocab_size=41), r"model.vocab_size \(41\) .* mesh.tensor"),
    (
      (4, 1, 2),
      dict(intermediate_size=25),
      r"model.intermediate_size \(25\) .* mesh.tensor \(2\)",
    ),
  ],
)
def test_a_mesh_that_does_not_divide_the_model_is_refused(
  shape, changes, message
):
  mesh = mesh_of(*shape)
  config = dataclasses.replace(GROUPED, **changes)
  with pytest.raises(ValueError, match=message):
    config.check_mesh(mesh)
  mesh_of(1, 1, 1)
  config.check_mesh(mesh_of(1, 1, 1))


def test_parameters_are_born_sharded_and_the_same_on_every_mesh():
  config = dataclasses.replace(CONFIGS["bias"], num_key_value_heads=2)
  make = functools.partial(decoder.make_params, jax.random.key(0), config)
  expected = make(mesh_of(1, 1, 1))
  mesh = mesh_of(2, 2, 2)
  params = make(mesh)
  for (path, got), want, abstract in zip(
    jax.tree.leaves_with_path(params),
    jax.tree.leaves(expected),
    jax.tree.leaves(decoder.abstract_params(config, mesh)),
    strict=True,
  ):
    name = jax.tree_util.keystr(path)
    np.testing.assert_array_equal(got, want, err_msg=name)
    assert got.sharding == abstract.sharding, name
    assert (got.shape, got.dtype) == (abstract.shape, abstract.dtype), name
  layers = params["layers"]
  attention, mlp = layers["attention"], layers["mlp"]
  fsdp, tensor = sharding.FSDP, sharding.TENSOR
  for array, spec in (
    (params["embedding"], (tensor, fsdp)),
    (params["unembedding"], (tensor, fsdp)),
    (attention["query"]["kernel"], (None, fsdp, tensor, None)),
    (attention["key"]["kernel"], (None, fsdp, tensor, None)),
    (attention["value"]["bias"], (None, tensor, None)),
    (attention["out"]["kernel"], (None, tensor, None, fsdp)),
    (mlp["gate"]["kernel"], (None, fsdp, tensor)),
    (mlp["down"]["kernel"], (None, tensor, fsdp)),
    (layers["mlp_norm"]["scale"], (None, None)),
  ):
    wanted = jax.sharding.NamedSharding(mesh, P(*spec))
    assert array.sharding.is_equivalent_to(wanted, array.ndim), spec
    is_split = (fsdp in spec) + (tensor in spec)
    piece = array.addressable_shards[0].data
    assert piece.size == array.size // 2**is_split


def test_fresh_parameters_have_the_spread_that_is_asked_for():
  config = dataclasses.replace(
    CONFIGS["bias"], num_key_value_heads=2, initializer_range=0.5
  )
  params = decoder.make_params(jax.random.key(0), config, mesh_of(1, 1, 1))
  for path, leaf in jax.tree.leaves_with_path(params):
    name = path[-1].key
    if name == "scale":
      np.testing.assert_array_equal(leaf, 1.0)
    elif name == "bias":
      np.testing.assert_array_equal(leaf, 0.0)
    else:
      # At least 288 draws: the estimate is off by 4 % (one sigma) at most.
      np.testing.assert_allclose(np.std(leaf), 0.5, rtol=0.15)
  # Layers are not copies of each other.
  gate = params["layers"]["mlp"]["gate"]["kernel"]
  assert np.abs(gate[0] - gate[1]).max() > 0.1
