"""Which Hugging Face models we know: families as data.

A family says which fields it settles, and which keys of its config.json say
what the others are.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

_SAME_NAMES = (
  "vocab_size",
  "hidden_size",
  "intermediate_size",
  "num_hidden_layers",
  "num_attention_heads",
  "num_key_value_heads",
  "head_dim",
  "hidden_act",
  "rms_norm_eps",
  "tie_word_embeddings",
  "initializer_range",
)
_ALL_BIASES = {
  "attention_bias": "attention_bias",
  "attention_out_bias": "attention_bias",
}
_GEMMA = {
  "hidden_act": "hidden_activation",
  "query_pre_attn_scalar": "query_pre_attn_scalar",
  "final_logit_softcapping": "final_logit_softcapping",
  **_ALL_BIASES,
}
_GEMMA_SETTLES = {
  "rms_norm_unit_offset": True,
  "post_norm": True,
  "scale_embeddings": True,
}
_WINDOW_IN_ALL_LAYERS = ("sliding_window",)
_WINDOW_FROM_A_LAYER = (
  "sliding_window",
  "use_sliding_window",
  "max_window_layers",
  "layer_types",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
  """Models that transformers builds with one class.

  Attributes:
    architecture: That class.
    fields: DecoderConfig's fields and the keys that say them, beyond those of
      _SAME_NAMES.
    settles: Fields that have one value in this family.
    windows: Keys about layers with a sliding window: which, and their RoPE.
    required: Keys that may be there, and what each has to be.
    unread: Keys that such configs have and that this class doesn't read.
  """

  architecture: str
  fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
  settles: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  windows: tuple[str, ...] = ()
  required: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  unread: tuple[str, ...] = ()

  @property
  def keys(self) -> dict[str, str]:
    return {**{name: name for name in _SAME_NAMES}, **self.fields}


# By transformers' `model_type`; to_hf takes the first that fits.
FAMILIES = {
  "llama": Family(
    architecture="LlamaForCausalLM",
    fields={**_ALL_BIASES, "mlp_bias": "mlp_bias"},
  ),
  "mistral": Family(
    architecture="MistralForCausalLM", windows=_WINDOW_IN_ALL_LAYERS
  ),
  "qwen2": Family(
    architecture="Qwen2ForCausalLM",
    settles={"attention_bias": True},
    windows=_WINDOW_FROM_A_LAYER,
  ),
  "qwen3": Family(
    architecture="Qwen3ForCausalLM",
    fields=_ALL_BIASES,
    settles={"qk_norm": "head"},
    windows=_WINDOW_FROM_A_LAYER,
  ),
  "gemma2": Family(
    architecture="Gemma2ForCausalLM",
    fields={**_GEMMA, "attn_logit_softcapping": "attn_logit_softcapping"},
    settles=_GEMMA_SETTLES,
    windows=("sliding_window", "layer_types"),
    required={"use_bidirectional_attention": (None, False)},
    unread=("hidden_act", "sliding_window_size"),
  ),
  "gemma3_text": Family(
    architecture="Gemma3ForCausalLM",
    fields=_GEMMA,
    settles={**_GEMMA_SETTLES, "qk_norm": "head"},
    windows=(
      "sliding_window",
      "layer_types",
      "sliding_window_pattern",
      "rope_local_base_freq",
    ),
    # transformers does not apply the cap of the scores in this family.
    required={
      "attn_logit_softcapping": (None,),
      "use_bidirectional_attention": (None, False),
    },
    unread=("hidden_act", "_sliding_window_pattern"),
  ),
  "olmo2": Family(
    architecture="Olmo2ForCausalLM",
    fields=_ALL_BIASES,
    settles={"pre_norm": False, "post_norm": True, "qk_norm": "full"},
  ),
  "phi3": Family(
    architecture="Phi3ForCausalLM",
    windows=_WINDOW_IN_ALL_LAYERS,
    unread=("full_attn_mod", "interpolate_factor"),
  ),
  "mixtral": Family(
    architecture="MixtralForCausalLM",
    fields={
      "num_experts": "num_local_experts",
      "num_experts_per_tok": "num_experts_per_tok",
    },
    windows=_WINDOW_IN_ALL_LAYERS,
  ),
  "qwen3_moe": Family(
    architecture="Qwen3MoeForCausalLM",
    fields={
      **_ALL_BIASES,
      "intermediate_size": "moe_intermediate_size",
      "num_experts": "num_experts",
      "num_experts_per_tok": "num_experts_per_tok",
      "norm_topk_prob": "norm_topk_prob",
    },
    settles={"qk_norm": "head"},
    windows=("sliding_window", "use_sliding_window"),
    required={"decoder_sparse_step": (1,), "mlp_only_layers": (None, [])},
    # Of dense layers, and of the other Qwen families.
    unread=("intermediate_size", "max_window_layers", "num_local_experts"),
  ),
}
