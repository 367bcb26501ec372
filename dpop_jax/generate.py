"""Greedy and sampled continuations of prompts, with a key-value cache."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Key

from dpop_jax import sharding
from dpop_jax.models import decoder

_MIN_PROMPT_LENGTH = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
  """How the next token is chosen, and how many there may be.

  Attributes:
    max_new_tokens: Tokens after the prompt, EOS included.
    temperature: Divides the logits; 0.0 takes the likeliest token (greedy).
    top_k: Sample from this many of the likeliest tokens; None for all.
    top_p: Sample from the fewest likeliest tokens whose probabilities, among
      those of `top_k`, add up to at least this; None for all.

  Raises:
    ValueError: A value is out of range, or set where it would be ignored.
  """

  max_new_tokens: int
  temperature: float = 0.0
  top_k: int | None = None
  top_p: float | None = None

  def __post_init__(self):
    if self.max_new_tokens < 1:
      raise ValueError(
        "sampling.max_new_tokens must be at least 1, got "
        f"{self.max_new_tokens}."
      )
    if not 0.0 <= self.temperature < math.inf:
      raise ValueError(
        "sampling.temperature must be 0.0 (greedy) or positive, got "
        f"{self.temperature}."
      )
    if self.top_k is not None and self.top_k < 1:
      raise ValueError(
        "sampling.top_k must be at least 1, or None to sample from all tokens, "
        f"got {self.top_k}."
      )
    if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
      raise ValueError(
        "sampling.top_p must be above 0 and at most 1, or None to sample from "
        f"all tokens, got {self.top_p}."
      )
    for name in ("top_k", "top_p"):
      if self.is_greedy and getattr(self, name) is not None:
        raise ValueError(
          f"sampling.{name} is {getattr(self, name)}, but nothing is sampled "
          "with sampling.temperature 0.0; set a positive temperature, or "
          f"sampling.{name} to None."
        )

  @property
  def is_greedy(self) -> bool:
    return self.temperature == 0.0


class Decoded(NamedTuple):
  """What `decode` returns.

  Attributes:
    tokens: int32 [rows, max_new_tokens]; from its EOS on, a row is all EOS.
    num_steps: int32 []; tokens chosen before every row was finished.
  """

  tokens: jax.Array
  num_steps: jax.Array


def sample(
  logits: Float[Array, "rows vocab"],
  keys: Key[Array, " rows"],
  sampling: SamplingConfig,
) -> Int[Array, " rows"]:
  """One token per row; every row has its own key.

  Temperature comes first, then `top_k`, then `top_p`. Of equally likely tokens
  the lower id is kept, so `top_k=1` is greedy.

  References:
    Holtzman et al., 2019, https://arxiv.org/abs/1904.09751 (top_p).
  """
  if sampling.is_greedy:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  logits = logits / sampling.temperature
  if sampling.top_k is None and sampling.top_p is None:
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
  num_kept = min(sampling.top_k or logits.shape[-1], logits.shape[-1])
  logits, tokens = jax.lax.top_k(logits, num_kept)
  if sampling.top_p is not None:
    probs = jax.nn.softmax(logits, axis=-1)
    # Of what is likelier than a token, without the token itself: exactly 0 for
    # the first, which is therefore always kept.
    likelier = jnp.cumsum(probs, axis=-1) - probs
    logits = jnp.where(likelier < sampling.top_p, logits, -jnp.inf)
  ranks = jax.vmap(jax.random.categorical)(keys, logits)
  return jnp.take_along_axis(tokens, ranks[:, None], axis=-1)[:, 0]


class _State(NamedTuple):
  """Between two steps: `step` tokens of every row are chosen, all but one run.

  Attributes:
    step: int32 [].
    tokens: int32 [rows, max_new_tokens]; EOS where nothing is chosen yet.
    latest: int32 [rows]; the token that the cache does not hold yet.
    is_finished: bool [rows].
    cache: Keys and values of prompts and new tokens.
  """

  step: jax.Array
  tokens: jax.Array
  latest: jax.Array
  is_finished: jax.Array
  cache: decoder.KeyValueCache


@functools.partial(jax.jit, static_argnames=("config", "sampling"))
def decode(
  params: dict,
  prompts: Int[Array, "rows prompt_length"],
  lengths: Int[Array, " rows"],
  indices: Int[Array, " rows"],
  key: Key[Array, ""],
  eos_id: Int[Array, ""],
  *,
  config: decoder.DecoderConfig,
  sampling: SamplingConfig,
) -> Decoded:
  """Continues right-padded prompts until every row has its EOS.

  A new token goes directly behind its own prompt, so the rows of a step stand
  at different positions. Padding has a position outside the cache and is not
  written. With prompts of 3 and 1 tokens, room for 4, and 3 new tokens (the
  last of which is never run), the cache has length 6:

    prompts  a b c -    positions  0 1 2 6    new tokens at  3 4
             d - - -               0 6 6 6                   1 2

  A token sees all positions up to its own, and these hold the row's own tokens.

  Args:
    params: Unboxed parameters of the decoder.
    prompts: Token ids; anything behind a prompt.
    lengths: Tokens of each prompt; 0 for a row that is padding.
    indices: Of each row's prompt; folded into the key with the step, they make
      samples independent of the batch.
    key: Randomness of all samples.
    eos_id: Token that ends a row.
    config: Of the decoder.
    sampling: How tokens are chosen.

  Returns:
    The new tokens, the same on every device.
  """
  rows, prompt_length = prompts.shape
  model = decoder.Decoder(config)
  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, indices)
  cache_length = prompt_length + sampling.max_new_tokens - 1

  def run(tokens, positions, cache):
    tokens = sharding.constrain_rows(tokens)
    return model.apply({"params": params}, tokens, positions, cache=cache)

  def choose(state, hidden):
    """Adds the token that follows `hidden` [rows, hidden_size]."""
    logits = decoder.logits(params, hidden, config)
    step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, state.step)
    latest = sample(logits, step_keys, sampling)
    latest = jnp.where(state.is_finished, eos_id, latest)
    return state._replace(
      step=state.step + 1,
      tokens=state.tokens.at[:, state.step].set(latest),
      latest=latest,
      is_finished=state.is_finished | (latest == eos_id),
    )

  def is_running(state):
    is_short = state.step < sampling.max_new_tokens
    return is_short & ~jnp.all(state.is_finished)

  def advance(state):
    positions = lengths + state.step - 1
    hidden, cache = run(state.latest[:, None], positions[:, None], state.cache)
    return choose(state._replace(cache=cache), hidden[:, 0])

  index = jnp.arange(prompt_length)[None]
  positions = jnp.where(index < lengths[:, None], index, cache_length)
  cache = decoder.empty_cache(config, rows, cache_length)
  hidden, cache = run(prompts, positions, cache)
  last = jnp.maximum(lengths - 1, 0)[:, None, None]
  hidden = jnp.take_along_axis(hidden, last, axis=1)[:, 0]
  state = _State(
    step=jnp.int32(0),
    tokens=jnp.full((rows, sampling.max_new_tokens), eos_id),
    latest=jnp.full((rows,), eos_id),
    is_finished=lengths == 0,
    cache=cache,
  )
  state = jax.lax.while_loop(is_running, advance, choose(state, hidden))
  tokens = state.tokens
  if sharding.active_axes(*sharding.MESH_AXES):
    # Every host reads all of them.
    tokens = jax.lax.with_sharding_constraint(tokens, P())
  return Decoded(tokens, state.step)


def generate(
  params: dict,
  config: decoder.DecoderConfig,
  prompts: Sequence[Sequence[int] | np.ndarray],
  sampling: SamplingConfig,
  *,
  eos_id: int,
  key: jax.Array | None = None,
  batch_size: int = 64,
) -> list[list[int]]:
  """Continues prompts; on the mesh in use, if there is one.

  Prompts of similar length are run together. Their lengths are rounded up to
  powers of two, and so are the rows if there are fewer prompts than
  `batch_size`, so that few shapes are compiled. The samples of a prompt depend
  on `key`, its index and itself; except for rounding errors, they do not depend
  on the other prompts, `batch_size` or the mesh. For several samples of a
  prompt, give it several times.

  Args:
    params: Unboxed parameters of the decoder.
    config: Of the decoder.
    prompts: Token ids of each prompt, with the BOS, if any.
    sampling: How tokens are chosen.
    eos_id: Token that ends a continuation.
    key: Randomness of all samples; may be None if greedy.
    batch_size: Most prompts run at once, before rounding up to the mesh.

  Returns:
    New tokens of each prompt, in the order of the prompts, without the EOS.

  Raises:
    ValueError: A prompt is empty; a token of it or `eos_id` is not in the
      vocabulary; `batch_size` is not positive; or a key is missing.
  """
  _check_arguments(config, prompts, sampling, eos_id, key, batch_size)
  key = jax.random.key(0) if key is None else key
  batch_size = min(batch_size, _power_of_two(len(prompts)))
  num_shards = sharding.active_row_shards()
  rows = math.ceil(batch_size / num_shards) * num_shards
  order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
  new_tokens: list[list[int]] = [[] for _ in prompts]
  for start in range(0, len(prompts), rows):
    batch = order[start : start + rows]
    longest = max(len(prompts[index]) for index in batch)
    length = max(_MIN_PROMPT_LENGTH, _power_of_two(longest))
    tokens, lengths, indices = (
      np.zeros(shape, np.int32) for shape in ((rows, length), rows, rows)
    )
    for row, index in enumerate(batch):
      lengths[row], indices[row] = len(prompts[index]), index
      tokens[row, : lengths[row]] = prompts[index]
    decoded = decode(
      params,
      tokens,
      lengths,
      indices,
      key,
      np.int32(eos_id),
      config=config,
      sampling=sampling,
    )
    for index, row in zip(batch, np.asarray(decoded.tokens), strict=False):
      new_tokens[index] = _until(row.tolist(), eos_id)
  return new_tokens


def _check_arguments(config, prompts, sampling, eos_id, key, batch_size):
  for index, prompt in enumerate(prompts):
    if not len(prompt):
      raise ValueError(
        f"Prompt {index} is empty; give it at least one token, such as the BOS."
      )
    if min(prompt) < 0 or max(prompt) >= config.vocab_size:
      raise ValueError(
        f"Prompt {index} should have token ids from 0 to model.vocab_size - 1 "
        f"({config.vocab_size - 1}), but they go from {min(prompt)} to "
        f"{max(prompt)}; use the tokenizer that the model was made for."
      )
  if not 0 <= eos_id < config.vocab_size:
    raise ValueError(
      f"The EOS should be a token id from 0 to model.vocab_size - 1 "
      f"({config.vocab_size - 1}), got {eos_id}; use the tokenizer that the "
      "model was made for."
    )
  if batch_size < 1:
    raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
  if key is None and not sampling.is_greedy:
    raise ValueError(
      f"Sampling with sampling.temperature {sampling.temperature} needs a key; "
      "give one, or set sampling.temperature to 0.0."
    )


def _power_of_two(number):
  """The smallest that is at least `number`."""
  return 1 << max(number - 1, 0).bit_length()


def _until(tokens, eos_id):
  return tokens[: tokens.index(eos_id)] if eos_id in tokens else tokens
