"""What a decoder's block is made of: norm, attention and dense MLP."""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpop_jax.models import attention, products, rotary
from dpop_jax.models.decoder_config import DecoderConfig

ACTIVATIONS = {
  "silu": nn.silu,
  "gelu_pytorch_tanh": functools.partial(nn.gelu, approximate=True),
  "gelu": functools.partial(nn.gelu, approximate=False),
}


class KeyValueCache(NamedTuple):
  """Keys and values of the tokens so far.

  Attributes:
    keys: [layers, batch, length, kv_heads, head_dim].
    values: Likewise.
  """

  keys: jax.Array
  values: jax.Array


class Differences(NamedTuple):
  """In what a layer's attention differs from that of other layers.

  Attributes:
    window: int32 []; how many tokens a query sees, itself included. None if no
      layer has a window.
    rotation: None if all layers have the same.
  """

  window: jax.Array | None = None
  rotation: rotary.Rotation | None = None


def weights(config: DecoderConfig, *axes: str | None):
  """Initializer of a weight, with its logical axes."""
  init = nn.initializers.normal(config.initializer_range)
  return nn.with_logical_partitioning(init, axes)


def _biases(*axes: str | None):
  return nn.with_logical_partitioning(nn.initializers.zeros_init(), axes)


class RMSNorm(nn.Module):
  """Divides by the root mean square, in float32, and scales.

  Attributes:
    config: The decoder's.
    num_axes: How many of the last axes are normalised together.
  """

  config: DecoderConfig
  num_axes: int = 1

  @nn.compact
  def __call__(
    self, x: Float[Array, "rows length *features"]
  ) -> Float[Array, "rows length *features"]:
    has_offset = self.config.rms_norm_unit_offset
    init = nn.initializers.zeros if has_offset else nn.initializers.ones
    scale = self.param(
      "scale",
      # Small enough to be kept whole on every device.
      nn.with_logical_partitioning(init, (None,) * self.num_axes),
      x.shape[-self.num_axes :],
      jnp.dtype(self.config.param_dtype),
    )
    scale = scale.astype(jnp.float32)
    scale = 1.0 + scale if has_offset else scale
    scale = jnp.expand_dims(scale, range(x.ndim - self.num_axes))
    axes = tuple(range(-self.num_axes, 0))
    wide = x.astype(jnp.float32)
    mean_square = jnp.square(wide).mean(axis=axes, keepdims=True)
    wide = wide * jax.lax.rsqrt(mean_square + self.config.rms_norm_eps)
    return (wide * scale).astype(x.dtype)


class Attention(nn.Module):
  """Grouped-query attention with rotary positions."""

  config: DecoderConfig

  @nn.compact
  def __call__(self, x, cache, positions, visibilities, differences):
    config = self.config

    def project(name, heads, axis):
      return nn.DenseGeneral(
        (heads, config.head_width),
        use_bias=config.attention_bias,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        dot_general=products.weight_product,
        promote_dtype=products.promoted,
        kernel_init=weights(config, "embed", axis, "head_dim"),
        bias_init=_biases(axis, "head_dim"),
        name=name,
      )(x)

    def rotated(name, heads, axis):
      heads = project(name, heads, axis)
      if config.qk_norm is not None:
        num_axes = {"head": 1, "full": 2}[config.qk_norm]
        heads = RMSNorm(config, num_axes, name=f"{name}_norm")(heads)
      return rotary.rotate(heads, positions, rotation)

    rotation = differences.rotation or rotary.rotation(config)
    query = rotated("query", config.num_attention_heads, "heads")
    key = rotated("key", config.num_key_value_heads, "kv_heads")
    value = project("value", config.num_key_value_heads, "kv_heads")
    window = differences.window
    scores = dict(
      scale=config.attention_scale, softcap=config.attn_logit_softcapping
    )
    if self.is_initializing():
      mixed = query  # Mixing has no parameters, and takes long to trace.
    elif cache is None:
      visibility = _of_window(visibilities, window)
      mixed = attention.forest_attention(
        query, key, value, visibility, **scores
      )
    else:
      # Row by row, so that rows stay on their devices.
      write = jax.vmap(lambda old, at, new: old.at[at].set(new, mode="drop"))
      cache = KeyValueCache(
        write(cache.keys, positions, key), write(cache.values, positions, value)
      )
      # A key's index in the cache is its position.
      index = jnp.arange(cache.keys.shape[1])[None, None, :]
      mask = index <= positions[:, :, None]
      if window is not None:
        mask &= positions[:, :, None] - index < window
      mixed = attention.masked_attention(query, *cache, mask, **scores)
    out = nn.DenseGeneral(
      config.hidden_size,
      axis=(-2, -1),
      use_bias=config.attention_out_bias,
      dtype=config.dtype,
      param_dtype=config.param_dtype,
      dot_general=products.weight_product,
      promote_dtype=products.promoted,
      kernel_init=weights(config, "heads", "head_dim", "embed"),
      bias_init=_biases(None),
      name="out",
    )(mixed)
    return out, cache


def _of_window(visibilities, window):
  """The one with a window."""
  visibility, *others = visibilities
  for other in others:
    choose = functools.partial(jnp.where, other.window == window)
    visibility = jax.tree.map(choose, other, visibility)
  return visibility


class MLP(nn.Module):
  """Gated MLP: `down(act(gate(x)) * up(x))`."""

  config: DecoderConfig

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    config = self.config

    def project(name, size, *axes, bias_axis=None):
      return nn.Dense(
        size,
        use_bias=config.mlp_bias,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        dot_general=products.weight_product,
        promote_dtype=products.promoted,
        kernel_init=weights(config, *axes),
        bias_init=_biases(bias_axis),
        name=name,
      )

    width = config.intermediate_size
    gate = project("gate", width, "embed", "mlp", bias_axis="mlp")(x)
    up = project("up", width, "embed", "mlp", bias_axis="mlp")(x)
    down = project("down", config.hidden_size, "mlp", "embed")
    return down(ACTIVATIONS[config.hidden_act](gate) * up)
