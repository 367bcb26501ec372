"""Questions with one right answer each, and how many a model gets right."""

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from dpop_jax import config as config_lib
from dpop_jax import generate, sharding
from dpop_jax.data import checkers, jsonl, tokenization, tokenizers


class Questions(NamedTuple):
  """What to ask, and how an answer is judged.

  Attributes:
    prompts: Text, or messages for the chat template.
    answers: What `final` should find, as long as `prompts`.
    final: What an answer comes down to, or None if it says nothing.
    max_new_tokens: Of an answer, EOS included.
    batch_size: Most questions that are answered at once.
  """

  prompts: Sequence[Any]
  answers: Sequence[str]
  final: Callable[[str], str | None]
  max_new_tokens: int
  batch_size: int

  def digest(self) -> str:
    """Changes with the questions, the answers and the length."""
    asked = [list(self.prompts), list(self.answers), self.max_new_tokens]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def load(path: str, *, checker: str, max_new_tokens: int) -> Questions:
  """Reads rows of `prompt` and `answer`.

  Args:
    path: A .jsonl or .jsonl.gz file.
    checker: A key of `checkers.CHECKERS`.
    max_new_tokens: See `Questions`.

  Raises:
    FileNotFoundError: There is no such file.
    ValueError: It is empty, a row lacks one of the two, or an answer says
      nothing to the checker.
  """
  rows = jsonl.read(path)
  if not rows:
    raise ValueError(f"There are no questions in {path}.")
  final = checkers.CHECKERS[checker]
  answers = []
  for i, row in enumerate(rows, start=1):
    if not {"prompt", "answer"} <= set(row):
      raise ValueError(
        f"Row {i} of {path} should have `prompt` and `answer`, got "
        f"{sorted(row)}."
      )
    answer = final(str(row["answer"]))
    if answer is None:
      raise ValueError(
        f"Row {i} of {path}: the answer {row['answer']!r} is none to the "
        f"checker {checker!r}."
      )
    answers.append(answer)
  return Questions(
    [row["prompt"] for row in rows], answers, final, max_new_tokens, 64
  )


def exact_match(
  params: Any, config: config_lib.Config, questions: Questions
) -> float:
  """Share of questions whose greedy answer is right, 0 to 1.

  Args:
    params: Of the model, on the config's mesh.
    config: Of the run; its tokenizer encodes the questions as in training.
    questions: What to ask.

  Raises:
    FileNotFoundError: The tokenizer is missing.
    ValueError: A prompt cannot be encoded.
  """
  data = config.data
  tokenizer = tokenizers.load(
    data.tokenizer,
    bos_token=data.bos_token,
    eos_token=data.eos_token,
    chat_template=data.chat_template,
  )
  prompts = [
    tokenization.encode_prompt(prompt, tokenizer, add_bos=data.add_bos)
    for prompt in questions.prompts
  ]
  with jax.set_mesh(sharding.make_mesh(config.mesh)):
    answers = generate.generate(
      params,
      config.model,
      prompts,
      generate.SamplingConfig(max_new_tokens=questions.max_new_tokens),
      eos_id=tokenizer.eos_id,
      batch_size=questions.batch_size,
    )
  right = [
    questions.final(tokenizer.decode(answer)) == expected
    for answer, expected in zip(answers, questions.answers, strict=True)
  ]
  return sum(right) / len(right)
