"""Worked examples in one text file, as MetaMath's prompts are written.

  Question: What is 3 + 4?
  A: Let's think step by step.
  3 + 4 = 7
  The answer is 7

with an empty line between two of them. What stands before the first is left
out.
"""

import re
from collections.abc import Iterator

from dpop_jax import paths
from dpop_jax.data import sources

_QUESTION = re.compile(r"^Question:\s*", re.MULTILINE)
_ANSWER = re.compile(r"^A(?:nswer)?:\s*", re.MULTILINE)


def read(path: str) -> Iterator[sources.Row]:
  """Rows with "query" and "response", as MetaMathQA has them.

  Raises:
    ValueError: The file is not UTF-8 text or holds no question.
  """
  with paths.open_binary(path) as file:
    content = file.read()
  try:
    text = content.decode("utf-8")
  except UnicodeDecodeError as error:
    raise ValueError(f"{path} is not UTF-8 text: {error}.") from error
  blocks = _QUESTION.split(text)[1:]
  if not blocks:
    raise ValueError(f'{path} holds no line that begins with "Question:".')
  for number, block in enumerate(blocks, start=1):
    parts = _ANSWER.split(block, maxsplit=1)
    if len(parts) < 2:
      yield sources.Row(path, number, None, 'no line that begins with "A:"')
    else:
      query, response = (part.strip() for part in parts)
      yield sources.Row(path, number, {"query": query, "response": response})
