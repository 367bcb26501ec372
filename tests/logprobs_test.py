"""Packed forests against one sequence at a time with full logits."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import plain
import pytest
from jax.sharding import PartitionSpec as P

from dpop_jax import logprobs, sharding, steps
from dpop_jax import pairs as pairs_lib
from dpop_jax.data import forests, packing
from dpop_jax.models import decoder

CONFIG = decoder.DecoderConfig(
  vocab_size=40,
  hidden_size=32,
  intermediate_size=48,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
)


def token_pair(prompt, chosen, rejected=()):
  return pairs_lib.TokenPair(
    *(np.array(ids, np.int32) for ids in (prompt, chosen, rejected))
  )


def random_pairs(seed):
  """Different prompts; shared prompts; shared prompts and chosen answers."""
  generator = np.random.default_rng(seed)
  draw = lambda low, high: generator.integers(
    2, 40, generator.integers(low, high)
  ).tolist()
  pairs = []
  for _ in range(3):
    prompt, chosen = [1, *draw(1, 12)], draw(2, 9)
    edited = [*chosen]
    edited[int(generator.integers(len(edited)))] = 1
    pairs += [
      token_pair(prompt, chosen, edited),
      token_pair(prompt, chosen, draw(1, 9)),
      token_pair(prompt, draw(1, 5), draw(1, 5)),
    ]
  return pairs


FORESTS = {
  "random": random_pairs(0),
  "random with other shapes": random_pairs(1),
  "one-token branches": [token_pair([1, 2], [3], [4])],
  "no common prefix of the answers": [token_pair([1], [3, 4, 5], [6, 7])],
  "an answer that begins the other": [token_pair([1, 2], [3, 4], [3, 4, 5])],
  "a prompt that reaches into an answer": [
    token_pair([1, *range(2, 22)], [30, 31], [32]),
    token_pair([1, *range(2, 20)], [20, 21, 30, 31], [20, 33]),
  ],
  "supervised": [token_pair([1, 2], [3, 4]), token_pair([1], [5])],
}


# One shape for all forests, so that each function compiles once.
NUM_PAIRS, LENGTH = 9, 64


def packed(pairs):
  groups, sizes = forests.group_into_trees(pairs, row_length=LENGTH)
  rows = [
    [forests.build_tree([pairs[i] for i in groups[g]], groups[g]) for g in row]
    for row in packing.pack(sizes, LENGTH)
  ]
  assert len(rows) <= 5
  capacity = packing.Capacity(LENGTH, scores=60, links=40, pairs=NUM_PAIRS)
  return packing.pack_rows([*rows, *[[]] * (5 - len(rows))], capacity)


def forest_logps(params, config, rows):
  """[pairs, 2] in the order of the data set; 0 for pairs that are not there."""
  logps = steps.region_logps(params, rows, config).sum(axis=-1)
  ids = jnp.where(rows.pair_ids < 0, NUM_PAIRS, rows.pair_ids)
  ordered = jnp.zeros((NUM_PAIRS, 2))
  return ordered.at[ids].set(logps, mode="drop")


@functools.partial(jax.jit, static_argnames=("logps_of", "config"))
def value_and_gradient(logps_of, params, config, batch, weights):
  """Log-probs [pairs, 2], and the gradient of their weighted sum."""

  def weighted(params):
    logps = logps_of(params, config, batch)
    return (logps * weights).sum(), logps

  gradient, logps = jax.grad(weighted, has_aux=True)(params)
  return logps, gradient


def assert_trees_close(actual, expected, tolerance):
  """Each array within `tolerance` of its largest expected entry."""
  for path, want in jax.tree.leaves_with_path(expected):
    got = functools.reduce(lambda tree, key: tree[key.key], path, actual)
    scale = np.abs(want).max() + 1e-6
    np.testing.assert_allclose(
      np.asarray(got) / scale,
      np.asarray(want) / scale,
      atol=tolerance,
      err_msg=jax.tree_util.keystr(path),
    )


@pytest.mark.parametrize(
  ("name", "is_tied"), [*((name, False) for name in FORESTS), ("random", True)]
)
def test_packed_forests_score_and_differentiate_as_single_sequences(
  name, is_tied
):
  config = dataclasses.replace(
    CONFIG, tie_word_embeddings=is_tied, attention_bias=is_tied
  )
  pairs, params = FORESTS[name], plain.random_params(config)
  # Sums of both signs, as in a gradient of preferences.
  weights = jax.random.normal(jax.random.key(1), (NUM_PAIRS, 2))
  logps, gradient = value_and_gradient(
    forest_logps, params, config, packed(pairs), weights
  )
  expected, expected_gradient = value_and_gradient(
    plain.pairs_logps,
    params,
    config,
    plain.sequences(pairs, LENGTH, NUM_PAIRS),
    weights,
  )
  is_answer = [[True, len(pair.rejected) > 0] for pair in pairs]
  assert ((expected[: len(pairs)] < 0) == np.array(is_answer)).all()
  # float32 sums of up to 30 terms, in another order.
  np.testing.assert_allclose(logps, expected, rtol=2e-6, atol=2e-5)
  assert_trees_close(gradient, expected_gradient, 2e-5)


def test_bfloat16_forests_agree_as_far_as_bfloat16_goes():
  config = dataclasses.replace(CONFIG, dtype="bfloat16")
  pairs, params = FORESTS["random"], plain.random_params(config)
  ones = jnp.ones((NUM_PAIRS, 2))
  sequences = plain.sequences(pairs, LENGTH, NUM_PAIRS)
  fast, fast_gradient = value_and_gradient(
    forest_logps, params, config, packed(pairs), ones
  )
  slow, _ = value_and_gradient(
    plain.pairs_logps, params, config, sequences, ones
  )
  exact, exact_gradient = value_and_gradient(
    plain.pairs_logps, params, CONFIG, sequences, ones
  )
  # Both round at every layer, in another order: errors of the same size.
  error = lambda logps: np.sqrt(np.mean((logps - exact) ** 2))
  assert error(slow) > 1e-3, "bfloat16 was not used"
  assert error(fast) < 2 * error(slow)
  for path, want in jax.tree.leaves_with_path(exact_gradient):
    got = functools.reduce(lambda tree, key: tree[key.key], path, fast_gradient)
    cosine = jnp.vdot(got, want) / jnp.linalg.norm(got) / jnp.linalg.norm(want)
    assert cosine > 0.999, jax.tree_util.keystr(path)


def naive_token_logps(
  hidden, unembedding, positions, targets, counts, softcap=None
):
  taken = jnp.take_along_axis(hidden, positions[..., None], axis=1)
  logits = jnp.einsum("rsd,vd->rsv", taken, unembedding)
  if softcap is not None:
    logits = softcap * jnp.tanh(logits / softcap)
  logps = jnp.take_along_axis(
    jax.nn.log_softmax(logits), targets[..., None], axis=-1
  )[..., 0]
  scores = positions.shape[1]
  return jnp.where(jnp.arange(scores)[None] < counts[:, None], logps, 0.0)


def head_inputs(rows=8, length=12, hidden=16, vocab=24, scores=10):
  keys = jax.random.split(jax.random.key(0), 5)
  return (
    jax.random.normal(keys[0], (rows, length, hidden)),
    jax.random.normal(keys[1], (vocab, hidden)),
    jax.random.randint(keys[2], (rows, scores), 0, length),
    jax.random.randint(keys[3], (rows, scores), 0, vocab),
    jax.random.randint(keys[4], (rows,), 0, scores + 1),
  )


# Logits are about 4 in size, so that a soft cap of 5 bends them.
@pytest.mark.parametrize(
  # Of 24 tokens, tiles of 8 are whole, and the last one of 5 goes back by 1.
  ("chunk_size", "tile_size", "shape", "softcap"),
  [(1, 24, None, None), (7, 5, None, None), (16, 8, None, None)]
  + [(1000, 1000, None, None), (7, 24, (1, 1, 1), None)]
  + [(7, 2, (1, 1, 8), None), (7, 5, (1, 8, 1), None)]
  + [(7, 5, (2, 2, 2), None), (7, 5, (2, 2, 2), 5.0), (7, 5, None, 5.0)],
)
@pytest.mark.parametrize("kept_bytes", [0, 2**20], ids=["again", "kept"])
def test_chunks_tiles_and_shards_of_the_head_change_nothing(
  chunk_size, tile_size, shape, softcap, kept_bytes
):
  inputs = head_inputs()
  weights = jax.random.normal(jax.random.key(9), inputs[3].shape)

  def run(function):
    def total(hidden, unembedding):
      logps = function(hidden, unembedding, *inputs[2:])
      return (logps * weights).sum(), logps

    gradient = jax.grad(total, argnums=(0, 1), has_aux=True)
    return jax.jit(gradient)(*inputs[:2])

  fast = functools.partial(
    logprobs.token_logps,
    softcap=softcap,
    chunk_size=chunk_size,
    tile_size=tile_size,
    kept_bytes=kept_bytes,
  )
  if shape is None:
    gradients, logps = run(fast)
  else:
    devices = jax.devices()[: int(np.prod(shape))]
    mesh = sharding.make_mesh(
      sharding.MeshConfig(**dict(zip(sharding.MESH_AXES, shape, strict=True))),
      devices,
    )
    inputs = jax.device_put(inputs, jax.sharding.NamedSharding(mesh, P()))
    with jax.set_mesh(mesh):
      gradients, logps = run(fast)
  expected_gradients, expected = run(
    functools.partial(naive_token_logps, softcap=softcap)
  )
  np.testing.assert_allclose(logps, expected, rtol=1e-5, atol=1e-5)
  for got, want in zip(gradients, expected_gradients, strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def gradient_temporaries(function, inputs):
  """Bytes that the gradients of hidden states and weights take meanwhile."""
  total = lambda h, u: function(h, u, *inputs[2:]).sum()
  gradient = jax.jit(jax.grad(total, argnums=(0, 1)))
  compiled = gradient.lower(*inputs[:2]).compile()
  return compiled.memory_analysis().temp_size_in_bytes


def test_logits_of_all_positions_are_kept_only_where_they_are_few():
  inputs = head_inputs(rows=2, length=512, scores=512, vocab=4096)
  all_logits = 2 * 512 * 4096 * 4

  def fast(kept_bytes):
    function = functools.partial(
      logprobs.token_logps, chunk_size=64, kept_bytes=kept_bytes
    )
    return gradient_temporaries(function, inputs)

  assert gradient_temporaries(naive_token_logps, inputs) >= all_logits
  assert fast(all_logits - 1) < all_logits / 4
  assert all_logits <= fast(all_logits) < all_logits * 5 / 4


def test_a_larger_vocabulary_takes_memory_for_its_weights_alone():
  def temporaries(vocab):
    fast = functools.partial(
      logprobs.token_logps, chunk_size=32, tile_size=256, kept_bytes=0
    )
    inputs = head_inputs(rows=2, length=64, scores=64, vocab=vocab)
    return gradient_temporaries(fast, inputs)

  # At the most a copy of the weights of 16, as their gradient is summed up.
  more = temporaries(8192) - temporaries(2048)
  assert more <= 6144 * 16 * 4


def test_extreme_logits_stay_finite():
  hidden = jnp.full((1, 1, 1), 1e4)
  unembedding = jnp.array([[1.0], [-1.0]])
  zero, one = jnp.zeros((1, 1), jnp.int32), jnp.ones((1,), jnp.int32)
  score = lambda target: logprobs.token_logps(
    hidden, unembedding, zero, target, one
  )
  assert score(zero)[0, 0] == 0.0
  assert score(zero + 1)[0, 0] == -2e4


def test_a_soft_cap_bounds_logits():
  # 30 tanh(+-20 / 30) for tokens 0 and 1.
  score = jax.value_and_grad(
    lambda hidden, target: logprobs.token_logps(
      jnp.full((1, 1, 1), hidden),
      jnp.array([[1.0], [-1.0]]),
      jnp.zeros((1, 1), jnp.int32),
      jnp.full((1, 1), target),
      jnp.ones((1,), jnp.int32),
      softcap=30.0,
    )[0, 0]
  )
  # With logits l and -l, token 1 has -2l - log(1 + exp(-2l)), whose slope by l
  # is -2 sigmoid(2l); that of l = 30 tanh(x / 30) is 1 - (l / 30)**2.
  logit = 30 * math.tanh(20 / 30)
  expected = -2 * logit - math.log1p(math.exp(-2 * logit))
  slope = -2 / (1 + math.exp(-2 * logit)) * (1 - (logit / 30) ** 2)
  np.testing.assert_allclose(score(20.0, 1), (expected, slope), rtol=1e-5)
  # Far beyond the cap nothing is left to gain.
  np.testing.assert_allclose(score(1e4, 1), (-60.0, 0.0), atol=1e-5)


@pytest.mark.parametrize("chunk_size", [2, 256])
def test_padding_with_huge_logits_reaches_no_gradient(chunk_size):
  # Padded entries read position 0, whose logits are 400 and overflow exp.
  hidden = jnp.ones((1, 4, 4)).at[0, 0].set(100.0)
  positions = jnp.array([[1, 2, 3, 0]])
  targets = jnp.zeros((1, 4), jnp.int32)
  total = lambda hidden, unembedding: logprobs.token_logps(
    hidden,
    unembedding,
    positions,
    targets,
    jnp.array([3]),
    chunk_size=chunk_size,
  ).sum()
  gradients = jax.grad(total, argnums=(0, 1))(hidden, jnp.ones((6, 4)))
  assert all(jnp.isfinite(gradient).all() for gradient in gradients)
  np.testing.assert_array_equal(gradients[0][0, 0], jnp.zeros(4))
