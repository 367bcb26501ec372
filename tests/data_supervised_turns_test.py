"""Supervised conversations: which turns are scored, and what that costs."""

import json

import numpy as np
import pytest

from dpop_jax.data import dataset, forests, preferences, sources

USER, OTHER = ({"role": "user", "content": text} for text in ("2+2?", "Sure?"))
SYSTEM = {"role": "system", "content": "Be brief."}
FOUR, YES = ({"role": "assistant", "content": text} for text in ("4", "Yes."))
Example = preferences.Example


@pytest.mark.parametrize(
  ("row", "expected"),
  [
    (
      {"messages": [USER, FOUR, OTHER, YES]},
      [([USER], "4"), ([USER, FOUR, OTHER], "Yes.")],
    ),
    # What the user says last is answered by nobody.
    ({"messages": [USER, FOUR, OTHER]}, [([USER], "4")]),
    # A greeting is predicted from nothing, but goes before what follows.
    ({"messages": [FOUR, USER, YES]}, [([FOUR, USER], "Yes.")]),
    (
      {"messages": [USER, FOUR, YES]},
      [([USER], "4"), ([USER, FOUR], "Yes.")],
    ),
    (
      {"system": "Be brief.", "conversations": [USER, FOUR]},
      [([SYSTEM, USER], "4")],
    ),
    # These say where the answer begins.
    (
      {"prompt": [USER, FOUR, OTHER], "completion": [YES]},
      [([USER, FOUR, OTHER], "Yes.")],
    ),
    ({"prompt": "2+2", "completion": "4"}, [("2+2", "4")]),
    (
      {"chosen": [USER, FOUR, OTHER, YES]},
      [([USER, FOUR, OTHER], "Yes.")],
    ),
    ({"prompt_ids": [1], "chosen_ids": [2]}, [([1], [2])]),
  ],
)
def test_turns_of_a_row(row, expected):
  examples = preferences.parse_supervised_turns(row)
  assert examples == [Example(*example, None) for example in expected]


@pytest.mark.parametrize(
  ("row", "reason"),
  [
    ({"messages": [USER]}, "no answer"),
    ({"messages": [FOUR]}, "no answer"),
    ({"messages": [USER, FOUR | {"content": " "}, YES]}, "empty answer"),
    ({"messages": [USER, FOUR | {"role": "tool"}, YES]}, "unknown role"),
    ({"messages": "abc"}, "missing key"),
    ({"prompt": "a", "completion": "b", "label": True}, "unpaired"),
    ({"system": "x", "messages": [SYSTEM, USER, FOUR]}, "misplaced system"),
  ],
)
def test_bad_rows_say_why(row, reason):
  with pytest.raises(preferences.BadRow) as caught:
    preferences.parse_supervised_turns(row)
  assert caught.value.reason == reason


@pytest.fixture
def load(tmp_path, shared_data):
  """Loads rows by chatml in the tokenizer of stories260K."""

  def load(rows, *, is_sft=True, row_length=4096, **options):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = dataset.DataConfig(
      train=str(file),
      tokenizer=str(shared_data / "models/stories260K"),
      **{"chat_template": "chatml"} | options,
    )
    return dataset.load(config, is_sft=is_sft, row_length=row_length)

  return load


def lists(token_pairs):
  return [[ids.tolist() for ids in pair] for pair in token_pairs]


ROWS = [{"messages": [USER, FOUR, OTHER, YES]}, {"messages": [OTHER, YES]}]


def test_last_is_what_it_was_and_all_adds_the_turns_before(load):
  last = lists(load(ROWS).train)
  assert lists(load(ROWS, supervised_turns="last").train) == last
  turns = [{"messages": [USER, FOUR]}, *ROWS]
  every = load(ROWS, supervised_turns="all")
  assert lists(every.train) == lists(load(turns).train)
  assert (every.report["train"]["num_rows"], len(every.train)) == (2, 3)
  first = load(ROWS, supervised_turns="all", max_pairs=1)
  assert lists(first.train) == lists(every.train)[:1]


def test_a_row_with_an_unusable_turn_counts_once(load):
  bad = {"messages": [USER, FOUR, {"role": "tool", "content": "x"}, YES]}
  report = load([bad, *ROWS], supervised_turns="all").report["train"]
  assert report["bad_rows"] == {"unknown role": 1}
  assert "1 of 3 rows are unusable" in report["left_out"]
  # This template refuses both turns of the first row.
  template = (
    "{% for m in messages %}{% if m.content == '2+2?' %}"
    "{{ raise_exception('No sums') }}{% endif %}{{ m.content }}{% endfor %}"
  )
  loaded = load(ROWS, supervised_turns="all", chat_template=template)
  assert loaded.report["train"]["bad_rows"] == {"chat template": 1}
  assert len(loaded.train) == 1


def test_a_turn_that_does_not_fit_leaves_the_others(load):
  long = FOUR | {"content": "4" * 40}
  row = {"messages": [USER, long, OTHER, YES]}
  loaded = load([row], supervised_turns="all", max_answer_length=30)
  assert loaded.report["train"]["num_dropped_for_length"] == 1
  assert loaded.report["train"]["bad_rows"] == {}
  expected = load([row], max_answer_length=30)
  assert lists(loaded.train) == lists(expected.train)
  with pytest.raises(ValueError, match="tokens does not fit"):
    load(
      [row],
      supervised_turns="all",
      max_answer_length=30,
      on_long_answer="raise",
    )


def test_turns_of_a_conversation_are_held_out_together(load):
  rows = [
    {"messages": [USER | {"content": f"{i}?"}, FOUR, OTHER, YES]}
    for i in range(6)
  ]
  loaded = load(rows, supervised_turns="all", num_eval_pairs=5)
  assert (len(loaded.train), len(loaded.eval)) == (8, 4)
  prompts = [
    {bytes(pair.prompt[:20]) for pair in side}
    for side in (loaded.train, loaded.eval)
  ]
  assert not prompts[0] & prompts[1]


def test_pairs_are_refused_all_turns(load):
  row = {"prompt": "a", "chosen": "b", "rejected": "c"}
  assert len(load([row], is_sft=False).train) == 1
  with pytest.raises(ValueError, match="data.supervised_turns = 'all' is for"):
    load([row], is_sft=False, supervised_turns="all")
  with pytest.raises(ValueError, match="data.supervised_turns must be one of"):
    load(ROWS, supervised_turns="first")


def test_all_turns_of_real_conversations_cost_little_more_than_their_text(
  load, shared_data
):
  path = shared_data / "prefs/llamafactory_dpo_en_demo.json"
  rows = []
  for row in sources.read(str(path)):
    example = preferences.parse_preference(row.value)
    turn = {"role": "assistant", "content": example.chosen}
    if len(example.prompt) > 4:
      rows.append({"messages": [*example.prompt, turn]})
  num_answers = sum(
    turn["role"] == "assistant" for row in rows for turn in row["messages"]
  )
  every = load(rows, supervised_turns="all", row_length=100_000).train
  last = load(rows, row_length=100_000).train
  assert len(last) == len(rows) < num_answers == len(every)
  # One conversation is one path, and each answer a short branch of it.
  ends = np.cumsum(
    [
      sum(turn["role"] == "assistant" for turn in row["messages"])
      for row in rows
    ]
  )
  for number, (start, end) in enumerate(
    zip([0, *ends[:-1]], ends, strict=True)
  ):
    turns = [every[i] for i in range(start, end)]
    tree = forests.build_tree(turns, range(len(turns)))
    whole = len(last[number].prompt) + len(last[number].chosen)
    # Of each answer, EOS, and a token or two where text was cut at its seam.
    assert whole <= len(tree.tokens) <= whole + 3 * len(turns)
