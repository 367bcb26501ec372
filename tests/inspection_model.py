"""A tiny model for inspection, pairs for it, and single sequences read with it.

Not a test itself.
"""

import functools

import jax
import numpy as np
import tiny_runs

from dpop_jax import pairs as pairs_lib
from dpop_jax import sharding
from dpop_jax.inspection import forward
from dpop_jax.models import decoder


def pair(prompt, chosen, rejected) -> pairs_lib.TokenPair:
  """A pair of lists of ids."""
  ids = (np.array(x, np.int32) for x in (prompt, chosen, rejected))
  return pairs_lib.TokenPair(*ids)


PAIRS = [
  pair([1, 3, 4], [5, 6, 2], [5, 7, 6, 2]),
  pair([1, 8], [9, 2], [10, 11, 2]),
  pair([1, 3], [4, 5, 6], [4, 5]),
  pair([1, 12, 3, 4, 5], [6, 2], [7, 2]),
]


def make() -> forward.Model:
  """The model, on one device."""
  config = decoder.DecoderConfig(
    **tiny_runs.SECTIONS["model"], initializer_range=0.5
  )
  mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  params = decoder.make_params(jax.random.key(0), config, mesh)
  return forward.Model(params, config, mesh, "tiny")


@functools.cache
def _compiled(config):
  def run(params, *row):
    return decoder.Decoder(config).apply({"params": params}, *row)[0][0]

  return jax.jit(run)


def states(model, prompt, answer) -> np.ndarray:
  """Hidden states before each token of one answer, by itself."""
  tokens = np.concatenate([prompt, answer]).astype(np.int32)
  # Of one length, so that it is compiled once.
  row = np.zeros((1, 8), np.int32)
  row[0, : len(tokens)] = tokens
  places = np.arange(8, dtype=np.int32)[None]
  visible = np.where(places < len(tokens), len(tokens), places)
  with jax.set_mesh(model.mesh):
    found = _compiled(model.config)(model.params, row, places, visible)
  return np.asarray(found)[len(prompt) - 1 : len(tokens) - 1]
