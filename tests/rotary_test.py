"""Rotary frequencies against the slow way, and what a rotation does."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import plain
import pytest

from dpop_jax.models import decoder_config, rotary

# A head of 16 has eight pairs, so that each kind of them is there.
PLAIN = decoder_config.DecoderConfig(
  vocab_size=8,
  hidden_size=32,
  intermediate_size=8,
  num_hidden_layers=3,
  num_attention_heads=2,
  num_key_value_heads=2,
  rope_theta=100.0,
)
SCALINGS = {
  "default": dict(),
  "linear": dict(factor=3.0),
  "llama3": dict(
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=128,
  ),
  "yarn": dict(
    factor=16.0,
    beta_fast=8.0,
    beta_slow=0.5,
    original_max_position_embeddings=100,
  ),
  "yarn_defaults": dict(factor=4.0, original_max_position_embeddings=1000),
  "yarn_whole": dict(
    factor=16.0,
    is_truncated=False,
    attention_factor=0.8,
    original_max_position_embeddings=300,
  ),
  # Both bounds are the same.
  "yarn_sharp": dict(
    factor=4.0,
    beta_fast=2.0,
    beta_slow=2.0,
    is_truncated=False,
    original_max_position_embeddings=100,
  ),
  "longrope": dict(
    short_factor=tuple(1.0 + 0.1 * i for i in range(8)),
    long_factor=tuple(1.0 + i for i in range(8)),
    original_max_position_embeddings=100,
    attention_factor=1.3,
  ),
}
SCALINGS["longrope_long"] = SCALINGS["longrope"] | dict(use_long_factor=True)
SCALINGS = {
  name: decoder_config.RopeScaling(rope_type=name.split("_")[0], **options)
  for name, options in SCALINGS.items()
}


def scaled(name, **changes):
  return dataclasses.replace(PLAIN, rope_scaling=SCALINGS[name], **changes)


@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_are_those_of_the_slow_way(name):
  config = scaled(name)
  got = rotary.rotation(config)
  frequencies, amplitude = plain.rates(config, is_sliding=False)
  assert got.frequencies.dtype == np.float32
  np.testing.assert_allclose(got.frequencies, frequencies, rtol=1e-6)
  if amplitude == 1:
    assert got.amplitude is None
  else:
    np.testing.assert_allclose(got.amplitude, amplitude, rtol=1e-6)
  is_changed = got.frequencies != rotary.rotation(PLAIN).frequencies
  assert is_changed.any() == (name != "default")


def test_llama3_frequencies_of_hand_worked_pairs():
  # In 40 tokens frequencies 1, 1/10 and 1/100 turn 6.4, 0.64 and 0.064 times:
  # the first more often than high_freq_factor, the others less than
  # low_freq_factor.
  scaling = dataclasses.replace(
    SCALINGS["llama3"], original_max_position_embeddings=40
  )
  config = dataclasses.replace(
    PLAIN, head_dim=6, rope_theta=1000.0, rope_scaling=scaling
  )
  turns = [40 / (2 * math.pi) / 10**i for i in range(3)]
  assert turns[0] > 4 and turns[1] < 1
  np.testing.assert_allclose(
    rotary.rotation(config).frequencies, [1, 0.1 / 8, 0.01 / 8], rtol=1e-6
  )
  # Bounds between which the first pair is a third of the way up.
  scaling = dataclasses.replace(
    scaling, low_freq_factor=turns[0] - 1, high_freq_factor=turns[0] + 2
  )
  config = dataclasses.replace(config, rope_scaling=scaling)
  np.testing.assert_allclose(
    rotary.rotation(config).frequencies[0],
    1 / 3 + 2 / 3 / 8,
    rtol=1e-6,
  )


def test_yarn_amplitude_of_a_factor():
  amplitude = rotary.rotation(scaled("yarn")).amplitude
  np.testing.assert_allclose(amplitude, 0.1 * math.log(16) + 1, rtol=1e-6)


def test_sliding_layers_may_have_frequencies_of_their_own():
  assert rotary.layer_rotations(scaled("yarn")) is None
  config = scaled(
    "yarn",
    sliding_window=4,
    layer_types=(
      decoder_config.SLIDING,
      decoder_config.FULL,
      decoder_config.SLIDING,
    ),
    rope_local_base_freq=16.0,
  )
  full = rotary.rotation(config)
  frequencies, amplitudes = rotary.layer_rotations(config)
  local = 16.0 ** -(np.arange(8) / 8)
  for layer, expected in enumerate((local, full.frequencies, local)):
    np.testing.assert_allclose(frequencies[layer], expected, rtol=1e-6)
  np.testing.assert_array_equal(amplitudes, [1, full.amplitude, 1])


ONE_TURN = rotary.Rotation(np.array([1.0, 0.1], np.float32))


def test_rotation_turns_each_pair_of_dimensions_by_its_own_angle():
  # Dimensions 0 and 2 form a pair that turns by 1 a position, 1 and 3 one that
  # turns by 0.1; the last two do not turn.
  x = jnp.array([1.0, 10.0, 2.0, 20.0, 5.0, 6.0])[None, None, None]
  cos, sin = math.cos, math.sin
  expected = [
    1 * cos(3) - 2 * sin(3),
    10 * cos(0.3) - 20 * sin(0.3),
    2 * cos(3) + 1 * sin(3),
    20 * cos(0.3) + 10 * sin(0.3),
  ]
  (rotated,) = rotary.rotate(x, jnp.array([[3]]), ONE_TURN)[0, 0]
  np.testing.assert_allclose(rotated, [*expected, 5.0, 6.0], rtol=1e-5)
  # The amplitude is of what turns.
  larger = ONE_TURN._replace(amplitude=np.float32(2))
  (rotated,) = rotary.rotate(x, jnp.array([[3]]), larger)[0, 0]
  expected = [2 * number for number in expected]
  np.testing.assert_allclose(rotated, [*expected, 5.0, 6.0], rtol=1e-5)


@pytest.mark.parametrize("width", [4, 6])
def test_a_rotation_keeps_bfloat16(width):
  x = jnp.ones((1, 1, 1, width), jnp.bfloat16)
  rotated = rotary.rotate(x, jnp.array([[7]]), ONE_TURN)
  assert rotated.dtype == jnp.bfloat16 and rotated.shape == x.shape
