"""Why devices send to each other in a step: everything the design calls for.

Collectives of a compiled program are told apart by what in the source they came
from. One that is none of these is a mistake, of ours or of the compiler.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from dpop_jax import sharding
from dpop_jax.planning import collectives

_GATHER = ("all-gather", "collective-permute")
_SCATTER = ("reduce-scatter", "collective-permute")
_REDUCE = ("all-reduce", "reduce-scatter")
# The compiler writes a gather over all three directions of a torus as an
# all-reduce of arrays that are zero but for the device's own part, and some
# scatters as an all-reduce of which each device takes its part.
_ANY = (*_GATHER, *_REDUCE)


class _Purpose(NamedTuple):
  """One reason to communicate.

  Attributes:
    text: The reason.
    kinds: Of collectives that serve it.
    axes: Mesh axes that it may extend over.
    pattern: Found in the `op_name`.
    max_bytes: Of the operands; sums of losses are small.
  """

  text: str
  kinds: Sequence[str]
  axes: Sequence[str]
  pattern: str
  max_bytes: float = float("inf")


_ROWS = sharding.ROW_AXES
_SMALL = 1e6
# What weights of a layer go through, and where they come from: the stack.
_WEIGHTS = (
  r"(/layers/.*(dot_general|all_gather|convert_element_type)"
  r"|/while/body/jit\(dynamic_index_in_dim\)/dynamic_slice)"
)
_PURPOSES = (
  _Purpose(
    "weights of a layer are gathered for its products",
    _ANY,
    (sharding.FSDP,),
    rf"^(?!.*transpose\().*{_WEIGHTS}",
  ),
  _Purpose(
    "weights of a layer are gathered again on the way back",
    ("all-gather",),
    (sharding.FSDP,),
    rf"transpose\(.*{_WEIGHTS}",
  ),
  _Purpose(
    "gradients of a layer's weights are summed over rows and scattered, and "
    "weights gathered, while they are multiplied",
    _ANY,
    _ROWS,
    r"transpose\(.*/layers/.*(dot_general|reduce_scatter|all_gather|dynamic_"
    r"update|psum)",
  ),
  _Purpose(
    "products with split heads or a split MLP are summed",
    _REDUCE,
    (sharding.TENSOR,),
    r"/layers/.*(dot_general|psum|add_any)",
  ),
  _Purpose(
    "the embedding is gathered for the look-up",
    _ANY,
    (sharding.FSDP,),
    r"jvp\((Decoder\)/(convert_element_type|shard_map/(all_gather|jit\(_take))"
    r"|\)/shard_map/gather)|\[\\?'embedding\\?'\]$",
  ),
  _Purpose(
    "looked-up embeddings are summed over parts of the vocabulary",
    _REDUCE,
    (sharding.TENSOR,),
    r"jvp\(Decoder\)\)?/shard_map/(psum|jit\(_where\))",
  ),
  _Purpose(
    "the output embedding is gathered for the scores",
    _ANY,
    (sharding.FSDP,),
    r"jvp\(\)\)?/shard_map/(all_gather|convert_element_type|.*dot_general)"
    r"|\[\\?'unembedding\\?'\]$",
  ),
  _Purpose(
    "log-normalizers and targets are summed over parts of the vocabulary",
    ("all-reduce",),
    (sharding.TENSOR,),
    r"jvp\(\)/shard_map/(while/body/)*(pmax|psum)",
  ),
  _Purpose(
    "gradients of hidden states are summed over parts of the vocabulary",
    _REDUCE,
    (sharding.TENSOR,),
    r"transpose\(jvp\(\)\)/shard_map/(psum|while)",
  ),
  _Purpose(
    "gradients of the embeddings are summed over rows and scattered",
    _ANY,
    _ROWS,
    r"transpose\(jvp\((Decoder)?\)\)/shard_map/(reduce_scatter|psum|jit\(_take\)|"
    r"scatter-add|while|mul|convert|add)",
  ),
  _Purpose(
    "gradients of norms and biases are summed over rows",
    _REDUCE,
    sharding.MESH_AXES,
    r"transpose\(.*(reduce_sum|add_any)",
  ),
  _Purpose(
    "losses and metrics are summed over rows",
    ("all-reduce",),
    sharding.MESH_AXES,
    r"^(?!.*transpose\().*jvp\(\)/",
    _SMALL,
  ),
  _Purpose(
    "gradients and metrics are summed over rows, once for all microbatches",
    _REDUCE,
    _ROWS,
    r"^jit\(\w+\)/while$",
  ),
  _Purpose(
    "norms of gradients are summed over the parts of the parameters",
    ("all-reduce",),
    sharding.MESH_AXES,
    r"^jit\(\w+\)/(reduce_sum|jit\(norm\))",
    _SMALL,
  ),
  _Purpose(
    "gradients and metrics are summed over copies of the parameters",
    _REDUCE,
    (sharding.DATA,),
    "",
  ),
)


def purpose(collective: collectives.Collective, axes: Sequence[str]) -> str:
  """Why a step has a collective; empty for one that it should not have.

  Args:
    collective: What to explain.
    axes: Mesh axes that its group extends over.
  """
  if collective.is_received:
    return (
      "sums are put together again, of which each chip has sent a part to "
      "other slices"
    )
  for candidate in _PURPOSES:
    if (
      collective.kind in candidate.kinds
      and set(axes) <= set(candidate.axes)
      and collective.num_bytes <= candidate.max_bytes
      and re.search(candidate.pattern, collective.op_name)
    ):
      return candidate.text
  is_nameless = collective.kind == "all-gather" and not collective.op_name
  if (collective.is_sparse or is_nameless) and set(axes) <= {sharding.FSDP}:
    return "weights are gathered; of which, the compiler does not say"
  return ""
