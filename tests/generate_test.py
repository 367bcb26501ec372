import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpop_jax import generate, sharding
from dpop_jax.models import decoder

SMALL = decoder.DecoderConfig(
  vocab_size=32,
  hidden_size=16,
  intermediate_size=32,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
)
CONFIGS = {
  "grouped": SMALL,
  "multi_head": dataclasses.replace(SMALL, num_key_value_heads=4),
  "bias": dataclasses.replace(SMALL, attention_bias=True),
  "tied": dataclasses.replace(SMALL, tie_word_embeddings=True),
  "remat": dataclasses.replace(SMALL, remat="full", head_dim=6),
  "sliding": dataclasses.replace(
    SMALL,
    sliding_window=5,
    layer_types=("sliding_attention", "full_attention"),
    attn_logit_softcapping=3.0,
    final_logit_softcapping=5.0,
  ),
  "experts": dataclasses.replace(SMALL, num_experts=4, num_experts_per_tok=2),
}
PROMPTS = [[1, 2, 3], [4], [9, 8, 7, 6, 5], [3] * 17, [1, 2, 3], [30, 2], [11]]
SAMPLED = generate.SamplingConfig(max_new_tokens=8, temperature=1.5)


def random_params(config):
  """Parameters on the host, large enough that all of them matter."""
  mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  random = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: random.normal(0.0, 1.0, x.shape).astype(x.dtype),
    decoder.abstract_params(config, mesh),
  )


@functools.partial(jax.jit, static_argnames="config")
def next_logits(params, tokens, length, *, config):
  """Logits of the token after the first `length`, by the training path."""
  index = jnp.arange(tokens.shape[1])[None]
  until = jnp.where(index < length, length, index)
  hidden, _ = decoder.Decoder(config).apply(
    {"params": params}, tokens, index, until
  )
  return decoder.logits(params, hidden[0, length - 1], config)


def greedy_by_recomputing(params, config, prompt, num_new_tokens):
  """Runs all tokens anew for each next one, and does not know of an EOS."""
  row = np.zeros((1, 32), np.int32)
  row[0, : len(prompt)] = prompt
  for length in range(len(prompt), len(prompt) + num_new_tokens):
    logits = next_logits(params, row, length, config=config)
    row[0, length] = np.argmax(logits)
  return row[0, len(prompt) : len(prompt) + num_new_tokens].tolist()


def until(tokens, eos_id):
  return tokens[: (tokens + [eos_id]).index(eos_id)]


def greedy(max_new_tokens):
  return generate.SamplingConfig(max_new_tokens=max_new_tokens)


def unused_token(*continuations):
  """A token that can be EOS without ending any of these."""
  used = {token for new_tokens in continuations for token in new_tokens}
  return min(set(range(SMALL.vocab_size)) - used)


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_with_cache_equals_recomputing_everything(name):
  config = CONFIGS[name]
  params = random_params(config)
  endless = [
    greedy_by_recomputing(params, config, prompt, 12) for prompt in PROMPTS
  ]
  # The comparison is worth something only if the model does not repeat itself.
  assert len({token for tokens in endless for token in tokens}) > 8
  # One that never comes, one that comes somewhere, one that comes first.
  for eos_id in (unused_token(*endless), endless[0][3], endless[1][0]):
    new_tokens = generate.generate(
      params, config, PROMPTS, greedy(12), eos_id=eos_id
    )
    assert new_tokens == [until(tokens, eos_id) for tokens in endless]


@pytest.mark.parametrize(
  "sampling", [greedy(8), SAMPLED], ids=["greedy", "t1.5"]
)
def test_batch_size_does_not_matter(sampling):
  params = random_params(SMALL)

  def run(batch_size):
    return generate.generate(
      params,
      SMALL,
      PROMPTS,
      sampling,
      eos_id=0,
      key=jax.random.key(5),
      batch_size=batch_size,
    )

  assert run(2) == run(64)


def test_samples_depend_on_key_and_index_but_not_on_other_prompts():
  params = random_params(SMALL)

  def run(prompts, seed=5):
    return generate.generate(
      params, SMALL, prompts, SAMPLED, eos_id=0, key=jax.random.key(seed)
    )

  new_tokens = run(PROMPTS)
  assert PROMPTS[0] == PROMPTS[4] and new_tokens[0] != new_tokens[4]
  assert run(PROMPTS, seed=6) != new_tokens
  others = [[7] * 20, [8], PROMPTS[2], [1, 3]]
  assert run(others)[2] == new_tokens[2]


def test_numpy_prompts_are_prompts():
  params = random_params(SMALL)
  arrays = [np.array(prompt, np.int32) for prompt in PROMPTS]
  assert generate.generate(
    params, SMALL, arrays, greedy(3), eos_id=0
  ) == generate.generate(params, SMALL, PROMPTS, greedy(3), eos_id=0)


def test_no_prompts_give_no_continuations():
  assert not generate.generate({}, SMALL, [], greedy(3), eos_id=0)


@pytest.mark.parametrize("max_new_tokens", [1, 2, 5])
def test_max_new_tokens_cuts_a_longer_continuation(max_new_tokens):
  params = random_params(SMALL)
  longer = [
    greedy_by_recomputing(params, SMALL, prompt, 6) for prompt in PROMPTS[:2]
  ]
  new_tokens = generate.generate(
    params,
    SMALL,
    PROMPTS[:2],
    greedy(max_new_tokens),
    eos_id=unused_token(*longer),
  )
  assert new_tokens == [tokens[:max_new_tokens] for tokens in longer]


def decode(params, prompts, lengths, eos_id, sampling):
  return generate.decode(
    params,
    jnp.array(prompts),
    jnp.array(lengths),
    jnp.arange(len(prompts)),
    jax.random.key(0),
    jnp.int32(eos_id),
    config=SMALL,
    sampling=sampling,
  )


def test_decoding_stops_when_the_last_row_is_finished():
  params = random_params(SMALL)
  new_tokens = greedy_by_recomputing(params, SMALL, [1, 2, 3], 12)
  # The EOS is a token that comes for the first time at this step.
  step = max(new_tokens.index(token) for token in new_tokens)
  eos_id = new_tokens[step]
  assert 1 < step < 11
  # The second row is padding, which must not keep the first one waiting.
  decoded = decode(params, [[1, 2, 3, 31]] * 2, [3, 0], eos_id, greedy(12))
  assert decoded.num_steps == step + 1
  expected = new_tokens[:step] + [eos_id] * (12 - step)
  np.testing.assert_array_equal(decoded.tokens[0], expected)
  np.testing.assert_array_equal(decoded.tokens[1], [eos_id] * 12)


def test_decoding_goes_on_while_one_row_is_not_finished():
  params = random_params(SMALL)
  first, second = (
    greedy_by_recomputing(params, SMALL, prompt, 12)
    for prompt in ([1, 2, 3], [4])
  )
  eos_id = next(token for token in first if token not in second)
  decoded = decode(params, [[1, 2, 3], [4, 9, 9]], [3, 1], eos_id, greedy(12))
  assert decoded.num_steps == 12
  np.testing.assert_array_equal(decoded.tokens[1], second)


def test_few_shapes_are_compiled():
  params = random_params(SMALL)
  sampling = greedy(4)
  before = generate.decode._cache_size()
  for lengths in ([3, 5, 2], [16, 1, 1], [9, 9, 9, 9], [4] * 11, [17, 32]):
    prompts = [[1] * length for length in lengths]
    generate.generate(params, SMALL, prompts, sampling, eos_id=0, batch_size=4)
  # Four rows of 16, and two rows of 32.
  assert generate.decode._cache_size() - before == 2


def test_top_k_of_one_is_greedy():
  params = random_params(SMALL)
  sampling = dataclasses.replace(SAMPLED, top_k=1)
  assert generate.generate(
    params, SMALL, PROMPTS, sampling, eos_id=0, key=jax.random.key(1)
  ) == generate.generate(params, SMALL, PROMPTS, greedy(8), eos_id=0)


def test_top_k_of_one_takes_the_first_of_equals():
  sampling = generate.SamplingConfig(max_new_tokens=1, temperature=1.0, top_k=1)
  keys = jax.random.split(jax.random.key(0), 20)
  tokens = generate.sample(jnp.zeros((20, 4)), keys, sampling)
  np.testing.assert_array_equal(tokens, np.zeros(20))


def assert_frequencies(counts, probabilities):
  """Chi-square within four standard deviations; nothing impossible came."""
  counts, probabilities = np.asarray(counts), np.asarray(probabilities)
  is_possible = probabilities > 0
  assert not counts[~is_possible].any()
  expected = counts.sum() * probabilities[is_possible]
  statistic = ((counts[is_possible] - expected) ** 2 / expected).sum()
  freedom = is_possible.sum() - 1
  assert statistic <= freedom + 4 * np.sqrt(2 * freedom)


# Probabilities 0.4, 0.3, 0.2, 0.1, not in order of ids. Temperature 0.5 squares
# them: 16, 9, 4, 1 of 30.
PROBABILITIES = [0.1, 0.4, 0.2, 0.3]


@pytest.mark.parametrize(
  "options, expected",
  [
    (dict(temperature=1.0), PROBABILITIES),
    (dict(temperature=0.5), [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
    (dict(temperature=1.0, top_k=2), [0, 4 / 7, 0, 3 / 7]),
    (dict(temperature=1.0, top_k=9), PROBABILITIES),
    # 0.4 + 0.3 is not enough yet, with 0.2 it is.
    (dict(temperature=1.0, top_p=0.75), [0, 4 / 9, 2 / 9, 3 / 9]),
    (dict(temperature=1.0, top_p=0.3), [0, 1, 0, 0]),
    (dict(temperature=1.0, top_p=1.0), PROBABILITIES),
    # Of the three of top_k the first has 4/9 and the second 3/9, which is 7/9.
    (dict(temperature=1.0, top_k=3, top_p=0.75), [0, 4 / 7, 0, 3 / 7]),
    # Temperature first: 25/30 of the mass are in two.
    (dict(temperature=0.5, top_p=0.8), [0, 16 / 25, 0, 9 / 25]),
  ],
  ids=str,
)
def test_sampled_frequencies_are_the_renormalised_probabilities(
  options, expected
):
  sampling = generate.SamplingConfig(max_new_tokens=1, **options)
  num_samples = 4000
  tokens = generate.sample(
    jnp.tile(jnp.log(jnp.array(PROBABILITIES)), (num_samples, 1)),
    jax.random.split(jax.random.key(0), num_samples),
    sampling,
  )
  assert_frequencies(np.bincount(tokens, minlength=4), expected)


def test_generated_frequencies_are_the_models_softmax():
  params = random_params(SMALL)
  prompt, temperature, num_samples = [1, 2, 3], 5.0, 2048
  new_tokens = generate.generate(
    params,
    SMALL,
    [prompt] * num_samples,
    generate.SamplingConfig(max_new_tokens=1, temperature=temperature),
    eos_id=7,
    key=jax.random.key(0),
    batch_size=512,
  )
  # A sampled EOS is an empty list.
  tokens = [tokens[0] if tokens else 7 for tokens in new_tokens]
  counts = np.bincount(tokens, minlength=SMALL.vocab_size)
  logits = next_logits(params, np.array([prompt]), 3, config=SMALL)
  weights = np.exp(np.asarray(logits) / temperature)
  assert_frequencies(counts, weights / weights.sum())


def test_steps_are_sampled_independently():
  # With all weights zero every step samples from the same uniform distribution,
  # so a key that did not change with the step would repeat its token.
  params = jax.tree.map(np.zeros_like, random_params(SMALL))
  sampling = generate.SamplingConfig(max_new_tokens=32, temperature=1.0)
  (new_tokens,) = generate.generate(
    params, SMALL, [[1]], sampling, eos_id=0, key=jax.random.key(3)
  )
  assert len(set(new_tokens)) > 10


@pytest.mark.parametrize(
  "sizes, name, sampling",
  [
    *(
      (sizes, "grouped", sampling)
      for sizes in [(8, 1, 1), (2, 2, 2), (1, 4, 2)]
      for sampling in (greedy(8), SAMPLED)
    ),
    ((2, 2, 2), "experts", greedy(8)),
  ],
  ids=lambda value: str(getattr(value, "temperature", value)),
)
def test_eight_devices_equal_one(sizes, name, sampling):
  config = CONFIGS[name]
  params = random_params(config)

  def run(params):
    # Seven prompts: no multiple of the shards.
    return generate.generate(
      params, config, PROMPTS, sampling, eos_id=0, key=jax.random.key(5)
    )

  data, fsdp, tensor = sizes
  mesh = sharding.make_mesh(
    sharding.MeshConfig(data=data, fsdp=fsdp, tensor=tensor)
  )
  with jax.set_mesh(mesh):
    shardings = decoder.param_shardings(config, mesh)
    on_mesh = run(jax.device_put(params, shardings))
  assert on_mesh == run(params)


@pytest.mark.parametrize(
  "options, message",
  [
    (dict(max_new_tokens=0), "sampling.max_new_tokens must be at least 1"),
    (dict(temperature=-1.0), "sampling.temperature must be 0.0"),
    (dict(temperature=float("nan")), "sampling.temperature must be 0.0"),
    (dict(temperature=float("inf")), "sampling.temperature must be 0.0"),
    (dict(temperature=1.0, top_k=0), "sampling.top_k must be at least 1"),
    (dict(temperature=1.0, top_p=0.0), "sampling.top_p must be above 0"),
    (dict(temperature=1.0, top_p=1.1), "sampling.top_p must be above 0"),
    (dict(top_k=5), "sampling.top_k is 5, but nothing is sampled"),
    (dict(top_p=0.5), "sampling.top_p is 0.5, but nothing is sampled"),
  ],
  ids=str,
)
def test_bad_sampling_options_are_named(options, message):
  with pytest.raises(ValueError, match=message):
    generate.SamplingConfig(**({"max_new_tokens": 1} | options))


@pytest.mark.parametrize(
  "prompts, options, message",
  [
    ([[1], []], {}, "Prompt 1 is empty"),
    ([[1], [2, 32]], {}, "Prompt 1 should have token ids from 0 to .*31"),
    ([[-1]], {}, "Prompt 0 should have token ids"),
    ([[1]], dict(eos_id=32), "The EOS should be a token id"),
    ([[1]], dict(batch_size=0), "batch_size must be at least 1"),
    ([[1]], dict(sampling=SAMPLED), "needs a key"),
  ],
)
def test_bad_arguments_are_refused(prompts, options, message):
  arguments = dict(eos_id=0, sampling=greedy(1)) | options
  with pytest.raises(ValueError, match=message):
    generate.generate({}, SMALL, prompts, **arguments)
