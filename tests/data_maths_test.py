"""Wrong intermediate results: one number, false, in style, nothing else."""

import fractions
import json
import os
import re

import numpy as np
import pytest

from dpop_jax.data import equations, maths, pair_tasks, worked_texts

NATALIA = {
  "question": "How many clips?",
  "answer": (
    "In May she sold 48/2 = <<48/2=24>>24 clips.\n"
    "In all she sold 48+24 = <<48+24=72>>72 clips.\n#### 72"
  ),
}
# The example that the data set of the paper shows, shortened.
PLAYERS = {
  "query": "What is the total cost for all sixteen players?",
  "response": (
    "Each one costs $25 + $15.20 + $6.80 = $47.\nSince there are sixteen "
    "players, it is 16 * $47 = $752.\n#### 752\nThe answer is: 752"
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


def test_the_published_example_without_marks():
  (pair,) = build([PLAYERS]).pairs
  assert pair["chosen"] == PLAYERS["response"]
  before, after = pair["chosen"].split("47", 1)
  wrong = pair["rejected"].removeprefix(before).removesuffix(after)
  # Nine is a fifth of 47; the later $47 stays.
  assert 38 <= int(wrong) <= 56 and wrong != "47"
  assert "16 * $47 = $752" in pair["rejected"]


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
    ("That is <<2**3=8>>8.", ["8"]),
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
    # Beyond what can be worked out.
    ("That is <<4x=8>>8.", []),
  ],
)
def test_which_marked_numbers_may_be_corrupted(sentence, eligible):
  last = "\nSo it is <<5+5=10>>10.\n#### 10"
  assert results_of(sentence + last) == eligible


def test_the_last_marked_calculation_is_never_corrupted():
  assert results_of("It is <<2*4=8>>8, about.\n#### 10") == []


def test_marks_are_taken_out_and_nothing_else():
  marked = "a  <<1+1=2>>2 << b\n<<2+2=4>>4 <<>>c\n#### 4\n"
  assert maths.parse_solution(marked).text == "a  2 << b\n4 c\n#### 4\n"


@pytest.mark.parametrize(
  "solution, eligible",
  [
    ("2+1 = 3, 3*4 = 12. The answer is: 12", ["3"]),
    ("2+1 = 3, 3*4 = 12. The answer is 3.", ["12"]),
    # Nothing that the final answer is made of.
    (r"2+1 = 3, 3*4 = 12. So $\boxed{(3, 5)}$.", ["12"]),
    (r"1/2+1/4 = 3/4, 3*4 = 12, \boxed{\frac{3}{4}}", ["12"]),
    (r"3-8 = -5, 3*4 = 12, \boxed{-5}", ["12"]),
    # Nothing at or behind the statement of the final answer.
    ("3*4 = 12\n#### 7\nThe answer is: 7, for 3+1 = 4.", ["12"]),
    (r"$3 \cdot 4 = 12$, $2^{12} = 4096$. \boxed{4096}", ["12"]),
    (r"\boxed{3*4 = 12}, so the answer is: 7", []),
    ("The value is 2+2 = 4. The value of x is 7.", ["4"]),
  ],
)
def test_which_numbers_without_marks_may_be_corrupted(solution, eligible):
  assert results_of(solution) == eligible


@pytest.mark.parametrize(
  "text, calculation, pattern",
  [
    ("24", "48/2", r"19|2[0-35-9]"),
    ("5,000", "5*1000", r"[1-9],000|10,000"),
    ("5{,}000", "5*1000", r"[1-9]\{,\}000|10\{,\}000"),
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
  exact = fractions.Fraction(eval(re.sub(r"(\d+)", r"F(\1)", calculation), {
    "F": fractions.Fraction
  }))  # fmt: skip
  result = equations.Equation(0, text, exact)
  wrong = {
    maths.wrong_number(result, np.random.default_rng(i)) for i in range(100)
  }
  assert all(re.fullmatch(pattern, number) for number in wrong), wrong
  assert text not in wrong


def test_numbers_beyond_64_bits_are_corrupted_too():
  nines = "9" * 30
  result = equations.Equation(0, nines, fractions.Fraction(nines))
  wrong = maths.wrong_number(result, np.random.default_rng(0))
  assert wrong != nines and len(wrong) in (30, 31)


def test_tries_are_bounded_and_a_row_without_luck_is_counted(monkeypatch):
  monkeypatch.setattr(maths, "_MAX_TRIES", 0)
  built = build([NATALIA])
  assert not built.pairs and built.skipped == {maths.NO_WRONG_NUMBER: 1}
  with pytest.raises(ValueError, match="Row 0: no result of it has a wrong"):
    build([NATALIA], unusable="raise")


def test_rows_without_an_intermediate_result_are_counted_or_refused():
  single = {"question": "?", "answer": "<<1+1=2>>2\n#### 2"}
  none = {"question": "?", "answer": "Two.\n#### 2"}
  built = build([single, NATALIA, none])
  assert len(built.pairs) == 1
  assert built.skipped == {maths.NO_INTERMEDIATE_RESULT: 2}
  with pytest.raises(ValueError, match="Row 1: it has no intermediate"):
    build([NATALIA, single], unusable="raise")


@pytest.mark.parametrize(
  "row, reason, what",
  [
    ({"answer": "#### 2"}, "bad_row", "should have `question` or `query`"),
    ({"question": "?", "answer": 3}, "bad_row", "`answer` should be a text"),
    ({"question": "?", "answer": " "}, "bad_row", "`answer` should be a text"),
    (
      {"question": "?", "answer": "<<1+1=2>>2"},
      maths.NO_FINAL_ANSWER,
      "which its final answer is",
    ),
  ],
)
def test_bad_rows_are_counted_or_named(row, reason, what):
  built = build([NATALIA, row])
  assert built.skipped == {reason: 1} and len(built.pairs) == 1
  with pytest.raises(ValueError, match=f"Row 1 cannot be used: .*{what}"):
    build([NATALIA, row], unusable="raise")


def test_a_row_is_known_by_its_texts_in_any_layout_and_company():
  layouts = [
    dict(zip(keys, NATALIA.values(), strict=True)) | {"id": i}
    for i, keys in enumerate(
      [("question", "answer"), ("query", "response"), ("problem", "solution")]
    )
  ]
  ids = {maths.make_task(row, 0).row_id for row in layouts}
  assert len(ids) == 1
  corrupted = {build([row]).pairs[0]["rejected"] for row in layouts}
  assert len(corrupted) == 1
  other = NATALIA | {"question": "How many clips ?"}
  assert maths.make_task(other, 0).row_id not in ids


def test_corruptions_differ_by_seed_and_by_row():
  rows = [NATALIA | {"question": f"Question {i}?"} for i in range(30)]
  first, again, other = (build(rows, seed=seed).pairs for seed in (0, 0, 1))
  assert first == again != other
  assert len({pair["rejected"] for pair in first}) > 5
  assert build(rows[::-1]).pairs == first


def test_rephrased_questions_of_one_original_belong_together():
  rows = [PLAYERS | {"query": q, "original_question": "Sixteen?"} for q in "ab"]
  assert {maths.make_task(row, 0).group for row in rows} == {"Sixteen?"}
  assert maths.make_task(PLAYERS, 0).group == PLAYERS["query"]


def assert_one_number_differs(pair):
  """And nothing else; returns the matches of both numbers."""
  chosen, rejected = pair["chosen"], pair["rejected"]
  place = len(os.path.commonprefix([chosen, rejected]))
  right, wrong = number_at(chosen, place), number_at(rejected, place)
  assert chosen[: right.start()] == rejected[: wrong.start()]
  assert chosen[right.end() :] == rejected[wrong.end() :]
  values = [
    float(number.group().replace(",", "").lstrip("-"))
    for number in (right, wrong)
  ]
  assert values[0] != values[1]
  return right, wrong


@pytest.fixture(scope="module")
def gsm8k(shared_data):
  lines = (shared_data / "gsm8k/train.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def test_all_of_gsm8k_differs_in_one_false_result_and_nothing_else(gsm8k):
  built = build(gsm8k)
  # 499 rows have less than two calculations; some of those without any mark
  # have equations in their text.
  assert 6_950 < len(built.pairs) < 7_473 - 499 + 95
  assert len(built.pairs) + built.skipped.total() == 7_473
  answers = {
    f"Question: {row['question']}\nAnswer:\n": row["answer"] for row in gsm8k
  }
  num_marked = num_found = 0
  for pair in built.pairs:
    marked, chosen = answers[pair["prompt"]], pair["chosen"]
    assert chosen == re.sub(r"<<.*?>>", "", marked)
    right, wrong = assert_one_number_differs(pair)
    start = right.start()
    assert start < chosen.index("####")
    final = chosen[chosen.index("####") :]
    assert pair["rejected"].endswith(final)
    right_value, wrong_value = (
      float(number.group().replace(",", "")) for number in (right, wrong)
    )
    assert str(right.group()) != final.removeprefix("#### ").strip()
    num_marked += "<<" in marked
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
  # A percent sign in a few calculations is beyond Python.
  assert num_marked - 5 < num_found <= num_marked


def test_gsm8k_without_its_marks_is_read_from_the_text(gsm8k):
  rows = [
    {"query": row["question"], "response": re.sub("<<.*?>>", "", row["answer"])}
    for row in gsm8k[:500]
  ]
  built = build(rows)
  assert len(built.pairs) > 0.92 * len(rows)
  num_checked = 0
  for pair in built.pairs:
    right, wrong = assert_one_number_differs(pair)
    start = right.start()
    # What Python can work out by itself.
    simple = re.search(
      r"(?<![\w.,/*+%$-])(?<![-/*+x×=] )"
      r"((?:\$?\d+(?:\.\d+)? ?[-+*/] ?)+\$?\d+(?:\.\d+)?) ?= ?\$?$",
      pair["chosen"][:start],
    )
    behind = pair["chosen"][right.end() :]
    if simple and not re.match(" ?[%/]", behind):
      exact = eval(simple[1].replace("$", ""))
      right_value, wrong_value = (
        float(number.group().replace(",", "")) for number in (right, wrong)
      )
      unit = 10.0 ** -len(right.group().partition(".")[2])
      assert abs(exact - right_value) < unit <= abs(exact - wrong_value) + 1e-9
      num_checked += 1
  assert num_checked > 0.5 * len(built.pairs)


def test_metamath_texts(shared_data):
  rows = {
    name: list(worked_texts.read(str(shared_data / f"metamath/{name}.txt")))
    for name in ("ansaug_cot_gsm8k", "sv_cot_gsm8k")
  }
  assert {name: len(found) for name, found in rows.items()} == {
    "ansaug_cot_gsm8k": 8, "sv_cot_gsm8k": 8
  }  # fmt: skip
  built = build([row.value for row in rows["ansaug_cot_gsm8k"]])
  assert len(built.pairs) == 8
  for pair in built.pairs:
    assert_one_number_differs(pair)
  # These solve for x: their equations hold an unknown, all but those of a row.
  built = build([row.value for row in rows["sv_cot_gsm8k"]])
  assert len(built.pairs) == 1
  assert built.skipped == {maths.NO_INTERMEDIATE_RESULT: 7}


def test_a_row_says_why_it_cannot_be_used():
  with pytest.raises(pair_tasks.Unusable, match="it should be|it says nowhere"):
    maths.make_task({"question": "?", "answer": "Two."}, 0)
