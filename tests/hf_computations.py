"""What is computed with a Hugging Face folder, to compare it with transformers.

Not a test itself. The texts are the same for every model; what transformers
computes of them is in tests/parity, which needs PyTorch, and recorded in
tests/fixtures/hugging_face.
"""

import dataclasses
import functools
import json
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpop_jax import generate as generate_lib
from dpop_jax import pairs as pairs_lib
from dpop_jax import sharding, steps
from dpop_jax.data import forests, packing
from dpop_jax.hf import families, names, weights
from dpop_jax.models import decoder

# Of all models here.
VOCAB_SIZE = 48
# Longer than every sliding window, and of different lengths, so that a batch
# has padding.
LENGTHS = (23, 17, 11)
# Prompt, chosen and rejected answer.
PAIR_LENGTHS = (12, 7, 5)
NUM_NEW_TOKENS = 8
EOS_ID = 0
_ROW_LENGTH = 96
_UNOPTIMIZED = {
  "xla_backend_optimization_level": 0,
  "xla_llvm_disable_expensive_passes": True,
}


class Computed(NamedTuple):
  """What is compared.

  Attributes:
    logits: float32 [tokens, vocab]; of the sequences, one behind the other.
    stepwise_logits: Likewise, token by token with a cache.
    logps: [2]; summed log-probs of the chosen and the rejected answer.
  """

  logits: np.ndarray
  stepwise_logits: np.ndarray
  logps: np.ndarray


def sequences() -> list[np.ndarray]:
  generator = np.random.default_rng(1)
  return [
    generator.integers(3, VOCAB_SIZE, length).astype(np.int32)
    for length in LENGTHS
  ]


def pair() -> pairs_lib.TokenPair:
  generator = np.random.default_rng(2)
  return pairs_lib.TokenPair(
    *(
      generator.integers(3, VOCAB_SIZE, length).astype(np.int32)
      for length in PAIR_LENGTHS
    )
  )


@functools.cache
def load(folder: pathlib.Path) -> tuple[str, decoder.DecoderConfig, dict]:
  """Family, config and parameters of a folder, on one device."""
  hf_config = json.loads((folder / "config.json").read_text())
  family, fields = families.from_hf(hf_config)
  config = decoder.DecoderConfig(**fields)
  original = config.rope_scaling.original_max_position_embeddings
  if config.rope_scaling.rope_type == "longrope" and original < min(LENGTHS):
    # transformers takes them for texts longer than this, as all are here.
    scaling = dataclasses.replace(config.rope_scaling, use_long_factor=True)
    config = dataclasses.replace(config, rope_scaling=scaling)
  mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  params = weights.load(
    folder, names.parts(config, family), decoder.abstract_params(config, mesh)
  )
  return family, config, params


def compute(folder: pathlib.Path, *, is_optimized: bool = True) -> Computed:
  """All of it, by our code.

  Args:
    folder: The model.
    is_optimized: Otherwise XLA makes slower code in half the time.
  """
  _, config, params = load(folder)
  rows, stretches = packed()
  padded = np.zeros((len(LENGTHS), max(LENGTHS)), np.int32)
  for row, sequence in enumerate(sequences()):
    padded[row, : len(sequence)] = sequence
  run = jax.jit(
    _run,
    static_argnames="config",
    compiler_options=None if is_optimized else _UNOPTIMIZED,
  )
  logits, stepwise, logps = run(params, rows, padded, config=config)
  return Computed(
    logits=np.concatenate([logits[0, stretch] for stretch in stretches]),
    stepwise_logits=np.concatenate(
      [stepwise[row, :length] for row, length in enumerate(LENGTHS)]
    ),
    logps=np.asarray(logps[0, -1].sum(axis=-1)),
  )


def new_tokens(folder: pathlib.Path) -> np.ndarray:
  """What follows the pair's prompt, greedily, up to the EOS."""
  _, config, params = load(folder)
  sampling = generate_lib.SamplingConfig(
    max_new_tokens=NUM_NEW_TOKENS, temperature=0.0
  )
  (tokens,) = generate_lib.generate(
    params, config, [pair().prompt], sampling, eos_id=EOS_ID
  )
  return np.array(tokens)


def save_again(folder: pathlib.Path, copy: pathlib.Path) -> None:
  """Writes the weights of a folder into another one, in their own dtypes."""
  family, config, params = load(folder)
  parts = names.parts(config, family)
  weights.save(params, parts, copy, dtype=weights.dtypes(folder))


def assert_close(found, expected, scale: float) -> None:
  """Within 2e-5 of the largest logit."""
  np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * scale)


def packed() -> tuple[pairs_lib.PackedBatch, list[slice]]:
  """All texts in one row: sequences as trees, then the pair; where each is."""
  nothing = np.zeros(0, np.int32)
  in_pairs = [
    pairs_lib.TokenPair(tokens[:1], tokens[1:], nothing)
    for tokens in sequences()
  ]
  in_pairs.append(pair())
  trees = [
    forests.build_tree([pair], [number]) for number, pair in enumerate(in_pairs)
  ]
  counts = [forests.count_tree([pair]) for pair in in_pairs]
  capacity = packing.needed_capacity([counts], _ROW_LENGTH)
  ends = np.cumsum([len(tree.tokens) for tree in trees])
  stretches = [
    slice(int(end) - length, int(end))
    for end, length in zip(ends[:-1], LENGTHS, strict=True)
  ]
  return packing.pack_rows([trees], capacity), stretches


def _run(params, rows, padded, *, config):
  model = decoder.Decoder(config)
  hidden, _ = model.apply(
    {"params": params}, rows.tokens, rows.positions, rows.visible_until
  )
  logits = decoder.logits(params, hidden, config)

  def step(cache, inputs):
    position, tokens = inputs
    positions = jnp.full_like(tokens, position)
    hidden, cache = model.apply(
      {"params": params}, tokens[:, None], positions[:, None], cache=cache
    )
    return cache, decoder.logits(params, hidden[:, 0], config)

  num_rows, length = padded.shape
  _, stepwise = jax.lax.scan(
    step,
    decoder.empty_cache(config, num_rows, length),
    (jnp.arange(length), padded.T),
  )
  logps = steps.region_logps(params, rows, config)
  return logits, jnp.swapaxes(stepwise, 0, 1), logps
