r"""The calculations of a worked solution, with the results that it states.

A text states a result where one number stands behind an equals sign, and a
calculation that `calculations` can read in front of it:

  12 total hours x 10 minutes = 120 extra minutes      120 = 12 * 10
  \frac{1}{2} + \frac{1}{4} = \frac{3}{4}              3 fourths = 1/2 + 1/4
  2x + 3 = 7                                           none: there is an unknown
  3 * 4 + 1 = 14                                       none: it is not true
"""

import fractions
from typing import NamedTuple

from dpop_jax.data import calculations

Fraction = fractions.Fraction

_MAX_TOKENS = 80
_ENDINGS = ("\\end", "\\implies", "\\Rightarrow")


class Equation(NamedTuple):
  """A number that a text states as the result of a calculation.

  Attributes:
    start: Where the number begins.
    text: The number as written, such as "1,250" or "0.20". Of a fraction it is
      the numerator.
    exact: What the calculation gives.
    scales: What one of the number is worth: 1; -1 behind a minus sign; 1/4 if
      it is the numerator of three quarters; of a percentage 1/100 or, since
      some write "x 100 = 52%", 1 as well.
    is_rounded: Whether the last digit may be rounded; not so in fractions.
  """

  start: int
  text: str
  exact: Fraction
  scales: tuple[Fraction, ...] = (Fraction(1),)
  is_rounded: bool = True

  def holds(self, number: str) -> bool:
    """Whether the equation is true with `number` in place of `text`.

    A result counts as true within one unit of its last digit, for people round
    up and down.
    """
    stated = calculations.parse_number(number)
    if stated is None:
      return False
    unit = Fraction(1, 10 ** calculations.num_decimals(number))
    for scale in self.scales:
      error = abs(self.exact - stated * scale)
      if error == 0 or (self.is_rounded and error < unit * abs(scale)):
        return True
    return False


def find(text: str) -> list[Equation]:
  """The true equations of a text whose right side is one number, in order.

  The left side is the longest stretch in front of the sign that reads as a
  calculation, with at least one operator.
  """
  if "=" not in text:
    return []
  tokens, found = calculations.tokenize(text), []
  for i, token in enumerate(tokens):
    if token.kind != "equals":
      continue
    right = _right_side(tokens, i + 1)
    exact = None if right is None else _left_side(text, tokens, i)
    if right is None or exact is None:
      continue
    equation = right._replace(exact=exact)
    if equation.holds(equation.text):
      found.append(equation)
  return found


def _right_side(tokens, i):
  """The one number behind an equals sign, without its `exact`; or None."""
  tokens = tokens[i : i + _MAX_TOKENS]
  kinds = [token.kind for token in tokens] + ["end"]
  i = int(kinds[0] == "power" and tokens[0].text == "**")  # Bold print.
  scale, is_rounded = Fraction(1), True
  if kinds[i] == "minus":
    scale, i = -scale, i + 1
  if kinds[i] == "fraction":
    try:
      parser = calculations.Parser(tokens, i, len(tokens))
      number, bottom = parser.fraction_of_numbers()
    except calculations.Unclear:
      return None
    scale, is_rounded, i = scale / bottom, False, parser.position
  elif kinds[i] == "number":
    number, i = tokens[i], i + 1
    if kinds[i : i + 2] == ["over", "number"]:
      bottom = calculations.parse_number(tokens[i + 1].text)
      if bottom:
        scale, is_rounded, i = scale / bottom, False, i + 2
  else:
    return None
  scales = (scale,)
  if kinds[i] == "percent":
    scales, i = (scale / 100, scale), i + 1
  if not _ends_here(tokens, i):
    return None
  return Equation(number.start, number.text, Fraction(0), scales, is_rounded)


def _ends_here(tokens, i):
  """Whether no calculation goes on behind a number and its unit."""
  if i < len(tokens) and tokens[i].text == "**":
    i += 1
  if i < len(tokens) and tokens[i].text.lower() in calculations.UNKNOWNS:
    return False
  num_words = 0
  while i < len(tokens) and tokens[i].kind in ("word", "unit"):
    if (
      tokens[i].text.lower() in calculations.NO_UNITS
      or num_words == calculations.MAX_UNIT_WORDS
    ):
      return True
    i, num_words = i + 1, num_words + 1
  if i + 1 < len(tokens) and tokens[i].kind == "over" and num_words:
    # $5 per hour, written 5 dollars/hour.
    return tokens[i + 1].kind == "word"
  goes_on = ("times", "over", "power", "plus", "minus", "percent")
  if i >= len(tokens) or tokens[i].kind in ("break", "equals", "close"):
    return True
  if tokens[i].kind in ("number", "fraction", "open"):
    return num_words > 0
  if tokens[i].text.startswith("\\"):
    # Of the rest of LaTeX, what is no factor such as \\sqrt{2}.
    return tokens[i].text in _ENDINGS
  return tokens[i].kind not in goes_on and tokens[i].text not in ("_", "!")


def _left_side(text, tokens, end):
  """The value of the calculation in front of an equals sign, or None."""
  while end and tokens[end - 1].kind == "break":
    end -= 1
  first = end
  while first and tokens[first - 1].kind not in ("equals", "break", "relation"):
    first -= 1
    if end - first == _MAX_TOKENS:
      break
  for start in range(first, end):
    token = tokens[start]
    if token.kind not in ("number", "open", "minus", "fraction"):
      continue
    if start and not _may_stand_before(text, tokens[start - 1], token):
      continue
    parser = calculations.Parser(tokens, start, end)
    try:
      value = parser.whole()
    except calculations.Unclear:
      continue
    return value if parser.num_operators else None
  return None


def _may_stand_before(text, before, token):
  """Whether a calculation may begin at `token`, behind the token `before`."""
  if before.kind in ("equals", "break", "open", "relation"):
    return True
  if before.kind == "word":
    # A minus behind a word is a dash, or belongs to an unknown.
    return token.kind != "minus" and (
      before.end < token.start or token.kind == "fraction"
    )
  if before.kind == "other" and not before.text.startswith("\\"):
    is_glued = before.end == token.start and before.text in ".,:_"
    return before.text in ",.:;?!\"'“”)" and not is_glued
  return False
