"""Final answers, and what makes two of them the same."""

import fractions

import pytest

from dpop_jax.data import checkers, final_answers


@pytest.mark.parametrize(
  "solution, text",
  [
    ("So 7.\n#### 72", "72"),
    ("#### 1,250 \nThe answer is: 3", "1,250"),
    ("The answer is: 72", "72"),
    ("the final answer is $72$.", "72"),
    ("So the answer is **72**!", "72"),
    (r"Thus $x = \boxed{\frac{1}{2}}$ and", r"\frac{1}{2}"),
    (r"\boxed{1}, no, \boxed{{2}}.", "{2}"),
    (r"\boxed{1}. The answer is: \boxed{3}", "3"),
    ("The value of x is 5.", "5"),
    ("The value of the unknown variable x is $5.", "$5"),
    ("So:\nAnswer: 5", "5"),
    ("37+5=42\nFinal answer 42", "42"),
    ("An answer 5", None),
    ("It is 5.", None),
    (r"\boxed{1", None),
    ("####", None),
    ("The answer is", None),
    ("", None),
  ],
)
def test_the_final_answer_of_a_solution(solution, text):
  final = final_answers.find(solution)
  assert (final and final.text) == text


def test_the_first_statement_of_a_final_answer_is_where_it_begins():
  solution = "2+2 = 4.\n#### 4\nThe answer is: 4"
  assert final_answers.find(solution).start == solution.index("####")


@pytest.mark.parametrize(
  "text, value",
  [
    ("72", 72),
    ("$1,250", 1250),
    ("-3.5", -3.5),
    ("50%", 50),
    (r"50\%", 50),
    ("12 apples", 12),
    ("3/4", fractions.Fraction(3, 4)),
    (r"\frac{3}{4}", fractions.Fraction(3, 4)),
    (r"-\frac{1}{2}", fractions.Fraction(-1, 2)),
    (r"90^\circ", 90),
    (r"\sqrt{5}", None),
    ("(1, 2)", None),
    ("2 + 3", None),
    ("apples", None),
    ("", None),
  ],
)
def test_the_number_of_a_final_answer(text, value):
  assert final_answers.number(text) == value


@pytest.mark.parametrize(
  "checker, answer, result",
  [
    ("number", "So 4.\n#### 4.0", "4"),
    ("number", "The answer is: $0.5", "1/2"),
    ("number", r"\boxed{\frac{2}{4}}", "1/2"),
    ("number", r"The answer is: \sqrt {5}", r"\sqrt{5}"),
    ("number", " 72 ", "72"),
    ("number", "It is 72, I think", None),
    ("letter", "B", "B"),
    ("letter", "(B) because", "B"),
    ("letter", "B. Iron", "B"),
    ("letter", "The answer is (B).", "B"),
    ("letter", "The answer is: 3", "3"),
    ("letter", "Because", None),
    ("letter", "I think B", None),
    ("exact", " yes\n", "yes"),
    ("exact", " ", None),
  ],
)
def test_what_an_answer_comes_down_to(checker, answer, result):
  assert checkers.CHECKERS[checker](answer) == result


def test_an_expected_answer_may_be_written_by_itself():
  assert checkers.expected("number", "#### 72") == "72"
  assert checkers.expected("number", r"\sqrt{5}") == r"\sqrt{5}"
  with pytest.raises(ValueError, match="'none' is none to the checker"):
    checkers.expected("letter", "none")
