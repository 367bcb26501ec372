"""Blocks of attention against softmax over all pairs of tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpop_jax import sharding
from dpop_jax.models import (
  attention,
  attention_blocks,
  attention_gpu,
  attention_kernel,
  attention_xla,
)

ROWS, LENGTH, HEADS, KV_HEADS, WIDTH = 8, 48, 4, 2, 8
# Products of inputs are about 3 in size: the cap of scores bends most of them.
SCALE, SOFTCAP = 0.4, 1.5
NO_WINDOW = 2**30


def random_trees(seed):
  """Rows of trees with random forks, then padding: visible_until, positions."""
  generator = np.random.default_rng(seed)
  visible_until = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
  positions = np.zeros((ROWS, LENGTH), np.int32)
  for until, depths in zip(visible_until, positions, strict=True):
    end = LENGTH - int(generator.integers(1, 10))
    for token in range(1, end):
      # Deeper by one, or back to some ancestor, or, from depth 0, a new tree.
      deepest = depths[token - 1] + 1
      is_fork = generator.random() < 0.12
      depths[token] = generator.integers(deepest) if is_fork else deepest
    for token in range(end):
      outside = np.flatnonzero(depths[token + 1 : end] <= depths[token])
      until[token] = token + 1 + outside[0] if len(outside) else end
  return jnp.asarray(visible_until), jnp.asarray(positions)


def inputs(dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(0), 4)
  shape = lambda heads: (ROWS, LENGTH, heads, WIDTH)
  return [
    jax.random.normal(key, shape(heads)).astype(dtype)
    for key, heads in zip(keys, (HEADS, KV_HEADS, KV_HEADS, HEADS), strict=True)
  ]


def last_ancestors(visible_until, window):
  """A token sees its last `window` ancestors, itself included; by counting."""
  token = jnp.arange(visible_until.shape[1])
  is_ancestor = token[None, None, :] <= token[None, :, None]
  is_ancestor &= token[None, :, None] < visible_until[:, None, :]
  # How many ancestors there are from this one on.
  number = jnp.cumsum(is_ancestor[..., ::-1], axis=-1)[..., ::-1]
  return is_ancestor & (number <= window)


def dense(query, key, value, mask, softcap):
  """Attention as one softmax, with the gradient that follows."""
  repeats = query.shape[2] // key.shape[2]
  key, value = (jnp.repeat(x, repeats, axis=2) for x in (key, value))
  scores = jnp.einsum("rqhd,rkhd->rhqk", query, key) * SCALE
  if softcap is not None:
    scores = softcap * jnp.tanh(scores / softcap)
  # Padding sees nothing; any finite scores will do for the softmax.
  scores = jnp.where(mask[:, None], scores, -1e9)
  weights = jnp.where(mask[:, None], jax.nn.softmax(scores, axis=-1), 0.0)
  return jnp.einsum("rhqk,rkhd->rqhd", weights, value)


def forest_attention(
  query, key, value, until, *, positions=None, window=None, **scoring
):
  visibility = attention_blocks.visibility(until, positions, window)
  return attention.forest_attention(query, key, value, visibility, **scoring)


def with_gradients(function):
  """Maps (inputs, ...) to `function`'s result and its gradients, compiled."""

  def run(arrays, *others):
    *qkv, weights = arrays

    def total(*qkv):
      out = function(*qkv, *others)
      return (out * weights).astype(jnp.float32).sum(), out

    gradients, out = jax.grad(total, argnums=(0, 1, 2), has_aux=True)(*qkv)
    return out, *gradients

  return jax.jit(run)


def assert_close(got, want):
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_a_window_counts_along_the_path_of_a_tree():
  #              0  1  2 -- 3  4      and a tree of one token
  #                     \-- 5  6  7
  until = jnp.array([[8, 8, 8, 5, 5, 8, 8, 8, 9]])
  positions = jnp.array([[0, 1, 2, 3, 4, 3, 4, 5, 0]])
  mask = attention.forest_mask(until, positions, jnp.int32(3))
  assert [np.flatnonzero(row).tolist() for row in mask[0]] == [
    [0],
    [0, 1],
    [0, 1, 2],
    [1, 2, 3],
    [2, 3, 4],
    [1, 2, 5],
    [2, 5, 6],
    [5, 6, 7],
    [8],
  ]


@pytest.mark.parametrize(
  ("block_size", "seed", "softcap"),
  [(1, 0, None), (8, 0, None), (8, 0, SOFTCAP), (16, 1, None), (48, 1, None)],
)
def test_blocks_equal_the_whole_softmax(block_size, seed, softcap, monkeypatch):
  monkeypatch.setattr(attention_blocks, "MAX_BLOCK_SIZE", block_size)
  until, _ = random_trees(seed)
  attend = with_gradients(
    lambda q, k, v: forest_attention(
      q, k, v, until, scale=SCALE, softcap=softcap
    )
  )
  want = with_gradients(functools.partial(dense, softcap=softcap))
  assert_close(attend(inputs()), want(inputs(), last_ancestors(until, LENGTH)))


@pytest.mark.parametrize(
  ("block_size", "softcap"), [(1, None), (8, None), (8, SOFTCAP), (48, SOFTCAP)]
)
def test_windows_of_all_sizes_need_one_compilation(
  block_size, softcap, monkeypatch
):
  monkeypatch.setattr(attention_blocks, "MAX_BLOCK_SIZE", block_size)
  attend = with_gradients(
    lambda q, k, v, until, positions, window: forest_attention(
      q,
      k,
      v,
      until,
      scale=SCALE,
      softcap=softcap,
      positions=positions,
      window=window,
    )
  )
  want = with_gradients(functools.partial(dense, softcap=softcap))
  for window in (1, 2, 7, 8, 9, 17, LENGTH - 1, LENGTH, NO_WINDOW):
    until, positions = random_trees(window % 5)
    assert_close(
      attend(inputs(), until, positions, jnp.int32(window)),
      want(inputs(), last_ancestors(until, window)),
    )
  assert attend._cache_size() == 1


def test_layers_of_a_scan_have_their_own_windows(monkeypatch):
  monkeypatch.setattr(attention_blocks, "MAX_BLOCK_SIZE", 8)
  until, positions = random_trees(0)
  windows = (3, NO_WINDOW, 9)

  def scanned(query, key, value):
    def layer(query, window):
      out = forest_attention(
        query,
        key,
        value,
        until,
        scale=SCALE,
        softcap=SOFTCAP,
        positions=positions,
        window=window,
      )
      return out, None

    return jax.lax.scan(layer, query, jnp.array(windows, jnp.int32))[0]

  def unrolled(query, key, value):
    for window in windows:
      mask = last_ancestors(until, window)
      query = dense(query, key, value, mask, SOFTCAP)
    return query

  assert_close(
    with_gradients(scanned)(inputs()), with_gradients(unrolled)(inputs())
  )


@pytest.mark.parametrize(
  ("shape", "window"), [((2, 2, 2), None), ((2, 2, 2), 9), ((1, 8, 1), 9)]
)
def test_a_mesh_changes_nothing(shape, window, monkeypatch):
  monkeypatch.setattr(attention_blocks, "MAX_BLOCK_SIZE", 8)
  mesh = sharding.make_mesh(
    sharding.MeshConfig(**dict(zip(sharding.MESH_AXES, shape, strict=True)))
  )
  until, positions = random_trees(0)
  attend = lambda q, k, v, window: forest_attention(
    q,
    k,
    v,
    until,
    scale=SCALE,
    softcap=None if window is None else SOFTCAP,
    positions=positions,
    window=window,
  )
  window = None if window is None else jnp.int32(window)
  want = with_gradients(attend)(inputs(), window)
  with jax.set_mesh(mesh):
    got = with_gradients(attend)(inputs(), window)
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("softcap", [None, SOFTCAP])
def test_bfloat16_blocks_are_as_exact_as_the_whole_mask(softcap):
  until, positions = random_trees(0)
  window = jnp.int32(9)
  mask = attention.forest_mask(until, positions, window)
  options = dict(scale=SCALE, softcap=softcap)
  exact = dense(*inputs()[:3], mask, softcap)
  half = inputs(jnp.bfloat16)[:3]
  error = lambda out: float(jnp.abs(out.astype(jnp.float32) - exact).max())
  blocks = forest_attention(
    *half, until, **options, positions=positions, window=window
  )
  whole = attention.masked_attention(*half, mask, **options)
  assert blocks.dtype == whole.dtype == jnp.bfloat16
  assert error(blocks) < 1.5 * error(whole) < 0.05


@pytest.mark.parametrize("softcap", [None, SOFTCAP])
def test_the_whole_mask_in_memory_gives_the_same(softcap):
  until, positions = random_trees(0)
  mask = attention.forest_mask(until, positions, jnp.int32(9))
  got = with_gradients(
    lambda q, k, v: attention.masked_attention(
      q, k, v, mask, scale=SCALE, softcap=softcap
    )
  )
  want = with_gradients(functools.partial(dense, softcap=softcap))
  assert_close(got(inputs()), want(inputs(), last_ancestors(until, 9)))


def test_a_row_of_a_length_without_divisors_is_padded(monkeypatch):
  # 48 has the divisor 16 below 22, which is near enough; 47 is prime.
  monkeypatch.setattr(attention_blocks, "MAX_BLOCK_SIZE", 22)
  sizes = []
  needed = attention_blocks.needed_blocks
  monkeypatch.setattr(
    attention_blocks,
    "needed_blocks",
    lambda until, *window, size: (
      sizes.append((size, until.shape[-1])) or needed(until, *window, size=size)
    ),
  )
  for length, computed in ((48, (16, 48)), (47, (22, 66))):
    until, positions = (x[:, :length] for x in random_trees(0))
    until = jnp.minimum(until, length)
    cut = [x[:, :length] for x in inputs()]
    got = with_gradients(
      lambda q, k, v, until, positions, window: forest_attention(
        q,
        k,
        v,
        until,
        scale=SCALE,
        softcap=SOFTCAP,
        positions=positions,
        window=window,
      )
    )(cut, until, positions, jnp.int32(9))
    want = with_gradients(functools.partial(dense, softcap=SOFTCAP))
    assert_close(got, want(cut, last_ancestors(until, 9)))
    assert computed in sizes
    sizes.clear()


@pytest.mark.parametrize("window", [None, 4])
def test_padding_sees_nothing_and_gives_zeros(window):
  until = jnp.arange(LENGTH, dtype=jnp.int32)[None].repeat(ROWS, axis=0)
  out = with_gradients(
    lambda q, k, v: forest_attention(
      q,
      k,
      v,
      until,
      scale=SCALE,
      softcap=SOFTCAP,
      positions=jnp.zeros_like(until),
      window=window and jnp.int32(window),
    )
  )(inputs())
  for array in out:
    np.testing.assert_array_equal(array, jnp.zeros_like(array))


def test_a_window_needs_positions():
  until, _ = random_trees(0)
  with pytest.raises(ValueError, match="give `positions`"):
    forest_attention(*inputs()[:3], until, scale=SCALE, window=jnp.int32(4))
  with pytest.raises(ValueError, match="give `positions`"):
    attention.forest_mask(until, window=jnp.int32(4))


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_a_mesh_that_knows_its_platform_traces_no_other(platform, monkeypatch):
  ways = {"cpu": attention_xla, "tpu": attention_kernel, "cuda": attention_gpu}
  traced = []

  def spy(name):
    def forward(query, key, value, visibility, *, scoring):
      traced.append(name)
      return query, jnp.zeros(query.shape[:3], jnp.float32)

    return forward

  for name, module in ways.items():
    monkeypatch.setattr(module, "forward", spy(name))
  until, _ = random_trees(0)
  run = functools.partial(forest_attention, *inputs()[:3], until, scale=SCALE)
  device = jax.sharding.AbstractDevice("a device", 1, platform)
  mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)
  with jax.sharding.use_abstract_mesh(mesh):
    jax.eval_shape(run)
  assert set(traced) == {platform}
  traced.clear()
  jax.eval_shape(run)
  assert set(traced) == set(ways)
