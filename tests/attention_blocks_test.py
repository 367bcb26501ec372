"""Which pairs of blocks are computed."""

import flax.linen as nn
import hypothesis
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies

from dpop_jax.models import attention, attention_blocks, decoder

SIZE = 8


def row(*trees, length):
  """visible_until and positions [1, length] of trees, given as depths."""
  until = np.arange(length, dtype=np.int32)
  positions = np.zeros(length, np.int32)
  start = 0
  for depths in trees:
    end = start + len(depths)
    positions[start:end] = depths
    for token in range(start, end):
      outside = np.flatnonzero(positions[token + 1 : end] <= positions[token])
      until[token] = token + 1 + outside[0] if len(outside) else end
    start = end
  return jnp.asarray(until)[None], jnp.asarray(positions)[None]


def listed(until, positions=None, window=None):
  """Pairs (query block, key block) that are computed."""
  window = None if window is None else jnp.int32(window)
  is_needed = attention_blocks.needed_blocks(
    until, positions, window, size=SIZE
  )
  blocks = attention_blocks.listed(is_needed)
  pairs = np.stack([blocks.queries, blocks.keys], axis=-1)
  return [tuple(pair) for pair in pairs[: int(blocks.count[0])].tolist()]


def needed(until, positions, window):
  """Those in which a token sees another, by the whole mask."""
  mask = attention.forest_mask(until, positions, jnp.int32(window))[0]
  count = len(mask) // SIZE
  mask = np.asarray(mask).reshape(count, SIZE, count, SIZE)
  return [tuple(pair) for pair in np.argwhere(mask.any(axis=(1, 3))).tolist()]


def test_blocks_that_no_token_needs_are_skipped():
  # Two trees of two blocks each, and two blocks of padding.
  until, _ = row(range(16), range(16), length=48)
  expected = [(0, 0), (1, 0), (1, 1), (2, 2), (3, 2), (3, 3)]
  assert listed(until) == expected


@pytest.mark.parametrize(
  ("window", "num_diagonals"),
  # The first query of block i is at 8i, the last key of block i - n at
  # 8(i - n) + 7: 8n - 7 tokens away.
  [(1, 1), (2, 2), (8, 2), (9, 2), (10, 3), (17, 3), (18, 4), (2**30, 8)],
)
def test_a_window_on_a_chain_leaves_a_band_of_blocks(window, num_diagonals):
  chain = row(range(64), length=80)
  band = [(q, k) for q in range(8) for k in range(8) if 0 <= q - k]
  assert listed(chain[0]) == band
  assert listed(*chain, window) == [
    (q, k) for q, k in band if q - k < num_diagonals
  ]


def test_a_window_along_branches_skips_what_is_far_above_them():
  # A trunk of 32 tokens with two branches of 16, then a tree of 20 tokens that
  # ends in a block with padding.
  trees = row(
    [*range(32), *range(32, 48), *range(32, 48)], range(20), length=88
  )
  assert listed(*trees, 9) == [
    *[(0, 0), (1, 0), (1, 1), (2, 1), (2, 2), (3, 2), (3, 3)],
    *[(4, 3), (4, 4), (5, 4), (5, 5)],
    *[(6, 3), (6, 6), (7, 6), (7, 7)],  # Back at the trunk.
    *[(8, 8), (9, 8), (9, 9), (10, 9), (10, 10)],
  ]


@hypothesis.given(
  seed=strategies.integers(0, 10_000), window=strategies.integers(1, 70)
)
def test_no_block_that_is_needed_is_skipped(seed, window):
  generator = np.random.default_rng(seed)
  trees, room = [], 64
  while room > 0:
    depths = [0]
    for _ in range(int(generator.integers(min(room, 50)))):
      deepest = depths[-1] + 1
      # Back to some ancestor, but not to a second root.
      is_fork = generator.random() < 0.1
      depths.append(
        int(generator.integers(1, deepest + 1)) if is_fork else deepest
      )
    room -= len(depths)
    trees.append(depths)
  until, positions = row(*trees[:-1], length=64)
  pairs = listed(until, positions, window)
  assert set(needed(until, positions, window)) <= set(pairs)
  assert set(pairs) <= set(listed(until))


def test_forks_within_blocks_cost_no_more_than_they_need():
  # Trunks with two branches; no fork or tree but the first begins with a block.
  tree = [*range(78), *range(78, 139), *range(78, 130)]
  trees = row(tree, tree[:158], tree, length=560)
  pairs = listed(*trees, 12)
  assert pairs == needed(*trees, 12)
  assert len(pairs) < len(listed(trees[0])) / 3


def test_blocks_are_listed_once_for_all_layers():
  config = decoder.DecoderConfig(
    vocab_size=8,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=4,
    num_attention_heads=2,
    num_key_value_heads=1,
    sliding_window=5,
    layer_types=("sliding_attention", "full_attention") * 2,
    remat="full",
  )
  tokens = jnp.zeros((1, 40), jnp.int32)
  until, positions = row(range(16), range(16), length=40)
  params = decoder.init_params(jax.random.key(0), config)

  def total(params):
    hidden, _ = decoder.Decoder(config).apply(
      {"params": nn.unbox(params)}, tokens, positions, until
    )
    return hidden.sum()

  jaxpr = jax.make_jaxpr(jax.grad(total))(params).jaxpr
  # Lists are made with cumulative sums, and nothing else here is.
  outside, inside = counts(jaxpr, "cumsum")
  assert outside > 0 == inside
  # Attention itself is inside.
  outside, inside = counts(jaxpr, "pallas_call")
  assert inside > 0 == outside


def counts(jaxpr, name, in_scan=False):
  """How often a primitive is outside of scans, and inside."""
  total = np.zeros(2, int)
  for equation in jaxpr.eqns:
    total[int(in_scan)] += equation.primitive.name == name
    is_scan = in_scan or equation.primitive.name == "scan"
    for inner in jax.extend.core.jaxprs_in_params(equation.params):
      total += counts(inner, name, is_scan)
  return tuple(total.tolist())
