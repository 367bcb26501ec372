"""A decoder-only transformer; model families are fields of its config.

It maps tokens to hidden states. The vocabulary is met later, where something is
scored (`logprobs.token_logps`) or sampled (`logits`).
"""

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpop_jax import sharding
from dpop_jax.models import attention, embeddings, products

_DTYPES = ("float32", "bfloat16")
# What a block keeps for the backward pass. "none": everything; "dots": results
# of the weight products; "full": its input alone.
REMAT_POLICIES = {
  "none": None,
  "dots": jax.checkpoint_policies.save_only_these_names(products.NAME),
  "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
  """Sizes and options of a decoder, in Hugging Face's names.

  Attributes:
    vocab_size: Rows of the embedding; at least the tokenizer's.
    hidden_size: Width of the residual stream.
    intermediate_size: Width of the MLP.
    num_hidden_layers: Blocks.
    num_attention_heads: Query heads.
    num_key_value_heads: Key and value heads; divides the query heads.
    head_dim: Width of a head; hidden_size / num_attention_heads if None.
    rope_theta: Base of the rotary embedding.
    rms_norm_eps: Added to the mean square.
    tie_word_embeddings: Input and output embedding are one.
    attention_bias: Query, key and value projections have biases.
    initializer_range: Standard deviation of fresh weights.
    dtype: Activations and matrix products.
    param_dtype: Weights as stored.
    remat: "none", "dots" or "full"; see REMAT_POLICIES.
  """

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  num_key_value_heads: int
  head_dim: int | None = None
  rope_theta: float = 10_000.0
  rms_norm_eps: float = 1e-5
  tie_word_embeddings: bool = False
  attention_bias: bool = False
  initializer_range: float = 0.02
  dtype: str = "float32"
  param_dtype: str = "float32"
  remat: str = "none"

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      is_number = isinstance(value, int | float) and field.type is not bool
      if is_number and not value > 0:
        raise ValueError(f"model.{field.name} must be positive, got {value}.")
    if self.num_attention_heads % self.num_key_value_heads:
      raise ValueError(
        f"model.num_attention_heads ({self.num_attention_heads}) must be a "
        f"multiple of model.num_key_value_heads ({self.num_key_value_heads})."
      )
    if self.head_dim is None and self.hidden_size % self.num_attention_heads:
      raise ValueError(
        f"model.hidden_size ({self.hidden_size}) must be a multiple of "
        f"model.num_attention_heads ({self.num_attention_heads}); otherwise "
        "set model.head_dim."
      )
    if self.head_width % 2:
      raise ValueError(
        f"model.head_dim must be even for rotary positions, got "
        f"{self.head_width}."
      )
    for name in ("dtype", "param_dtype"):
      if getattr(self, name) not in _DTYPES:
        raise ValueError(
          f"model.{name} must be one of {_DTYPES}, got {getattr(self, name)!r}."
        )
    if self.remat not in REMAT_POLICIES:
      raise ValueError(
        f"model.remat must be one of {tuple(REMAT_POLICIES)}, got "
        f"{self.remat!r}."
      )

  @property
  def head_width(self) -> int:
    return self.head_dim or self.hidden_size // self.num_attention_heads

  def check_mesh(self, mesh: jax.sharding.Mesh) -> None:
    """Raises ValueError if a weight can't be split evenly over the mesh."""
    tensor, fsdp = mesh.shape[sharding.TENSOR], mesh.shape[sharding.FSDP]
    for name, axis, size in (
      ("vocab_size", "tensor", tensor),
      ("num_key_value_heads", "tensor", tensor),
      ("intermediate_size", "tensor", tensor),
      ("hidden_size", "fsdp", fsdp),
    ):
      if getattr(self, name) % size:
        raise ValueError(
          f"model.{name} ({getattr(self, name)}) must be a multiple of "
          f"mesh.{axis} ({size})."
        )


class KeyValueCache(NamedTuple):
  """Keys and values of the tokens so far.

  Attributes:
    keys: [layers, batch, length, kv_heads, head_dim].
    values: Likewise.
  """

  keys: jax.Array
  values: jax.Array


def empty_cache(
  config: DecoderConfig, batch: int, length: int
) -> KeyValueCache:
  """A cache for `length` tokens of `batch` sequences."""
  shape = (config.num_hidden_layers, batch, length)
  shape += (config.num_key_value_heads, config.head_width)
  zeros = jnp.zeros(shape, config.dtype)
  return KeyValueCache(zeros, zeros)


def _weights(config: DecoderConfig, *axes: str):
  init = nn.initializers.normal(config.initializer_range)
  return nn.with_logical_partitioning(init, axes)


class RMSNorm(nn.Module):
  """Divides by the root mean square, in float32, and scales."""

  config: DecoderConfig

  @nn.compact
  def __call__(
    self, x: Float[Array, "rows length hidden"]
  ) -> Float[Array, "rows length hidden"]:
    scale = self.param(
      "scale",
      # Small enough to be kept whole on every device.
      nn.with_logical_partitioning(nn.initializers.ones_init(), (None,)),
      (x.shape[-1],),
      jnp.dtype(self.config.param_dtype),
    )
    wide = x.astype(jnp.float32)
    mean_square = jnp.square(wide).mean(axis=-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(mean_square + self.config.rms_norm_eps)
    return (wide * scale.astype(jnp.float32)[None, None]).astype(x.dtype)


class Attention(nn.Module):
  """Grouped-query attention with rotary positions."""

  config: DecoderConfig

  @nn.compact
  def __call__(self, x, cache, positions, visible_until):
    config = self.config

    def project(name, heads, axis):
      return nn.DenseGeneral(
        (heads, config.head_width),
        use_bias=config.attention_bias,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        dot_general=products.weight_product,
        kernel_init=_weights(config, "embed", axis, "head_dim"),
        bias_init=nn.with_logical_partitioning(
          nn.initializers.zeros_init(), (axis, "head_dim")
        ),
        name=name,
      )(x)

    query = project("query", config.num_attention_heads, "heads")
    key = project("key", config.num_key_value_heads, "kv_heads")
    value = project("value", config.num_key_value_heads, "kv_heads")
    query = embeddings.rotate(query, positions, config.rope_theta)
    key = embeddings.rotate(key, positions, config.rope_theta)
    if cache is None:
      mixed = attention.forest_attention(query, key, value, visible_until)
    else:
      # Row by row, so that rows stay on their devices.
      write = jax.vmap(lambda old, at, new: old.at[at].set(new, mode="drop"))
      cache = KeyValueCache(
        write(cache.keys, positions, key), write(cache.values, positions, value)
      )
      index = jnp.arange(cache.keys.shape[1])
      mask = index[None, None, :] <= positions[:, :, None]
      mixed = attention.masked_attention(query, *cache, mask)
    out = nn.DenseGeneral(
      config.hidden_size,
      axis=(-2, -1),
      use_bias=False,
      dtype=config.dtype,
      param_dtype=config.param_dtype,
      dot_general=products.weight_product,
      kernel_init=_weights(config, "heads", "head_dim", "embed"),
      name="out",
    )(mixed)
    return out, cache


class MLP(nn.Module):
  """SwiGLU: `down(silu(gate(x)) * up(x))`."""

  config: DecoderConfig

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    def project(name, size, *axes):
      return nn.Dense(
        size,
        use_bias=False,
        dtype=self.config.dtype,
        param_dtype=self.config.param_dtype,
        dot_general=products.weight_product,
        kernel_init=_weights(self.config, *axes),
        name=name,
      )

    width = self.config.intermediate_size
    gate = project("gate", width, "embed", "mlp")(x)
    up = project("up", width, "embed", "mlp")(x)
    down = project("down", self.config.hidden_size, "mlp", "embed")
    return down(nn.silu(gate) * up)


class Block(nn.Module):
  """One layer: attention and MLP, each behind a norm, added to the stream."""

  config: DecoderConfig

  @nn.compact
  def __call__(self, x, cache, positions, visible_until):
    mixed, cache = Attention(self.config, name="attention")(
      RMSNorm(self.config, name="attention_norm")(x),
      cache,
      positions,
      visible_until,
    )
    x = x + mixed
    x = x + MLP(self.config, name="mlp")(
      RMSNorm(self.config, name="mlp_norm")(x)
    )
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
      _weights(config, "vocab", "embed"),
      (config.vocab_size, config.hidden_size),
      jnp.dtype(config.param_dtype),
    )
    if not config.tie_word_embeddings:
      self.param(
        "unembedding",
        _weights(config, "vocab", "embed"),
        (config.vocab_size, config.hidden_size),
        jnp.dtype(config.param_dtype),
      )
    x = embeddings.look_up(embedding.astype(config.dtype), tokens)
    block = Block
    if config.remat != "none":
      policy = REMAT_POLICIES[config.remat]
      block = nn.remat(Block, policy=policy, prevent_cse=False)
    layers = nn.scan(
      block,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=config.num_hidden_layers,
      in_axes=(0, nn.broadcast, nn.broadcast),
      out_axes=0,
      metadata_params={nn.PARTITION_NAME: "layers"},
    )(config, name="layers")
    x, cache = layers(x, cache, positions, visible_until)
    return RMSNorm(config, name="final_norm")(x), cache


def unembedding(params: dict, config: DecoderConfig) -> jax.Array:
  """The output embedding [vocab_size, hidden_size], tied or not."""
  name = "embedding" if config.tie_word_embeddings else "unembedding"
  return params[name]


def logits(params: dict, hidden: jax.Array, config: DecoderConfig) -> jax.Array:
  """float32 logits [..., vocab_size]; for decoding a few positions."""
  weights = unembedding(params, config).astype(hidden.dtype)
  return jnp.einsum(
    "...d,vd->...v", hidden, weights, preferred_element_type=jnp.float32
  )


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
