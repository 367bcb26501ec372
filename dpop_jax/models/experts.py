"""A sparse MLP: every token goes to a few of many experts.

No token is dropped: copies of tokens are sorted by expert, and products with
ragged groups do the rest.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from dpop_jax import sharding
from dpop_jax.models import layers, products
from dpop_jax.models.decoder_config import DecoderConfig


class SparseMLP(nn.Module):
  """A weighted sum of the gated MLPs that a router chooses for each token.

    probabilities = softmax(router(x))
    out = sum over the likeliest experts e: probabilities[e] * mlp_e(x)

  The probabilities of a token's experts are made to add up to 1 if the config
  says so. Rows stay on their devices, weights are gathered over fsdp, and the
  width of every expert is split over tensor.

  References:
    Jiang et al., 2024, https://arxiv.org/abs/2401.04088 (Mixtral).
  """

  config: DecoderConfig

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    config = self.config
    width, hidden = config.intermediate_size, config.hidden_size

    def kernel(name, *axes):
      sizes = {"embed": hidden, "mlp": width, "experts": config.num_experts}
      shape = tuple(sizes[axis] for axis in axes)
      return _Kernel(config, shape, axes, name=name)()

    kernels = _Kernels(
      router=kernel("router", "embed", "experts"),
      gate=kernel("gate", "experts", "embed", "mlp"),
      up=kernel("up", "experts", "embed", "mlp"),
      down=kernel("down", "experts", "mlp", "embed"),
    )
    mix = functools.partial(_mix, config=config)
    if config.remat == "none":
      # Gathered weights of all layers would be the whole model.
      mix = jax.checkpoint(mix, policy=_is_not_gathered, prevent_cse=False)
    rows = P(sharding.ROW_AXES)
    return sharding.per_device(mix, in_specs=(rows, _SPLIT), out_specs=rows)(
      x, kernels
    )


class _Kernel(nn.Module):
  """A weight, in the activations' dtype."""

  config: DecoderConfig
  shape: tuple[int, ...]
  axes: tuple[str, ...]

  @nn.compact
  def __call__(self) -> jax.Array:
    kernel = self.param(
      "kernel",
      layers.weights(self.config, *self.axes),
      self.shape,
      jnp.dtype(self.config.param_dtype),
    )
    return products.cast(kernel, self.config.dtype)


class _Kernels(NamedTuple):
  """The router's and those of all experts, or what holds for each.

  Attributes:
    router: [hidden, experts].
    gate: [experts, hidden, width].
    up: Likewise.
    down: [experts, width, hidden].
  """

  router: Any
  gate: Any
  up: Any
  down: Any


_SPLIT = _Kernels(
  router=P(sharding.FSDP),
  gate=P(None, sharding.FSDP, sharding.TENSOR),
  up=P(None, sharding.FSDP, sharding.TENSOR),
  down=P(None, sharding.TENSOR, sharding.FSDP),
)
# Axis of each that is split over fsdp.
_FSDP_AXES = _Kernels(router=0, gate=1, up=1, down=2)


def _is_not_gathered(primitive, *_, **__):
  return primitive is not jax.lax.all_gather_p


def _mix(
  x: Float[Array, "rows length hidden"],
  kernels: _Kernels,
  *,
  config: DecoderConfig,
) -> Float[Array, "rows length hidden"]:
  """The sum over experts, of one device's rows."""
  if fsdp := sharding.split_axes(sharding.FSDP):
    kernels = jax.tree.map(
      lambda kernel, axis: jax.lax.all_gather(
        kernel, fsdp, axis=axis, tiled=True
      ),
      kernels,
      _FSDP_AXES,
    )
  count = config.num_experts_per_tok
  tokens = x.reshape(-1, x.shape[-1])
  # Not split over tensor: partial sums would be rounded, and choose otherwise.
  probabilities = jax.nn.softmax(
    (tokens @ kernels.router).astype(jnp.float32), axis=-1
  )
  shares, chosen = jax.lax.top_k(probabilities, count)  # [tokens, count]
  if config.norm_topk_prob:
    shares = shares / shares.sum(axis=-1, keepdims=True)
  shares = shares.astype(x.dtype)

  chosen = chosen.reshape(-1)
  order = jnp.argsort(chosen)
  sizes = jnp.bincount(chosen, length=config.num_experts)
  copies = tokens[order // count]
  act = layers.ACTIVATIONS[config.hidden_act]
  inner = act(jax.lax.ragged_dot(copies, kernels.gate, sizes))
  inner = inner * jax.lax.ragged_dot(copies, kernels.up, sizes)
  copies = jax.lax.ragged_dot(inner, kernels.down, sizes)

  copies = copies[jnp.argsort(order)].reshape(-1, count, tokens.shape[-1])
  out = jnp.einsum(
    "tcd,tc->td", copies, shares, preferred_element_type=jnp.float32
  )
  out = jax.lax.psum(out.astype(x.dtype), sharding.split_axes(sharding.TENSOR))
  return out.reshape(x.shape)
