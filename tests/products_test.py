"""Weight products and casts against JAX's own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpop_jax.models import products

# Shapes of Dense (one axis contracted) and of the attention's output (two).
SHAPES = {1: ((2, 5, 6), (6, 3, 4)), 2: ((2, 5, 3, 4), (3, 4, 6))}


def numbers(x, count):
  axes = tuple(range(x.ndim - count, x.ndim))
  return (axes, tuple(range(count))), ((), ())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("count", SHAPES)
def test_value_and_gradients_are_those_of_dot_general(count, dtype):
  keys = jax.random.split(jax.random.key(0), 3)
  x, weights = (
    jax.random.normal(key, shape).astype(dtype)
    for key, shape in zip(keys, SHAPES[count], strict=False)
  )

  def run(product):
    out, pull = jax.vjp(
      lambda x, w: product(x, w, numbers(x, count)), x, weights
    )
    return out, *pull(jax.random.normal(keys[2], out.shape).astype(dtype))

  got, want = run(products.weight_product), run(jax.lax.dot_general)
  for a, b in zip(got, want, strict=True):
    assert a.dtype == b.dtype
    # The same products, summed in another order.
    tolerance = 1e-6 if dtype == jnp.float32 else 2e-2
    np.testing.assert_allclose(
      a.astype(jnp.float32),
      b.astype(jnp.float32),
      rtol=tolerance,
      atol=tolerance,
    )


def test_the_weight_gradient_needs_no_transposition():
  x, weights = jnp.ones((2, 5, 6)), jnp.ones((6, 3, 4))

  def primitives(product):
    total = lambda w: product(x, w, numbers(x, 1)).sum()
    return str(jax.make_jaxpr(jax.grad(total))(weights))

  assert "transpose[" in primitives(jax.lax.dot_general)
  assert "transpose[" not in primitives(products.weight_product)


def test_other_axes_and_options_are_refused():
  x, weights = jnp.ones((5, 6)), jnp.ones((4, 6))
  with pytest.raises(NotImplementedError, match="last axes of x"):
    products.weight_product(x, weights, (((1,), (1,)), ((), ())))
  with pytest.raises(NotImplementedError, match="takes no options"):
    products.weight_product(
      x, weights.T, numbers(x, 1), precision=jax.lax.Precision.HIGHEST
    )


SPECIAL = [0.0, -0.0, jnp.inf, -jnp.inf, jnp.nan, 1e-45, 1 + 2**-9, 3e38]
WIDE_TO_NARROW = [("float32", "bfloat16"), ("float32", "float16")]
OTHERS = [("bfloat16", "float32"), ("bfloat16", "bfloat16"), ("float32",) * 2]
as_is = lambda function: function


@pytest.mark.parametrize(
  "transform",
  [as_is, jax.jit, jax.vmap, jax.checkpoint],
  ids=["eager", "jit", "vmap", "remat"],
)
@pytest.mark.parametrize(("source", "dtype"), WIDE_TO_NARROW + OTHERS)
def test_a_cast_is_that_of_astype_to_the_bit(source, dtype, transform):
  weights = jax.random.normal(jax.random.key(0), (64, 8)).at[0].set(SPECIAL)
  weights = weights.astype(source)
  pulled = jax.random.normal(jax.random.key(1), (64, 8)).at[0].set(SPECIAL)

  def run(cast):
    out, pull = jax.vjp(transform(cast), weights)
    return out, *pull(pulled.astype(dtype))

  got = run(functools.partial(products.cast, dtype=dtype))
  want = run(lambda x: x.astype(dtype))
  bits = lambda x: jax.lax.bitcast_convert_type(x, f"uint{8 * x.itemsize}")
  for a, b in zip(got, want, strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(bits(a), bits(b))


def test_only_what_gets_narrower_is_held_back():
  def program(source, dtype):
    cast = functools.partial(products.cast, dtype=dtype)
    return str(jax.make_jaxpr(cast)(jnp.ones((2, 3), source)))

  for dtypes in WIDE_TO_NARROW:
    assert "optimization_barrier" in program(*dtypes)
  for dtypes in OTHERS:
    assert "optimization_barrier" not in program(*dtypes)


def test_scanned_layers_cast_their_own_weights_and_learn_what_they_did():
  keys = jax.random.split(jax.random.key(0))
  weights = jax.random.normal(keys[0], (5, 8, 8)) / 3
  x = jax.random.normal(keys[1], (4, 8), jnp.bfloat16)

  def run(cast):
    def layer(x, kernel):
      return jnp.tanh(x @ cast(kernel)), None

    def total(weights):
      return jax.lax.scan(jax.checkpoint(layer), x, weights)[0].sum()

    return jax.jit(jax.value_and_grad(total))(weights)

  got = run(functools.partial(products.cast, dtype=jnp.bfloat16))
  want = run(lambda kernel: kernel.astype(jnp.bfloat16))
  jax.tree.map(np.testing.assert_array_equal, got, want)


def test_operands_of_a_layer_get_one_type_and_none_stays_none():
  x, kernel = jnp.ones((2, 3), jnp.bfloat16), jnp.ones((3, 4), jnp.float32)
  promoted = products.promoted(x, kernel, None, dtype=jnp.bfloat16)
  assert promoted[0] is x and promoted[1].dtype == jnp.bfloat16
  assert promoted[2] is None
  assert products.promoted(x.astype(jnp.float32), kernel, dtype=None)[1] is (
    kernel
  )
