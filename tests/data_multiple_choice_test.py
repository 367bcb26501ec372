"""Pairs from multiple choice: one per wrong choice, whatever the labels."""

import collections
import json

import pytest

from dpop_jax.data import multiple_choice, pair_tasks


def row(answer="B", labels="ABCD", question="Which?", texts=None):
  texts = texts or [f"choice {label}" for label in labels]
  return {
    "question": question,
    "choices": {"text": texts, "label": list(labels)},
    "answerKey": answer,
  }


def build(rows, **changes):
  options = dict(num_shots=0, seed=0, unusable="skip")
  return multiple_choice.build_arc_pairs(rows, **(options | changes))


@pytest.mark.parametrize("labels", ["AB", "ABC", "ABCD", "ABCDE", "1234"])
def test_every_wrong_choice_gives_a_pair_in_the_order_of_the_choices(labels):
  pairs = build([row(answer=labels[1], labels=labels)]).pairs
  wrong = [label for label in labels if label != labels[1]]
  assert pairs == [
    {
      "prompt": "Question: Which?\nAnswer:\n",
      "chosen": f"choice {labels[1]}",
      "rejected": f"choice {label}",
    }
    for label in wrong
  ]


def test_labels_and_answer_may_be_numbers():
  choices = {"text": ["a", "b"], "label": [1, 2]}
  rows = [
    {"question": "Which?", "choices": choices, "answerKey": key}
    for key in (2, "2")
  ]
  assert [pair["chosen"] for pair in build(rows).pairs] == ["b", "b"]


def test_a_wrong_choice_like_the_right_one_gives_no_pair():
  same = row(answer="A", labels="ABC", texts=["x", "x", "y"])
  built = build([same])
  assert [pair["rejected"] for pair in built.pairs] == ["y"]
  assert built.skipped == {multiple_choice.SAME_AS_ANSWER: 1}
  with pytest.raises(ValueError, match="Row 0: it has the wrong choice 'x'"):
    build([same], unusable="raise")


@pytest.mark.parametrize(
  "bad, what",
  [
    (row(answer="E"), "`answerKey` should be one of the labels"),
    (row(labels="ABAB", answer="A"), "`answerKey` should be one of the labels"),
    (row(question=" "), "`question` should be a text"),
    (row(labels="A", answer="A"), "two or more texts"),
    (row(labels="AB", texts=["x", ""]), "should be a text, not empty"),
    (row() | {"choices": ["x", "y"]}, "`choices` should hold"),
    (row() | {"choices": {"text": "xy", "label": "AB"}}, "two or more texts"),
    ({"question": "Which?"}, "`choices` should hold"),
  ],
)
def test_bad_rows_are_counted_or_named(bad, what):
  built = build([row(), bad])
  assert built.skipped == {pair_tasks.BAD_ROW: 1}
  assert len(built.pairs) == 3
  with pytest.raises(ValueError, match=f"Row 1 cannot be used: .*{what}"):
    build([row(), bad], unusable="raise")


def test_pairs_of_a_question_share_shots_that_are_other_questions():
  rows = [row(question=f"Which {i}?") for i in range(6)]
  pairs = build(rows, num_shots=5).pairs
  prompts = [pair["prompt"] for pair in pairs]
  assert prompts[::3] == prompts[1::3] == prompts[2::3]
  for prompt in prompts[::3]:
    questions = [
      line for line in prompt.split("\n") if line.startswith("Question: ")
    ]
    assert len(set(questions)) == 6
    assert prompt.count("Answer:\nchoice B\n\n") == 5
  assert len(set(prompts)) == 6


@pytest.fixture(scope="module")
def arc(shared_data):
  return {
    path.stem: [json.loads(line) for line in path.read_text().splitlines()]
    for path in (shared_data / "arc").glob("*.jsonl")
  }


def test_arc_challenge_gives_the_published_number_of_pairs(arc):
  built = build(arc["ARC-Challenge-train"], num_shots=5, unusable="raise")
  assert len(built.pairs) == 3_357
  sizes = collections.Counter(pair["prompt"] for pair in built.pairs)
  # Two questions are asked twice, with the same choices.
  assert len(sizes) >= 1_119 - 10
  for pair in built.pairs:
    assert pair["chosen"] != pair["rejected"]
    assert pair["prompt"].count("Question: ") >= 6


def test_arc_with_digits_as_labels_is_read_whole(arc):
  rows = arc["ARC-Easy-validation"]
  assert sum(r["answerKey"].isdigit() for r in rows) == 21
  num_wrong = sum(len(r["choices"]["label"]) - 1 for r in rows)
  assert len(build(rows, unusable="raise").pairs) == num_wrong
