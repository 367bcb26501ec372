"""Text that a run's newest checkpoint continues prompts with."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence

import jax

from dpop_jax import checkpoints, generate, program, saved_config, sharding
from dpop_jax import config as config_lib
from dpop_jax.data import tokenization, tokenizers
from dpop_jax.models import decoder

Prompt = str | Sequence[dict[str, str]]


def generate_answers(
  config: config_lib.Config,
  workdir: str,
  prompts: Sequence[Prompt],
  sampling: generate.SamplingConfig,
  *,
  seed: int,
  batch_size: int,
) -> list[str]:
  """One answer to each prompt, which is encoded as in training.

  Args:
    config: Of the run. Its mesh may be another than in training.
    workdir: Of the run.
    prompts: Text, or messages for the chat template.
    sampling: How tokens are chosen.
    seed: Of the samples.
    batch_size: Most prompts that are run at once.

  Returns:
    Answers without their EOS, in the order of the prompts.

  Raises:
    FileNotFoundError: The tokenizer is missing.
    ValueError: There is no checkpoint, the mesh does not divide the model, or
      a prompt cannot be encoded.
  """
  saved_config.check_started_alike(
    config,
    **{
      "--prompts": _digest(prompts),
      "--seed": seed,
      "--batch_size": batch_size,
    },
    **dataclasses.asdict(sampling),
  )
  program.use_compilation_cache(config)
  mesh = sharding.make_mesh(config.mesh)
  config.model.check_mesh(mesh)
  tokenizer = tokenizers.load(
    config.data.tokenizer,
    bos_token=config.data.bos_token,
    eos_token=config.data.eos_token,
    chat_template=config.data.chat_template,
  )
  encoded = [
    tokenization.encode_prompt(prompt, tokenizer, add_bos=config.data.add_bos)
    for prompt in prompts
  ]
  params = checkpoints.load_params(
    workdir, decoder.abstract_params(config.model, mesh)
  )
  with jax.set_mesh(mesh):
    answers = generate.generate(
      params,
      config.model,
      encoded,
      sampling,
      eos_id=tokenizer.eos_id,
      key=jax.random.key(seed),
      batch_size=batch_size,
    )
  return [
    _decode(prompt, answer, tokenizer)
    for prompt, answer in zip(encoded, answers, strict=True)
  ]


def _digest(prompts):
  return hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:8]


def _decode(prompt, answer, tokenizer):
  # By itself an answer would lose a space that it begins with.
  before = tokenizer.decode(prompt)
  text = tokenizer.decode([*prompt, *answer])
  if text.startswith(before):
    return text[len(before) :]
  return tokenizer.decode(answer)
