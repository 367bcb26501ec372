r"""The final answer of a solution, where it says which one it is.

  #### 72                      GSM8K
  The answer is: 72            MetaMath; also "The answer is 72."
  \boxed{\frac{1}{2}}          MATH
  The value of x is 7.         MetaMath's questions with an unknown
  Answer: 72                   at the beginning of a line

If there are several, the one that is highest in this list, and of those the
last.
"""

import fractions
import re
from typing import NamedTuple

from dpop_jax.data import calculations

_MARKS = (
  re.compile(r"^####[ \t]*(?P<answer>\S.*)", re.MULTILINE),
  re.compile(
    r"\b(?:the )?(?:final |correct )?answer is\b:?[ \t]*(?P<answer>\S.*)",
    re.IGNORECASE,
  ),
  re.compile(r"\\boxed\s*\{"),
  re.compile(
    r"\bthe value of (?:the )?(?:unknown )?(?:variable )?\$?x\$? is:?[ \t]*"
    r"(?P<answer>\S.*)",
    re.IGNORECASE,
  ),
  re.compile(
    r"^[ \t]*(?:final )?answer\b:?[ \t]+(?P<answer>\S.*)",
    re.IGNORECASE | re.MULTILINE,
  ),
)
_BOX = _MARKS[2]


class FinalAnswer(NamedTuple):
  """What a solution ends in.

  Attributes:
    text: The answer without its mark, its box, dollar signs and full stop.
    start: Where the first statement of a final answer in the solution begins.
  """

  text: str
  start: int


def find(solution: str) -> FinalAnswer | None:
  """The final answer, or None if the solution does not say which it is."""
  text, starts = None, []
  for mark in _MARKS:
    for match in mark.finditer(solution):
      answer = (
        _in_braces(solution, match.end()) if mark is _BOX else match["answer"]
      )
      if answer is None:
        continue
      starts.append(match.start())
      last = answer
    if starts and text is None:
      text = _bare(last)
  return None if not text else FinalAnswer(text, min(starts))


def number(text: str) -> fractions.Fraction | None:
  r"""The value of a final answer such as "$1,250", "50%", "3/4" or "12 apples".

  A percent sign is taken for a unit: 50% is 50. None if there is no number, or
  more than one.
  """
  text = text.replace("\\%", "").replace("%", "")
  tokens = calculations.tokenize(text)
  while tokens and tokens[-1].kind in ("word", "unit", "break"):
    tokens.pop()
  if tokens and tokens[-1].text == ".":
    tokens.pop()
  kinds = [t.kind for t in tokens if t.kind not in ("open", "close")]
  if any(kind not in ("minus", "number", "fraction", "over") for kind in kinds):
    return None
  # One number, or a numerator and a denominator.
  if kinds.count("number") > 1 + kinds.count("over") + kinds.count("fraction"):
    return None
  return calculations.evaluate(text[: tokens[-1].end] if tokens else "")


def _in_braces(text, start):
  """What stands between the brace in front of `start` and its partner."""
  depth = 1
  for end in range(start, len(text)):
    depth += {"{": 1, "}": -1}.get(text[end], 0)
    if not depth:
      return text[start:end]
  return None


def _bare(answer):
  box = _BOX.search(answer)
  if box:
    answer = _in_braces(answer, box.end()) or answer
  answer = answer.strip()
  if answer.endswith(".") or answer.endswith("!"):
    answer = answer[:-1]
  answer = answer.strip().strip("*").strip()
  if answer.startswith("$") and answer.endswith("$"):
    answer = answer[1:-1]
  return answer.strip()
