"""Arithmetic as people write it, worked out exactly or not at all."""

import fractions
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpop_jax.data import calculations

half = fractions.Fraction(1, 2)


@pytest.mark.parametrize(
  "calculation, value",
  [
    ("48/2", 24),
    ("0.1+0.2", fractions.Fraction(3, 10)),
    (".20*(50-10)", 8),
    ("-3*-4", 12),
    ("(1+1)*(2--2)", 8),
    ("1,000*2", 2000),
    ("2 - 3 - 4", -5),
    ("24 / 4 / 3", 2),
    ("2 + 3 × 4", 14),
    ("12 ÷ 3 · 2", 8),
    ("3 x 4", 12),
    ("3x4", 12),
    ("2(3 + 4)(2)", 28),
    # Units, rates and currencies.
    ("3 hours x 2 chapters", 6),
    ("12 total hours x 10 minutes", 120),
    ("$5/hour * 8 hours", 40),
    ("15 hours / 4 hours each day", fractions.Fraction(15, 4)),
    ("3 10-minute", None),
    ("2 * 10-minute", 20),
    # Shares.
    ("20% of 50", 10),
    ("2/3 of 600", 400),
    ("100% - 20%", fractions.Fraction(4, 5)),
    # LaTeX.
    (r"\frac{3}{4} \cdot 8 + 2^2", 10),
    (r"\dfrac12 + \frac{1}{2}", 1),
    (r"\left(1 + 2\right)^{2} \div 3", 3),
    (r"1{,}000 \times 20\%", 200),
    (r"3 \text{ cm} + 4\text{ cm}", 7),
    (r"180^\circ - 90^\circ", 90),
    (r"-2^2", -4),
    # Unclear, or not worked out.
    ("1/0", None),
    (r"\frac{1}{1-1}", None),
    ("2**9999999", None),
    ("9^9^9", None),
    ("2^{1/2}", None),
    (r"\sqrt{4}", None),
    ("2x + 3", None),
    ("x2 + 3", None),
    ("10_3 + 1", None),
    ("5! + 1", None),
    ("2 + 1 1/2", None),
    ("2:30 + 1", None),
    ("the 3rd + 1", None),
    ("3 apples and 4", None),
    ("(3 + 4", None),
    ("3 + 4)", None),
    ("3 +", None),
    ("__import__('os')", None),
    ("True+1", None),
    ("", None),
    ("(" * 10_000, None),
    ("-" * 100_000 + "1", None),
  ],
)
def test_evaluate(calculation, value):
  assert calculations.evaluate(calculation) == value


@pytest.mark.parametrize(
  "text, value",
  [
    ("1,250", 1250),
    ("-3.5", -3.5),
    (".5", half),
    ("1{,}000", 1000),
    ("12,34", None),
    ("1 2", None),
    ("x", None),
  ],
)
def test_parse_number(text, value):
  assert calculations.parse_number(text) == value


def test_numbers_in_a_text_are_wholes_fractions_and_their_parts():
  assert calculations.numbers_in(r"$\frac{3}{4}$ or -2") == {
    3, 4, -2, 2, fractions.Fraction(3, 4)
  }  # fmt: skip
  assert calculations.numbers_in("1/2") == {1, 2, half}
  assert calculations.numbers_in("none") == set()


@given(
  st.recursive(
    st.integers(0, 999).map(str),
    lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner).map(
      lambda parts: f"({parts[0]}{parts[1]}{parts[2]})"
    ),
    max_leaves=8,
  )
)
def test_brackets_and_signs_mean_what_they_mean_to_python(text):
  wrapped = re.sub(r"(\d+)", r"F(\1)", text)
  try:
    expected = eval(wrapped, {"F": fractions.Fraction})
  except ZeroDivisionError:
    expected = None
  assert calculations.evaluate(text) == expected
