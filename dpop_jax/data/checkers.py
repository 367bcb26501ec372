"""Whether a sampled answer to a question is the expected one."""

import re
from collections.abc import Callable

from dpop_jax.data import final_answers, pair_tasks

_LETTER = re.compile(r"\(?\b([A-Z]|\d)\b\)?")
# Alone, or in front of its choice: "B", "(B) Iron" or "B. Iron".
_ONLY_LETTER = re.compile(r"\s*\(?([A-Z]|\d)(?:[.:)]|\s*$|\s*\n)")


def number(answer: str) -> str | None:
  r"""The final number: behind "####" or "The answer is:", or in \\boxed{}.

  As a reduced fraction, so that 0.5, 1/2 and \\frac{1}{2} are the same. A final
  answer that is no number, such as \\sqrt{5}, is its text without spaces. A
  text that is nothing but a number is its own final answer.
  """
  final = final_answers.find(answer)
  if final is None:
    value = final_answers.number(answer)
    return None if value is None else str(value)
  value = final_answers.number(final.text)
  if value is not None:
    return str(value)
  return re.sub(r"\s|\\[,;! ]|\\left|\\right", "", final.text)


def letter(answer: str) -> str | None:
  """The label of a choice: a letter or digit, alone or as the final answer."""
  final = final_answers.find(answer)
  if final is not None:
    match = _LETTER.search(final.text)
  else:
    match = _ONLY_LETTER.match(answer)
  return None if match is None else match[1]


def exact(answer: str) -> str | None:
  """All of the answer but the spaces around it."""
  return answer.strip() or None


# What an answer comes down to, or None if it says nothing; two answers are the
# same if this is.
CHECKERS: dict[str, Callable[[str], str | None]] = {
  "number": number,
  "letter": letter,
  "exact": exact,
}


def expected(checker: str, text: str) -> str:
  """What a right answer comes down to.

  Raises:
    pair_tasks.Unusable: The reference answer says nothing to this checker.
  """
  value = CHECKERS[checker](text)
  if value is None and checker == "number":
    # As a result by itself, which need not be a number: \\sqrt{5}.
    value = number(f"#### {text.strip()}")
  if value is None:
    raise pair_tasks.Unusable(
      pair_tasks.BAD_ROW,
      f"the expected answer {text!r:.80} is none to the checker {checker!r}",
    )
  return value
