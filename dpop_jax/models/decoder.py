"""A decoder-only transformer; model families are fields of its config.

It maps tokens to hidden states. The vocabulary is met later, where something is
scored (`logprobs.token_logps`) or sampled (`logits`).
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dpop_jax import sharding
from dpop_jax.models import (
  attention,
  attention_blocks,
  embeddings,
  experts,
  layers,
  products,
  rotary,
)
from dpop_jax.models.decoder_config import DecoderConfig
from dpop_jax.models.layers import KeyValueCache

# What a block keeps for the backward pass. "none": everything; "dots": results
# of the weight products and of attention; "full": its input alone.
REMAT_POLICIES = {
  "none": None,
  "dots": jax.checkpoint_policies.save_only_these_names(
    products.NAME, attention.NAME
  ),
  "full": jax.checkpoint_policies.nothing_saveable,
}
# More than any row has; far from where a sum with positions overflows.
_NO_WINDOW = 2**30


def empty_cache(
  config: DecoderConfig, batch: int, length: int
) -> KeyValueCache:
  """A cache for `length` tokens of `batch` sequences."""
  shape = (config.num_hidden_layers, batch, length)
  shape += (config.num_key_value_heads, config.head_width)
  zeros = jnp.zeros(shape, config.dtype)
  return KeyValueCache(zeros, zeros)


class Block(nn.Module):
  """One layer: attention and MLP between norms, added to the stream."""

  config: DecoderConfig

  @nn.compact
  def __call__(self, x, cache, positions, visibilities, differences):
    config = self.config

    def norm(name, is_used, x):
      return layers.RMSNorm(config, name=name)(x) if is_used else x

    mixed, cache = layers.Attention(config, name="attention")(
      norm("attention_norm", config.pre_norm, x),
      cache,
      positions,
      visibilities,
      differences,
    )
    x = x + norm("attention_post_norm", config.post_norm, mixed)
    mlp = layers.MLP if config.num_experts is None else experts.SparseMLP
    mixed = mlp(config, name="mlp")(norm("mlp_norm", config.pre_norm, x))
    x = x + norm("mlp_post_norm", config.post_norm, mixed)
    return sharding.constrain_rows(x), cache


class Decoder(nn.Module):
  """Token ids to normalised last hidden states; layers scanned."""

  config: DecoderConfig

  @nn.compact
  def __call__(
    self,
    tokens: jax.Array,
    positions: jax.Array,
    visible_until: jax.Array | None = None,
    cache: KeyValueCache | None = None,
  ) -> tuple[jax.Array, KeyValueCache | None]:
    """Runs rows of prefix trees, or sequences against a cache.

    Args:
      tokens: int32 [rows, length].
      positions: int32 [rows, length]; for RoPE, and with a cache also where
        keys and values are written (a position outside the cache is not
        written).
      visible_until: int32 [rows, length]; see `pairs.PackedBatch`. Not with a
        cache: there a token sees all positions up to its own.
      cache: Keys and values so far.

    Returns:
      Hidden states [rows, length, hidden_size] and the cache with these tokens.
    """
    if (visible_until is None) == (cache is None):
      raise ValueError("Give either visible_until or a cache.")
    config = self.config
    embedding = self.param(
      "embedding",
      layers.weights(config, "vocab", "embed"),
      (config.vocab_size, config.hidden_size),
      jnp.dtype(config.param_dtype),
    )
    if not config.tie_word_embeddings:
      self.param(
        "unembedding",
        layers.weights(config, "vocab", "embed"),
        (config.vocab_size, config.hidden_size),
        jnp.dtype(config.param_dtype),
      )
    x = embeddings.look_up(embedding.astype(config.dtype), tokens)
    if config.scale_embeddings:
      # Rounded to the activations' dtype first, as in Gemma.
      x = x * jnp.asarray(config.hidden_size**0.5, x.dtype)
    block = Block
    if config.remat != "none":
      policy = REMAT_POLICIES[config.remat]
      block = nn.remat(Block, policy=policy, prevent_cse=False)
    params = self.variables.get("params", {}).get("layers", {})
    if any(map(sharding.is_on_host, jax.tree.leaves(params))):
      # Inside of the scan: a layer at a time.
      fetch = functools.partial(jax.tree.map, sharding.fetched)
      block = nn.map_variables(block, "params", trans_in_fn=fetch)
    blocks = nn.scan(
      block,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=config.num_hidden_layers,
      in_axes=(0, nn.broadcast, nn.broadcast, 0),
      out_axes=0,
      metadata_params={nn.PARTITION_NAME: "layers"},
    )(config, name="layers")
    visibilities = None
    if cache is None:
      visibilities = _visibilities(config, visible_until, positions)
    x, cache = blocks(x, cache, positions, visibilities, _differences(config))
    return layers.RMSNorm(config, name="final_norm")(x), cache


def _visibilities(
  config: DecoderConfig, visible_until: jax.Array, positions: jax.Array
) -> tuple[attention_blocks.Visibility, ...]:
  """What queries see, for each window that a layer has: once for all layers."""
  windows = _windows(config)
  if windows is None:
    return (attention_blocks.visibility(visible_until),)
  return tuple(
    attention_blocks.visibility(visible_until, positions, jnp.int32(window))
    for window in dict.fromkeys(windows)
  )


def _windows(config: DecoderConfig) -> list[int] | None:
  """That of each layer; None if none has one."""
  if not any(config.is_sliding):
    return None
  return [
    config.sliding_window if is_sliding else _NO_WINDOW
    for is_sliding in config.is_sliding
  ]


def _differences(config: DecoderConfig) -> layers.Differences:
  """Those of all layers, with a leading axis."""
  windows = _windows(config)
  if windows is not None:
    windows = jnp.asarray(np.array(windows, np.int32))
  rotations = jax.tree.map(jnp.asarray, rotary.layer_rotations(config))
  return layers.Differences(windows, rotations)


def unembedding(params: dict, config: DecoderConfig) -> jax.Array:
  """The output embedding [vocab_size, hidden_size], tied or not."""
  name = "embedding" if config.tie_word_embeddings else "unembedding"
  return params[name]


def logits(params: dict, hidden: jax.Array, config: DecoderConfig) -> jax.Array:
  """float32 logits [..., vocab_size]; for decoding a few positions."""
  weights = unembedding(params, config).astype(hidden.dtype)
  scores = jnp.einsum(
    "...d,vd->...v", hidden, weights, preferred_element_type=jnp.float32
  )
  cap = config.final_logit_softcapping
  return scores if cap is None else cap * jnp.tanh(scores / cap)


def init_params(key: jax.Array, config: DecoderConfig) -> dict:
  """Fresh parameters, with logical axes as `nn.LogicallyPartitioned` boxes."""
  tokens = jnp.zeros((sharding.active_row_shards(), 1), jnp.int32)
  variables = Decoder(config).init(key, tokens, tokens, tokens + 1)
  return variables["params"]


def param_shardings(config: DecoderConfig, mesh: jax.sharding.Mesh) -> dict:
  """NamedSharding of every parameter on a mesh, by `sharding.AXIS_RULES`."""
  boxed = jax.eval_shape(
    lambda key: init_params(key, config), jax.random.key(0)
  )
  specs = nn.get_partition_spec(boxed)
  return nn.logical_to_mesh_sharding(specs, mesh, list(sharding.AXIS_RULES))


def abstract_params(config: DecoderConfig, mesh: jax.sharding.Mesh) -> dict:
  """Shape, dtype and sharding of every parameter."""
  boxed = jax.eval_shape(
    lambda key: init_params(key, config), jax.random.key(0)
  )
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    nn.unbox(boxed),
    param_shardings(config, mesh),
  )


def make_params(
  key: jax.Array, config: DecoderConfig, mesh: jax.sharding.Mesh
) -> dict:
  """Fresh parameters, born sharded; the same numbers on every mesh."""

  def init(key):
    return nn.unbox(init_params(key, config))

  return jax.jit(init, out_shardings=param_shardings(config, mesh))(key)
