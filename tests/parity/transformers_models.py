"""Tiny random models of transformers, and what it computes with them.

Not a test itself; needs PyTorch.
"""

import pathlib

import hf_computations
import numpy as np
import torch
import transformers

_SIZES = {
  "vocab_size": hf_computations.VOCAB_SIZE,
  "hidden_size": 32,
  "intermediate_size": 40,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "max_position_embeddings": 64,
  "bos_token_id": 1,
  "eos_token_id": hf_computations.EOS_ID,
  "pad_token_id": 2,
}
_EXPERTS = {"num_experts_per_tok": 2, "intermediate_size": 24}


def _rope(rope_type, **values):
  return {"rope_theta": 100.0, "rope_type": rope_type, **values}


_LONG = {"short_factor": [1.0, 1.1, 1.3], "long_factor": [1.5, 3.0, 4.0]}
# By case: arguments of the config, and the dtype of the weights in the file
# (numbers are float32 in either case).
CASES = {
  "llama2": ({"num_key_value_heads": 4}, "float32"),
  "llama3": (
    {
      "rope_parameters": _rope(
        "llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=16,
      )
    },
    "bfloat16",
  ),
  "llama_linear": (
    {"rope_parameters": _rope("linear", factor=4.0)},
    "bfloat16",
  ),
  "llama_yarn": (
    {
      "rope_parameters": _rope(
        "yarn",
        factor=4.0,
        original_max_position_embeddings=16,
        beta_fast=2.0,
        beta_slow=0.5,
        truncate=False,
        mscale=0.7,
        mscale_all_dim=1.4,
      )
    },
    "bfloat16",
  ),
  "yi": ({"num_key_value_heads": 1, "rope_theta": 5e6}, "float16"),
  "llamafied_qwen": ({"attention_bias": True, "mlp_bias": True}, "bfloat16"),
  "smollm": ({"tie_word_embeddings": True}, "bfloat16"),
  "mistral": ({"sliding_window": 8}, "bfloat16"),
  "qwen2": (
    {
      "rope_parameters": _rope(
        "yarn", factor=4.0, original_max_position_embeddings=16
      )
    },
    "bfloat16",
  ),
  "qwen2_windows": (
    {
      "use_sliding_window": True,
      "sliding_window": 8,
      "max_window_layers": 1,
    },
    "bfloat16",
  ),
  "qwen3": ({"head_dim": 10, "attention_bias": True}, "bfloat16"),
  "gemma2": (
    {
      "head_dim": 10,
      "query_pre_attn_scalar": 6,
      "sliding_window": 8,
      "attn_logit_softcapping": 3.0,
      "final_logit_softcapping": 8.0,
    },
    "bfloat16",
  ),
  "gemma3": (
    {
      "num_hidden_layers": 3,
      "head_dim": 10,
      "query_pre_attn_scalar": 6,
      "sliding_window": 8,
      "layer_types": [
        "sliding_attention",
        "full_attention",
        "sliding_attention",
      ],
      "rope_parameters": {
        "full_attention": _rope("linear", factor=8.0),
        "sliding_attention": {"rope_theta": 10.0, "rope_type": "default"},
      },
    },
    "bfloat16",
  ),
  "olmo2": ({"num_key_value_heads": 2}, "bfloat16"),
  "phi3": (
    {
      "partial_rotary_factor": 0.75,
      "original_max_position_embeddings": 32,
      "rope_parameters": _rope("longrope", **_LONG),
      "sliding_window": 8,
    },
    "bfloat16",
  ),
  "phi3_long": (
    {
      "partial_rotary_factor": 0.75,
      "original_max_position_embeddings": 8,
      "rope_parameters": _rope("longrope", **_LONG),
    },
    "bfloat16",
  ),
  "mixtral": ({"num_local_experts": 4, **_EXPERTS}, "bfloat16"),
  "qwen3_moe": (
    {
      "num_experts": 5,
      "num_experts_per_tok": 3,
      "moe_intermediate_size": 24,
      "head_dim": 10,
      "norm_topk_prob": True,
      "use_sliding_window": True,
      "sliding_window": 8,
    },
    "bfloat16",
  ),
}
_MODEL_TYPES = {
  "yi": "llama",
  "llamafied_qwen": "llama",
  "smollm": "llama",
  "llama2": "llama",
  "llama3": "llama",
  "gemma3": "gemma3_text",
  "qwen3_moe": "qwen3_moe",
}


def model_type(case: str) -> str:
  return _MODEL_TYPES.get(case, case.split("_")[0])


def write(case: str, folder: pathlib.Path) -> None:
  """A random model in a folder."""
  arguments, dtype = CASES[case]
  config = transformers.AutoConfig.for_model(
    model_type(case), **{**_SIZES, **arguments}
  )
  model = transformers.AutoModelForCausalLM.from_config(config)
  generator = torch.Generator().manual_seed(1 + sum(map(ord, case)))
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      # Fresh biases and scales are 0 and 1, which would hide mistakes.
      draw = torch.randn(parameter.shape, generator=generator)
      is_norm = "norm" in name
      spread = 0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
      center = 1.0 if is_norm and "gemma" not in case else 0.0
      parameter.copy_(center + spread * draw)
  model.to(getattr(torch, dtype)).save_pretrained(folder)


def read(folder: pathlib.Path):
  model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, attn_implementation="eager"
  )
  return model.eval()


@torch.no_grad()
def compute(folder: pathlib.Path) -> hf_computations.Computed:
  """Each text alone, and token by token with transformers' own cache."""
  model = read(folder)
  sequences = hf_computations.sequences()
  pair = hf_computations.pair()
  return hf_computations.Computed(
    logits=np.concatenate([logits(model, tokens) for tokens in sequences]),
    stepwise_logits=np.concatenate(
      [_stepwise(model, tokens) for tokens in sequences]
    ),
    logps=np.array(
      [
        _logp(model, pair.prompt, answer)
        for answer in (pair.chosen, pair.rejected)
      ]
    ),
  )


@torch.no_grad()
def logits(model, tokens: np.ndarray) -> np.ndarray:
  return model(torch.tensor(tokens[None]).long()).logits[0].numpy()


@torch.no_grad()
def padded_logits(model, side: str) -> np.ndarray:
  """Of all sequences in one padded batch."""
  sequences = hf_computations.sequences()
  longest = max(map(len, sequences))
  tokens = torch.full((len(sequences), longest), 2)
  mask = torch.zeros_like(tokens)
  for row, sequence in enumerate(sequences):
    start = longest - len(sequence) if side == "left" else 0
    tokens[row, start : start + len(sequence)] = torch.tensor(sequence)
    mask[row, start : start + len(sequence)] = 1
  positions = (mask.cumsum(-1) - 1).clamp(min=0)
  found = model(tokens, attention_mask=mask, position_ids=positions).logits
  return np.concatenate(
    [found[row][mask[row] == 1].numpy() for row in range(len(sequences))]
  )


@torch.no_grad()
def new_tokens(model) -> np.ndarray:
  """What follows the pair's prompt, greedily, up to the EOS."""
  prompt = hf_computations.pair().prompt
  tokens = model.generate(
    torch.tensor(prompt[None]).long(),
    attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
    max_new_tokens=hf_computations.NUM_NEW_TOKENS,
    do_sample=False,
  )
  new = tokens[0, len(prompt) :].tolist()
  return np.array(new[:-1] if new[-1] == hf_computations.EOS_ID else new)


def _stepwise(model, tokens):
  cache, found = None, []
  for token in tokens:
    output = model(
      torch.tensor([[int(token)]]), past_key_values=cache, use_cache=True
    )
    cache = output.past_key_values
    found.append(output.logits[0])
  return torch.cat(found).numpy()


def _logp(model, prompt, answer):
  text = np.concatenate([prompt, answer])
  found = torch.tensor(logits(model, text)).double().log_softmax(-1)
  predicting = found[len(prompt) - 1 : -1]
  return float(predicting[range(len(answer)), answer.tolist()].sum())
