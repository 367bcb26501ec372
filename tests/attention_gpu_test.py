"""The GPU's kernels: run in the interpreter, lowered without a GPU."""

import functools
import re
from unittest import mock

import attention_inputs
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpop_jax import config as config_lib
from dpop_jax import optim, program, sharding
from dpop_jax.data import dataset, plan
from dpop_jax.models import (
  attention,
  attention_blocks,
  attention_gpu,
  attention_gpu_layout,
  decoder,
)
from dpop_jax.planning import batch_shapes

SCALE, SOFTCAP = 0.4, 1.5
# What a compiled program calls Triton by.
TRITON = "__gpu$xla.gpu.triton"


@pytest.fixture
def small_blocks(monkeypatch):
  """Rows of 48 have several blocks, cut otherwise there and back."""
  monkeypatch.setattr(attention_blocks, "GPU_BLOCK_SIZE", 16)
  sizes = (
    attention_gpu_layout.Sizes(16, 8, 4, 1),
    attention_gpu_layout.Sizes(8, 16, 4, 1),
  )
  monkeypatch.setattr(attention_gpu_layout, "SIZES", {1: sizes})


def kernel(direction, scoring):
  """Takes the kernel on any platform."""
  run = getattr(attention_gpu, direction)
  return functools.partial(run, scoring=scoring, interpret=True)


@pytest.fixture
def in_the_interpreter(small_blocks, monkeypatch):
  monkeypatch.setattr(attention, "_by_platform", kernel)


def forest(window=None, softcap=None):
  """The model's attention of query, key, value, weights, until, positions."""

  def attend(query, key, value, *tree):
    limit = None if window is None else jnp.int32(window)
    visibility = attention_blocks.visibility(*tree, limit)
    return attention.forest_attention(
      query, key, value, visibility, scale=SCALE, softcap=softcap
    )

  return attention_inputs.with_gradients(attend)


def dense(window=None, softcap=None):
  """The same with the whole mask in memory."""

  def attend(query, key, value, *tree):
    limit = None if window is None else jnp.int32(window)
    mask = attention.forest_mask(*tree, limit)
    return attention.masked_attention(
      query, key, value, mask, scale=SCALE, softcap=softcap
    )

  return attention_inputs.with_gradients(attend)


@pytest.mark.parametrize(
  ("length", "window", "softcap"),
  [(43, None, None), (43, 9, None), (48, None, SOFTCAP)],
)
def test_the_kernel_equals_other_ways(
  length, window, softcap, small_blocks, monkeypatch
):
  arrays = (
    *attention_inputs.inputs(length),
    *attention_inputs.random_trees(0, length),
  )
  plain = forest(window, softcap)(*arrays)
  whole = dense(window, softcap)(*arrays)
  monkeypatch.setattr(attention, "_by_platform", kernel)
  for got, *wanted in zip(
    forest(window, softcap)(*arrays), plain, whole, strict=True
  ):
    for want in wanted:
      np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(got[-1], np.zeros_like(got[-1]))
    np.testing.assert_array_equal(got[-2, 3:], np.zeros_like(got[-2, 3:]))


def test_groups_and_widths_need_not_be_powers_of_two(in_the_interpreter):
  # Heads of 24 are padded to 32; 7 query heads share a key, 6 of 14 are past
  # a power of two.
  arrays = (
    *attention_inputs.inputs(43, heads=14, kv_heads=2, width=24),
    *attention_inputs.random_trees(1, 43),
  )
  for got, want in zip(forest()(*arrays), dense()(*arrays), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_the_kernel_in_bfloat16_is_as_exact_as_the_whole_mask(
  in_the_interpreter,
):
  tree = attention_inputs.random_trees(0, 48)
  arrays = attention_inputs.inputs(48)
  half = [x.astype(jnp.bfloat16) for x in arrays]
  exact = dense()(*arrays, *tree)
  for got, whole, want in zip(
    forest()(*half, *tree), dense()(*half, *tree), exact, strict=True
  ):
    assert got.dtype == whole.dtype == jnp.bfloat16
    error = lambda x, want=want: float(
      jnp.abs(x.astype(jnp.float32) - want).max()
    )
    assert error(got) < 1.5 * error(whole) < 0.1
  # What is added up in less is not seen here, where the compiler keeps more.
  program = str(forest().trace(*half, *tree).jaxpr)
  assert program.count("preferred_element_type=float32") == 10
  assert "preferred_element_type=bfloat16" not in program


def test_a_mesh_changes_nothing(in_the_interpreter):
  mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
  arrays = (
    *attention_inputs.inputs(48),
    *attention_inputs.random_trees(0, 48),
  )
  want = forest(window=9)(*arrays)
  with jax.set_mesh(mesh):
    got = forest(window=9)(*arrays)
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_blocks_that_no_token_needs_are_not_read(in_the_interpreter):
  # Two trees of two blocks each and two blocks of padding, of 16 tokens; in
  # another row one tree of six blocks.
  ends = [[32] * 32 + [64] * 32 + list(range(64, 96)), [96] * 96]
  until = jnp.array(ends, jnp.int32)
  visibility = attention_blocks.visibility(until)

  def lists(runs):
    starts, others = runs.starts.tolist(), runs.others.tolist()
    return [
      others[start:end] for start, end in zip(starts, starts[1:], strict=False)
    ]

  first_row, second_row = [[0], [0, 1], [2], [2, 3], [], []], range(6)
  assert lists(visibility.gpu_by_query) == first_row + [
    list(range(6, 6 + query + 1)) for query in second_row
  ]
  first_row = [[0, 1], [1], [2, 3], [3], [], []]
  assert lists(visibility.gpu_by_key) == first_row + [
    list(range(6 + key, 12)) for key in second_row
  ]
  # A value that is read spoils the results, even with a weight of zero.
  arrays = attention_inputs.inputs(96, rows=2)
  clean = forest()(*arrays, until)
  spoilt = forest()(*(x.at[0, 32:64].set(jnp.nan) for x in arrays), until)
  for a, b in zip(spoilt, clean, strict=True):
    np.testing.assert_array_equal(a[1], b[1])
    np.testing.assert_array_equal(a[0, :32], b[0, :32])
    assert np.isnan(a[0, 32:64]).all()
    np.testing.assert_array_equal(a[0, 64:], np.zeros_like(a[0, 64:]))


def test_padding_gives_no_nan_and_passes_none_on(in_the_interpreter):
  # No token sees anything, not even itself.
  until = jnp.arange(48, dtype=jnp.int32)[None].repeat(2, axis=0)
  arrays = attention_inputs.inputs(48, rows=2)
  scores = dict(scoring=attention.Scoring(SCALE, None), interpret=True)
  visibility = attention_blocks.visibility(until)
  _, log_normalizers = attention_gpu.forward(*arrays[:3], visibility, **scores)
  np.testing.assert_array_equal(log_normalizers, jnp.zeros((4, 2, 48)))
  for array in forest()(*arrays, until):
    np.testing.assert_array_equal(array, jnp.zeros_like(array))


@pytest.mark.parametrize("limit", attention_gpu_layout.SIZES)
def test_blocks_of_a_program_divide_those_of_the_lists(limit):
  for sizes in attention_gpu_layout.SIZES[limit]:
    for size in sizes[:2]:
      assert attention_blocks.GPU_BLOCK_SIZE % size == 0
      # The least that Triton multiplies.
      assert size >= 16


def test_wider_heads_get_smaller_blocks():
  forward = lambda width, dtype: attention_gpu_layout.sizes_of(
    width, jnp.dtype(dtype)
  )[0]
  assert forward(64, "bfloat16") == attention_gpu_layout.SIZES[128][0]
  assert forward(128, "bfloat16") == attention_gpu_layout.SIZES[256][0]
  assert forward(256, "bfloat16") == attention_gpu_layout.SIZES[512][0]
  # Twice the bytes, and twice the registers.
  assert forward(64, "float32") == attention_gpu_layout.SIZES[512][0]
  assert forward(2048, "float32") == attention_gpu_layout.SIZES[2048][0]


needs_no_card = pytest.mark.skipif(
  jax.__version_info__ >= (0, 11),
  reason="jax 0.11 lowers these kernels only where there is a GPU",
)


@needs_no_card
@pytest.mark.parametrize("window", [None, 9])
def test_the_platform_is_that_of_the_compilation(window):
  arrays = (
    *attention_inputs.inputs(128),
    *attention_inputs.random_trees(0, 128),
  )
  lower = forest(window).trace(*arrays).lower
  for platform, count in (("cpu", 0), ("tpu", 0), ("rocm", 0), ("cuda", 3)):
    text = lower(lowering_platforms=(platform,)).as_text()
    assert text.count(TRITON) == count


LENGTH = 384


def lowered_step(remat, sliding_window=None):
  """The train step for a GPU that is not there, as StableHLO."""
  config = config_lib.Config(
    model=decoder.DecoderConfig(
      vocab_size=512,
      hidden_size=32,
      intermediate_size=64,
      num_hidden_layers=2,
      num_attention_heads=4,
      num_key_value_heads=2,
      head_dim=16,
      attn_logit_softcapping=30.0,
      sliding_window=sliding_window,
      dtype="bfloat16",
      remat=remat,
    ),
    data=dataset.DataConfig(train="-", tokenizer="-"),
    batch=plan.BatchConfig(
      batch_size=2, row_length=LENGTH, rows_per_microbatch=2
    ),
    loss=config_lib.LossConfig(name="dpop", beta=0.3, dpop_lambda=50.0),
    optimizer=optim.OptimizerConfig(name="adamw", peak_learning_rate=1e-6),
    run=config_lib.RunConfig(num_steps=1),
  )
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
  made = program.make_program(config, mesh, num_steps=1)
  batch = batch_shapes.of_config(config).empty_batch(2)
  of_any = mock.patch.object(sharding, "active_platform", lambda: None)
  with of_any, jax.set_mesh(mesh):
    traced = made.train_step.trace(
      made.abstract_state,
      made.abstract_reference,
      program.abstract_batch(made, batch),
      jax.ShapeDtypeStruct((), jnp.int32),
    )
  return traced.lower(lowering_platforms=("cuda",)).as_text()


@needs_no_card
@pytest.mark.parametrize(
  ("remat", "window", "kernels"),
  # There and two ways back, and of the reference: "dots" keeps what attention
  # gave, "full" computes it again.
  [("dots", 64, 4), ("full", None, 5)],
)
def test_the_train_step_for_a_gpu_has_the_kernels_and_no_mask_in_memory(
  remat, window, kernels
):
  text = lowered_step(remat, window)
  assert text.count(TRITON) == kernels
  squares = re.findall(rf"tensor<(?:\d+x)*{LENGTH}x{LENGTH}x\w+>", text)
  assert not squares


def test_a_mask_in_memory_would_be_found():
  text = dense().trace(
    *attention_inputs.inputs(LENGTH),
    *attention_inputs.random_trees(0, LENGTH),
  )
  text = text.lower(lowering_platforms=("cuda",)).as_text()
  assert re.findall(rf"tensor<(?:\d+x)*{LENGTH}x{LENGTH}xi1>", text)
