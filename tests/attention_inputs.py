"""Random forests and heads, for tests of attention's kernels."""

import jax
import jax.numpy as jnp
import numpy as np

ROWS, HEADS, KV_HEADS, WIDTH = 8, 4, 2, 8


def random_trees(seed, length):
  """visible_until and positions of rows of trees with forks, then padding."""
  generator = np.random.default_rng(seed)
  until = np.tile(np.arange(length, dtype=np.int32), (ROWS, 1))
  positions = np.zeros((ROWS, length), np.int32)
  # The last row is padding alone, as are most blocks of the one before.
  ends = [*generator.integers(length // 2, length + 1, ROWS - 2), 3, 0]
  for row, end in enumerate(ends):
    depths = positions[row]
    for token in range(1, end):
      # Deeper by one, or back to some ancestor, or, from depth 0, a new tree.
      deepest = depths[token - 1] + 1
      is_fork = generator.random() < 0.12
      depths[token] = generator.integers(deepest) if is_fork else deepest
    for token in range(end):
      outside = np.flatnonzero(depths[token + 1 : end] <= depths[token])
      until[row, token] = token + 1 + outside[0] if len(outside) else end
  return jnp.asarray(until), jnp.asarray(positions)


def inputs(length, heads=HEADS, kv_heads=KV_HEADS, width=WIDTH, rows=ROWS):
  """Queries, keys, values and weights of the outputs."""
  keys = jax.random.split(jax.random.key(0), 4)
  sizes = heads, kv_heads, kv_heads, heads
  return [
    jax.random.normal(key, (rows, length, size, width))
    for key, size in zip(keys, sizes, strict=True)
  ]


def with_gradients(attend):
  """Maps queries, keys, values, weights, ... to output and gradients."""

  def run(query, key, value, weights, *others):
    def total(*qkv):
      out = attend(*qkv, *others)
      return (out * weights).astype(jnp.float32).sum(), out

    gradients, out = jax.grad(total, argnums=(0, 1, 2), has_aux=True)(
      query, key, value
    )
    return out, *gradients

  return jax.jit(run)
