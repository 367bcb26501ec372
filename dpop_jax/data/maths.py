"""Preference pairs from worked maths solutions: one wrong intermediate result.

GSM8K marks its calculations, `48/2 = <<48/2=24>>24`. The marks say which
numbers of the text are results, and of what; then they are taken out. The
rejected solution is the chosen one with a single number replaced, so that its
equation is false. Nothing after it changes, and neither does the final answer:

  chosen    Natalia sold 48/2 = 24 clips in May.
            Natalia sold 48+24 = 72 clips altogether in April and May.
            #### 72
  rejected  Natalia sold 48/2 = 27 clips in May.
            Natalia sold 48+24 = 72 clips altogether in April and May.
            #### 72

References:
  Cobbe et al., 2021, https://arxiv.org/abs/2110.14168 (GSM8K); Pal et al.,
  2024, https://arxiv.org/abs/2402.13228v2, corrupt MetaMath's solutions in this
  way. How far off their wrong numbers are is not published; `wrong_number` says
  how far ours are.
"""

import ast
import fractions
import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dpop_jax.data import few_shot, pair_lists

# Why a row gives no pair.
BAD_ROW = "bad_row"
NO_INTERMEDIATE_RESULT = "no_intermediate_result"
NO_WRONG_NUMBER = "no_wrong_number"

_CORRUPTION = 0  # The stream of randomness; the shots have another.
_MAX_TRIES = 100

_MARK = re.compile(r"<<([^<>]*)>>")
_FINAL = re.compile(r"^#### *(\S.*)", re.MULTILINE)
_NUMBER = re.compile(r"-?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")
# Where the text repeats a result, with or without a currency.
_REPEATED = re.compile(rf" ?[$€£]? ?({_NUMBER.pattern})")
# A number that these follow is part of something longer: 1/2, 2:30, 24th.
_GOES_ON = re.compile(r"[/:,]\d|st\b|nd\b|rd\b|th\b")
_OPERATORS = {
  ast.Add: operator.add,
  ast.Sub: operator.sub,
  ast.Mult: operator.mul,
  ast.Div: operator.truediv,
  ast.UAdd: operator.pos,
  ast.USub: operator.neg,
}


class Result(NamedTuple):
  """A number of a solution that a calculation gave.

  Attributes:
    start: Where the number begins in the solution without marks.
    text: The number as it is written there, such as "1,250" or "0.20".
    calculation: What it is the result of, such as "10000/8".
  """

  start: int
  text: str
  calculation: str


class Solution(NamedTuple):
  """A solution without marks.

  Attributes:
    text: What is left when the marks are gone.
    results: The intermediate results that may be corrupted.
  """

  text: str
  results: tuple[Result, ...]


def parse_solution(marked: str) -> Solution:
  """Takes the marks out and finds the results that may be corrupted.

  These are the results of all calculations but the last, where the text repeats
  the number right behind the mark. Not among them: a number equal to the final
  answer, part of a fraction, a time or an ordinal, and a result that is wrong
  already. An equation counts as true if it holds within one unit of the last
  digit written, since results are rounded up and down.

  Args:
    marked: A solution that ends with a line "#### " and the final answer.

  Raises:
    ValueError: There is no such line.
  """
  final = _FINAL.search(marked)
  if final is None:
    raise ValueError(
      'A solution must have a line "#### " with the final answer, got '
      f"{marked[-60:]!r}."
    )
  final_value = parse_number(final.group(1).strip(" $"))
  marks = list(_MARK.finditer(marked))
  parts, length, end, results = [], 0, 0, []
  for mark in marks:
    parts.append(marked[end : mark.start()])
    length += len(parts[-1])
    end = mark.end()
    calculation, equals, stated = mark.group(1).rpartition("=")
    repeated = _REPEATED.match(marked, end)
    if mark is marks[-1] or not equals or repeated is None:
      continue
    number = repeated[1]
    value = parse_number(number)
    if (
      value == parse_number(stated.strip())
      and value != final_value
      and not _GOES_ON.match(marked, repeated.end())
      and is_true(calculation, number) is not False
    ):
      start = length + repeated.start(1) - end
      results.append(Result(start, number, calculation.strip()))
  parts.append(marked[end:])
  return Solution("".join(parts), tuple(results))


def parse_number(text: str) -> fractions.Fraction | None:
  """The value of a written number ("1,250", "-3", ".5"), or None."""
  if not _NUMBER.fullmatch(text):
    return None
  return fractions.Fraction(text.replace(",", ""))


def evaluate(calculation: str) -> fractions.Fraction | None:
  """The exact value of +, -, *, / and brackets; None for anything else."""
  try:
    return _value(ast.parse(calculation.strip(), mode="eval"))
  except (
    SyntaxError,
    KeyError,
    ValueError,
    ZeroDivisionError,
    RecursionError,
    MemoryError,
  ):
    return None


def is_true(calculation: str, number: str) -> bool | None:
  """Whether `calculation` gives `number` within one unit of its last digit.

  None if the calculation is beyond `evaluate`.
  """
  exact, stated = evaluate(calculation), parse_number(number)
  if exact is None or stated is None:
    return None
  return abs(exact - stated) < fractions.Fraction(
    1, 10 ** _num_decimals(number)
  )


def wrong_number(result: Result, rng: np.random.Generator) -> str | None:
  """Another number in the style of the right one that makes the equation false.

  It is off by a fifth at most, or by up to five units if that is more, where
  the unit is that of the last digit that is not 0: 24 becomes 19 to 29, 5,000
  becomes 1,000 to 10,000, 0.20 becomes 0.10 to 0.70. Sign, decimals, trailing
  zeros and commas stay as they are.

  Args:
    result: The number to replace.
    rng: Chooses among the numbers.

  Returns:
    The number as text, or None if a hundred tries found none.
  """
  decimals = _num_decimals(result.text)
  digits = re.sub(r"\D", "", result.text)
  # "0.20" is 2 times 10 times a hundredth.
  mantissa = int(digits)
  unit = 1
  while mantissa and mantissa % 10 == 0:
    mantissa, unit = mantissa // 10, unit * 10
  # NumPy draws no larger integers than 64 bits hold.
  reach = max(5, min(mantissa // 5, 10**9))
  for _ in range(_MAX_TRIES):
    offset = int(rng.integers(1, reach + 1))
    other = mantissa + (offset if rng.integers(2) else -offset)
    if other < 1:
      continue
    text = _write_like(result.text, other * unit, decimals)
    if text is not None and not is_true(result.calculation, text):
      return text
  return None


def corrupt(solution: Solution, *, seed: int, row_id: int) -> str | None:
  """The solution with one wrong intermediate result, by seed and row alone.

  Returns:
    The corrupted text, or None if no result has a wrong number in its style.
  """
  rng = np.random.default_rng([seed, row_id, _CORRUPTION])
  for choice in rng.permutation(len(solution.results)):
    result = solution.results[choice]
    wrong = wrong_number(result, rng)
    if wrong is not None:
      end = result.start + len(result.text)
      return solution.text[: result.start] + wrong + solution.text[end:]
  return None


def build_pairs(
  rows: Sequence[Mapping[str, Any]],
  *,
  num_shots: int,
  seed: int,
  unusable: pair_lists.Policy,
) -> pair_lists.PairList:
  """One pair for each row that has an intermediate result.

  Args:
    rows: Each with "question" and "answer", as GSM8K has them. A row's id is
      its index.
    num_shots: Solved examples in front of each question.
    seed: Decides the shots, which result is corrupted, and to what.
    unusable: "skip" counts the rows that give no pair, "raise" refuses them.

  Raises:
    ValueError: A row gives no pair and `unusable` is "raise", or there are too
      few rows for `num_shots`.
  """
  built = pair_lists.PairList(unusable)
  solutions: dict[int, Solution] = {}
  for row_id, row in enumerate(rows):
    try:
      solutions[row_id] = _parse_row(row)
    except ValueError as error:
      built.skip(BAD_ROW, f"Row {row_id} cannot be used: {error}")
  examples = [
    few_shot.Example(rows[row_id]["question"], solution.text)
    for row_id, solution in solutions.items()
  ]
  for row_id, solution in solutions.items():
    if not solution.results:
      built.skip(
        NO_INTERMEDIATE_RESULT,
        f"Row {row_id} has no intermediate result to corrupt.",
      )
      continue
    rejected = corrupt(solution, seed=seed, row_id=row_id)
    if rejected is None:
      built.skip(
        NO_WRONG_NUMBER,
        f"Row {row_id} has no result with a wrong number of the same style.",
      )
      continue
    question = rows[row_id]["question"]
    shots = few_shot.sample_shots(
      examples, question, row_id=row_id, num_shots=num_shots, seed=seed
    )
    built.add(
      prompt=few_shot.render(shots, question),
      chosen=solution.text,
      rejected=rejected,
    )
  return built


def _parse_row(row: Mapping[str, Any]) -> Solution:
  for key in ("question", "answer"):
    if not isinstance(row.get(key), str) or not row[key].strip():
      raise ValueError(
        f"{key!r} must be a text that is not empty, got {row.get(key)!r}."
      )
  return parse_solution(row["answer"])


def _value(node: ast.AST) -> fractions.Fraction:
  match node:
    case ast.Expression(body=body):
      return _value(body)
    case ast.Constant(value=int() | float() as number):
      # By way of the text, for 0.1 means a tenth and not the nearest double.
      return fractions.Fraction(str(number))
    case ast.BinOp(left=left, op=op, right=right):
      return _OPERATORS[type(op)](_value(left), _value(right))
    case ast.UnaryOp(op=op, operand=operand):
      return _OPERATORS[type(op)](_value(operand))
  raise ValueError(f"{ast.dump(node)} is no arithmetic.")


def _num_decimals(number: str) -> int:
  return len(number.partition(".")[2])


def _write_like(model: str, scaled: int, decimals: int) -> str | None:
  """`scaled / 10**decimals` written like `model`, or None if that cannot be."""
  whole, fraction = divmod(scaled, 10**decimals)
  whole_model = model.lstrip("-").partition(".")[0]
  if whole_model == "":
    if whole:
      return None
    text = ""
  elif "," in whole_model:
    if whole < 1000:
      return None
    text = f"{whole:,}"
  else:
    # Where commas would begin, the style of a shorter number is unknown.
    if whole >= 1000 > int(whole_model):
      return None
    text = str(whole)
  if decimals:
    text += f".{fraction:0{decimals}d}"
  return ("-" if model.startswith("-") else "") + text
