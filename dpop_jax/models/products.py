"""Products of activations and weights, with a gradient that suits the CPU."""

import functools

import jax
from jax.ad_checkpoint import checkpoint_name

# By which a remat policy knows the results: what is inside of a function with
# its own gradient is hidden from it.
NAME = "weight_product"


def weight_product(
  x: jax.Array,
  weights: jax.Array,
  dimension_numbers,
  precision=None,
  preferred_element_type=None,
) -> jax.Array:
  """`jax.lax.dot_general` of the last axes of `x` and the first of `weights`.

  The automatic gradient of the weights comes out transposed and is turned
  round, with copies of both operands that take most of a small model's
  backward pass on a CPU. Here it is computed the way the weights lie.

  Args:
    x: [..., inputs...].
    weights: [inputs..., outputs...].
    dimension_numbers: As Linen's Dense and DenseGeneral give them.
    precision: Must be None.
    preferred_element_type: Must be None.

  Raises:
    NotImplementedError: Other axes are contracted, or an option is set.
  """
  (contracted, first), batch = dimension_numbers
  count = len(contracted)
  if (
    precision is not None
    or preferred_element_type is not None
    or tuple(map(tuple, batch)) != ((), ())
    or tuple(first) != tuple(range(count))
    or tuple(contracted) != tuple(range(x.ndim - count, x.ndim))
  ):
    raise NotImplementedError(
      "weight_product contracts the last axes of x with the first of the "
      f"weights and takes no options, got {dimension_numbers}, {precision}, "
      f"{preferred_element_type}."
    )
  return checkpoint_name(_product(x, weights, count), NAME)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x, weights, count):
  contracted = tuple(range(x.ndim - count, x.ndim))
  numbers = ((contracted, tuple(range(count))), ((), ()))
  return jax.lax.dot_general(x, weights, numbers)


def _forward(x, weights, count):
  return _product(x, weights, count), (x, weights)


def _backward(count, residuals, gradient):
  x, weights = residuals
  rows = tuple(range(x.ndim - count))
  outputs = tuple(range(len(rows), gradient.ndim))
  x_gradient = jax.lax.dot_general(
    gradient, weights, ((outputs, tuple(range(count, weights.ndim))), ((), ()))
  )
  weight_gradient = jax.lax.dot_general(x, gradient, ((rows, rows), ((), ())))
  return x_gradient, weight_gradient


_product.defvjp(_forward, _backward)
