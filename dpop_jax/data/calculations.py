r"""Arithmetic as people write it in worked solutions, plain or in LaTeX.

  3 hours x 2 chapters = 6 hours total      20% of $1,250.50 = 250.1
  12 boxes × $10 = $120                     $\frac{3}{4} \cdot 8 + 2^2 = 10$

What is not sure to have been read right is `Unclear`: a calculation with an
unknown or a root in it, or with words between its numbers that are no units.
"""

import fractions
import re
from typing import NamedTuple

Fraction = fractions.Fraction

_THOUSANDS = r"(?:,|\{,\}|,\\!)"
_UNSIGNED = (
  rf"(?:(?:\d{{1,3}}(?:{_THOUSANDS}\d{{3}})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
)
NUMBER = re.compile(rf"[-−]?{_UNSIGNED}")
_TOKEN = re.compile(
  r"""
  (?P<skip>[ \t$€£&~]|\\[,;:!\ $()\[\]]|\\q?quad|\\(?:left|right)(?![A-Za-z]))
  |(?P<break>\n|\\\\)
  |(?P<fraction>\\[dt]?frac(?![A-Za-z]))
  |(?P<unit>\\(?:text|textrm|mathrm|mbox)\s*\{[^{}]*\}(?:\^\{?\d\}?)?
    |\^\\circ(?![A-Za-z])|\^\{\\circ\}|°|(?<=\d)-(?=[A-Za-z]{2})[A-Za-z]+)
  |(?P<times>\\(?:times|cdot|ast)(?![A-Za-z])|[×·∙]|\*(?!\*))
  |(?P<over>\\div(?![A-Za-z])|[÷/])
  |(?P<power>\^|\*\*)
  |(?P<plus>\+)
  |(?P<minus>[-−–])
  |(?P<open>[({\[])
  |(?P<close>[)}\]])
  |(?P<percent>\\?%)
  |(?P<relation>[<>!=]=|[≤≥≠≈<>])
  |(?P<equals>=)
  |(?P<number>"""
  + _UNSIGNED
  + r""")
  |(?P<word>[^\W\d_]+(?:['’-][^\W\d_]+)*)
  |(?P<other>\\[A-Za-z]+|.)
  """,
  re.VERBOSE | re.DOTALL,
)
# What no unit is called; a number behind one of these begins another phrase.
NO_UNITS = frozenset(
  "and or so is are was were then but because if when where equals plus minus "
  "times divided by to which gives thus since".split()
)
# "4 hours a day" and 3 m are fine.
UNKNOWNS = frozenset("bcdfijknopqrtuvwxyz")
MAX_UNIT_WORDS = 4
_MAX_DEPTH = 20
# Digits of a power are bounded, for 9**9**9 has more than memory holds.
_MAX_POWER_BITS = 4096


class Token(NamedTuple):
  """A piece of a text.

  Attributes:
    kind: The name of its group in `_TOKEN`.
    text: As written.
    start: Where it begins.
    end: Where it ends.
  """

  kind: str
  text: str
  start: int
  end: int


class Unclear(Exception):
  """What stands there is no calculation, or might be read in several ways."""


def parse_number(text: str) -> Fraction | None:
  """The value of a written number ("1,250", "-3", ".5"), or None."""
  if not NUMBER.fullmatch(text):
    return None
  plain = re.sub(_THOUSANDS, "", text).replace("−", "-")
  # Fractions read integers more slowly than Python does.
  return Fraction(plain if "." in plain else int(plain))


def num_decimals(number: str) -> int:
  """Digits behind the point."""
  return len(number.partition(".")[2])


def numbers_in(text: str) -> set[Fraction]:
  """The values of all numbers and of all fractions of a text."""
  values = {parse_number(match[0]) for match in NUMBER.finditer(text)}
  # Hyphens and minus signs look alike.
  values |= {parse_number(match[0]) for match in re.finditer(_UNSIGNED, text)}
  tokens = tokenize(text)
  for i, token in enumerate(tokens):
    if token.kind in ("fraction", "number", "minus"):
      try:
        parser = Parser(tokens, i, len(tokens))
        values.add(parser.product())
      except Unclear:
        pass
  return {value for value in values if value is not None}


def evaluate(calculation: str) -> Fraction | None:
  """The exact value of a whole calculation; None where that is unclear."""
  tokens = tokenize(calculation)
  try:
    return Parser(tokens, 0, len(tokens)).whole()
  except Unclear:
    return None


def tokenize(text: str) -> list[Token]:
  """The tokens of a text; spaces, currencies and the like are left out."""
  tokens = []
  for match in _TOKEN.finditer(text):
    kind = match.lastgroup or "other"
    if kind == "skip":
      continue
    if kind == "number" and _is_part_of_a_name(text, *match.span()):
      kind = "other"
    if kind == "word" and match[0] in ("x", "X"):
      kind = "times" if _is_between_factors(text, *match.span()) else "word"
    tokens.append(Token(kind, match[0], *match.span()))
  return tokens


def _is_part_of_a_name(text, start, end):
  """Of 12th, 3x, x2, 10_3 or 2:30, and not of 3x4."""
  before, after = text[max(start - 5, 0) : start], text[end : end + 2]
  if re.match(r"[xX]\d", after) or re.search(r"\d[xX]\Z", before):
    return False
  if re.match(r"[^\W\d]|_|[:,.]\d|!", after):
    return True
  return bool(re.search(r"[^\W\d](?<!frac)\Z|_\Z|\d[:,.]\Z", before))


def _is_between_factors(text, start, end):
  before, after = text[:start].rstrip(), text[end:].lstrip(" $\\(")
  is_glued = re.search(r"[^\W_]\Z", text[:start]) and not before[-1:].isdigit()
  return bool(after[:1].isdigit() or after[:1] == ".") and not is_glued


class Parser:
  """Recursive descent over tokens[position:end]; raises `Unclear`.

  Attributes:
    position: Of the next token.
    num_operators: That were applied so far.
  """

  def __init__(self, tokens: list[Token], position: int, end: int):
    self.position = position
    self.num_operators = 0
    self._tokens, self._end, self._depth = tokens, end, 0

  def whole(self) -> Fraction:
    value = self._sum()
    if self.position != self._end:
      raise Unclear
    return value

  def product(self) -> Fraction:
    value = self._factor()
    while True:
      kind = self._peek()
      if self._take("times") or self._take_of():
        value *= self._factor()
      elif self._take("over"):
        divisor = self._factor()
        if divisor == 0:
          raise Unclear
        value /= divisor
      elif kind == "open":
        value *= self._factor()
      else:
        return value
      self.num_operators += 1

  def fraction_of_numbers(self) -> tuple[Token, Fraction]:
    r"""The numerator and the value of the denominator of \frac{3}{4}."""
    if not self._take("fraction"):
      raise Unclear
    short = self._short_fraction()
    if short:
      return short[0], _value_of(short[1])
    top = self._number_in_braces()
    bottom = _value_of(self._number_in_braces())
    if bottom == 0:
      raise Unclear
    return top, bottom

  def _sum(self):
    self._depth += 1
    if self._depth > _MAX_DEPTH:
      raise Unclear
    value = self.product()
    while self._peek() in ("plus", "minus"):
      sign = 1 if self._next().kind == "plus" else -1
      value += sign * self.product()
      self.num_operators += 1
    self._depth -= 1
    return value

  def _factor(self):
    sign = 1
    for _ in range(2):
      if self._peek() in ("plus", "minus"):
        sign *= 1 if self._next().kind == "plus" else -1
    value = self._atom()
    if self._take("power"):
      value = _power(value, self._exponent())
      self.num_operators += 1
    if self._take("percent"):
      value /= 100
    self._skip_unit()
    return sign * value

  def _atom(self):
    token = self._next()
    if token.kind == "number":
      return _value_of(token)
    if token.kind == "open":
      value = self._sum()
      self._expect_close()
      return value
    if token.kind == "fraction":
      self.num_operators += 1
      short = self._short_fraction()
      top, bottom = map(_value_of, short) if short else self._two_groups()
      if bottom == 0:
        raise Unclear
      return top / bottom
    raise Unclear

  def _two_groups(self):
    values = []
    for _ in range(2):
      if not self._take("open"):
        raise Unclear
      values.append(self._sum())
      self._expect_close()
    return values

  def _short_fraction(self):
    r"""The digits of \frac12, or None."""
    if self._peek() != "number":
      return None
    token = self._next()
    if not re.fullmatch(r"\d[1-9]", token.text):
      raise Unclear
    middle = token.start + 1
    return (
      Token("number", token.text[0], token.start, middle),
      Token("number", token.text[1], middle, token.end),
    )

  def _number_in_braces(self):
    if not self._take("open") or self._peek() != "number":
      raise Unclear
    token = self._next()
    self._expect_close()
    return token

  def _exponent(self):
    if self._take("open"):
      value = self._sum()
      self._expect_close()
      return value
    token = self._next()
    if token.kind != "number":
      raise Unclear
    return _value_of(token)

  def _skip_unit(self):
    for _ in range(MAX_UNIT_WORDS):
      if self._peek() not in ("word", "unit") or self._is_of():
        break
      if self._tokens[self.position].text.lower() in NO_UNITS | UNKNOWNS:
        break
      self.position += 1
    # The second half of a rate: $5/hour.
    if (
      self._peek() == "over"
      and self.position + 1 < self._end
      and self._tokens[self.position + 1].kind == "word"
    ):
      self.position += 2

  def _is_of(self):
    """Whether the next word is one that multiplies: 20% of 50."""
    after = self.position + 1
    return (
      self._tokens[self.position].text.lower() == "of"
      and after < self._end
      and self._tokens[after].kind in ("number", "open", "fraction")
    )

  def _take_of(self):
    if self._peek() == "word" and self._is_of():
      self.position += 1
      return True
    return False

  def _peek(self):
    if self.position >= self._end:
      return None
    return self._tokens[self.position].kind

  def _next(self):
    if self.position >= self._end:
      raise Unclear
    self.position += 1
    return self._tokens[self.position - 1]

  def _take(self, kind):
    if self._peek() == kind:
      self.position += 1
      return True
    return False

  def _expect_close(self):
    if not self._take("close"):
      raise Unclear


def _value_of(token):
  value = parse_number(token.text)
  if value is None:
    raise Unclear
  return value


def _power(base, exponent):
  bits = max(base.numerator.bit_length(), base.denominator.bit_length())
  if exponent.denominator != 1 or not 0 <= exponent * bits <= _MAX_POWER_BITS:
    raise Unclear
  return base ** int(exponent)
