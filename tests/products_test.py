"""Weight products against the automatic gradient."""

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
