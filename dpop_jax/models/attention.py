"""Attention over rows of prefix trees.

Query `q` sees key `k` exactly when `k <= q < visible_until[k]` and, if there is
a window, `positions[q] - positions[k] < window`, where a position is the depth
of a token in its tree.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from dpop_jax import sharding
from dpop_jax.models import (
  attention_blocks,
  attention_gpu,
  attention_kernel,
  attention_xla,
)
from dpop_jax.models.attention_blocks import Visibility
from dpop_jax.models.attention_scores import MASKED, Scoring

# By which a remat policy knows what the way back needs of the way there.
NAME = "forest_attention"
# How [rows, length, heads, head_dim] and the log-normalizers [heads, rows,
# length] are split.
_HEADS = P(sharding.ROW_AXES, None, sharding.TENSOR)
_NORMALIZERS = P(sharding.TENSOR, sharding.ROW_AXES)


def forest_mask(
  visible_until: Int[Array, "rows length"],
  positions: Int[Array, "rows length"] | None = None,
  window: Int[Array, ""] | None = None,
) -> Bool[Array, "rows length length"]:
  """Which key (last axis) each query (second axis) may see, written out.

  Raises:
    ValueError: There is a window, but no positions.
  """
  attention_blocks.check_window(positions, window)
  index = jnp.arange(visible_until.shape[-1])
  queries, keys = index[None, :, None], index[None, None, :]
  mask = (keys <= queries) & (queries < visible_until[:, None, :])
  if window is None:
    return mask
  return mask & (positions[:, :, None] - positions[:, None, :] < window)


def masked_attention(
  query: Float[Array, "rows queries heads head_dim"],
  key: Float[Array, "rows keys kv_heads head_dim"],
  value: Float[Array, "rows keys kv_heads head_dim"],
  mask: Bool[Array, "rows queries keys"],
  *,
  scale: float,
  softcap: float | None = None,
) -> Float[Array, "rows queries heads head_dim"]:
  """Grouped-query attention with the whole mask in memory; for decoding.

  Scores and their softmax are float32. A query that sees nothing gives zeros.
  For `scale` and `softcap` see `forest_attention`.
  """
  rows, queries, heads, head_dim = query.shape
  kv_heads = key.shape[2]
  grouped = query.reshape(rows, queries, kv_heads, -1, head_dim)
  scores = jnp.einsum(
    "rqkgd,rckd->rkgqc", grouped, key, preferred_element_type=jnp.float32
  )
  scores = Scoring(scale, softcap).scores(scores)
  mask = mask[:, None, None]
  weights = jax.nn.softmax(jnp.where(mask, scores, MASKED), axis=-1)
  weights = jnp.where(mask, weights, 0.0).astype(value.dtype)
  mixed = jnp.einsum(
    "rkgqc,rckd->rqkgd", weights, value, preferred_element_type=jnp.float32
  )
  return mixed.reshape(rows, queries, heads, head_dim).astype(query.dtype)


def forest_attention(
  query: Float[Array, "rows length heads head_dim"],
  key: Float[Array, "rows length kv_heads head_dim"],
  value: Float[Array, "rows length kv_heads head_dim"],
  visibility: Visibility,
  *,
  scale: float,
  softcap: float | None = None,
) -> Float[Array, "rows length heads head_dim"]:
  """Grouped-query attention in blocks, without a mask in memory.

  Softmax is accumulated block by block in float32 and recomputed in the
  backward pass. Blocks in which no query sees a key are not computed. Rows are
  split over the mesh's data and fsdp axes and heads over its tensor axis, with
  no communication. On TPUs and NVIDIA GPUs it is a kernel, elsewhere plain XLA.

  Args:
    query: One for each token and head.
    key: One for each token and group of heads.
    value: Likewise.
    visibility: Of the rows, from `attention_blocks.visibility`.
    scale: Multiplies the products of queries and keys, which makes scores.
    softcap: Scores s become softcap * tanh(s / softcap), if given.
  """
  query, key, value = map(jnp.asarray, (query, key, value))
  return _attention(query, key, value, visibility, Scoring(scale, softcap))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(query, key, value, visibility, scoring):
  return _forward(query, key, value, visibility, scoring)[0]


def _forward(query, key, value, visibility, scoring):
  run = sharding.per_device(
    _by_platform("forward", scoring),
    in_specs=(_HEADS, _HEADS, _HEADS, attention_blocks.SPLIT),
    out_specs=(_HEADS, _NORMALIZERS),
  )
  results = run(query, key, value, visibility)
  out, log_normalizers = (checkpoint_name(x, NAME) for x in results)
  return out, (query, key, value, visibility, out, log_normalizers)


def _backward(scoring, residuals, out_gradient):
  specs = (*(_HEADS,) * 3, attention_blocks.SPLIT, _HEADS, _NORMALIZERS, _HEADS)
  run = sharding.per_device(
    _by_platform("backward", scoring),
    in_specs=specs,
    out_specs=(_HEADS, _HEADS, _HEADS),
  )
  return (*run(*residuals, out_gradient), None)


_attention.defvjp(_forward, _backward)


def _by_platform(direction, scoring):
  """Decides where it is compiled for, which need not be where it is traced.

  Tracing all three takes most of the tracing of a decoder; where a mesh says
  what its devices are, only theirs is traced.
  """
  way = lambda module: functools.partial(
    getattr(module, direction), scoring=scoring
  )
  known = {"cpu": attention_xla, "tpu": attention_kernel}
  platform = sharding.active_platform()
  if platform in known:
    return way(known[platform])
  return functools.partial(
    jax.lax.platform_dependent,
    tpu=way(attention_kernel),
    cuda=way(attention_gpu),
    default=way(attention_xla),
  )
