"""Hugging Face's configs: what they mean, and what is refused by name."""

import math

import pytest

from dpop_jax.hf import families
from dpop_jax.models import decoder_config

SIZES = {
  "vocab_size": 64,
  "hidden_size": 32,
  "intermediate_size": 48,
  "num_hidden_layers": 4,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
}
FULL, SLIDING = "full_attention", "sliding_attention"


def hf(family, **values):
  """A config.json of some family."""
  architecture = families.FAMILIES[family].architecture
  return {
    "architectures": [architecture],
    "model_type": family,
    **SIZES,
    **values,
  }


def read(family, **values):
  found, fields = families.from_hf(hf(family, **values))
  assert found == family
  return decoder_config.DecoderConfig(**fields)


def refusal(hf_config, **kwargs):
  with pytest.raises(ValueError) as error:
    families.from_hf(hf_config, **kwargs)
  message = str(error.value)
  assert "\n" not in message and message.endswith(".")
  return message


def rope(rope_type="default", **fields):
  return decoder_config.RopeScaling(rope_type=rope_type, **fields)


def test_llama_2_of_the_hub():
  fields = families.from_hf(
    {
      "_name_or_path": "meta-llama/Llama-2-7b-hf",
      "architectures": ["LlamaForCausalLM"],
      "bos_token_id": 1,
      "eos_token_id": 2,
      "hidden_act": "silu",
      "hidden_size": 4096,
      "initializer_range": 0.02,
      "intermediate_size": 11008,
      "max_position_embeddings": 4096,
      "model_type": "llama",
      "num_attention_heads": 32,
      "num_hidden_layers": 32,
      "num_key_value_heads": 32,
      "pretraining_tp": 1,
      "rms_norm_eps": 1e-05,
      "rope_scaling": None,
      "tie_word_embeddings": False,
      "torch_dtype": "float16",
      "transformers_version": "4.31.0.dev0",
      "use_cache": True,
      "vocab_size": 32000,
    }
  )[1]
  assert decoder_config.DecoderConfig(**fields) == decoder_config.DecoderConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
  )


def test_an_absent_key_has_the_default_of_its_class():
  fields = families.from_hf({"architectures": ["MixtralForCausalLM"]})[1]
  assert fields["num_experts"] == 8
  assert fields["rope_theta"] == 1e6
  assert fields["rms_norm_eps"] == 1e-5
  assert families.from_hf({"model_type": "gemma2"})[1]["head_dim"] == 256


def test_attention_bias_of_llama_is_one_behind_attention_too():
  # Of Smaug-72B, a Qwen-72B whose tensors were renamed to Llama's.
  config = read("llama", attention_bias=True, mlp_bias=True)
  assert config.attention_bias and config.attention_out_bias
  assert config.mlp_bias
  # Qwen 2 has its three whatever its config says.
  config = read("qwen2")
  assert config.attention_bias and not config.attention_out_bias


LLAMA3 = {
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 8192,
  "rope_type": "llama3",
}


@pytest.mark.parametrize(
  "layout",
  [
    {"rope_theta": 500000.0, "rope_scaling": LLAMA3},
    {"rope_parameters": {**LLAMA3, "rope_theta": 500000.0}},
  ],
  ids=["transformers 4", "transformers 5"],
)
def test_llama_3_1_in_both_layouts(layout):
  config = read("llama", max_position_embeddings=131072, **layout)
  assert config.rope_theta == 5e5
  assert config.rope_scaling == rope(**LLAMA3)


@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_linear_scaling(key):
  config = read("llama", rope_scaling={key: "linear", "factor": 4})
  assert config.rope_scaling == rope("linear", factor=4.0)


def test_yarn():
  config = read(
    "qwen2",
    max_position_embeddings=32768,
    rope_scaling={"type": "yarn", "factor": 4.0, "truncate": False},
  )
  # The original length is the longest one if nothing else is said.
  assert config.rope_scaling == rope(
    "yarn",
    factor=4.0,
    original_max_position_embeddings=32768,
    is_truncated=False,
  )


def test_yarn_with_two_scales_of_attention():
  scaling = {
    "type": "yarn",
    "factor": 40.0,
    "original_max_position_embeddings": 4096,
    "mscale": 0.7,
    "mscale_all_dim": 1.4,
  }
  found = read("llama", rope_scaling=scaling).rope_scaling.attention_factor
  above, below = (0.1 * m * math.log(40) + 1 for m in (0.7, 1.4))
  assert found == pytest.approx(above / below)
  scaling["attention_factor"] = 1.25
  found = read("llama", rope_scaling=scaling).rope_scaling.attention_factor
  assert found == 1.25


def phi3_scaling(**values):
  return {"short_factor": [1.0] * 3, "long_factor": [4, 5, 6], **values}


@pytest.mark.parametrize("name", ["longrope", "su"])
def test_phi3_works_out_its_attention_factor(name):
  config = read(
    "phi3",
    partial_rotary_factor=0.75,
    max_position_embeddings=131072,
    original_max_position_embeddings=4096,
    rope_scaling=phi3_scaling(type=name),
    sliding_window=262144,
    auto_map={"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"},
    resid_pdrop=0.1,
  )
  assert config.rotary_width == 6
  assert config.is_sliding == (True,) * 4
  assert config.rope_scaling == rope(
    "longrope",
    short_factor=(1.0, 1.0, 1.0),
    long_factor=(4.0, 5.0, 6.0),
    original_max_position_embeddings=4096,
    # The texts grew by 32 = 2**5 and 4096 = 2**12.
    attention_factor=math.sqrt(1 + 5 / 12),
  )


def test_windows_of_qwen():
  window = {"sliding_window": 8, "max_window_layers": 3}
  assert read("qwen2", **window).sliding_window is None
  config = read("qwen2", use_sliding_window=True, **window)
  assert config.is_sliding == (False, False, False, True)
  config = read("qwen3", use_sliding_window=True, sliding_window=8)
  # Only layers above the 28th.
  assert config.sliding_window is None
  config = read("qwen3_moe", use_sliding_window=True, sliding_window=8)
  assert config.is_sliding == (True,) * 4


def test_windows_of_mistral():
  assert read("mistral").sliding_window == 4096
  assert read("mistral", sliding_window=None).sliding_window is None
  assert read("mistral", sliding_window=8).is_sliding == (True,) * 4


def test_gemma2():
  config = read(
    "gemma2",
    head_dim=8,
    query_pre_attn_scalar=16,
    sliding_window=8,
    attn_logit_softcapping=50.0,
    final_logit_softcapping=None,
    hidden_act="gelu_pytorch_tanh",
    cache_implementation="hybrid",
  )
  assert config.is_sliding == (True, False, True, False)
  assert config.attention_scale == 1 / 4
  assert config.attn_logit_softcapping == 50.0
  assert config.final_logit_softcapping is None
  assert config.hidden_act == "gelu_pytorch_tanh"
  assert config.scale_embeddings and config.rms_norm_unit_offset
  assert config.pre_norm and config.post_norm and config.tie_word_embeddings


@pytest.mark.parametrize(
  "layout",
  [
    {
      "rope_theta": 1e6,
      "rope_local_base_freq": 10_000.0,
      "rope_scaling": {"rope_type": "linear", "factor": 8.0},
      "sliding_window_pattern": 3,
    },
    {
      "rope_parameters": {
        FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
      },
      "layer_types": [SLIDING, SLIDING, FULL, SLIDING],
      "_sliding_window_pattern": 6,
    },
  ],
  ids=["transformers 4", "transformers 5"],
)
def test_gemma3_in_both_layouts(layout):
  config = read("gemma3_text", head_dim=8, sliding_window=8, **layout)
  assert config.layer_types == (SLIDING, SLIDING, FULL, SLIDING)
  assert (config.rope_theta, config.rope_local_base_freq) == (1e6, 1e4)
  assert config.rope_scaling == rope("linear", factor=8.0)
  assert config.qk_norm == "head"


def test_experts():
  config = read("mixtral", num_local_experts=4, num_experts_per_tok=2)
  assert (config.num_experts, config.num_experts_per_tok) == (4, 2)
  assert config.norm_topk_prob and config.sliding_window is None
  # transformers 4 and the hub say num_experts; transformers 5 does not.
  for key in ("num_experts", "num_local_experts"):
    config = read(
      "qwen3_moe",
      **{key: 4},
      num_experts_per_tok=2,
      moe_intermediate_size=24,
      norm_topk_prob=False,
      router_aux_loss_coef=0.001,
      mlp_only_layers=[],
    )
    assert (config.num_experts, config.intermediate_size) == (4, 24)
    assert not config.norm_topk_prob and config.qk_norm == "head"


def test_olmo2_norms_behind_its_layers():
  config = read("olmo2")
  assert not config.pre_norm and config.post_norm and config.qk_norm == "full"


@pytest.mark.parametrize(
  ("hf_config", "words"),
  [
    (
      {"architectures": ["FalconForCausalLM"], "model_type": "falcon"},
      ("FalconForCausalLM", "LlamaForCausalLM", "Qwen3MoeForCausalLM"),
    ),
    ({"model_type": "gpt2"}, ("model_type='gpt2'", "OlmO2ForCausalLM")),
    ({"architectures": ["QWenLMHeadModel"]}, ("QWenLM", "llamafied")),
    (
      {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": {},
      },
      ("Gemma3ForConditionalGeneration", "more than text"),
    ),
    (
      hf("llama", quantization_config={"quant_method": "gptq"}),
      ("quantization_config", "gptq", "bfloat16"),
    ),
    (hf("llama", model_type="qwen2"), ("LlamaForCausalLM", "model_type")),
    (hf("llama", hidden_act="relu"), ("hidden_act='relu'", "silu")),
    (
      hf("gemma2", hidden_activation="relu"),
      ("hidden_activation='relu'", "gelu_pytorch_tanh"),
    ),
    (
      hf("llama", rope_scaling={"type": "dynamic", "factor": 2.0}),
      ("'dynamic'", "as the text grows", "llama3"),
    ),
    (hf("qwen2", rope_parameters={"rope_type": "foo"}), ("'foo'", "yarn")),
    (
      hf("llama", rope_scaling={"rope_type": "llama3", "factor": 8.0}),
      ("LlamaForCausalLM", "low_freq_factor"),
    ),
    (
      hf("llama", rope_scaling={"type": "linear", "factor": 2, "base": 3}),
      ("base=3", "--ignore_options=base"),
    ),
    (hf("llama", rope_scaling="linear"), ("rope_scaling='linear'",)),
    (
      hf("llama", partial_rotary_factor=0.5),
      ("partial_rotary_factor=0.5", "Phi3ForCausalLM"),
    ),
    (hf("qwen3_moe", decoder_sparse_step=2), ("decoder_sparse_step=2",)),
    (hf("qwen3_moe", mlp_only_layers=[0]), ("mlp_only_layers=[0]",)),
    (hf("olmo2", clip_qkv=8.0), ("clip_qkv=8.0", "not clipped")),
    (
      hf("gemma3_text", use_bidirectional_attention=True),
      ("use_bidirectional_attention=True", "False"),
    ),
    (
      hf("gemma3_text", attn_logit_softcapping=50.0),
      ("attn_logit_softcapping=50.0",),
    ),
    (
      hf("mistral", new_trick=3),
      ("new_trick=3", "MistralForCausalLM", "--ignore_options=new_trick"),
    ),
    # Read in one family, unknown in another.
    (hf("llama", sliding_window=8), ("sliding_window=8",)),
    (hf("phi3", attention_bias=True), ("attention_bias=True",)),
    (hf("llama", hidden_size="a"), ("LlamaForCausalLM", "hidden_size")),
    # transformers lets such a model see what comes later.
    (hf("qwen2", is_causal=False), ("is_causal=False", "True")),
    (hf("llama", num_attention_heads=0), ("LlamaForCausalLM", "ZeroDivision")),
    (
      hf("phi3", rope_scaling=phi3_scaling(original_max_position_embeddings=0)),
      ("Phi3ForCausalLM",),
    ),
    (hf("qwen3", rope_scaling={"full_attention": {}}), ("rope_theta",)),
    (hf("llama") | {"architectures": "Llama"}, ("architectures='Llama'",)),
    (hf("llama", quantization_config="gptq"), ("quantization_config",)),
    ({"model": {}}, ("neither architectures nor a model_type",)),
  ],
)
def test_what_is_not_supported_is_named(hf_config, words):
  message = refusal(hf_config)
  for word in words:
    assert word.lower() in message.lower(), message


def test_unknown_options_can_be_ignored_and_unsupported_ones_not():
  hf_config = hf("mistral", new_trick=3)
  families.from_hf(hf_config, ignored_options=("new_trick",))
  hf_config = hf("olmo2", clip_qkv=8.0)
  assert "clip_qkv" in refusal(hf_config, ignored_options=("clip_qkv",))
  told = refusal(hf_config, ignored_options=("hidden_size",))
  assert told.startswith("hidden_size of config.json cannot be ignored")


def test_an_unknown_option_that_is_off_says_nothing():
  read("mistral", new_trick=None, other_trick=False, clip_qkv=None)


def test_lengths_that_nothing_is_computed_from_say_nothing():
  """Such as the `seq_length` of Qwen1.5, which models made of it keep."""
  for key in ("seq_length", "max_sequence_length", "model_max_length"):
    assert read("llama", **{key: 2048}) == read("llama")


def test_the_config_that_is_read_stays_as_it_is():
  scaling = {"type": "linear", "factor": 2.0}
  hf_config = hf("gemma3_text", rope_scaling=scaling)
  families.from_hf(hf_config)
  assert scaling == {"type": "linear", "factor": 2.0}
  assert hf_config == hf("gemma3_text", rope_scaling=scaling)


# One model of every family, with its options.
MODELS = {
  "llama": [
    hf("llama", attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    hf("llama", rope_scaling=LLAMA3, head_dim=16),
  ],
  "mistral": [hf("mistral", sliding_window=8)],
  "qwen2": [
    hf("qwen2", rope_scaling={"type": "yarn", "factor": 4.0, "beta_fast": 16})
  ],
  "qwen3": [
    hf(
      "qwen3",
      use_sliding_window=True,
      sliding_window=8,
      max_window_layers=2,
      head_dim=8,
    )
  ],
  "gemma2": [hf("gemma2", head_dim=8)],
  "gemma3_text": [
    hf("gemma3_text", rope_scaling={"rope_type": "linear", "factor": 8.0})
  ],
  "olmo2": [hf("olmo2", attention_bias=True)],
  "phi3": [
    hf(
      "phi3",
      partial_rotary_factor=0.75,
      original_max_position_embeddings=32,
      max_position_embeddings=128,
      rope_scaling=phi3_scaling(type="longrope"),
    )
  ],
  "mixtral": [hf("mixtral")],
  "qwen3_moe": [hf("qwen3_moe", num_experts=16)],
}


@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_written_config_is_read_as_the_same_model(family):
  for hf_config in MODELS[family]:
    _, fields = families.from_hf(hf_config)
    config = decoder_config.DecoderConfig(**fields)
    written = families.to_hf(config)
    found, read_again = families.from_hf(written)
    assert (found, read_again) == (family, fields)


def test_a_written_config_has_no_tokens_of_another_tokenizer():
  # Phi-3's padding would be 32000 and outside of a small vocabulary.
  written = families.to_hf(decoder_config.DecoderConfig(**SIZES))
  for token in ("bos", "eos", "pad"):
    assert written[f"{token}_token_id"] is None


def test_what_is_only_said_otherwise_is_the_same_model():
  plain = decoder_config.DecoderConfig(**SIZES)
  explicit = decoder_config.DecoderConfig(
    **SIZES, head_dim=8, layer_types=(FULL,) * 4, param_dtype="bfloat16"
  )
  assert families.to_hf(plain) == families.to_hf(explicit)


def test_a_model_that_nobody_knows_is_not_written():
  config = decoder_config.DecoderConfig(**SIZES, scale_embeddings=True)
  with pytest.raises(ValueError, match="No model of Hugging Face.*Gemma3"):
    families.to_hf(config)
