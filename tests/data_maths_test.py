"""Wrong intermediate results: one number, false, in style, nothing else."""

import fractions
import json
import os
import re

import numpy as np
import pytest

from dpop_jax.data import maths

NATALIA = {
  "question": "How many clips?",
  "answer": (
    "In May she sold 48/2 = <<48/2=24>>24 clips.\n"
    "In all she sold 48+24 = <<48+24=72>>72 clips.\n#### 72"
  ),
}


def build(rows, **changes):
  options = dict(num_shots=0, seed=0, unusable="skip")
  return maths.build_pairs(rows, **(options | changes))


def results_of(answer):
  return [result.text for result in maths.parse_solution(answer).results]


def number_at(text, place):
  """The number that covers `place`, as a match."""
  for match in re.finditer(r"-?[\d,]*\.?\d+", text):
    if match.start() <= place < match.end():
      return match
  raise AssertionError(f"There is no number at {place} of {text!r}.")


def test_a_hand_worked_pair():
  (pair,) = build([NATALIA]).pairs
  assert pair["prompt"] == "Question: How many clips?\nAnswer:\n"
  assert pair["chosen"] == (
    "In May she sold 48/2 = 24 clips.\n"
    "In all she sold 48+24 = 72 clips.\n#### 72"
  )
  before, after = pair["chosen"].split("24", 1)
  wrong = pair["rejected"].removeprefix(before).removesuffix(after)
  # Five off at most, for a fifth of 24 is less.
  assert 19 <= int(wrong) <= 29 and wrong != "24"


@pytest.mark.parametrize(
  "sentence, eligible",
  [
    ("That is $<<2*600=1200>>1,200 a year.", ["1,200"]),
    ("That is <<12*.5=6>> $6.", ["6"]),
    ("That is <<3-8=-5>>-5 points.", ["-5"]),
    ("That is <<1/4=.25>>.25 of it.", [".25"]),
    ("That is <<1/4=.25>>0.25 of it.", ["0.25"]),
    ("That is <<10/3=3>>3 of them.", ["3"]),
    ("They end at <<2*4=8>>8.", ["8"]),
    # The text goes on differently, or with more of the same number.
    ("That is <<2*4=8>>eight.", []),
    ("That is <<1/4=.25>>25%.", []),
    ("That is <<1*1=1>>1/2 of it.", []),
    ("That is at <<1*2=2>>2:30.", []),
    ("That is the <<3*4=12>>12th.", []),
    ("That is <<1*12=12>>12,34 of it.", []),
    # Wrong from the start, or as the answer.
    ("That is <<2*4=9>>9.", []),
    ("That is <<2*5=10>>10.", []),
    ("That is <<10>>10.", []),
    # Beyond what can be worked out; that it is a result is known.
    ("That is <<4x=8>>8.", ["8"]),
    ("That is <<2**3=8>>8.", ["8"]),
    ("That is <<(1+1)*(2--2)=8>>8.", ["8"]),
  ],
)
def test_which_numbers_may_be_corrupted(sentence, eligible):
  last = "\nSo it is <<5+5=10>>10.\n#### 10"
  assert results_of(sentence + last) == eligible


def test_the_last_calculation_is_never_corrupted():
  assert results_of("It is <<2*4=8>>8, about.\n#### 10") == []


def test_marks_are_taken_out_and_nothing_else():
  marked = "a  <<1+1=2>>2 << b\n<<2+2=4>>4 <<>>c\n#### 4\n"
  assert maths.parse_solution(marked).text == "a  2 << b\n4 c\n#### 4\n"


@pytest.mark.parametrize(
  "calculation, value",
  [
    ("48/2", 24),
    ("0.1+0.2", fractions.Fraction(3, 10)),
    (".20*(50-10)", 8),
    ("-3*-4", 12),
    ("1/0", None),
    ("2**9999999", None),
    ("1,000*2", None),
    ("__import__('os')", None),
    ("True+1", None),
    ("007", None),
    ("", None),
    ("(" * 10_000, None),
    ("-" * 100_000 + "1", None),
  ],
)
def test_evaluate(calculation, value):
  assert maths.evaluate(calculation) == value


@pytest.mark.parametrize(
  "text, calculation, pattern",
  [
    ("24", "48/2", r"19|2[0-35-9]"),
    ("5,000", "5*1000", r"[1-9],000|10,000"),
    ("5000", "5*1000", r"[1-9]000|10000"),
    ("-5", "3-8", r"-([1-46-9]|10)"),
    (".25", "1/4", r"\.(2[0-46-9]|30)"),
    ("0.20", "1/5", r"0\.[13-7]0"),
    ("12.00", "6*2", r"([7-9]|1[013-7])\.00"),
    # Ten times more: 998 is 798 to 999; "1,050" is how another style writes it.
    ("998", "499*2", r"[79]\d\d|8\d\d"),
    ("1,001", "1000+1", r"1,\d\d\d"),
    ("0", "5-5", r"[1-5]"),
    # 10/3 is 3.33: both 3 and 4 could be its rounding.
    ("3", "10/3", r"[125-8]"),
  ],
)
def test_a_wrong_number_keeps_the_style_of_the_right_one(
  text, calculation, pattern
):
  result = maths.Result(0, text, calculation)
  wrong = {
    maths.wrong_number(result, np.random.default_rng(i)) for i in range(200)
  }
  assert all(re.fullmatch(pattern, number) for number in wrong), wrong
  assert text not in wrong


def test_numbers_beyond_64_bits_are_corrupted_too():
  result = maths.Result(0, "9" * 30, "9" * 30)
  wrong = maths.wrong_number(result, np.random.default_rng(0))
  assert wrong != result.text and len(wrong) in (30, 31)


def test_tries_are_bounded_and_a_row_without_luck_is_counted(monkeypatch):
  monkeypatch.setattr(maths, "_MAX_TRIES", 0)
  built = build([NATALIA])
  assert not built.pairs and built.skipped == {maths.NO_WRONG_NUMBER: 1}
  with pytest.raises(ValueError, match="Row 0 has no result with a wrong"):
    build([NATALIA], unusable="raise")


def test_rows_without_an_intermediate_result_are_counted_or_refused():
  single = {"question": "?", "answer": "<<1+1=2>>2\n#### 2"}
  none = {"question": "?", "answer": "Two.\n#### 2"}
  built = build([single, NATALIA, none])
  assert len(built.pairs) == 1
  assert built.skipped == {maths.NO_INTERMEDIATE_RESULT: 2}
  with pytest.raises(ValueError, match="Row 1 has no intermediate"):
    build([NATALIA, single], unusable="raise")


@pytest.mark.parametrize(
  "row, what",
  [
    ({"answer": NATALIA["answer"]}, "'question' must be a text"),
    ({"question": "?", "answer": 3}, "'answer' must be a text"),
    ({"question": "?", "answer": " "}, "'answer' must be a text"),
    ({"question": "?", "answer": "<<1+1=2>>2"}, "final answer"),
  ],
)
def test_bad_rows_are_counted_or_named(row, what):
  built = build([NATALIA, row])
  assert built.skipped == {maths.BAD_ROW: 1} and len(built.pairs) == 1
  with pytest.raises(ValueError, match=f"Row 1 cannot be used: .*{what}"):
    build([NATALIA, row], unusable="raise")


def numbered(count):
  return [NATALIA | {"question": f"Question {i}?"} for i in range(count)]


def asked(prompt):
  return re.findall(r"^Question: (.*)$", prompt, re.MULTILINE)


def test_shots_are_others_without_repeats_and_end_with_the_question():
  for i, pair in enumerate(build(numbered(6), num_shots=5).pairs):
    questions = asked(pair["prompt"])
    assert questions[-1] == f"Question {i}?"
    assert len(set(questions)) == len(questions) == 6
    assert pair["prompt"].count(pair["chosen"]) == 5
    assert "<<" not in pair["prompt"]


def test_a_row_that_asks_the_same_is_no_shot():
  rows = [*numbered(2), NATALIA | {"question": "Question 0?"}]
  assert asked(build(rows, num_shots=1).pairs[0]["prompt"]) == [
    "Question 1?",
    "Question 0?",
  ]
  with pytest.raises(ValueError, match="num_shots=2 .* there are 1"):
    build(rows, num_shots=2)


def test_shots_differ_by_row_and_by_seed():
  prompts = [
    [
      asked(pair["prompt"])[:-1]
      for pair in build(numbered(20), **options).pairs
    ]
    for options in (
      dict(num_shots=4, seed=0),
      dict(num_shots=4, seed=0),
      dict(num_shots=4, seed=1),
    )
  ]
  assert prompts[0] == prompts[1] != prompts[2]
  assert len({tuple(shots) for shots in prompts[0]}) == 20


def test_a_corruption_depends_on_seed_and_row_id_alone():
  solution = maths.parse_solution(NATALIA["answer"])
  forth = [maths.corrupt(solution, seed=0, row_id=i) for i in range(30)]
  back = [maths.corrupt(solution, seed=0, row_id=i) for i in range(29, -1, -1)]
  other = [maths.corrupt(solution, seed=1, row_id=i) for i in range(30)]
  assert forth == back[::-1] != other
  assert len(set(forth)) > 5
  # Rows before it do not matter to a row, be they usable or not.
  unusable = {"question": "?", "answer": "Two.\n#### 2"}
  assert (
    build([NATALIA, NATALIA]).pairs[1] == build([unusable, NATALIA]).pairs[0]
  )


@pytest.fixture(scope="module")
def gsm8k(shared_data):
  lines = (shared_data / "gsm8k/train.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def test_all_of_gsm8k_differs_in_one_false_result_and_nothing_else(gsm8k):
  built = build(gsm8k)
  # 499 rows have less than two calculations.
  assert 6_900 < len(built.pairs) <= 7_473 - 499
  assert len(built.pairs) + built.skipped.total() == 7_473
  answers = {
    f"Question: {row['question']}\nAnswer:\n": row["answer"] for row in gsm8k
  }
  num_found = 0
  for pair in built.pairs:
    marked, chosen, rejected = (
      answers[pair["prompt"]],
      pair["chosen"],
      pair["rejected"],
    )
    assert chosen == re.sub(r"<<.*?>>", "", marked)
    place = len(os.path.commonprefix([chosen, rejected]))
    right, wrong = number_at(chosen, place), number_at(rejected, place)
    start = right.start()
    assert chosen[:start] == rejected[: wrong.start()]
    assert chosen[right.end() :] == rejected[wrong.end() :]
    assert start < chosen.index("####")
    right_value, wrong_value = (
      float(number.group().replace(",", "")) for number in (right, wrong)
    )
    assert right_value != wrong_value
    assert (right_value < 0) == (wrong_value < 0)
    # The calculation whose mark stood in front of the number.
    for mark in re.finditer(r"<<([-+*/(). \d]+)=([-.\d]+)>>", marked):
      marked_place = len(re.sub(r"<<.*?>>", "", marked[: mark.end()]))
      if 0 <= start - marked_place <= 2 and float(mark[2]) == right_value:
        exact = eval(mark[1])
        unit = 10.0 ** -len(right.group().partition(".")[2])
        assert (
          abs(exact - right_value) < unit <= abs(exact - wrong_value) + 1e-9
        )
        num_found += 1
        break
  assert num_found == len(built.pairs)


def test_gsm8k_rows_are_the_same_in_any_company(gsm8k):
  together, some = build(gsm8k[:200]).pairs, build(gsm8k[:100]).pairs
  assert some == together[: len(some)]
  assert build(gsm8k[:200], seed=1).pairs != together
