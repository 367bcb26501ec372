"""Blocks of attention against the whole mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpop_jax import sharding
from dpop_jax.models import attention

ROWS, LENGTH, HEADS, KV_HEADS, WIDTH = 8, 48, 4, 2, 8


def random_visibility(seed):
  """Trees of random sizes with one fork each, then padding."""
  generator = np.random.default_rng(seed)
  visible_until = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
  for row in visible_until:
    start = 0
    while start < LENGTH - 8:
      size = int(generator.integers(1, min(30, LENGTH - 4 - start)))
      end, fork = start + size, start + size // 4
      middle = (fork + end) // 2
      row[start:end] = end
      row[fork:middle] = middle
      start = end
  return jnp.asarray(visible_until)


def inputs(dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(0), 4)
  shape = lambda heads: (ROWS, LENGTH, heads, WIDTH)
  return [
    jax.random.normal(key, shape(heads)).astype(dtype)
    for key, heads in zip(keys, (HEADS, KV_HEADS, KV_HEADS, HEADS), strict=True)
  ]


def value_and_gradients(function, query, key, value, weights):
  def total(*qkv):
    out = function(*qkv)
    return (out * weights).astype(jnp.float32).sum(), out

  run = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))
  gradients, out = run(query, key, value)
  return out, *gradients


@pytest.mark.parametrize(
  ("block_size", "seed"), [(1, 0), (8, 0), (16, 1), (48, 1)]
)
def test_blocks_equal_the_whole_mask(block_size, seed, monkeypatch):
  monkeypatch.setattr(attention, "MAX_BLOCK_SIZE", block_size)
  until = random_visibility(seed)
  mask = attention.forest_mask(until)
  got = value_and_gradients(
    lambda q, k, v: attention.forest_attention(q, k, v, until), *inputs()
  )
  want = value_and_gradients(
    lambda q, k, v: attention.masked_attention(q, k, v, mask), *inputs()
  )
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 8, 1)])
def test_a_mesh_changes_nothing(shape):
  mesh = sharding.make_mesh(
    sharding.MeshConfig(**dict(zip(sharding.MESH_AXES, shape, strict=True)))
  )
  until = random_visibility(0)
  attend = lambda q, k, v: attention.forest_attention(q, k, v, until)
  want = value_and_gradients(attend, *inputs())
  with jax.set_mesh(mesh):
    got = value_and_gradients(attend, *inputs())
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_bfloat16_blocks_are_as_exact_as_the_whole_mask():
  until = random_visibility(0)
  mask = attention.forest_mask(until)
  exact = attention.masked_attention(*inputs()[:3], mask)
  half = inputs(jnp.bfloat16)[:3]
  error = lambda out: float(jnp.abs(out.astype(jnp.float32) - exact).max())
  blocks = attention.forest_attention(*half, until)
  assert blocks.dtype == jnp.bfloat16
  assert error(blocks) < 1.5 * error(attention.masked_attention(*half, mask))


def test_blocks_that_no_token_needs_are_skipped(monkeypatch):
  monkeypatch.setattr(attention, "MAX_BLOCK_SIZE", 8)
  # Two trees of two blocks each, and two blocks of padding.
  until = np.repeat(np.array([16, 32], np.int32), 16)
  until = np.concatenate([until, np.arange(32, 48, dtype=np.int32)])
  blocks = attention.visible_blocks(jnp.asarray(until)[None])
  count = int(blocks.count)
  pairs = zip(blocks.queries[:count], blocks.keys[:count], strict=True)
  assert [(int(q), int(k)) for q, k in pairs] == [
    (0, 0),
    (1, 0),
    (1, 1),
    (2, 2),
    (3, 2),
    (3, 3),
  ]


def test_a_row_of_a_length_without_divisors_is_padded(monkeypatch):
  # 48 has the divisor 16 below 22, which is near enough; 47 is prime.
  monkeypatch.setattr(attention, "MAX_BLOCK_SIZE", 22)
  lengths = []
  blocks = attention.visible_blocks
  monkeypatch.setattr(
    attention,
    "visible_blocks",
    lambda until: lengths.append(until.shape[-1]) or blocks(until),
  )
  for length, computed in ((48, 48), (47, 66)):
    until = jnp.minimum(random_visibility(0)[:, :length], length)
    mask = attention.forest_mask(until)
    cut = [x[:, :length] for x in inputs()]
    got = value_and_gradients(
      lambda q, k, v, until=until: attention.forest_attention(q, k, v, until),
      *cut,
    )
    want = value_and_gradients(
      lambda q, k, v, mask=mask: attention.masked_attention(q, k, v, mask),
      *cut,
    )
    for a, b in zip(got, want, strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=5e-6)
    assert set(lengths) == {computed}
    lengths.clear()


def test_padding_sees_nothing_and_gives_zeros():
  until = jnp.arange(LENGTH, dtype=jnp.int32)[None].repeat(ROWS, axis=0)
  out = value_and_gradients(
    lambda q, k, v: attention.forest_attention(q, k, v, until), *inputs()
  )
  for array in out:
    np.testing.assert_array_equal(array, jnp.zeros_like(array))
