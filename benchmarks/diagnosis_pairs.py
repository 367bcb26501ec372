"""Kinds of pairs that are made from the demo's sums.

somewhere  the demo's: one wrong digit in one intermediate result
early      the same in the first one
late       the same in the last one
every      the same in every one: several edits
number     every digit of one intermediate result is wrong
carried    one wrong digit in the first one, and all that follows from it
other      the answer to another question: high edit distance
answer     one wrong digit in the final answer: hardly anything behind it
"""

import numpy as np

from dpop_jax.data import arithmetic


def _wrong_digit(rng, number: str, place: int | None = None) -> str:
  if place is None:
    place = int(rng.integers(len(number)))
  digits = [
    digit
    for digit in "0123456789"
    if digit != number[place] and not (place == 0 and digit == "0")
  ]
  wrong = digits[rng.integers(len(digits))]
  return number[:place] + wrong + number[place + 1 :]


def _wrong_result(rng, line: str) -> str:
  left, result = line.rsplit("=", 1)
  return f"{left}={_wrong_digit(rng, result)}"


def _early(lines, example, config, rng):
  return [_wrong_result(rng, lines[0]), *lines[1:]]


def _late(lines, example, config, rng):
  # The last two lines are the last addition and the answer.
  i = len(lines) - 3
  return [*lines[:i], _wrong_result(rng, lines[i]), *lines[i + 1 :]]


def _somewhere(lines, example, config, rng):
  return arithmetic.corrupt("\n".join(lines), rng).split("\n")


def _every(lines, example, config, rng):
  return [*(_wrong_result(rng, line) for line in lines[:-2]), *lines[-2:]]


def _number(lines, example, config, rng):
  i = int(rng.integers(len(lines) - 2))
  left, result = lines[i].rsplit("=", 1)
  for place in range(len(result)):
    result = _wrong_digit(rng, result, place)
  return [*lines[:i], f"{left}={result}", *lines[i + 1 :]]


def _carried(lines, example, config, rng):
  first = _wrong_result(rng, lines[0])
  total = int(first.rsplit("=", 1)[1])
  return [first, *arithmetic.solution((total, *example.terms[2:]))]


def _other(lines, example, config, rng):
  other = arithmetic.draw_sum(config, arithmetic.TRAIN, rng)
  return other.completion.split("\n")


def _answer(lines, example, config, rng):
  number = lines[-1].removeprefix("Answer ")
  return [*lines[:-1], f"Answer {_wrong_digit(rng, number)}"]


KINDS = {
  "early": _early,
  "late": _late,
  "somewhere": _somewhere,
  "every": _every,
  "number": _number,
  "carried": _carried,
  "other": _other,
  "answer": _answer,
}


def pair_row(
  config: arithmetic.ArithmeticConfig,
  split: str,
  kind: str,
  draw: int,
  row: int,
) -> dict[str, str]:
  """A pair of a kind. All kinds have the same sums; a draw has its own."""
  seed = [config.seed, 7, split == arithmetic.EVAL, draw, row]
  example = arithmetic.draw_sum(config, split, np.random.default_rng(seed))
  lines = arithmetic.solution(example.terms)
  rng = np.random.default_rng([*seed, 1])
  return {
    "prompt": example.prompt,
    "chosen": example.completion,
    "rejected": "\n".join(KINDS[kind](lines, example, config, rng)),
  }
