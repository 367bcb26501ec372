"""HellaSwag's rows: contexts continued, labels as text, marks taken out."""

import gzip
import json

import pytest

from dpop_jax.data import hellaswag, multiple_choice, pair_builder

ROOF = {
  "activity_label": "Roof shingle removal",
  "ctx_a": "A man is sitting on a roof.",
  "ctx_b": "he",
  "ctx": "A man is sitting on a roof. he",
  "endings": ["is using wrap.", "is ripping tiles off.", ", then falls."],
  "label": "1",
}
IRON = {
  "ctx": "[header] How to iron [title] Fill it. [step] Use water.",
  "ctx_b": "",
  "endings": ["[substeps] Wait. [title] Press.", "Stop."],
  "label": 0,
}


def build(rows, strip_brackets=False, **changes):
  options = dict(num_shots=0, seed=0, unusable="skip")
  kind = hellaswag.kind(strip_brackets=strip_brackets)
  return pair_builder.build_list(rows, kind, **(options | changes))


def test_an_ending_continues_its_context():
  assert build([ROOF]).pairs == [
    {
      "prompt": "A man is sitting on a roof. he",
      "chosen": " is ripping tiles off.",
      "rejected": rejected,
    }
    for rejected in (" is using wrap.", ", then falls.")
  ]


@pytest.mark.parametrize(
  "ending, follows",
  [
    ("runs.", " runs."),
    (", runs.", ", runs."),
    ("'s running.", "'s running."),
    (") runs.", ") runs."),
    ('"Stop", he says.', ' "Stop", he says.'),
    ("'Stop', he says.", " 'Stop', he says."),
    ("(runs).", " (runs)."),
    (" runs. ", " runs."),
  ],
)
def test_closing_punctuation_follows_directly(ending, follows):
  row = ROOF | {"endings": [ending, "x"], "label": 0}
  assert build([row]).pairs[0]["chosen"] == follows


def test_shots_are_continued_contexts():
  other = ROOF | {"ctx": "A dog barks. it", "endings": ["runs.", "flies."]}
  other["label"] = 0
  prompts = {pair["prompt"] for pair in build([ROOF, other], num_shots=1).pairs}
  assert prompts == {
    "A dog barks. it runs.\n\nA man is sitting on a roof. he",
    "A man is sitting on a roof. he is ripping tiles off.\n\nA dog barks. it",
  }


def test_marks_stay_unless_asked_for():
  (pair,) = build([IRON]).pairs
  assert pair["prompt"] == IRON["ctx"]
  (pair,) = build([IRON], strip_brackets=True).pairs
  assert pair == {
    "prompt": "How to iron. Fill it. Use water.",
    "chosen": " Wait. Press.",
    "rejected": " Stop.",
  }


def test_a_context_in_two_parts_is_put_together():
  row = {key: value for key, value in ROOF.items() if key != "ctx"}
  assert build([row]).pairs == build([ROOF]).pairs
  row["ctx_b"] = ""
  assert build([row]).pairs[0]["prompt"] == "A man is sitting on a roof."


@pytest.mark.parametrize(
  "changes, what",
  [
    ({"label": ""}, "an index from 0 to 2, got ''; the test part"),
    ({"label": "3"}, "an index from 0 to 2"),
    ({"label": None}, "an index from 0 to 2"),
    ({"endings": ["x"]}, "two or more"),
    ({"endings": "xy"}, "a list of texts"),
    ({"endings": ["x", " "], "label": 0}, "a text, not empty"),
    ({"ctx": 5}, "`ctx` should be a text"),
  ],
)
def test_bad_rows_are_named(changes, what):
  with pytest.raises(ValueError, match=f"Row 0 cannot be used: .*{what}"):
    build([ROOF | changes], unusable="raise")


def test_the_real_files(shared_data):
  folder = shared_data / "hellaswag"
  text = gzip.decompress((folder / "val_even.jsonl.gz").read_bytes()).decode()
  rows = [json.loads(line) for line in text.splitlines()][:600]
  built = build(rows, unusable="raise")
  assert len(built.pairs) == 3 * len(rows)
  raw = [
    json.loads(line)
    for line in (folder / "raw1000_even.jsonl").read_text().splitlines()
  ]
  marked = [row for row in raw if "[header]" in row["ctx"]]
  assert len(marked) == 44
  for pair in build(marked, strip_brackets=True, unusable="raise").pairs:
    text = "".join(pair.values())
    assert "[" not in text and ". ." not in text and "  " not in text
  assert multiple_choice.SAME_AS_ANSWER not in built.skipped
