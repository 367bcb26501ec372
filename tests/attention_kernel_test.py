"""The TPU's kernels: run in the interpreter, compiled by the real compiler."""

import functools
import importlib.util
import itertools
import re

import attention_inputs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dpop_jax import sharding
from dpop_jax.models import attention, attention_blocks, attention_kernel
from dpop_jax.planning import chips

SCALE, SOFTCAP = 0.4, 1.5


@pytest.fixture
def small_blocks(monkeypatch):
  monkeypatch.setattr(attention_blocks, "KERNEL_BLOCK_SIZES", (16, 8))
  monkeypatch.setattr(attention_blocks, "MAX_BLOCK_SIZE", 16)


def kernel(direction, scoring):
  """Takes the kernel on any platform."""
  run = getattr(attention_kernel, direction)
  return functools.partial(run, scoring=scoring, interpret=True)


@pytest.fixture
def in_the_interpreter(small_blocks, monkeypatch):
  monkeypatch.setattr(attention, "_by_platform", kernel)


@pytest.mark.parametrize(
  ("length", "window", "softcap"),
  [(48, None, None), (43, 9, None), (43, None, SOFTCAP), (48, 9, SOFTCAP)],
)
def test_the_kernel_equals_other_ways(
  length, window, softcap, small_blocks, monkeypatch
):
  window = None if window is None else jnp.int32(window)
  scoring = dict(scale=SCALE, softcap=softcap)

  def forest(query, key, value, *tree):
    visibility = attention_blocks.visibility(*tree, window)
    return attention.forest_attention(query, key, value, visibility, **scoring)

  def dense(query, key, value, *tree):
    mask = attention.forest_mask(*tree, window)
    return attention.masked_attention(query, key, value, mask, **scoring)

  arrays = (
    *attention_inputs.inputs(length),
    *attention_inputs.random_trees(0, length),
  )
  plain = attention_inputs.with_gradients(forest)(*arrays)
  dense = attention_inputs.with_gradients(dense)(*arrays)
  monkeypatch.setattr(attention, "_by_platform", kernel)
  for got, *wanted in zip(
    attention_inputs.with_gradients(forest)(*arrays), plain, dense, strict=True
  ):
    for want in wanted:
      np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(got[-1], np.zeros_like(got[-1]))
    np.testing.assert_array_equal(got[-2, 3:], np.zeros_like(got[-2, 3:]))


def test_the_kernel_in_bfloat16_is_as_exact_as_the_whole_mask(
  in_the_interpreter,
):
  until, positions = attention_inputs.random_trees(0, 48)
  mask = attention.forest_mask(until, positions)
  dense = attention_inputs.with_gradients(
    lambda *qkv: attention.masked_attention(*qkv, mask, scale=SCALE)
  )
  visibility = attention_blocks.visibility(until)
  forest = attention_inputs.with_gradients(
    lambda *qkv: attention.forest_attention(*qkv, visibility, scale=SCALE)
  )
  exact = dense(*attention_inputs.inputs(48))
  half = [x.astype(jnp.bfloat16) for x in attention_inputs.inputs(48)]
  for got, whole, want in zip(forest(*half), dense(*half), exact, strict=True):
    assert got.dtype == whole.dtype == jnp.bfloat16
    error = lambda x, want=want: float(
      jnp.abs(x.astype(jnp.float32) - want).max()
    )
    assert error(got) < 1.5 * error(whole) < 0.1


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 8, 1)])
def test_a_mesh_changes_nothing(shape, in_the_interpreter):
  mesh = sharding.make_mesh(
    sharding.MeshConfig(**dict(zip(sharding.MESH_AXES, shape, strict=True)))
  )
  until, positions = attention_inputs.random_trees(0, 48)

  def attend(query, key, value, until, positions):
    visibility = attention_blocks.visibility(until, positions, jnp.int32(9))
    return attention.forest_attention(
      query, key, value, visibility, scale=SCALE
    )

  arrays = *attention_inputs.inputs(48), until, positions
  want = attention_inputs.with_gradients(attend)(*arrays)
  with jax.set_mesh(mesh):
    got = attention_inputs.with_gradients(attend)(*arrays)
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_the_kernel_equals_splash_attention_with_the_mask_in_memory(
  in_the_interpreter,
):
  length, heads, kv_heads, width = 256, 4, 2, 128
  # There, padding has no answer: let it see itself.
  index = jnp.arange(length, dtype=jnp.int32)[None]
  until = jnp.maximum(
    attention_inputs.random_trees(3, length)[0][:1], index + 1
  )
  mask = attention.forest_mask(until)
  make_kernel = functools.partial(
    splash_attention.make_splash_mha,
    block_sizes=splash_attention.BlockSizes.get_default(),
    head_shards=1,
    q_seq_shards=1,
    interpret=True,
  )

  def splash(query, key, value):
    kernel = make_kernel(jnp.broadcast_to(mask, (heads, length, length)))
    for name in ("fwd_mask_info", "dq_mask_info", "dkv_mask_info"):
      # While traced it forgets that it knows this.
      known = getattr(kernel, name)._replace(is_dynamic_mask=True)
      setattr(kernel, name, known)
    query, key, value = (x[0].swapaxes(0, 1) for x in (query, key, value))
    return kernel(query * SCALE, key, value).swapaxes(0, 1)[None]

  def ours(query, key, value):
    visibility = attention_blocks.visibility(until)
    return attention.forest_attention(
      query, key, value, visibility, scale=SCALE
    )

  arrays = attention_inputs.inputs(length, heads, kv_heads, width, rows=1)
  got, want = (
    attention_inputs.with_gradients(ours)(*arrays),
    attention_inputs.with_gradients(splash)(*arrays),
  )
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_blocks_that_no_token_needs_are_not_read(in_the_interpreter):
  # Two trees of two blocks each and two blocks of padding, of 16 tokens: of 21
  # pairs 6 are computed. In another row one tree of six blocks: all 21 are.
  ends = [[32] * 32 + [64] * 32 + list(range(64, 96)), [96] * 96]
  visibility = attention_blocks.visibility(jnp.array(ends, jnp.int32))
  assert visibility.by_query.count == visibility.by_key.count == 6 + 21
  assert visibility.by_query.queries.shape == (21 + 21 + 1,)
  pairs = lambda blocks: {
    (int(q), int(k))
    for q, k in zip(
      *(x[: int(blocks.count[0])] for x in blocks[:2]), strict=True
    )
  }
  first_row = {(0, 0), (1, 0), (1, 1), (2, 2), (3, 2), (3, 3)}
  second_row = {(6 + q, 6 + k) for q in range(6) for k in range(q + 1)}
  assert pairs(visibility.by_query) == first_row | second_row
  assert pairs(visibility.by_key) == first_row | second_row
  # A value that is read spoils the results, even with a weight of zero.
  query, key, value, weights = attention_inputs.inputs(96, rows=2)
  attend = attention_inputs.with_gradients(
    lambda *qkv: attention.forest_attention(*qkv, visibility, scale=SCALE)
  )
  clean = attend(query, key, value, weights)
  nan = jnp.nan
  spoilt = attend(
    query.at[0, 32:].set(nan),
    key.at[0, 32:].set(nan),
    value.at[0, 32:].set(nan),
    weights.at[0, 32:].set(nan),
  )
  for a, b in zip(spoilt, clean, strict=True):
    np.testing.assert_array_equal(a[1], b[1])
    np.testing.assert_array_equal(a[0, :32], b[0, :32])
    assert np.isnan(a[0, 32:64]).all()
    # Padding is neither read nor written.
    np.testing.assert_array_equal(a[0, 64:], np.zeros_like(a[0, 64:]))


@pytest.mark.parametrize(
  ("length", "size"),
  [
    (4096, 512),
    (2048, 512),
    (1000, 512),  # 24 tokens of padding.
    (2100, 256),  # 204; blocks of 512 would need 460, more than an eighth.
    (512, 512),
    (300, 128),  # 84; of 256, 212.
    (1, 128),
  ],
)
def test_block_sizes_of_the_kernel(length, size):
  assert attention_blocks.kernel_block_size(length) == size


@pytest.mark.parametrize("window", [None, 9])
def test_the_platform_is_that_of_the_compilation(window):
  until, positions = attention_inputs.random_trees(0, 128)

  def attend(query, key, value):
    limit = None if window is None else jnp.int32(window)
    visibility = attention_blocks.visibility(until, positions, limit)
    return attention.forest_attention(
      query, key, value, visibility, scale=SCALE
    )

  lower = (
    attention_inputs.with_gradients(attend)
    .trace(*attention_inputs.inputs(128))
    .lower
  )
  assert "tpu_custom_call" not in lower(lowering_platforms=("cpu",)).as_text()
  text = lower(lowering_platforms=("tpu",)).as_text()
  assert text.count("tpu_custom_call") == 3


# Rows, length, heads, key heads, head_dim, dtype, window and cap. One is the
# largest that a block may be; lengths need padding.
ODD_SHAPES = {
  "v4:2x2x1": (2, 1024, 8, 4, 128, jnp.bfloat16, None, None),
  "v5e:2x2": (2, 1000, 4, 2, 256, jnp.float32, 300, 50.0),
  "v5p:2x2x1": (4, 2048, 16, 2, 128, jnp.bfloat16, None, 50.0),
  "v6e:2x2": (2, 300, 4, 4, 64, jnp.bfloat16, 100, None),
}
# Those of Llama 3.2 1B and of Yi 34B, in rows as a config has them.
REAL_SHAPES = (
  (4, 2048, 32, 8, 64, jnp.bfloat16, None, None),
  (2, 4096, 56, 8, 128, jnp.bfloat16, None, None),
)


@pytest.mark.tpu
@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="needs the TPU compiler: pip install dpop_jax[tpu]",
)
@pytest.mark.parametrize(
  ("topology", "shape"),
  [
    *ODD_SHAPES.items(),
    *itertools.product(ODD_SHAPES, REAL_SHAPES),
  ],
  ids=lambda x: x if isinstance(x, str) else "-".join(map(str, x[:5])),
)
def test_the_tpu_compiler_takes_it(topology, shape):
  rows, length, heads, kv_heads, width, dtype, window, cap = shape
  mesh = sharding.make_mesh(
    sharding.MeshConfig(fsdp=2, tensor=2),
    chips.devices(chips.parse(topology)),
  )

  def abstract(shape, dtype, *spec):
    placement = NamedSharding(mesh, P(*spec))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=placement)

  def attend(query, key, value, until, positions):
    limit = None if window is None else jnp.int32(window)
    visibility = attention_blocks.visibility(until, positions, limit)
    return attention.forest_attention(
      query, key, value, visibility, scale=SCALE, softcap=cap
    )

  arrays = [
    abstract((rows, length, size, width), dtype, "fsdp", None, "tensor")
    for size in (heads, kv_heads, kv_heads, heads)
  ]
  tree = [abstract((rows, length), jnp.int32, "fsdp")] * 2
  with jax.set_mesh(mesh):
    compiled = (
      attention_inputs.with_gradients(attend).lower(*arrays, *tree).compile()
    )
  text = compiled.as_text()
  calls = re.findall(r"%(\w+_kernel)[.\d]* = .*tpu_custom_call", text)
  assert sorted(calls) == [
    "forward_kernel",
    "key_gradient_kernel",
    "query_gradient_kernel",
  ]
  assert not re.findall("all-(gather|reduce|to-all)|collective-permute", text)
  # Arrays of heads, at most: a row's whole mask is not among them, which for
  # each query and key would take four bytes.
  sizes = [x.size * x.dtype.itemsize for x in arrays]
  memory = compiled.memory_analysis().temp_size_in_bytes
  assert memory < 3 * sum(sizes) / 4 + 2**20
