"""Decoder configs that make no sense, and meshes that don't divide them."""

import dataclasses
import math

import jax
import pytest

from dpop_jax import sharding
from dpop_jax.models import decoder_config

SMALL = decoder_config.DecoderConfig(
  vocab_size=40,
  hidden_size=16,
  intermediate_size=24,
  num_hidden_layers=3,
  num_attention_heads=4,
  num_key_value_heads=2,
)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(vocab_size=0), "model.vocab_size must be positive, got 0"),
    (dict(rope_theta=-1.0), "model.rope_theta must be positive, got -1.0"),
    (
      dict(num_key_value_heads=3),
      r"model.num_attention_heads \(4\) must be a multiple of "
      r"model.num_key_value_heads \(3\)",
    ),
    (
      dict(hidden_size=18),
      r"model.hidden_size \(18\) must be a multiple of "
      r"model.num_attention_heads \(4\); otherwise set model.head_dim",
    ),
    (dict(head_dim=0), "model.head_dim must be positive, got 0"),
    (dict(head_dim=5), r"model.head_dim \* .* must be even .* got 5"),
    (dict(hidden_size=20), r"model.head_dim \* .* must be even .* got 5"),
    (dict(partial_rotary_factor=0.3), "must be even .* got 1"),
    (dict(partial_rotary_factor=1.5), r"at most model.head_dim \(4\), got 6"),
    (dict(hidden_act="relu"), "model.hidden_act must be one of .* got 'relu'"),
    (dict(qk_norm="all"), "model.qk_norm must be one of .* got 'all'"),
    (dict(pre_norm=False), "Set model.pre_norm or model.post_norm"),
    (
      dict(sliding_window=3, layer_types=("sliding_attention",)),
      "model.layer_types must be .* for each of the 3 layers",
    ),
    (
      dict(layer_types=("sliding_attention",) * 3),
      "model.layer_types has sliding layers; set model.sliding_window",
    ),
    (
      dict(sliding_window=3, layer_types=("full_attention",) * 3),
      "model.sliding_window is 3, but no layer is sliding",
    ),
    (
      dict(rope_local_base_freq=10.0),
      "model.rope_local_base_freq is 10.0, but no layer is sliding",
    ),
    (dict(num_experts=2), "model.num_experts_per_tok or neither; got 2 and"),
    (
      dict(num_experts=2, num_experts_per_tok=3),
      r"model.num_experts_per_tok \(3\) must be at most model.num_experts",
    ),
    (
      dict(num_experts=2, num_experts_per_tok=1, mlp_bias=True),
      "model.mlp_bias does not go with model.num_experts",
    ),
    (dict(dtype="float16"), "model.dtype must be one of .* got 'float16'"),
    (dict(param_dtype="int8"), "model.param_dtype must be one of .* 'int8'"),
    (dict(remat="some"), "model.remat must be one of .*dots.* got 'some'"),
  ],
)
def test_a_bad_config_names_its_key(changes, message):
  with pytest.raises(ValueError, match=message) as caught:
    dataclasses.replace(SMALL, **changes)
  assert "\n" not in str(caught.value)


def mesh_of(*shape):
  sizes = dict(zip(sharding.MESH_AXES, shape, strict=True))
  devices = jax.devices()[: math.prod(shape)]
  return sharding.make_mesh(sharding.MeshConfig(**sizes), devices)


@pytest.mark.parametrize(
  ("shape", "changes", "message"),
  [
    (
      (1, 1, 8),
      {},
      r"model.num_key_value_heads \(2\) must be a multiple of "
      r"mesh.tensor \(8\)",
    ),
    (
      (1, 8, 1),
      dict(hidden_size=20, head_dim=4),
      r"model.hidden_size \(20\) must be a multiple of mesh.fsdp \(8\)",
    ),
    ((4, 1, 2), dict(vocab_size=41), r"model.vocab_size \(41\) .* mesh.tensor"),
    (
      (4, 1, 2),
      dict(intermediate_size=25),
      r"model.intermediate_size \(25\) .* mesh.tensor \(2\)",
    ),
  ],
)
def test_a_mesh_that_does_not_divide_the_model_is_refused(
  shape, changes, message
):
  mesh = mesh_of(*shape)
  config = dataclasses.replace(SMALL, **changes)
  with pytest.raises(ValueError, match=message):
    config.check_mesh(mesh)
  mesh_of(1, 1, 1)
  config.check_mesh(mesh_of(1, 1, 1))
