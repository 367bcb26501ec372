"""What the reference's log-probs depend on, as the name of where they are kept.

Other weights, tokens, arithmetic or code give another name, so what is found
under a name is what would be computed now.
"""

import ast
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpop_jax import config as config_lib
from dpop_jax import steps
from dpop_jax.data import plan as plan_lib
from dpop_jax.models import decoder

# What scores, and what lays out that which is scored.
_SCORER = (
  "models",
  "data/forests.py",
  "data/packing.py",
  "data/plan.py",
  "logprobs.py",
  "pairs.py",
  "sharding.py",
  "steps.py",
)
_PACKAGES = ("jax", "jaxlib", "flax")
# Of a DecoderConfig, what the forward pass does not see.
_OF_NO_EFFECT = ("remat", "initializer_range")
# Names for which a product of float32 matrices is one of float32 numbers.
_FULL_PRECISION = ("float32", "highest")
_SEEDS = (0x9E3779B9, 0x85EBCA6B)


def is_by_pair(model: decoder.DecoderConfig, mesh: jax.sharding.Mesh) -> bool:
  """Whether a pair's log-probs are the same wherever in a batch it lies.

  In float32 they are, to about 1e-7 of their size. What is rounded to bfloat16
  between two layers is not: sums are added up in another order in another
  place, which changes a rounding here and there, which a few layers later has
  changed most of them. Accelerators round the operands of a float32 product,
  too, unless told otherwise (`jax_default_matmul_precision`).
  """
  if model.dtype != "float32":
    return False
  is_told = _matmul_precision() in _FULL_PRECISION
  return is_told or mesh.devices.flat[0].platform == "cpu"


def _matmul_precision():
  return str(getattr(jax.config, "jax_default_matmul_precision"))  # noqa: B009


def key_parts(
  config: config_lib.Config,
  mesh: jax.sharding.Mesh,
  params_digest: str,
  plan: plan_lib.Plan,
) -> dict[str, Any]:
  """All that the log-probs of a plan's pairs depend on; what JSON can say.

  Args:
    config: Of the run.
    mesh: Where they are computed.
    params_digest: `params_digest` of the reference.
    plan: The pairs, and how they are laid out.
  """
  model = config_lib.reference_model(config)
  device = mesh.devices.flat[0]
  fields = dataclasses.asdict(model)
  parts = {
    "weights": params_digest,
    "model": {k: v for k, v in fields.items() if k not in _OF_NO_EFFECT},
    "pairs": plan.pairs.digest(),
    "scorer": scorer_digest(),
    "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
    "device": f"{device.platform} {device.device_kind}",
    "matmul_precision": _matmul_precision(),
  }
  if not is_by_pair(model, mesh):
    parts["layout"] = plan.layout_digest()
    parts["mesh"] = dict(mesh.shape)
  return parts


@functools.cache
def scorer_digest() -> str:
  """A hash of the code that scores, without its comments and layout."""
  digest = hashlib.sha256()
  root = pathlib.Path(__file__).parent
  for name in _SCORER:
    path = root / name
    for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
      digest.update(f"{file.relative_to(root).as_posix()}\n".encode())
      digest.update(code_digest(file.read_text(encoding="utf-8")))
  return digest.hexdigest()


def code_digest(source: str) -> bytes:
  """A hash of some code: equal where only comments and line breaks differ."""
  return hashlib.sha256(ast.dump(ast.parse(source)).encode()).digest()


def params_digest(params: steps.Params) -> str:
  """A hash of names, shapes, dtypes and every bit of some parameters.

  Devices hash what they hold, so it is the same on every mesh and nothing of
  the size of a parameter moves.

  Args:
    params: Arrays of 2 or 4 bytes an element, on the devices of all processes.
  """
  leaves = jax.tree.leaves_with_path(params)
  words = jax.device_get(_words([leaf for _, leaf in leaves]))
  described = {
    jax.tree_util.keystr(path, simple=True, separator="/"): [
      list(leaf.shape),
      str(leaf.dtype),
      np.asarray(found).tolist(),
    ]
    for (path, leaf), found in zip(leaves, words, strict=True)
  }
  text = json.dumps(described, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


@jax.jit
def _words(leaves):
  """uint32 [2] of each array: sums modulo 2**32, in whatever order."""
  return [jnp.stack([_word(x, seed) for seed in _SEEDS]) for x in leaves]


def _word(x, seed):
  width = x.dtype.itemsize * 8
  bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{width}"))
  place = jnp.full(x.shape, seed, jnp.uint32)
  for axis in range(x.ndim):
    stride = math.prod(x.shape[axis + 1 :]) % 2**32
    index = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    place += index * np.uint32(stride)
  return _mixed(_mixed(place) ^ bits.astype(jnp.uint32)).sum(dtype=jnp.uint32)


def _mixed(x):
  """A permutation of the uint32 in which every bit depends on every other."""
  # The finalizer of MurmurHash3 (A. Appleby, public domain).
  x ^= x >> np.uint32(16)
  x *= np.uint32(0x85EBCA6B)
  x ^= x >> np.uint32(13)
  x *= np.uint32(0xC2B2AE35)
  return x ^ (x >> np.uint32(16))
