"""The decoder against the slow one, and its weights on every mesh."""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import plain
import pytest
from jax.sharding import PartitionSpec as P

from dpop_jax import sharding
from dpop_jax.models import decoder, decoder_config

GROUPED = decoder.DecoderConfig(
  vocab_size=40,
  hidden_size=16,
  intermediate_size=24,
  num_hidden_layers=3,
  num_attention_heads=4,
  num_key_value_heads=2,
)
WIDE = dataclasses.replace(GROUPED, num_hidden_layers=2, head_dim=8)
SLIDING = (decoder_config.SLIDING, decoder_config.FULL)
# What families of models have, with values at which it matters in few tokens.
FAMILIES = {
  "bias": dict(
    attention_bias=True,
    attention_out_bias=True,
    mlp_bias=True,
    hidden_act="gelu",
    num_key_value_heads=1,
    head_dim=6,
    rope_theta=100.0,
    rms_norm_eps=0.1,
  ),
  "llama3": dict(
    num_key_value_heads=4,
    tie_word_embeddings=True,
    rope_theta=100.0,
    rope_scaling=decoder_config.RopeScaling(
      rope_type="llama3",
      factor=8.0,
      low_freq_factor=1.0,
      high_freq_factor=4.0,
      original_max_position_embeddings=64,
    ),
  ),
  "olmo2": dict(qk_norm="full", pre_norm=False, post_norm=True),
  "gemma2": dict(
    hidden_act="gelu_pytorch_tanh",
    rms_norm_unit_offset=True,
    post_norm=True,
    tie_word_embeddings=True,
    scale_embeddings=True,
    query_pre_attn_scalar=3.0,
    attn_logit_softcapping=0.7,
    final_logit_softcapping=1.5,
    sliding_window=4,
    layer_types=SLIDING,
  ),
  # Gemma 3 with frequencies of YaRN, so that amplitudes differ as well.
  "gemma3": dict(
    rms_norm_unit_offset=True,
    post_norm=True,
    qk_norm="head",
    sliding_window=3,
    layer_types=SLIDING,
    rope_theta=100.0,
    rope_scaling=decoder_config.RopeScaling(
      rope_type="yarn", factor=32.0, original_max_position_embeddings=16
    ),
    rope_local_base_freq=10.0,
  ),
  "phi3": dict(
    partial_rotary_factor=0.75,
    rope_scaling=decoder_config.RopeScaling(
      rope_type="longrope",
      short_factor=(1.0, 1.5, 3.0),
      long_factor=(1.0, 4.0, 9.0),
      original_max_position_embeddings=64,
      attention_factor=1.2,
    ),
  ),
  "mixtral": dict(num_experts=4, num_experts_per_tok=2, sliding_window=5),
  "qwen3_moe": dict(
    num_experts=5, num_experts_per_tok=2, norm_topk_prob=False, qk_norm="head"
  ),
}
CONFIGS = {"grouped": GROUPED} | {
  name: dataclasses.replace(WIDE, **changes)
  for name, changes in FAMILIES.items()
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
def run_plainly(params, tokens, *, config):
  logits = functools.partial(plain.sequence_logits, params, config)
  return jax.vmap(logits)(tokens)


def mesh_of(*shape):
  sizes = dict(zip(sharding.MESH_AXES, shape, strict=True))
  devices = jax.devices()[: math.prod(shape)]
  return sharding.make_mesh(sharding.MeshConfig(**sizes), devices)


class Forest(NamedTuple):
  """Two rows of prefix trees, 16 tokens long.

  Attributes:
    tokens: int32 [2, 16].
    positions: Likewise.
    visible_until: Likewise; 0 for padding.
    paths: For each leaf, its row and the places of the tokens above it.
  """

  tokens: np.ndarray
  positions: np.ndarray
  visible_until: np.ndarray
  paths: list[tuple[int, np.ndarray]]


def make_forest():
  # Each row: start and end of an edge, the end of its subtree, its parent.
  rows = (
    [(0, 5, 13, None), (5, 9, 9, 0), (9, 13, 13, 0)],
    [
      (0, 3, 15, None),
      (3, 6, 12, 0),
      (6, 8, 8, 1),
      (8, 12, 12, 1),
      (12, 15, 15, 0),
    ],
  )
  tokens = np.random.default_rng(3).integers(0, 40, (2, 16)).astype(np.int32)
  positions, until = np.zeros_like(tokens), np.zeros_like(tokens)
  paths = []
  for row, edges in enumerate(rows):
    places = []
    for start, end, subtree_end, parent in edges:
      above = [] if parent is None else places[parent]
      places.append([*above, *range(start, end)])
      positions[row, start:end] = len(above) + np.arange(end - start)
      until[row, start:end] = subtree_end
      if subtree_end == end:
        paths.append((row, np.array(places[-1])))
  return Forest(tokens, positions, until, paths)


FOREST = make_forest()
# Each path by itself; what stands behind it is padding.
PATHS = np.zeros((len(FOREST.paths), 12), np.int32)
for _number, (_row, _places) in enumerate(FOREST.paths):
  PATHS[_number, : len(_places)] = FOREST.tokens[_row, _places]


# TOKENS in the same shape, so that the slow way is compiled once.
SEQUENCES = np.resize(TOKENS, PATHS.shape)


def loss_of(logits, places):
  """Any function of the logits of a path that has a gradient everywhere."""
  weights = np.random.default_rng(4).normal(size=(12, 40)).astype(np.float32)
  return (logits * weights[: len(places)]).sum()


@functools.partial(jax.jit, static_argnames="config")
def run_forest(params, *, config):
  """Logits [2, 16, vocab_size] of FOREST."""
  hidden, _ = decoder.Decoder(config).apply(
    {"params": params}, *map(jnp.asarray, FOREST[:3])
  )
  return decoder.logits(params, hidden, config)


@pytest.mark.parametrize("name", CONFIGS)
def test_trees_give_the_logits_of_their_paths_one_by_one(name):
  config = CONFIGS[name]
  params = plain.random_params(config)
  assert ("unembedding" in params) != config.tie_word_embeddings
  got = run_forest(params, config=config)
  assert np.isfinite(got).all(), "padding"
  expected = run_plainly(params, PATHS, config=config)
  for (row, places), want in zip(FOREST.paths, expected, strict=True):
    np.testing.assert_allclose(got[row, places], want[: len(places)], atol=2e-5)


def test_trees_give_the_gradients_of_their_paths_on_any_mesh():
  config = dataclasses.replace(
    CONFIGS["gemma2"],
    qk_norm="full",
    attention_bias=True,
    num_experts=3,
    num_experts_per_tok=2,
  )
  params = plain.random_params(config)

  def of_forest(params):
    logits = run_forest(params, config=config)
    # Padding is not in it, but is computed, and must not spoil it.
    losses = [loss_of(logits[row, at], at) for row, at in FOREST.paths]
    return jnp.stack(losses).sum()

  def of_paths(params):
    logits = run_plainly(params, PATHS, config=config)
    losses = [
      loss_of(path_logits[: len(at)], at)
      for path_logits, (_, at) in zip(logits, FOREST.paths, strict=True)
    ]
    return jnp.stack(losses).sum()

  want = jax.jit(jax.grad(of_paths))(params)
  mesh = mesh_of(1, 2, 2)
  sharded = jax.device_put(params, decoder.param_shardings(config, mesh))
  got = jax.jit(jax.grad(of_forest))(params)
  with jax.set_mesh(mesh):
    got_on_mesh = jax.jit(jax.grad(of_forest))(sharded)
  for (path, b), a, on_mesh in zip(
    jax.tree.leaves_with_path(want),
    jax.tree.leaves(got),
    jax.tree.leaves(got_on_mesh),
    strict=True,
  ):
    name, largest = jax.tree_util.keystr(path), np.abs(b).max()
    assert largest > 1e-3, name
    for leaf in (a, on_mesh):
      np.testing.assert_allclose(
        leaf, b, rtol=1e-3, atol=2e-5 * largest, err_msg=name
      )


@pytest.mark.parametrize("name", CONFIGS)
def test_a_cache_gives_what_all_tokens_at_once_give(name):
  config = CONFIGS[name]
  params = plain.random_params(config)
  expected = run_plainly(params, SEQUENCES, config=config)

  @jax.jit
  def step(params, tokens, positions, cache):
    hidden, cache = decoder.Decoder(config).apply(
      {"params": params}, tokens, positions, cache=cache
    )
    return decoder.logits(params, hidden, config), cache

  cache = decoder.empty_cache(config, batch=2, length=12)
  heads = (config.num_key_value_heads, config.head_width)
  assert cache.keys.shape == (config.num_hidden_layers, 2, 12, *heads)
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


@pytest.mark.parametrize("name", ["grouped", "gemma2"])
def test_bfloat16_is_as_exact_as_in_the_slow_decoder(name):
  config = dataclasses.replace(CONFIGS[name], dtype="bfloat16")
  params = plain.random_params(config)
  exact = run_plainly(params, SEQUENCES, config=CONFIGS[name])[:2]
  error = lambda logits: np.sqrt(np.mean((logits - exact) ** 2))
  slow = run_plainly(params, SEQUENCES, config=config)[:2]
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


def test_parameters_are_born_sharded_and_the_same_on_every_mesh():
  config = dataclasses.replace(
    CONFIGS["bias"], num_key_value_heads=2, qk_norm="full"
  )
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
    (attention["query_norm"]["scale"], (None, None, None)),
    (attention["out"]["bias"], (None, None)),
    (mlp["up"]["bias"], (None, tensor)),
  ):
    wanted = jax.sharding.NamedSharding(mesh, P(*spec))
    assert array.sharding.is_equivalent_to(wanted, array.ndim), spec
    is_split = (fsdp in spec) + (tensor in spec)
    piece = array.addressable_shards[0].data
    assert piece.size == array.size // 2**is_split


def test_fresh_parameters_have_the_spread_that_is_asked_for():
  config = dataclasses.replace(CONFIGS["bias"], initializer_range=0.5)
  params = decoder.make_params(jax.random.key(0), config, mesh_of(1, 1, 1))
  for path, leaf in jax.tree.leaves_with_path(params):
    name = path[-1].key
    if name == "scale":
      np.testing.assert_array_equal(leaf, 1.0)
    elif name == "bias":
      np.testing.assert_array_equal(leaf, 0.0)
    else:
      # At least 192 draws: the estimate is off by 5 % (one sigma) at most.
      np.testing.assert_allclose(np.std(leaf), 0.5, rtol=0.2)
  # Layers are not copies of each other.
  gate = params["layers"]["mlp"]["gate"]["kernel"]
  assert np.abs(gate[0] - gate[1]).max() > 0.1
