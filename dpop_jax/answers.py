"""Text that a model continues prompts with: a run's newest, or a folder's."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence

import jax

from dpop_jax import config as config_lib
from dpop_jax import generate, model_folders, program, saved_config, sharding
from dpop_jax.data import tokenization, tokenizers

Prompt = str | Sequence[dict[str, str]]


class Answerer:
  """A model on the mesh with its tokenizer, ready to continue prompts."""

  def __init__(self, config: config_lib.Config, path: str):
    """Reads the parameters; called by all processes alike.

    Args:
      config: Of the run, or `config_of` the folder. Its mesh may be another
        than in training.
      path: A workdir, a Hugging Face folder, or what `import_hf` wrote.

    Raises:
      FileNotFoundError: The tokenizer or the weights are missing.
      ValueError: There is no checkpoint, or the mesh does not divide the model.
    """
    program.use_compilation_cache(config)
    self._config = config
    self._mesh = sharding.make_mesh(config.mesh)
    config.model.check_mesh(self._mesh)
    self._tokenizer = tokenizers.load(
      config.data.tokenizer,
      bos_token=config.data.bos_token,
      eos_token=config.data.eos_token,
      chat_template=config.data.chat_template,
    )
    ignored = config.run.ignored_options
    model_folders.check_weights(path, config.model, ignored_options=ignored)
    self._params = model_folders.load_params(
      path, config.model, self._mesh, ignored_options=ignored
    )

  def answer(
    self,
    prompts: Sequence[Prompt],
    sampling: generate.SamplingConfig,
    *,
    key: jax.Array,
    batch_size: int,
  ) -> list[str]:
    """One answer to each prompt, which is encoded as in training.

    Args:
      prompts: Text, or messages for the chat template.
      sampling: How tokens are chosen.
      key: Randomness of the samples; those of a prompt depend on its place.
      batch_size: Most prompts that are run at once.

    Returns:
      Answers without their EOS, in the order of the prompts.

    Raises:
      ValueError: A prompt cannot be encoded.
    """
    add_bos = self._config.data.add_bos
    encoded = [
      tokenization.encode_prompt(prompt, self._tokenizer, add_bos=add_bos)
      for prompt in prompts
    ]
    with jax.set_mesh(self._mesh):
      answers = generate.generate(
        self._params,
        self._config.model,
        encoded,
        sampling,
        eos_id=self._tokenizer.eos_id,
        key=key,
        batch_size=batch_size,
      )
    return [
      _decode(prompt, answer, self._tokenizer)
      for prompt, answer in zip(encoded, answers, strict=True)
    ]


def config_of(path: str, *, dtype: str = "float32") -> config_lib.Config:
  """A config that says how to run the model of a folder without a run.

  Args:
    path: A Hugging Face folder, or what `import_hf` wrote.
    dtype: Of the weights as stored and of the computation.

  Raises:
    FileNotFoundError: There is nothing in it.
    ValueError: The model is of no supported kind.
  """
  return config_lib.from_config_dict(
    config_lib.config_dict(
      model=dict(dtype=dtype, param_dtype=dtype),
      # Nothing of this is used to generate.
      data=dict(train="none"),
      batch=dict(batch_size=1, row_length=2),
      loss=dict(name="sft"),
      optimizer=dict(name="adamw", peak_learning_rate=1.0),
      run=dict(num_steps=1, init_from=path),
    )
  )


def generate_answers(
  config: config_lib.Config,
  workdir: str,
  prompts: Sequence[Prompt],
  sampling: generate.SamplingConfig,
  *,
  seed: int,
  batch_size: int,
) -> list[str]:
  """One answer to each prompt by a run's newest checkpoint.

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
  return Answerer(config, workdir).answer(
    prompts, sampling, key=jax.random.key(seed), batch_size=batch_size
  )


def _digest(prompts):
  return hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:8]


def _decode(prompt, answer, tokenizer):
  # By itself an answer would lose a space that it begins with.
  before = tokenizer.decode(prompt)
  text = tokenizer.decode([*prompt, *answer])
  if text.startswith(before):
    return text[len(before) :]
  return tokenizer.decode(answer)
