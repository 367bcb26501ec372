"""Floating-point operations of an update, counted from the model's sizes.

The compiler's own count is of no use here: it counts the body of a loop once,
and the layers are a loop. Only products of matrices are counted, a multiply and
an add as two operations; norms, activations, softmax and the optimizer are
about a hundredth of them in models of billions of parameters.
"""

import dataclasses

from dpop_jax.models import decoder_config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
  """What an update computes on, over all devices.

  Attributes:
    positions: Tokens of the rows, padding included: it is computed as well.
    scores: Positions that meet the vocabulary.
    visible_pairs: Pairs of a query and a key, in one layer and for one head.
    are_logits_kept: Whether they are few enough not to be computed again; see
      `logprobs.are_logits_kept`.
  """

  positions: int
  scores: int
  visible_pairs: int
  are_logits_kept: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flops:
  """Operations of an update, over all devices.

  Attributes:
    forward: Of the policy.
    backward: Gradients of the policy.
    recomputation: What the backward pass computes a second time: of the layers
      by `model.remat`, always attention's scores, and the vocabulary's unless
      they are kept.
    reference: Forward of the reference.
  """

  forward: int
  backward: int
  recomputation: int
  reference: int

  @property
  def total(self) -> int:
    return sum(dataclasses.astuple(self))


def count(
  model: decoder_config.DecoderConfig,
  reference_model: decoder_config.DecoderConfig | None,
  work: Work,
) -> Flops:
  """Operations of one update.

  Args:
    model: The policy's.
    reference_model: The reference's; None where there is none.
    work: What the update computes on.
  """
  products = 2 * model.num_hidden_layers * work.positions
  head = 2 * model.vocab_size * model.hidden_size * work.scores
  # One product of queries and keys, or of their scores and values.
  pairs = 2 * _query_width(model) * model.num_hidden_layers
  pairs *= work.visible_pairs
  forward = products * _layer_weights(model) + 2 * pairs + head
  recomputation = pairs if work.are_logits_kept else head + pairs
  if model.remat == "full":
    recomputation += 2 * pairs
  if model.remat != "none":
    recomputation += products * _recomputed_weights(model)
  reference = 0
  if reference_model is not None:
    reference = count(reference_model, None, work).forward
  return Flops(
    forward=forward,
    # A product has two gradients, each as much work as itself.
    backward=2 * forward,
    recomputation=recomputation,
    reference=reference,
  )


def _layer_weights(model: decoder_config.DecoderConfig) -> int:
  """Weights of a layer that a token is multiplied with."""
  heads = 2 * model.num_attention_heads + 2 * model.num_key_value_heads
  router = model.hidden_size * (model.num_experts or 0)
  return (
    model.hidden_size * heads * model.head_width + router + 3 * _matrix(model)
  )


def _recomputed_weights(model: decoder_config.DecoderConfig) -> int:
  """Those of them that are multiplied again on the way back."""
  is_sparse = model.num_experts is not None
  if model.remat == "dots":
    # Products with experts have no name that they could be kept by.
    return 3 * _matrix(model) if is_sparse else 0
  # Nothing needs what a block ends with, unless it is normalised or weighed.
  is_last_needed = model.post_norm or is_sparse
  return _layer_weights(model) - (0 if is_last_needed else _matrix(model))


def _matrix(model: decoder_config.DecoderConfig) -> int:
  """Weights of one of the MLP's three products, of a token's experts."""
  experts = model.num_experts_per_tok or 1
  return experts * model.hidden_size * model.intermediate_size


def _query_width(model: decoder_config.DecoderConfig) -> int:
  return model.num_attention_heads * model.head_width
