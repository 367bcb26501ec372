r"""Preference pairs from worked maths solutions: one wrong intermediate result.

The rejected solution is the chosen one with a single number replaced, so that
its equation is false. Nothing after it changes, and neither does the final
answer:

  chosen    Natalia sold 48/2 = 24 clips in May.
            Natalia sold 48+24 = 72 clips altogether in April and May.
            #### 72
  rejected  Natalia sold 48/2 = 27 clips in May.
            Natalia sold 48+24 = 72 clips altogether in April and May.
            #### 72

GSM8K marks its calculations, `48/2 = <<48/2=24>>24`. The marks say which
numbers are results, and of what; then they are taken out. In a solution without
marks, such as MetaMath's, the results are those that `equations` finds.

References:
  Cobbe et al., 2021, https://arxiv.org/abs/2110.14168 (GSM8K); Yu et al., 2023,
  https://arxiv.org/abs/2309.12284 (MetaMath); Pal et al., 2024,
  https://arxiv.org/abs/2402.13228v2, corrupt MetaMath's solutions in this way.
  How far off their wrong numbers are is not published; `wrong_number` says how
  far ours are.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dpop_jax.data import (
  calculations,
  equations,
  final_answers,
  pair_builder,
  pair_lists,
  pair_tasks,
)
from dpop_jax.data.equations import Equation

# Why a row gives no pair.
NO_FINAL_ANSWER = "no_final_answer"
NO_INTERMEDIATE_RESULT = "no_intermediate_result"
NO_WRONG_NUMBER = "no_wrong_number"

_CORRUPTION = 0  # The stream of randomness; the shots have another.
_MAX_TRIES = 100

_QUESTION_KEYS = ("question", "query", "problem")
_ANSWER_KEYS = ("answer", "response", "solution")

_MARK = re.compile(r"<<([^<>]*)>>")
# Where the text repeats a result, with or without a currency.
_REPEATED = re.compile(rf" ?[$€£]? ?({calculations.NUMBER.pattern})")
# A number that these follow is part of something longer: 1/2, 2:30, 24th.
_GOES_ON = re.compile(r"[/:,]\d|st\b|nd\b|rd\b|th\b")
_SEPARATOR = re.compile(r"\{,\}|,\\!|,")


class Solution(NamedTuple):
  """A solution without marks.

  Attributes:
    text: What is left when the marks are gone.
    results: The intermediate results that may be corrupted.
  """

  text: str
  results: tuple[Equation, ...]


def parse_solution(written: str) -> Solution:
  """Takes the marks out and finds the results that may be corrupted.

  A result may be corrupted if its calculation can be worked out and it is true,
  it stands in front of the final answer's statement, and it is not equal to any
  number of the final answer. Of marked calculations the last one, which leads
  to the answer, is never corrupted, and a number has to follow its mark and not
  be part of a fraction, a time or an ordinal.

  Args:
    written: A solution that says which its final answer is; see
      `final_answers`.

  Raises:
    pair_tasks.Unusable: It does not.
  """
  final = final_answers.find(written)
  if final is None:
    raise pair_tasks.Unusable(
      NO_FINAL_ANSWER,
      'it says nowhere which its final answer is ("#### 72", "The answer is: '
      f'72" or "\\boxed{{72}}"); it ends in {written[-60:]!r}',
    )
  if _MARK.search(written):
    text, results = _of_marks(written)
    final = final_answers.find(text) or final
  else:
    text, results = written, equations.find(written)
  values = calculations.numbers_in(final.text)
  return Solution(
    text,
    tuple(
      result
      for result in results
      if result.start < final.start and _values(result).isdisjoint(values)
    ),
  )


def wrong_number(result: Equation, rng: np.random.Generator) -> str | None:
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
  decimals = calculations.num_decimals(result.text)
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
    if text is not None and not result.holds(text):
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


def make_task(row: Mapping[str, Any], seed: int) -> pair_tasks.Task:
  """The pair of a row with a question and a solution.

  Args:
    row: "question" and "answer" (GSM8K), "query" and "response" (MetaMathQA) or
      "problem" and "solution" (MATH). Rows of one "original_question", if they
      have it, belong together.
    seed: Decides which result is corrupted, and to what.

  Raises:
    pair_tasks.Unusable: One of the texts is missing, or the solution does not
      say which its final answer is.
  """
  question = question_of(row)
  written = pair_tasks.required_text(row, *_ANSWER_KEYS)
  original = row.get("original_question")
  solution = parse_solution(written)
  row_id = pair_tasks.id_of(question, written)
  problem = None
  rejected = corrupt(solution, seed=seed, row_id=row_id)
  if not solution.results:
    problem = pair_tasks.Unusable(
      NO_INTERMEDIATE_RESULT, "it has no intermediate result to corrupt"
    )
  elif rejected is None:
    problem = pair_tasks.Unusable(
      NO_WRONG_NUMBER, "no result of it has a wrong number of the same style"
    )
  return pair_tasks.Task(
    row_id=row_id,
    question=question,
    answer=solution.text,
    pairs=() if rejected is None else ((solution.text, rejected),),
    problems=() if problem is None else (problem,),
    group=original if isinstance(original, str) and original else question,
  )


def question_of(row: Mapping[str, Any]) -> str:
  """What is asked.

  Raises:
    pair_tasks.Unusable: Nothing is.
  """
  return pair_tasks.required_text(row, *_QUESTION_KEYS)


KIND = pair_builder.Kind(make_task, question_of)


def build_pairs(
  rows: Sequence[Mapping[str, Any]],
  *,
  num_shots: int,
  seed: int,
  unusable: pair_lists.Policy,
) -> pair_lists.PairList:
  """As `pair_builder.build_list`, of rows that `make_task` reads."""
  return pair_builder.build_list(
    rows, KIND, num_shots=num_shots, seed=seed, unusable=unusable
  )


def _of_marks(marked):
  """The text without marks, and the results that they mark but the last."""
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
    exact = calculations.evaluate(calculation)
    if (
      exact is None
      or calculations.parse_number(number)
      != calculations.parse_number(stated.strip())
      or _GOES_ON.match(marked, repeated.end())
    ):
      continue
    start = length + repeated.start(1) - end
    result = Equation(start, number, exact)
    if result.holds(number):
      results.append(result)
  parts.append(marked[end:])
  return "".join(parts), results


def _values(result):
  number = calculations.parse_number(result.text)
  assert number is not None
  return {number, *(number * scale for scale in result.scales)}


def _write_like(model: str, scaled: int, decimals: int) -> str | None:
  """`scaled / 10**decimals` written like `model`, or None if that cannot be."""
  whole, fraction = divmod(scaled, 10**decimals)
  sign = model[0] if model[0] in "-−" else ""
  whole_model = model.removeprefix(sign).partition(".")[0]
  separator = _SEPARATOR.search(whole_model)
  if whole_model == "":
    if whole:
      return None
    text = ""
  elif separator:
    if whole < 1000:
      return None
    text = f"{whole:,}".replace(",", separator[0])
  else:
    # Where commas would begin, the style of a shorter number is unknown.
    if whole >= 1000 > int(whole_model):
      return None
    text = str(whole)
  if decimals:
    text += f".{fraction:0{decimals}d}"
  return sign + text
