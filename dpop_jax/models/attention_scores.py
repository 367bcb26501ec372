"""What makes attention's scores of the products of queries and keys."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Stands for minus infinity: finite, so that differences of two are not nan.
MASKED = -1e30
# Where a kernel's maxima start, so that exp(MASKED - maximum) is 0 from the
# first block on.
LOWEST = MASKED / 10


class Scoring(NamedTuple):
  """How products become scores.

  Attributes:
    scale: Multiplies the products.
    softcap: Scores s become softcap * tanh(s / softcap); None for s.
  """

  scale: float
  softcap: float | None

  def scores(self, products: jax.Array) -> jax.Array:
    scores = products * self.scale
    if self.softcap is None:
      return scores
    return self.softcap * jnp.tanh(scores / self.softcap)

  def product_gradient(
    self, score_gradient: jax.Array, scores: jax.Array
  ) -> jax.Array:
    """The gradient in front of `scores`, from that behind it."""
    if self.softcap is not None:
      # The slope of tanh at x is 1 - tanh(x)**2.
      slope = 1.0 - jnp.square(scores / self.softcap)
      score_gradient = score_gradient * slope
    return score_gradient * self.scale


def dot(
  a: jax.Array, b: jax.Array, axis_of_a: int, axis_of_b: int
) -> jax.Array:
  """Products of two blocks over an axis of each, in float32."""
  return jax.lax.dot_general(
    a,
    b,
    (((axis_of_a,), (axis_of_b,)), ((), ())),
    preferred_element_type=jnp.float32,
  )
