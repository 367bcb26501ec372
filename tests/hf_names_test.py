"""The table of names: what Hugging Face calls our arrays, and how they lie."""

import math

import jax
import pytest

from dpop_jax.hf import families, names
from dpop_jax.models import decoder, decoder_config

SIZES = {
  "vocab_size": 40,
  "hidden_size": 12,
  "intermediate_size": 20,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 6,
}
# Each with everything that changes a name or a shape.
MODELS = {
  "llama": {
    "attention_bias": True,
    "attention_out_bias": True,
    "mlp_bias": True,
  },
  "mistral": {},
  "qwen2": {"attention_bias": True, "tie_word_embeddings": True},
  "qwen3": {"qk_norm": "head"},
  "gemma2": {"post_norm": True, "tie_word_embeddings": True},
  "gemma3_text": {
    "post_norm": True,
    "qk_norm": "head",
    "tie_word_embeddings": True,
  },
  "olmo2": {"pre_norm": False, "post_norm": True, "qk_norm": "full"},
  "phi3": {},
  "mixtral": {"num_experts": 3, "num_experts_per_tok": 2},
  "qwen3_moe": {"num_experts": 3, "num_experts_per_tok": 2, "qk_norm": "head"},
}


def parts_of(family):
  config = decoder_config.DecoderConfig(**SIZES, **MODELS[family])
  return config, names.parts(config, family)


def find(family, name):
  """The parts of a tensor."""
  return [part for part in parts_of(family)[1] if part.name == name]


def test_there_is_a_model_of_every_family():
  assert MODELS.keys() == families.FAMILIES.keys()


@pytest.mark.parametrize("family", MODELS)
def test_every_element_of_every_array_has_one_place(family):
  config, parts = parts_of(family)
  model = decoder.Decoder(config)
  tokens = jax.ShapeDtypeStruct((1, 4), "int32")
  params = jax.eval_shape(
    lambda *inputs: model.init(jax.random.key(0), *inputs), *[tokens] * 3
  )["params"]
  arrays = {
    tuple(key.key for key in path): value.shape
    for path, value in jax.tree.flatten_with_path(
      params, is_leaf=lambda x: hasattr(x, "unbox")
    )[0]
    for value in [value.unbox() if hasattr(value, "unbox") else value]
  }
  assert {part.path for part in parts} == arrays.keys()
  assert len({(part.path, part.index) for part in parts}) == len(parts)
  for part in parts:
    shape = arrays[part.path]
    assert shape[len(part.index) :] == part.shape
    assert all(i < n for i, n in zip(part.index, shape, strict=False))
    assert sorted(sum(part.axes, ())) == list(range(len(part.shape)))
  for path, shape in arrays.items():
    held = [math.prod(part.shape) for part in parts if part.path == path]
    assert sum(held) == math.prod(shape)


def test_a_projection_merges_heads_and_is_transposed():
  # q_proj [4 * 6, 12] of our [12, 4, 6]; o_proj [12, 4 * 6] of our [4, 6, 12].
  (query,) = find("mistral", "model.layers.1.self_attn.q_proj.weight")
  assert query.path == ("layers", "attention", "query", "kernel")
  assert (query.index, query.shape) == ((1,), (12, 4, 6))
  assert (query.axes, query.tensor_shape) == (((1, 2), (0,)), (24, 12))
  (out,) = find("mistral", "model.layers.0.self_attn.o_proj.weight")
  assert (out.shape, out.axes) == ((4, 6, 12), ((2,), (0, 1)))
  assert out.tensor_shape == (12, 24)


def test_phi3_stacks_query_key_and_value():
  parts = find("phi3", "model.layers.0.self_attn.qkv_proj.weight")
  assert [p.path[2] for p in parts] == ["query", "key", "value"]
  # 4 query heads and twice 2 of keys and values, each 6 wide.
  assert [p.offset for p in parts] == [0, 24, 36]
  assert [p.tensor_shape for p in parts] == [(24, 12), (12, 12), (12, 12)]
  parts = find("phi3", "model.layers.0.mlp.gate_up_proj.weight")
  assert [(p.path[2], p.offset) for p in parts] == [("gate", 0), ("up", 20)]


def test_norms_of_one_name_lie_elsewhere_in_other_families():
  name = "model.layers.0.post_attention_layernorm.weight"
  expected = {
    "llama": "mlp_norm",
    "gemma2": "attention_post_norm",
    "olmo2": "attention_post_norm",
  }
  for family, norm in expected.items():
    (part,) = find(family, name)
    assert part.path == ("layers", norm, "scale")


def test_olmo2_norms_all_heads_together():
  (part,) = find("olmo2", "model.layers.0.self_attn.k_norm.weight")
  assert (part.shape, part.tensor_shape) == ((2, 6), (12,))
  (part,) = find("qwen3", "model.layers.0.self_attn.k_norm.weight")
  assert part.tensor_shape == (6,)


@pytest.mark.parametrize(
  ("family", "module", "expected"),
  [
    ("mixtral", "block_sparse_moe", {"w1": "gate", "w3": "up", "w2": "down"}),
    (
      "qwen3_moe",
      "mlp",
      {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"},
    ),
  ],
)
def test_experts_have_tensors_of_their_own(family, module, expected):
  for name, path in expected.items():
    (part,) = find(family, f"model.layers.1.{module}.experts.2.{name}.weight")
    assert part.path == ("layers", "mlp", path, "kernel")
    assert part.index == (1, 2)
    shape = (12, 20) if path == "down" else (20, 12)
    assert part.tensor_shape == shape
  (router,) = find(family, f"model.layers.1.{module}.gate.weight")
  assert router.path == ("layers", "mlp", "router", "kernel")
  assert router.tensor_shape == (3, 12)


def test_a_tied_model_has_no_second_embedding():
  assert not find("gemma2", "lm_head.weight")
  assert find("llama", "lm_head.weight")


def test_only_what_follows_from_the_rest_is_ignorable():
  tied, _ = parts_of("qwen2")
  separate, _ = parts_of("llama")
  assert names.is_ignorable("lm_head.weight", tied)
  assert not names.is_ignorable("lm_head.weight", separate)
  frequencies = "model.layers.7.self_attn.rotary_emb.inv_freq"
  assert names.is_ignorable(frequencies, separate)
  assert not names.is_ignorable("model.layers.7.mlp.gate_proj.weight", separate)
