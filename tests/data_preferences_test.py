"""Every layout of preference data gives the same example, or says why not."""

import collections

import pytest

from dpop_jax.data import preferences, sources

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "2+2?"}
FOUR = {"role": "assistant", "content": "4"}
FIVE = {"role": "assistant", "content": "5"}
GPT_FOUR = {"from": "gpt", "value": "4"}
GPT_FIVE = {"from": "gpt", "value": "5"}
CHAT = preferences.Example([USER], "4", "5")


@pytest.mark.parametrize(
  ("row", "expected"),
  [
    (
      {"prompt": "2+2", "chosen": " = 4", "rejected": " = 5", "score": 3},
      preferences.Example("2+2", " = 4", " = 5"),
    ),
    ({"prompt": [USER], "chosen": [FOUR], "rejected": [FIVE]}, CHAT),
    ({"prompt": [USER], "chosen": "4", "rejected": "5"}, CHAT),
    ({"prompt": "2+2?", "chosen": [FOUR], "rejected": [FIVE]}, CHAT),
    (
      {"prompt": [USER], "chosen": [USER, FOUR], "rejected": [USER, FIVE]},
      CHAT,
    ),
    ({"chosen": [USER, FOUR], "rejected": [USER, FIVE]}, CHAT),
    (
      {"prompt": "2+2?", "chosen": [USER, FOUR], "rejected": [USER, FIVE]},
      CHAT,
    ),
    (
      {
        "chosen": [SYSTEM, USER, FOUR, USER, FOUR],
        "rejected": [SYSTEM, USER, FOUR, USER, FIVE],
      },
      preferences.Example([SYSTEM, USER, FOUR, USER], "4", "5"),
    ),
    (
      {
        "conversations": [
          {"from": "system", "value": "Be brief."},
          {"from": "human", "value": "2+2?"},
        ],
        "chosen": GPT_FOUR,
        "rejected": GPT_FIVE,
      },
      preferences.Example([SYSTEM, USER], "4", "5"),
    ),
    (
      {
        "system": "Be brief.",
        "conversations": [{"from": "human", "value": "2+2?"}],
        "chosen": GPT_FOUR,
        "rejected": GPT_FIVE,
      },
      preferences.Example([SYSTEM, USER], "4", "5"),
    ),
    (
      {
        "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
        "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: e",
      },
      preferences.Example(
        "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", " d", " e"
      ),
    ),
    (
      {"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8, 9]},
      preferences.Example([5, 6], [7], [8, 9]),
    ),
    (
      {
        "prompt_input_ids": [5, 6],
        "chosen_input_ids": [7],
        "rejected_input_ids": [8, 9],
      },
      preferences.Example([5, 6], [7], [8, 9]),
    ),
  ],
)
def test_layouts_of_preference_rows(row, expected):
  assert preferences.parse_preference(row) == expected
  # The same without the rejected answer is supervised data.
  del row[next(key for key in row if key.startswith("rejected"))]
  supervised = preferences.parse_supervised(row)
  assert supervised == expected._replace(rejected=None)


@pytest.mark.parametrize(
  ("row", "expected"),
  [
    ({"prompt": "2+2", "completion": " = 4"}, ("2+2", " = 4", None)),
    ({"prompt": "2+2", "answer": " = 4"}, ("2+2", " = 4", None)),
    ({"prompt": "", "response": "4"}, ("", "4", None)),
    ({"prompt": [USER], "completion": [FOUR]}, ([USER], "4", None)),
    ({"messages": [SYSTEM, USER, FOUR]}, ([SYSTEM, USER], "4", None)),
    (
      {"system": "Be brief.", "messages": [USER, FOUR]},
      ([SYSTEM, USER], "4", None),
    ),
    # Some data says it twice.
    (
      {"system": "Be brief.", "messages": [SYSTEM, USER, FOUR]},
      ([SYSTEM, USER], "4", None),
    ),
    (
      {"conversations": [{"from": "human", "value": "2+2?"}, GPT_FOUR]},
      ([USER], "4", None),
    ),
  ],
)
def test_layouts_of_supervised_rows(row, expected):
  assert preferences.parse_supervised(row) == preferences.Example(*expected)


@pytest.mark.parametrize(
  ("row", "reason", "detail"),
  [
    ("2+2", "wrong type", "a row should be an object, not text"),
    (None, "wrong type", "NoneType"),
    ({}, "missing key", "`chosen` and `rejected` not among no keys"),
    (
      {"prompt": "a", "chosen": "b"},
      "missing key",
      "`rejected` not among `prompt`, `chosen`",
    ),
    # Tables have null for a missing cell.
    ({"prompt": "a", "chosen": "b", "rejected": None}, "missing key", "reje"),
    ({"chosen": "abc", "rejected": "abd"}, "missing key", "no `prompt`"),
    ({"chosen": [FOUR], "rejected": [FIVE]}, "missing key", "no `prompt`"),
    ({"prompt": 2, "chosen": "b", "rejected": "c"}, "wrong type", "a int"),
    ({"prompt": "a", "chosen": 4, "rejected": "c"}, "wrong type", "a int"),
    ({"prompt": "a", "chosen": "b", "rejected": []}, "wrong type", "empty"),
    ({"prompt": [USER], "chosen": ["4"], "rejected": "5"}, "wrong type", "tex"),
    (
      {"prompt": [USER], "chosen": [{"role": "assistant"}], "rejected": "5"},
      "missing key",
      "has no `content`",
    ),
    (
      {
        "prompt": [{"role": "user", "content": [{"type": "image"}]}],
        "chosen": "a",
        "rejected": "b",
      },
      "wrong type",
      "`prompt` should hold text, not a list",
    ),
    (
      {"prompt": [{"role": "tool", "content": "x"}], "chosen": "a"}
      | {"rejected": "b"},
      "unknown role",
      "'tool'",
    ),
    ({"prompt": "a", "chosen": "", "rejected": "b"}, "empty answer", "chosen"),
    ({"prompt": "a", "chosen": "b", "rejected": " \n"}, "empty answer", "rej"),
    (
      {"prompt": "a", "chosen": "b", "rejected": "b"},
      "identical answers",
      "the same",
    ),
    (
      {"prompt": "a", "completion": "b", "label": True},
      "unpaired",
      "is not a pair",
    ),
    ({"prompt": "a", "chosen": "\ud83d", "rejected": "b"}, "not Unicode", "0"),
    (
      {"chosen": [USER, FOUR], "rejected": [SYSTEM, USER, FIVE]},
      "different prompts",
      "differ before their last turn",
    ),
    (
      {"prompt": "other", "chosen": [USER, FOUR], "rejected": [USER, FIVE]},
      "different prompts",
      "`prompt` is not a turn",
    ),
    (
      {"prompt": [USER], "chosen": [FOUR, USER, FOUR], "rejected": [FIVE]},
      "several turns",
      "one turn of the assistant",
    ),
    # What the user says is never scored: not in answers of several turns, and
    # not in conversations that part before their last turn.
    (
      {
        "prompt": [USER],
        "chosen": [FOUR, USER, FOUR],
        "rejected": [FIVE, USER, FIVE],
      },
      "several turns",
      "one turn of the assistant",
    ),
    (
      {
        "prompt": [USER],
        "chosen": [USER, FOUR, USER, FOUR],
        "rejected": [USER, FIVE, USER, FIVE],
      },
      "several turns",
      "one turn of the assistant",
    ),
    (
      {
        "chosen": [USER, FOUR, USER, FOUR],
        "rejected": [USER, FIVE, USER, FIVE],
      },
      "different prompts",
      "differ before their last turn",
    ),
    (
      {"chosen": [USER, FOUR], "rejected": [USER, FIVE, USER, FIVE]},
      "different prompts",
      "differ before their last turn",
    ),
    (
      {"prompt": "2+2?", "chosen": [FOUR, USER, FOUR], "rejected": [FIVE]},
      "several turns",
      "one turn of the assistant",
    ),
    (
      {"prompt": [USER], "chosen": [FOUR, FIVE], "rejected": [FIVE]},
      "several turns",
      "one turn of the assistant",
    ),
    (
      {"prompt": [USER], "chosen": [FOUR, USER], "rejected": [FIVE, USER]},
      "no answer",
      "turn of the user",
    ),
    ({"chosen": [USER], "rejected": [USER]}, "no answer", "turn of the user"),
    (
      {"system": "x", "prompt": "a", "chosen": "b", "rejected": "c"},
      "misplaced system",
      "prompt of messages",
    ),
    (
      {"prompt_ids": [1], "chosen_ids": [2.0], "rejected_ids": [3]},
      "wrong type",
      "`chosen_ids` should be a list of integers",
    ),
    ({"prompt_ids": [1], "chosen_ids": [2]}, "missing key", "rejected_ids"),
    (
      {"prompt_ids": [1], "chosen_ids": [], "rejected_ids": [3]},
      "empty answer",
      "chosen",
    ),
  ],
)
def test_bad_preference_rows_say_why(row, reason, detail):
  with pytest.raises(preferences.BadRow, match=detail) as caught:
    preferences.parse_preference(row)
  assert caught.value.reason == reason


@pytest.mark.parametrize(
  ("row", "reason"),
  [
    ({"text": "abc"}, "missing key"),
    ({"question": "a", "answer": "b"}, "missing key"),
    ({"prompt": "a", "completion": ""}, "empty answer"),
    ({"prompt": "a", "completion": "b", "label": False}, "unpaired"),
    ({"messages": [USER]}, "no answer"),
    ({"messages": [FOUR]}, "missing key"),
    ({"messages": "abc"}, "missing key"),
    ({"chosen_ids": [3]}, "missing key"),
  ],
)
def test_bad_supervised_rows_say_why(row, reason):
  with pytest.raises(preferences.BadRow) as caught:
    preferences.parse_supervised(row)
  assert caught.value.reason == reason


def test_rows_are_not_changed_by_parsing():
  row = {"system": "x", "prompt": [dict(USER)], "chosen": "4", "rejected": "5"}
  assert preferences.parse_preference(row) == preferences.parse_preference(row)


def test_real_chat_pairs_are_all_understood(shared_data):
  path = shared_data / "prefs/llamafactory_dpo_en_demo.json"
  examples = [
    preferences.parse_preference(row.value) for row in sources.read(str(path))
  ]
  # README of the data: 80 with a system turn; 1 to 13 turns.
  roles = [[turn["role"] for turn in example.prompt] for example in examples]
  assert sum(r[0] == "system" for r in roles) == 80
  assert set(map(len, roles)) == {1, 2, 3, 5, 7, 9, 13}
  assert collections.Counter(r[-1] for r in roles) == {"user": 300}
