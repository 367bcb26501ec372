"""Log-probs of every answer token of some pairs, from one forward pass."""

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dpop_jax import (
  config_values,
  model_folders,
  sharding,
  steps,
)
from dpop_jax import pairs as pairs_lib
from dpop_jax.inspection import look_ahead, pair_rows
from dpop_jax.models import decoder


class Model(NamedTuple):
  """A model to inspect pairs with.

  Attributes:
    params: Of the decoder, on the mesh.
    config: What it is.
    mesh: Where it lies.
    name: The checkpoint that was read.
  """

  params: Any
  config: decoder.DecoderConfig
  mesh: jax.sharding.Mesh
  name: str


class TokenLogps(NamedTuple):
  """Natural logarithms of probabilities, float32, one per answer token.

  Attributes:
    chosen: [chosen tokens]; each behind prompt and chosen answer.
    rejected: [rejected tokens]; each behind prompt and rejected answer.
    chosen_changes: [chosen tokens, len(look_ahead.SIZES)]; what they change by
      in look-aheads of these sizes.
    rejected_changes: [rejected tokens, len(look_ahead.SIZES)].
  """

  chosen: np.ndarray
  rejected: np.ndarray
  chosen_changes: np.ndarray
  rejected_changes: np.ndarray


def load(
  path: str,
  *,
  mesh: sharding.MeshConfig,
  dtype: str = "float32",
  ignored_options: Collection[str] = (),
) -> Model:
  """Loads a Hugging Face folder, an import, a workdir or a step of one.

  Args:
    path: The folder.
    mesh: Over which devices.
    dtype: Of weights and activations, "float32" or "bfloat16".
    ignored_options: See `families.from_hf`.

  Raises:
    FileNotFoundError: There is nothing, or no weights.
    ValueError: It is no model of a supported kind, or the mesh does not divide
      it.
  """
  pinned = model_folders.pin(path, key="--model")
  fields = model_folders.architecture(pinned, ignored_options)
  config = config_values.build(
    decoder.DecoderConfig,
    fields | {"dtype": dtype, "param_dtype": dtype},
    "model.",
  )
  devices = sharding.make_mesh(mesh)
  config.check_mesh(devices)
  model_folders.check_weights(pinned, config, ignored_options=ignored_options)
  params = model_folders.load_params(
    pinned, config, devices, ignored_options=ignored_options
  )
  return Model(params, config, devices, pinned)


def check_vocabulary(model: Model, pairs: Sequence[pairs_lib.TokenPair]):
  """Raises ValueError if a token of the pairs is none of the model's."""
  largest = max(int(ids.max()) for pair in pairs for ids in pair)
  if largest >= model.config.vocab_size:
    raise ValueError(
      f"The pairs hold token {largest}, but the model in {model.name} has "
      f"{model.config.vocab_size}; give its own tokenizer as --tokenizer."
    )


def token_logps(
  model: Model,
  pairs: Sequence[pairs_lib.TokenPair],
  *,
  row_length: int,
  progress: Callable[[int], Any] = lambda number: None,
) -> list[TokenLogps]:
  """Scores every token of both answers of every pair.

  Args:
    model: The model.
    pairs: With rejected answers.
    row_length: Tokens of a row, into which each pair fits.
    progress: Called with the number of each pair that is done.

  Raises:
    ValueError: A token is none of the model's.
  """
  check_vocabulary(model, pairs)
  score = jax.jit(functools.partial(_score, config=model.config))
  results: dict[int, TokenLogps] = {}
  for rows in pair_rows.batches(
    pairs,
    row_length=row_length,
    rows_per_batch=sharding.num_row_shards(model.mesh),
  ):
    with jax.set_mesh(model.mesh):
      values = score(model.params, rows._replace(pair_ids=[]))
    logps, changes = (
      pair_rows.split(np.asarray(each), rows, pairs) for each in values
    )
    for (i, *of_tokens), (_, *of_changes) in zip(logps, changes, strict=True):
      results[i] = TokenLogps(*of_tokens, *of_changes)
      progress(i)
  return [results[i] for i in range(len(pairs))]


def _score(params, rows, *, config):
  """Log-probs [rows, scores] and their changes [rows, scores, sizes]."""
  hidden = steps.hidden_states(params, rows, config)
  changes = look_ahead.changes(
    hidden,
    functools.partial(decoder.logits, params, config=config),
    rows.score_positions,
    rows.score_targets,
    rows.signs,
    rows.partners,
  )
  unembedding = decoder.unembedding(params, config)
  return steps.token_logps(hidden, unembedding, rows, config), changes
