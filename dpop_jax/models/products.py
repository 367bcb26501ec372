"""Products of activations and weights: their gradient, and their casts."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax.linen import dtypes
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


def cast(weights: jax.Array, dtype: Any) -> jax.Array:
  """`weights.astype(dtype)`, of a layer at a time where layers are scanned.

  The TPU compiler otherwise casts the weights of all layers before the first
  of them and keeps what it gets, which for float32 and bfloat16 is half of
  what the parameters take. It does not move a cast across a barrier of bits.

  Args:
    weights: Of any shape.
    dtype: Of the result. Only casts to a narrower type are held back: others
      make nothing larger, or are none.
  """
  dtype = jnp.dtype(dtype)
  if dtype.itemsize >= weights.dtype.itemsize:
    return weights.astype(dtype)
  return _narrowed(weights, dtype, weights.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _narrowed(weights, dtype, source):
  bits = jax.lax.bitcast_convert_type(weights, f"uint{8 * source.itemsize}")
  bits = jax.lax.optimization_barrier(bits)
  return jax.lax.bitcast_convert_type(bits, source).astype(dtype)


def _narrowed_forward(weights, dtype, source):
  return _narrowed(weights, dtype, source), None


def _narrowed_backward(dtype, source, _, gradient):
  return (gradient.astype(source),)


_narrowed.defvjp(_narrowed_forward, _narrowed_backward)


def promoted(
  *operands: jax.Array | None, dtype: Any, inexact: bool = True
) -> list[jax.Array | None]:
  """The operands of one of Linen's layers in one type; its `promote_dtype`."""
  dtype = dtypes.canonicalize_dtype(*operands, dtype=dtype, inexact=inexact)
  return [None if x is None else cast(x, dtype) for x in operands]
