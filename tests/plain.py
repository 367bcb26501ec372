"""The slow way, for comparison: single sequences, full logits, no blocks."""

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
    drawn = generator.normal(float(is_scale), 0.2, leaf.shape)
    return drawn.astype(leaf.dtype)

  return jax.tree.map_with_path(draw, decoder.abstract_params(config, mesh))


def _norm(x, scale, eps):
  wide = x.astype(jnp.float32)
  wide = wide / jnp.sqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + eps)
  return (wide * scale.astype(jnp.float32)[None, :]).astype(x.dtype)


def _rotate(x, theta):
  """x: [length, heads, head_dim]; pairs dimension i with i + head_dim / 2."""
  length, _, width = x.shape
  rate = jnp.asarray(theta ** (-np.arange(0, width, 2) / width), jnp.float32)
  angle = jnp.arange(length, dtype=jnp.float32)[:, None] * rate[None, :]
  turn = jax.lax.complex(jnp.cos(angle), jnp.sin(angle))[:, None, :]
  wide = x.astype(jnp.float32)
  z = jax.lax.complex(wide[..., : width // 2], wide[..., width // 2 :]) * turn
  return jnp.concatenate([z.real, z.imag], axis=-1).astype(x.dtype)


def sequence_logits(params, config: decoder.DecoderConfig, tokens) -> jax.Array:
  """float32 logits [length, vocab_size] of one sequence [length]."""
  dtype = jnp.dtype(config.dtype)
  length = tokens.shape[0]
  x = params["embedding"].astype(dtype)[tokens]
  causal = jnp.tril(jnp.ones((length, length), bool))

  def project(x, layer):
    y = jnp.einsum("ld,dhk->lhk", x, layer["kernel"].astype(dtype))
    return y + layer["bias"].astype(dtype)[None] if "bias" in layer else y

  for number in range(config.num_hidden_layers):
    layer = jax.tree.map(lambda p: p[number], params["layers"])  # noqa: B023
    h = _norm(x, layer["attention_norm"]["scale"], config.rms_norm_eps)
    attention = layer["attention"]
    query = _rotate(project(h, attention["query"]), config.rope_theta)
    key = _rotate(project(h, attention["key"]), config.rope_theta)
    value = project(h, attention["value"])
    repeats = query.shape[1] // key.shape[1]
    key, value = (jnp.repeat(y, repeats, axis=1) for y in (key, value))
    scores = jnp.einsum(
      "qhk,chk->hqc", query, key, preferred_element_type=jnp.float32
    )
    scores = jnp.where(causal[None], scores / config.head_width**0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(dtype)
    mixed = jnp.einsum("hqc,chk->qhk", weights, value)
    x = x + jnp.einsum(
      "qhk,hkd->qd", mixed, attention["out"]["kernel"].astype(dtype)
    )
    h = _norm(x, layer["mlp_norm"]["scale"], config.rms_norm_eps)
    mlp = {k: v["kernel"].astype(dtype) for k, v in layer["mlp"].items()}
    x = x + (jax.nn.silu(h @ mlp["gate"]) * (h @ mlp["up"])) @ mlp["down"]
  x = _norm(x, params["final_norm"]["scale"], config.rms_norm_eps)
  unembedding = params.get("unembedding", params["embedding"]).astype(dtype)
  return jnp.einsum(
    "ld,vd->lv", x, unembedding, preferred_element_type=jnp.float32
  )


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
