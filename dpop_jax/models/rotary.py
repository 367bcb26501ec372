"""Rotary position embedding, and how its frequencies are stretched.

Dimension i of a head's first `rotary_width` is paired with dimension
i + rotary_width / 2, as in Llama; pair i turns by `frequencies[i]` radians a
token. Frequencies are computed in float64 while tracing.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dpop_jax.models.decoder_config import DecoderConfig, RopeScaling


class Rotation(NamedTuple):
  """What positions do to queries and keys.

  Attributes:
    frequencies: float32 [rotary_width / 2]; radians a token of each pair.
    amplitude: float32 []; multiplies what was rotated. None for 1.
  """

  frequencies: jax.Array | np.ndarray
  amplitude: jax.Array | np.ndarray | None = None


def rotation(config: DecoderConfig) -> Rotation:
  """That of `rope_theta` and `rope_scaling`, for one layer."""
  frequencies, amplitude = _SCALED[config.rope_scaling.rope_type](
    _frequencies(config.rope_theta, config.rotary_width),
    config.rope_theta,
    config.rope_scaling,
  )
  amplitude = None if amplitude == 1 else np.float32(amplitude)
  return Rotation(frequencies.astype(np.float32), amplitude)


def layer_rotations(config: DecoderConfig) -> Rotation | None:
  """Those of all layers, with a leading axis; None if they are the same."""
  if config.rope_local_base_freq is None:
    return None
  full = rotation(config)
  local = _frequencies(config.rope_local_base_freq, config.rotary_width)
  local = local.astype(np.float32)
  is_sliding = np.array(config.is_sliding)
  frequencies = np.where(is_sliding[:, None], local, full.frequencies)
  if full.amplitude is None:
    return Rotation(frequencies)
  amplitudes = np.where(is_sliding, np.float32(1), full.amplitude)
  return Rotation(frequencies, amplitudes)


def rotate(
  x: Float[Array, "rows length heads head_dim"],
  positions: Int[Array, "rows length"],
  rotation: Rotation,
) -> Float[Array, "rows length heads head_dim"]:
  """Turns each pair of dimensions by its frequency times the position.

  What is behind the rotated dimensions of a head stays as it is.

  Source: Su et al., 2021, https://arxiv.org/abs/2104.09864.
  """
  frequencies = jnp.asarray(rotation.frequencies)
  angles = positions[..., None].astype(jnp.float32) * frequencies[None, None]
  cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
  if rotation.amplitude is not None:
    cos, sin = cos * rotation.amplitude, sin * rotation.amplitude
  width = 2 * frequencies.shape[-1]
  turning, rest = x[..., :width], x[..., width:]
  first, second = jnp.split(turning.astype(jnp.float32), 2, axis=-1)
  rotated = [first * cos - second * sin, second * cos + first * sin]
  rotated = jnp.concatenate(rotated, axis=-1).astype(x.dtype)
  return jnp.concatenate([rotated, rest], axis=-1) if rest.size else rotated


def _frequencies(theta: float, width: int) -> np.ndarray:
  return theta ** -(np.arange(0, width, 2) / width)


# Each takes the frequencies, their base and the options, and gives the
# stretched frequencies and the amplitude.


def _default(frequencies, theta, scaling):
  return frequencies, 1.0


def _linear(frequencies, theta, scaling):
  return frequencies / scaling.factor, 1.0


def _llama3(frequencies, theta, scaling: RopeScaling):
  """Scales long waves, leaves short ones, and blends in between."""
  turns = scaling.original_max_position_embeddings * frequencies / (2 * np.pi)
  low, high = scaling.low_freq_factor, scaling.high_freq_factor
  share_kept = np.clip((turns - low) / (high - low), 0, 1)
  return _blend(frequencies, scaling.factor, share_kept), 1.0


def _yarn(frequencies, theta, scaling: RopeScaling):
  """Like `_llama3`, but blends along dimensions instead of frequencies.

  Source: Peng et al., 2023, https://arxiv.org/abs/2309.00071.
  """
  width = 2 * len(frequencies)

  def pair_that_turns(times):
    """Index, not a whole number, of the pair that turns so often."""
    longest = scaling.original_max_position_embeddings
    return (
      width * math.log(longest / (2 * math.pi * times)) / (2 * math.log(theta))
    )

  low = pair_that_turns(scaling.beta_fast or 32)
  high = pair_that_turns(scaling.beta_slow or 1)
  if scaling.is_truncated is not False:
    low, high = math.floor(low), math.ceil(high)
  # The upper bound is of dimensions although pairs are counted, as in the
  # authors' code, which trained models follow.
  low, high = max(low, 0), min(high, width - 1)
  high = high if high != low else high + 1e-3
  share_scaled = np.clip((np.arange(width // 2) - low) / (high - low), 0, 1)
  amplitude = scaling.attention_factor
  if amplitude is None:
    amplitude = 0.1 * math.log(max(scaling.factor, 1.0)) + 1.0
  return _blend(frequencies, scaling.factor, 1 - share_scaled), amplitude


def _longrope(frequencies, theta, scaling: RopeScaling):
  """A factor of its own for each frequency.

  Source: Ding et al., 2024, https://arxiv.org/abs/2402.13753.
  """
  factors = scaling.short_factor
  if scaling.use_long_factor:
    factors = scaling.long_factor
  return frequencies / np.array(factors), scaling.attention_factor


def _blend(frequencies, factor, share_kept):
  return frequencies * (share_kept + (1 - share_kept) / factor)


_SCALED = {
  "default": _default,
  "linear": _linear,
  "llama3": _llama3,
  "yarn": _yarn,
  "longrope": _longrope,
}
