"""Shots: others, without repeats, by seed and row, plain or as messages."""

import pytest

from dpop_jax.data import few_shot, preferences


def example(i, question=None, group=None):
  question = question or f"Q{i}"
  return few_shot.Example(i, question, f"A{i}", group or question)


def shots(examples, num_shots=3, **changes):
  options = dict(sampling="per_row", seed=0)
  return few_shot.Shots(examples, num_shots=num_shots, **(options | changes))


def questions(drawn):
  return [one.question for one in drawn]


TWENTY = [example(i) for i in range(20)]


def test_a_prompt_as_text_and_as_messages():
  assert few_shot.render(TWENTY[:1], "Why?") == (
    "Question: Q0\nAnswer:\nA0\n\nQuestion: Why?\nAnswer:\n"
  )
  assert few_shot.render(TWENTY[:1], "and", few_shot.CONTINUATION) == (
    "Q0A0\n\nand"
  )
  chat = few_shot.render_chat(TWENTY[:1], "Why?")
  assert chat == [
    {"role": "user", "content": "Q0"},
    {"role": "assistant", "content": "A0"},
    {"role": "user", "content": "Why?"},
  ]
  answers = {
    key: [few_shot.message("assistant", key)] for key in ("chosen", "rejected")
  }
  read = preferences.parse_preference({"prompt": chat, **answers})
  assert (read.prompt, read.chosen, read.rejected) == (
    chat, "chosen", "rejected"
  )  # fmt: skip


@pytest.mark.parametrize("sampling", ["per_row", "fixed"])
def test_no_row_gets_its_own_group_or_a_question_twice(sampling):
  twice = [*TWENTY[:4], example(7, "Q0"), example(8, group="Q1")]
  for i in range(4):
    drawn = shots(twice, sampling=sampling).of(i, f"Q{i}")
    assert len(set(questions(drawn))) == 3
    assert f"Q{i}" not in [one.group for one in drawn]


def test_shots_depend_on_the_set_and_not_on_its_order():
  forth, back = shots(TWENTY), shots(TWENTY[::-1])
  assert [forth.of(i, "") for i in range(9)] == [
    back.of(i, "") for i in range(9)
  ]
  assert forth.of(5, "") == forth.of(5, "")
  # Also where some ask the same.
  twice = [*TWENTY, *(example(50 + i, f"Q{i}") for i in range(10))]
  forth, back = shots(twice, 15), shots(twice[::-1], 15)
  assert forth.of(0, "") == back.of(0, "")


def test_shots_differ_by_row_and_by_seed_unless_fixed():
  per_row = [tuple(shots(TWENTY).of(i, "")) for i in range(20)]
  # 20 draws of 3 ordered out of 20 (6,840 ways): a repeat is rare, not all.
  assert len(set(per_row)) > 17
  assert per_row != [tuple(shots(TWENTY, seed=1).of(i, "")) for i in range(20)]
  fixed = shots(TWENTY, sampling="fixed")
  assert len({tuple(fixed.of(i, "")) for i in range(20)}) == 1
  first = questions(fixed.of(0, ""))
  # A row that is a shot itself gets another instead, and the others stay.
  assert questions(fixed.of(0, first[1]))[:2] == [first[0], first[2]]


@pytest.mark.parametrize("sampling", ["per_row", "fixed"])
def test_too_few_others_are_an_error(sampling):
  with pytest.raises(ValueError, match="num_shots=3 .* there are 2"):
    shots(TWENTY[:3], sampling=sampling).of(0, "Q0")
  with pytest.raises(ValueError, match="num_shots=1 .* there are 0"):
    shots([], num_shots=1).of(0, "Q0")


@pytest.mark.parametrize(
  "changes", [dict(num_shots=-1), dict(seed=-1), dict(sampling="all")]
)
def test_bad_options_are_named(changes):
  with pytest.raises(ValueError, match="not be negative|must be one of"):
    shots(TWENTY, **changes)
