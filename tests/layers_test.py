"""Layers by themselves; what they compute is tested with the decoder."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpop_jax.models import decoder_config, layers


@pytest.mark.parametrize("has_offset", [False, True])
def test_a_fresh_norm_scales_by_one(has_offset):
  config = decoder_config.DecoderConfig(
    vocab_size=1,
    hidden_size=2,
    intermediate_size=1,
    num_hidden_layers=1,
    num_attention_heads=1,
    num_key_value_heads=1,
    rms_norm_unit_offset=has_offset,
  )
  x = jnp.array([[[4.0, -2.0]]])
  out, variables = layers.RMSNorm(config).init_with_output(jax.random.key(0), x)
  # The mean square is (16 + 4) / 2.
  np.testing.assert_allclose(out, x / np.sqrt(10).astype(np.float32), rtol=1e-5)
  scale = nn.unbox(variables)["params"]["scale"]
  np.testing.assert_array_equal(scale, [float(not has_offset)] * 2)


def test_heads_are_normalised_one_by_one_or_together():
  config = decoder_config.DecoderConfig(
    vocab_size=1,
    hidden_size=4,
    intermediate_size=1,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
  )
  x = jnp.array([[[[3.0, 3.0], [1.0, -1.0]]]])
  # Mean squares of the heads are 9 and 1, of both together 5.
  for num_axes, scale, expected in (
    (1, [1.0, 2.0], [[1.0, 2.0], [1.0, -2.0]]),
    (
      2,
      [[1.0, 2.0], [3.0, 4.0]],
      np.array([[3.0, 6.0], [3.0, -4.0]]) / 5**0.5,
    ),
  ):
    norm = layers.RMSNorm(config, num_axes)
    params = {"scale": jnp.array(scale)}
    (out,) = norm.apply({"params": params}, x)[0]
    np.testing.assert_allclose(out, expected, rtol=1e-5)
