"""Where each tensor of a Hugging Face checkpoint lies in our parameters.

One table of names serves import and export. A row is a tensor's name, the path
of our array and how their axes correspond: "d h k -> (h k) d" says that our
array is [d, h, k] and that the tensor is its transpose with two axes merged.

  v  vocab_size            h  num_attention_heads    f  intermediate_size
  d  hidden_size           g  num_key_value_heads    e  num_experts
                           k  head_dim
"""

import math
import re
from typing import NamedTuple

from dpop_jax.models import decoder_config


class Part(NamedTuple):
  """Where a Hugging Face tensor, or some rows of it, lies in our parameters.

  Attributes:
    name: Of the tensor, "model.layers.3.self_attn.q_proj.weight".
    path: Of our array, ("layers", "attention", "query", "kernel").
    index: Leading indices into our array: (layer,), (layer, expert) or ().
    shape: Of our array without those leading axes, (d, h, k).
    axes: For each axis of the tensor the axes of `shape` that it merges, in
      order, ((1, 2), (0,)). Only the first of a merged group is ever sharded,
      so that a shard is a rectangle of the tensor.
    offset: First row of this part in the tensor's first axis; parts that share
      a name are stacked there.
  """

  name: str
  path: tuple[str, ...]
  index: tuple[int, ...]
  shape: tuple[int, ...]
  axes: tuple[tuple[int, ...], ...]
  offset: int = 0

  @property
  def tensor_shape(self) -> tuple[int, ...]:
    """Of these rows of the tensor, [h * k, d]."""
    return tuple(math.prod(self.shape[i] for i in axes) for axes in self.axes)


_LAYER = "model.layers.{layer}."


def parts(config: decoder_config.DecoderConfig, family: str) -> list[Part]:
  """All parts of a checkpoint, layer by layer.

  Args:
    config: The decoder.
    family: As families.from_hf names it; settles what tensors are called.
  """
  sizes = {
    "v": config.vocab_size,
    "d": config.hidden_size,
    "h": config.num_attention_heads,
    "g": config.num_key_value_heads,
    "k": config.head_width,
    "f": config.intermediate_size,
    "e": config.num_experts,
  }
  found = [_part("model.embed_tokens.weight", "embedding", "v d", sizes)]
  rows = [
    (_LAYER + name, "layers/" + path, axes)
    for name, path, axes in (
      *_norms(config),
      *_attention(config, family),
      *_mlp(config, family),
    )
  ]
  for layer in range(config.num_hidden_layers):
    for name, path, axes in rows:
      if "{expert}" not in name:
        found.append(
          _part(name.format(layer=layer), path, axes, sizes, (layer,))
        )
        continue
      for expert in range(config.num_experts or 0):
        full_name = name.format(layer=layer, expert=expert)
        found.append(_part(full_name, path, axes, sizes, (layer, expert)))
  found.append(_part("model.norm.weight", "final_norm/scale", "d", sizes))
  if not config.tie_word_embeddings:
    found.append(_part("lm_head.weight", "unembedding", "v d", sizes))
  return _stacked(found)


def is_ignorable(name: str, config: decoder_config.DecoderConfig) -> bool:
  """Whether a tensor that has no part may be dropped.

  That is a copy of the embedding where it is tied, and the rotary frequencies
  that old checkpoints kept, which follow from the config.
  """
  is_tied_copy = config.tie_word_embeddings and name == "lm_head.weight"
  return is_tied_copy or name.endswith("rotary_emb.inv_freq")


def _norms(config):
  if config.pre_norm and config.post_norm:
    names = {
      "input": "attention_norm",
      "post_attention": "attention_post_norm",
      "pre_feedforward": "mlp_norm",
      "post_feedforward": "mlp_post_norm",
    }
  elif config.pre_norm:
    names = {"input": "attention_norm", "post_attention": "mlp_norm"}
  else:
    names = {
      "post_attention": "attention_post_norm",
      "post_feedforward": "mlp_post_norm",
    }
  for name, path in names.items():
    yield f"{name}_layernorm.weight", f"{path}/scale", "d"


def _attention(config, family):
  for name, path, heads in (
    ("q", "query", "h"),
    ("k", "key", "g"),
    ("v", "value", "g"),
  ):
    # Phi-3 keeps the three in one tensor, one below the other.
    name = "qkv" if family == "phi3" else name
    name, path = f"self_attn.{name}_proj", f"attention/{path}"
    yield f"{name}.weight", f"{path}/kernel", f"d {heads} k -> ({heads} k) d"
    if config.attention_bias:
      yield f"{name}.bias", f"{path}/bias", f"{heads} k -> ({heads} k)"
  yield (
    "self_attn.o_proj.weight",
    "attention/out/kernel",
    "h k d -> d (h k)",
  )
  if config.attention_out_bias:
    yield "self_attn.o_proj.bias", "attention/out/bias", "d"
  for name, path, heads in (("q", "query", "h"), ("k", "key", "g")):
    axes = {"head": "k", "full": f"{heads} k -> ({heads} k)"}
    if config.qk_norm is not None:
      name, path = f"self_attn.{name}_norm", f"attention/{path}_norm"
      yield f"{name}.weight", f"{path}/scale", axes[config.qk_norm]


def _mlp(config, family):
  names = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
  module = "mlp."
  if family == "mixtral":
    names = {"gate": "w1", "up": "w3", "down": "w2"}
    module = "block_sparse_moe."
  elif family == "phi3":
    names |= {"gate": "gate_up_proj", "up": "gate_up_proj"}
  if config.num_experts is not None:
    yield f"{module}gate.weight", "mlp/router/kernel", "d e -> e d"
    module += "experts.{expert}."
  for path, name in names.items():
    out, into = ("d", "f") if path == "down" else ("f", "d")
    axes = f"{into} {out} -> {out} {into}"
    yield f"{module}{name}.weight", f"mlp/{path}/kernel", axes
    if config.mlp_bias:
      yield f"{module}{name}.bias", f"mlp/{path}/bias", out


def _part(name, path, axes, sizes, index=()):
  """A row with its axes read; one side alone says that both are the same."""
  ours, _, theirs = axes.partition(" -> ")
  letters = ours.split()
  groups = re.findall(r"\((.*?)\)|(\w)", theirs or ours)
  return Part(
    name=name,
    path=tuple(path.split("/")),
    index=index,
    shape=tuple(sizes[letter] for letter in letters),
    axes=tuple(
      tuple(letters.index(letter) for letter in (group or single).split())
      for group, single in groups
    ),
  )


def _stacked(found):
  """Gives parts that share a name their offsets, in the order they came."""
  rows: dict[str, int] = {}
  result = []
  for part in found:
    offset = rows.get(part.name, 0)
    rows[part.name] = offset + part.tensor_shape[0]
    result.append(part._replace(offset=offset))
  return result
