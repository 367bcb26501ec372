"""The results a solution states: found where true, left alone otherwise."""

import fractions

import pytest

from dpop_jax.data import equations


def found(text):
  return [
    text[equation.start :][: len(equation.text)]
    for equation in equations.find(text)
  ]


@pytest.mark.parametrize(
  "text, results",
  [
    ("3 hours x 2 chapters = 6 hours total.", ["6"]),
    ("She has 60+24 = 84, and 84/2= 42 more.", ["84", "42"]),
    ("They sold these for 5 * $3 = $15", ["15"]),
    ("In 2 weeks 3 + 4 = 7 days", ["7"]),
    ("12 boxes × 6 pens/box = 72 pens", ["72"]),
    ("8 pages / 20 minutes = 0.4 pages per minute", ["0.4"]),
    ("5 hours = 5 * 60 = 300 minutes", ["300"]),
    ("Cost = 3 * 4 = 2 * 6 = 12", ["12"]),
    ("20% of $1,250.50 = $250.10", ["250.10"]),
    ("3 - 8 = -5", ["5"]),
    ("3 - 8 = -$5", ["5"]),
    ("1/2 + 1/4 = 3/4 of it", ["3"]),
    ("$25 + $15.20 + $6.80 = **47**. Since", ["47"]),
    ("10/3 = 3.33", ["3.33"]),
    ("52/100 = 52%", ["52"]),
    ("52/100 * 100 = 52%", ["52"]),
    (r"$\frac12 + \frac14 = \frac{3}{4}$", ["3"]),
    (r"$1{,}000 \times 3 = 3{,}000$", ["3{,}000"]),
    ("x &= 3 + 4 \\\\\n&= 7", ["7"]),
    (r"&= 3 + 4 = 7 \end{align*}", ["7"]),
    ("4 hours a day * 3 days = 12 hours", ["12"]),
    (r"f(3) = 3(3)^2 - 2 = 25", ["25"]),
    # Not the whole right side.
    ("2 + 3 = 5 * 1", []),
    ("3 / 4 * 2 = 1 1/2 square feet", []),
    ("2 * 6 = 12x", []),
    (r"3 \cdot 30 = 90^2", []),
    ("2 * 1 = 2:30", []),
    (r"81 + 9 + 1 = \boxed{91}", []),
    ("2 * 3 = 6!", []),
    ("2 * 3 = 6 * x", []),
    (r"2 + 3 = 5\sqrt{2}", []),
    (r"2 + 3 = 5 \pi", []),
    (r"2 + 3 = 3\frac{1}{2}", []),
    ("2 + 3 = 5 x", []),
    # Not the whole left side.
    ("x - 2 * 3 = 6", []),
    ("60 + 30 - x = 85", []),
    ("2x + 3 = 7", []),
    (r"\sqrt{4+1} + 2*2 = 4", []),
    ("2 1/2 * 2 = 1", []),
    ("2 x + 4 = 6", []),
    (r"3\frac{1}{2} + 1 = \frac{3}{2}", []),
    (r"\binom{5}{2} \cdot 2 = 4", []),
    ("|3 - 5| = 2", []),
    (r"\lfloor 6/2 \rfloor = 3", []),
    (r"\log_{2} 2^3 = 8", []),
    (r"a_1 + 3 \cdot 2 = 6", []),
    # No calculation, or not true.
    ("1 hour = 60 minutes", []),
    ("2 + 2 = 5", []),
    ("2 + 2 >= 4", []),
    ("2 + 2 != 4", []),
  ],
)
def test_which_results_are_found(text, results):
  assert found(text) == results


def test_a_result_holds_within_one_unit_of_its_last_digit():
  (third,) = equations.find("10/3 = 3.33")
  assert third.exact == fractions.Fraction(10, 3)
  assert [third.holds(text) for text in ("3.34", "3.32", "3.3", "4", "-3.33")] \
    == [True, False, True, True, False]  # fmt: skip


def test_a_numerator_is_not_rounded():
  (three,) = equations.find("1/2 + 1/4 = 3/4")
  assert three.holds("3") and not three.holds("4") and not three.holds("2")


def test_a_percentage_is_wrong_only_if_wrong_in_both_readings():
  (share,) = equations.find("52/100 * 100 = 52%")
  assert share.holds("52") and not share.holds("57")
  (share,) = equations.find("52/100 = 52%")
  assert share.holds("52") and not share.holds("57")


def test_long_texts_are_read_in_time():
  text = "1 + " * 20_000 + "1 = 3"
  assert found(text) == []
