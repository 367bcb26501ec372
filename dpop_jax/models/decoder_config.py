"""What a decoder is made of: sizes and options, in Hugging Face's names."""

import dataclasses
import math

import jax

from dpop_jax import sharding

_DTYPES = ("float32", "bfloat16")
ACTIVATIONS = ("silu", "gelu_pytorch_tanh", "gelu")
FULL, SLIDING = "full_attention", "sliding_attention"
# What a block keeps for the backward pass: everything; results of the weight
# products and of attention; its input alone.
REMATS = ("none", "dots", "full")
# Options of `rope_scaling` that each type needs, and those it may have.
ROPE_TYPES = {
  "default": ((), ()),
  "linear": (("factor",), ()),
  "llama3": (
    (
      "factor",
      "low_freq_factor",
      "high_freq_factor",
      "original_max_position_embeddings",
    ),
    (),
  ),
  "yarn": (
    ("factor", "original_max_position_embeddings"),
    ("attention_factor", "beta_fast", "beta_slow", "is_truncated"),
  ),
  "longrope": (
    (
      "short_factor",
      "long_factor",
      "original_max_position_embeddings",
      "attention_factor",
    ),
    ("use_long_factor",),
  ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
  """How rotary frequencies are stretched for long texts.

  What a type does not use stays None.

  Attributes:
    rope_type: A key of ROPE_TYPES.
    factor: By which texts became longer (linear, llama3, yarn).
    original_max_position_embeddings: Length before (llama3, yarn, longrope).
    low_freq_factor: Wavelengths longer than the original length by this are
      scaled whole (llama3).
    high_freq_factor: Shorter ones by this are not scaled (llama3).
    beta_fast: Rotations over the original length above which nothing is scaled
      (yarn); 32 if None.
    beta_slow: Rotations below which all is scaled (yarn); 1 if None.
    is_truncated: Whether the bounds that follow from the two are rounded to
      whole dimensions (yarn); True if None.
    attention_factor: Multiplies cosines and sines (yarn, longrope); for yarn
      0.1 ln(factor) + 1 if None.
    short_factor: Divides each frequency, up to the original length (longrope).
    long_factor: Likewise in longer texts (longrope).
    use_long_factor: Takes the long factors for texts of any length, instead of
      the short ones (longrope); None is False.
  """

  rope_type: str = "default"
  factor: float | None = None
  original_max_position_embeddings: int | None = None
  low_freq_factor: float | None = None
  high_freq_factor: float | None = None
  beta_fast: float | None = None
  beta_slow: float | None = None
  is_truncated: bool | None = None
  attention_factor: float | None = None
  short_factor: tuple[float, ...] | None = None
  long_factor: tuple[float, ...] | None = None
  use_long_factor: bool | None = None

  def __post_init__(self):
    if self.rope_type not in ROPE_TYPES:
      raise ValueError(
        f"model.rope_scaling.rope_type must be one of {', '.join(ROPE_TYPES)}; "
        f"got {self.rope_type!r}."
      )
    needed, optional = ROPE_TYPES[self.rope_type]
    for field in dataclasses.fields(self)[1:]:
      key, value = f"model.rope_scaling.{field.name}", getattr(self, field.name)
      if value is None:
        if field.name in needed:
          raise ValueError(
            f"model.rope_scaling.rope_type={self.rope_type!r} needs {key}."
          )
        continue
      if field.name not in needed + optional:
        raise ValueError(
          f"{key} is {value}, but model.rope_scaling.rope_type="
          f"{self.rope_type!r} does not use it; leave it out (None)."
        )
      values = value if isinstance(value, tuple) else (value,)
      if field.type != (bool | None) and not all(
        0 < v < math.inf for v in values
      ):
        raise ValueError(f"{key} must be positive, got {value}.")
    low, high = self.low_freq_factor, self.high_freq_factor
    if low is not None and low >= high:
      raise ValueError(
        f"model.rope_scaling.low_freq_factor ({low}) must be below "
        f"model.rope_scaling.high_freq_factor ({high})."
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
  """Sizes and options of a decoder, in Hugging Face's names.

  Attributes:
    vocab_size: Rows of the embedding; at least the tokenizer's.
    hidden_size: Width of the residual stream.
    intermediate_size: Width of the MLP, or of each expert.
    num_hidden_layers: Blocks.
    num_attention_heads: Query heads.
    num_key_value_heads: Key and value heads; divides the query heads.
    head_dim: Width of a head; hidden_size / num_attention_heads if None.
    hidden_act: Of the MLP's gate; one of ACTIVATIONS ("gelu" is the exact one).
    rope_theta: Base of the rotary embedding.
    rope_scaling: How its frequencies are stretched.
    rope_local_base_freq: Base in sliding layers, unscaled there; rope_theta and
      rope_scaling hold in all layers if None.
    partial_rotary_factor: Share of a head that is rotated.
    rms_norm_eps: Added to the mean square.
    rms_norm_unit_offset: A norm multiplies by 1 + scale instead of scale.
    pre_norm: Norms in front of attention and MLP.
    post_norm: Norms behind attention and MLP, before they are added.
    qk_norm: Norms queries and keys: "head" each head, "full" all heads of a
      token together; None does not.
    tie_word_embeddings: Input and output embedding are one.
    scale_embeddings: Input embeddings are multiplied by sqrt(hidden_size).
    attention_bias: Query, key and value projections have biases.
    attention_out_bias: So has the projection behind attention.
    mlp_bias: So have the MLP's projections.
    query_pre_attn_scalar: Scores are divided by its square root; by that of
      head_dim if None.
    attn_logit_softcapping: Scores s become cap * tanh(s / cap); None for s.
    final_logit_softcapping: Likewise the logits of the vocabulary.
    sliding_window: Tokens that a query of a sliding layer sees, itself
      included; None sees all.
    layer_types: FULL or SLIDING for each layer; None is SLIDING for all if
      there is a sliding_window, else FULL.
    num_experts: Experts of each layer's sparse MLP; None for a dense MLP.
    num_experts_per_tok: Experts that each token goes to.
    norm_topk_prob: Weights of a token's experts are made to add up to 1.
    initializer_range: Standard deviation of fresh weights.
    dtype: Activations and matrix products.
    param_dtype: Weights as stored.
    remat: One of REMATS.
  """

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  num_key_value_heads: int
  head_dim: int | None = None
  hidden_act: str = "silu"
  rope_theta: float = 10_000.0
  rope_scaling: RopeScaling = RopeScaling()
  rope_local_base_freq: float | None = None
  partial_rotary_factor: float = 1.0
  rms_norm_eps: float = 1e-5
  rms_norm_unit_offset: bool = False
  pre_norm: bool = True
  post_norm: bool = False
  qk_norm: str | None = None
  tie_word_embeddings: bool = False
  scale_embeddings: bool = False
  attention_bias: bool = False
  attention_out_bias: bool = False
  mlp_bias: bool = False
  query_pre_attn_scalar: float | None = None
  attn_logit_softcapping: float | None = None
  final_logit_softcapping: float | None = None
  sliding_window: int | None = None
  layer_types: tuple[str, ...] | None = None
  num_experts: int | None = None
  num_experts_per_tok: int | None = None
  norm_topk_prob: bool = True
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
    for name, options in (
      ("dtype", _DTYPES),
      ("param_dtype", _DTYPES),
      ("hidden_act", ACTIVATIONS),
      ("qk_norm", (None, "head", "full")),
      ("remat", REMATS),
    ):
      if getattr(self, name) not in options:
        raise ValueError(
          f"model.{name} must be one of {options}, got {getattr(self, name)!r}."
        )
    self._check_rotary()
    self._check_layers()
    self._check_experts()

  def _check_rotary(self):
    width = self.rotary_width
    if width < 2 or width % 2 or width > self.head_width:
      raise ValueError(
        "model.head_dim * model.partial_rotary_factor must be even and at most "
        f"model.head_dim ({self.head_width}), got {width}."
      )
    for name in ("short_factor", "long_factor"):
      factors = getattr(self.rope_scaling, name)
      if factors is not None and len(factors) != width // 2:
        raise ValueError(
          f"model.rope_scaling.{name} must have a factor for each of the "
          f"{width // 2} frequencies, got {len(factors)}."
        )

  def _check_layers(self):
    if not (self.pre_norm or self.post_norm):
      raise ValueError(
        "Set model.pre_norm or model.post_norm; without either nothing is "
        "normalised."
      )
    types = self.layer_types
    if types is not None:
      if len(types) != self.num_hidden_layers or set(types) - {FULL, SLIDING}:
        raise ValueError(
          f"model.layer_types must be {FULL!r} or {SLIDING!r} for each of the "
          f"{self.num_hidden_layers} layers, got {types}."
        )
      if SLIDING in types and self.sliding_window is None:
        raise ValueError(
          "model.layer_types has sliding layers; set model.sliding_window."
        )
    has_sliding = any(self.is_sliding)
    for name in ("sliding_window", "rope_local_base_freq"):
      if getattr(self, name) is not None and not has_sliding:
        raise ValueError(
          f"model.{name} is {getattr(self, name)}, but no layer is sliding; "
          "leave it out (None)."
        )

  def _check_experts(self):
    if (self.num_experts is None) != (self.num_experts_per_tok is None):
      raise ValueError(
        "Set both of model.num_experts and model.num_experts_per_tok or "
        f"neither; got {self.num_experts} and {self.num_experts_per_tok}."
      )
    if self.num_experts is None:
      return
    if self.num_experts_per_tok > self.num_experts:
      raise ValueError(
        f"model.num_experts_per_tok ({self.num_experts_per_tok}) must be at "
        f"most model.num_experts ({self.num_experts})."
      )
    if self.mlp_bias:
      raise ValueError("model.mlp_bias does not go with model.num_experts.")

  @property
  def head_width(self) -> int:
    return self.head_dim or self.hidden_size // self.num_attention_heads

  @property
  def rotary_width(self) -> int:
    """Dimensions of a head that are rotated."""
    return int(self.head_width * self.partial_rotary_factor)

  @property
  def is_sliding(self) -> tuple[bool, ...]:
    """For each layer, whether its attention has the window."""
    if self.layer_types is None:
      return (self.sliding_window is not None,) * self.num_hidden_layers
    return tuple(kind == SLIDING for kind in self.layer_types)

  @property
  def attention_scale(self) -> float:
    """Multiplies the products of queries and keys."""
    return (self.query_pre_attn_scalar or self.head_width) ** -0.5

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
