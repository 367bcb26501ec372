"""The slow way, for comparison: single sequences, full logits, no blocks.

Everything is written out, one layer, head, frequency or expert after another.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpop_jax import sharding
from dpop_jax.models import decoder


def random_params(config: decoder.DecoderConfig, seed: int = 0) -> dict:
  """Parameters on the host, with biases and scales that are not 0 and 1."""
  generator = np.random.default_rng(seed)
  mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])

  def draw(path, leaf):
    is_scale = jax.tree_util.keystr(path).endswith("['scale']")
    center = float(is_scale and not config.rms_norm_unit_offset)
    drawn = generator.normal(center, 0.2, leaf.shape)
    return drawn.astype(leaf.dtype)

  return jax.tree.map_with_path(draw, decoder.abstract_params(config, mesh))


def _norm(x, scale, config):
  """x: [length, ...]; all behind the first axis of `scale` is one vector."""
  lead = x.shape[: x.ndim - scale.ndim]
  vectors = x.astype(jnp.float32).reshape(*lead, -1)
  mean_square = jnp.sum(vectors**2, axis=-1) / vectors.shape[-1]
  size = jnp.sqrt(mean_square + config.rms_norm_eps)
  factor = scale.astype(jnp.float32).reshape((1,) * len(lead) + (-1,))
  if config.rms_norm_unit_offset:
    factor = factor + 1.0
  return (vectors / size[..., None] * factor).reshape(x.shape).astype(x.dtype)


def rates(config: decoder.DecoderConfig, is_sliding: bool):
  """Radians a token of each pair of dimensions, and the amplitude.

  One pair after another, in the words of the papers: a wavelength is a number
  of tokens.
  """
  width = int(config.head_width * config.partial_rotary_factor)
  scaling, theta = config.rope_scaling, config.rope_theta
  kind, amplitude = scaling.rope_type, 1.0
  if is_sliding and config.rope_local_base_freq is not None:
    kind, theta = "default", config.rope_local_base_freq
  old_length = scaling.original_max_position_embeddings
  found = []
  for pair in range(width // 2):
    wavelength = 2 * math.pi * theta ** (2 * pair / width)
    if kind == "linear":
      wavelength *= scaling.factor
    elif kind == "llama3":
      longest = old_length / scaling.low_freq_factor
      shortest = old_length / scaling.high_freq_factor
      if wavelength > longest:
        wavelength *= scaling.factor
      elif wavelength > shortest:
        kept = old_length / wavelength - scaling.low_freq_factor
        kept /= scaling.high_freq_factor - scaling.low_freq_factor
        wavelength /= kept + (1 - kept) / scaling.factor
    elif kind == "yarn":
      bounds = []
      for rotations, rounded in (
        (scaling.beta_fast or 32, math.floor),
        (scaling.beta_slow or 1, math.ceil),
      ):
        # theta ** (2 * bound / width) * 2 pi = old_length / rotations
        bound = math.log(old_length / rotations / 2 / math.pi, theta)
        bound *= width / 2
        truncates = scaling.is_truncated in (None, True)
        bounds.append(rounded(bound) if truncates else bound)
      first, last = max(bounds[0], 0), min(bounds[1], width - 1)
      scaled = (pair - first) / ((last - first) or 0.001)
      scaled = min(max(scaled, 0.0), 1.0)
      wavelength /= (1 - scaled) + scaled / scaling.factor
      amplitude = scaling.attention_factor
      if amplitude is None:
        amplitude = 1 + math.log(scaling.factor) / 10
    elif kind == "longrope":
      is_long = scaling.use_long_factor
      factors = scaling.long_factor if is_long else scaling.short_factor
      wavelength *= factors[pair]
      amplitude = scaling.attention_factor
    found.append(2 * math.pi / wavelength)
  return found, amplitude


def _rotate(x, config, is_sliding):
  """x: [length, heads, head_dim]; pairs dimension i with i + half."""
  length, _, width = x.shape
  rate, amplitude = rates(config, is_sliding)
  half = len(rate)
  rate = jnp.asarray(rate, jnp.float32)
  angle = jnp.arange(length, dtype=jnp.float32)[:, None] * rate[None, :]
  turn = jax.lax.complex(jnp.cos(angle), jnp.sin(angle))[:, None, :]
  wide = x.astype(jnp.float32)
  z = jax.lax.complex(wide[..., :half], wide[..., half : 2 * half])
  z = z * turn * amplitude
  parts = [z.real, z.imag, wide[..., 2 * half : width]]
  return jnp.concatenate(parts, axis=-1).astype(x.dtype)


def _capped(scores, cap):
  return scores if cap is None else jnp.tanh(scores / cap) * cap


def _act(x, config):
  wide = x.astype(jnp.float32)
  if config.hidden_act == "silu":
    wide = wide * (1 + jnp.tanh(wide / 2)) / 2
  elif config.hidden_act == "gelu":
    wide = wide * (1 + jax.lax.erf(wide / 2**0.5)) / 2
  else:
    inner = (2 / math.pi) ** 0.5 * (wide + 0.044715 * wide**3)
    wide = wide * (1 + jnp.tanh(inner)) / 2
  return wide.astype(x.dtype)


def _linear(x, layer, sums="ld,df->lf"):
  y = jnp.einsum(sums, x, layer["kernel"].astype(x.dtype))
  return y + layer["bias"].astype(x.dtype)[None] if "bias" in layer else y


def _attention(x, layer, config, is_sliding):
  length = x.shape[0]
  query, key, value = (
    _linear(x, layer[name], "ld,dhk->lhk") for name in ("query", "key", "value")
  )
  if config.qk_norm is not None:
    query = _norm(query, layer["query_norm"]["scale"], config)
    key = _norm(key, layer["key_norm"]["scale"], config)
  query = _rotate(query, config, is_sliding)
  key = _rotate(key, config, is_sliding)
  repeats = query.shape[1] // key.shape[1]
  key, value = (jnp.repeat(y, repeats, axis=1) for y in (key, value))
  scores = jnp.einsum(
    "qhk,chk->hqc", query, key, preferred_element_type=jnp.float32
  )
  scores = scores / (config.query_pre_attn_scalar or config.head_width) ** 0.5
  scores = _capped(scores, config.attn_logit_softcapping)
  distance = np.arange(length)[:, None] - np.arange(length)[None]
  is_seen = distance >= 0
  if is_sliding:
    is_seen &= distance < config.sliding_window
  weights = jax.nn.softmax(jnp.where(is_seen[None], scores, -jnp.inf), axis=-1)
  mixed = jnp.einsum("hqc,chk->qhk", weights.astype(x.dtype), value)
  return _linear(mixed, layer["out"], "qhk,hkd->qd")


def mlp(x, layer, config: decoder.DecoderConfig) -> jax.Array:
  """Dense, or with all experts for all tokens; [length, hidden_size]."""
  gated = lambda layer: _linear(
    _act(_linear(x, layer["gate"]), config) * _linear(x, layer["up"]),
    layer["down"],
  )
  if config.num_experts is None:
    return gated(layer)
  chances = _linear(x, layer["router"]).astype(jnp.float32)
  chances = jax.nn.softmax(chances, axis=-1)
  # The best that are left, one after another.
  left, chosen = chances, jnp.zeros_like(chances)
  for _ in range(config.num_experts_per_tok):
    best = jax.nn.one_hot(left.argmax(axis=-1), config.num_experts)
    left, chosen = jnp.where(best > 0, -1.0, left), chosen + best
  chances = chances * chosen
  if config.norm_topk_prob:
    chances = chances / chances.sum(axis=-1, keepdims=True)
  out = jnp.zeros_like(x)
  for number in range(config.num_experts):
    expert = {
      name: {"kernel": layer[name]["kernel"][number]}
      for name in ("gate", "up", "down")
    }
    out += gated(expert) * chances[:, number].astype(x.dtype)[:, None]
  return out


def sequence_logits(params, config: decoder.DecoderConfig, tokens) -> jax.Array:
  """float32 logits [length, vocab_size] of one sequence [length]."""
  dtype = jnp.dtype(config.dtype)
  x = params["embedding"].astype(dtype)[tokens]
  if config.scale_embeddings:
    x = x * jnp.asarray(math.sqrt(config.hidden_size), dtype)
  for number in range(config.num_hidden_layers):
    layer = jax.tree.map(lambda p: p[number], params["layers"])  # noqa: B023
    is_sliding = config.sliding_window is not None
    if config.layer_types is not None:
      is_sliding = config.layer_types[number] == "sliding_attention"
    for name, run in (
      ("attention", lambda h, p: _attention(h, p, config, is_sliding)),  # noqa: B023
      ("mlp", lambda h, p: mlp(h, p, config)),
    ):
      h = x
      if config.pre_norm:
        h = _norm(h, layer[f"{name}_norm"]["scale"], config)
      h = run(h, layer[name])
      if config.post_norm:
        h = _norm(h, layer[f"{name}_post_norm"]["scale"], config)
      x = x + h
  x = _norm(x, params["final_norm"]["scale"], config)
  unembedding = params.get("unembedding", params["embedding"]).astype(dtype)
  logits = jnp.einsum(
    "ld,vd->lv", x, unembedding, preferred_element_type=jnp.float32
  )
  return _capped(logits, config.final_logit_softcapping)


class Sequences(NamedTuple):
  """Prompt and answer of both sides of pairs, right-padded to one length.

  Padding comes after all that counts, so a causal model never looks at it. It
  is there for sequences of all lengths to need one compilation.

  Attributes:
    tokens: int32 [pairs, 2, length].
    starts: int32 [pairs, 2]; where the answer begins.
    ends: int32 [pairs, 2]; where it ends.
  """

  tokens: np.ndarray
  starts: np.ndarray
  ends: np.ndarray


def sequences(pairs, length=None, num_pairs=None) -> Sequences:
  """Pairs as sequences; pairs beyond the given ones have empty answers."""
  both = [[pair.chosen, pair.rejected] for pair in pairs]
  longest = max(len(p.prompt) + max(map(len, p[1:])) for p in pairs)
  shape = (num_pairs or len(pairs), 2)
  tokens = np.zeros((*shape, length or longest), np.int32)
  starts, ends = np.ones(shape, np.int32), np.ones(shape, np.int32)
  for number, (pair, answers) in enumerate(zip(pairs, both, strict=True)):
    for side, answer in enumerate(answers):
      sequence = np.concatenate([pair.prompt, answer])
      tokens[number, side, : len(sequence)] = sequence
      starts[number, side], ends[number, side] = len(pair.prompt), len(sequence)
  return Sequences(tokens, starts, ends)


def pairs_logps(params, config, batch: Sequences) -> jax.Array:
  """Log-prob of each answer: float32 [pairs, 2]. One sequence after another."""

  # The gradient computes the logits again, so that there are never all at once.
  @jax.checkpoint
  def answer_logp(inputs):
    tokens, start, end = inputs
    logps = jax.nn.log_softmax(sequence_logits(params, config, tokens), axis=-1)
    next_tokens = tokens[1:]
    logps = logps[jnp.arange(len(next_tokens)), next_tokens]
    index = jnp.arange(1, len(tokens))
    return logps.sum(where=(index >= start) & (index < end))

  flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)
  return jax.lax.map(answer_logp, flat).reshape(-1, 2)
