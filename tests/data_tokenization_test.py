"""The rule of tokenization, on hand-made ids and on real tokenizers."""

import json
import unicodedata

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from dpop_jax.data import preferences, tokenization, tokenizers

Example = preferences.Example
TEXTS = strategies.text(max_size=30)


class LetterTokenizer(tokenizers.Tokenizer):
  """`<` is BOS 1, `>` is EOS 2, and `a` to `z` are 3 to 28.

  Like Llama's it puts a space (id 0) before a text.
  """

  def __init__(self, *, adds_bos=True, chat_template=None):
    self.name = "letters"
    self.vocab_size = 29
    self.bos_id, self.eos_id = 1, 2
    self.bos_token, self.eos_token = "<", ">"
    self.adds_bos = adds_bos
    self.chat_template = chat_template

  def encode_all(self, texts):
    return [self._encode(text) for text in texts]

  def _encode(self, text):
    if not text:
      return []
    ids = [" <>abcdefghijklmnopqrstuvwxyz".find(letter) for letter in text]
    return ids if ids[0] == 1 else [0, *ids]

  def decode(self, ids):
    return "".join(" <>abcdefghijklmnopqrstuvwxyz"[i] for i in ids)

  def _unknown_id(self):
    return -1


def encode(example, tokenizer=None, add_bos=None):
  tokenizer = tokenizer or LetterTokenizer()
  return tokenization.encode([example], tokenizer, add_bos=add_bos)[0]


def chat(prompt, chosen, rejected=None):
  return Example([{"role": "user", "content": prompt}], chosen, rejected)


def test_one_bos_before_the_prompt_and_one_eos_behind_both_answers():
  encoded = encode(Example("ab", "c", "d"))
  # Only the prompt gets the space that begins a text.
  assert encoded == ([1, 0, 3, 4], [5, 2], [6, 2], True)


def test_bos_can_be_switched_and_is_never_doubled():
  habit = LetterTokenizer(adds_bos=False)
  bare, with_bos = [0, 3], [1, 0, 3]
  assert encode(Example("a", "c", "d"), habit).prompt == bare
  assert encode(Example("a", "c", "d"), habit, add_bos=True).prompt == with_bos
  assert encode(Example("a", "c", "d"), add_bos=False).prompt == bare
  for add_bos in (None, True, False):
    assert encode(Example("<a", "c", "d"), add_bos=add_bos).prompt == [1, 3]


def test_eos_is_never_doubled():
  encoded = encode(Example("a", "c>", "d"))
  assert (encoded.chosen, encoded.rejected) == ([5, 2], [6, 2])


def test_an_empty_prompt_is_bos_and_the_answer_begins_the_text():
  encoded = encode(Example("", "c", "d"))
  assert encoded == ([1], [0, 5, 2], [0, 6, 2], True)
  problem = encode(Example("", "c", "d"), add_bos=False)
  assert problem.reason == "empty prompt"


def test_supervised_examples_have_an_empty_rejected_answer():
  assert encode(Example("a", "c", None)) == ([1, 0, 3], [5, 2], [], True)


def test_ids_get_bos_and_eos_by_the_same_rule():
  assert encode(Example([3], [5], [6, 2])) == ([1, 3], [5, 2], [6, 2], True)
  assert encode(Example([1, 3], [5], None)) == ([1, 3], [5, 2], [], True)
  for ids in ([29], [-1]):
    assert encode(Example([3], ids, [6])).reason == "unknown id"
  assert encode(Example([3], [2], [6])).reason == "empty answer"
  assert encode(Example([3], [5], [5, 2])).reason == "identical answers"


def test_bos_that_the_tokenizer_lacks_is_refused():
  tokenizer = LetterTokenizer()
  tokenizer.bos_id = None
  with pytest.raises(ValueError, match="data.add_bos is True, but"):
    encode(Example("a", "c", "d"), tokenizer, add_bos=True)


def test_rows_come_back_in_order_whatever_their_kind():
  bad = preferences.BadRow("reason", "detail")
  examples = [Example("a", "b", "c"), bad, Example([3], [5], None)]
  examples += [Example("", "b", None), Example("c", "d", None)]
  encoded = tokenization.encode(examples, LetterTokenizer(), add_bos=None)
  assert encoded[1] is bad
  assert [encode(e) for e in examples if e is not bad] == [
    e for e in encoded if e is not bad
  ]


# Turns are `u` + text + `z`, and `a` + text + `z` for the assistant.
LETTERS = (
  "{% for m in messages %}{{ m.role[0] }}{{ m.content }}z{% endfor %}"
  "{% if add_generation_prompt %}a{% endif %}"
)


def test_the_answer_keeps_what_the_template_ends_a_turn_with():
  tokenizer = LetterTokenizer(chat_template=LETTERS)
  encoded = encode(chat("b", "c", "d"), tokenizer)
  u, a, z = 23, 3, 28
  assert encoded.prompt == [1, 0, u, 4, z, a]
  assert (encoded.chosen, encoded.rejected) == ([5, z, 2], [6, z, 2])


def test_bos_and_eos_of_the_template_are_not_doubled():
  template = "<" + LETTERS.replace("z", "> ")
  tokenizer = LetterTokenizer(chat_template=template)
  encoded = encode(chat("b", "c", "d"), tokenizer)
  assert encoded.prompt[:2] == [1, 23]
  # The space behind EOS is left out, for nobody ever generates it.
  assert (encoded.chosen, encoded.rejected) == ([5, 2], [6, 2])


def test_templates_that_write_the_prompt_in_two_ways_are_refused():
  template = "{{ messages|length }}" + LETTERS
  problem = encode(chat("b", "c"), LetterTokenizer(chat_template=template))
  assert problem.reason == "chat template"
  assert "in another way once the answer follows" in str(problem)


def test_templates_that_refuse_a_row_spoil_only_that_row():
  template = "{% if messages[0].content == 'b' %}{{ raise_exception('no b') }}"
  tokenizer = LetterTokenizer(chat_template=template + "{% endif %}" + LETTERS)
  examples = [chat("b", "c"), chat("c", "c")]
  bad, good = tokenization.encode(examples, tokenizer, add_bos=None)
  assert bad.reason == "chat template" and "no b" in str(bad)
  assert isinstance(good, tokenization.Encoded)


def test_messages_without_any_template_end_the_run():
  with pytest.raises(ValueError, match="set data.chat_template"):
    encode(chat("b", "c"))


def test_prompts_to_generate_from_are_those_of_the_data():
  tokenizer = LetterTokenizer(chat_template=LETTERS)
  for example in (Example("ab", "c", None), chat("ab", "c")):
    for add_bos in (None, False):
      assert (
        tokenization.encode_prompt(example.prompt, tokenizer, add_bos=add_bos)
        == encode(example, tokenizer, add_bos).prompt
      )


# Prompt of 5 with BOS; answers of 4 and 3 which share one token. The tree has
# 5 + 4 + 3 - 1 = 11 tokens, the longer sequence 9.
ENCODED = tokenization.Encoded(
  [1, 10, 11, 12, 13], [20, 21, 22, 2], [20, 31, 2], True
)


def fit(encoded=ENCODED, **limits):
  limits = {"row_length": 99} | limits
  fitted = tokenization.fit(encoded, tokenization.Limits(**limits))
  return [ids.tolist() for ids in fitted.pair], fitted[1:]


def test_a_pair_that_just_fits_is_left_alone():
  whole = [list(ids) for ids in ENCODED[:3]], (0, False)
  assert fit(row_length=11) == whole
  assert fit(max_length=9) == whole
  assert fit(max_answer_length=4) == whole
  pair = tokenization.fit(ENCODED, tokenization.Limits(row_length=99)).pair
  assert {ids.dtype for ids in pair} == {np.dtype(np.int32)}


def test_prompts_lose_their_beginning_but_not_bos():
  for limits in ({"row_length": 9}, {"max_length": 7}):
    (prompt, chosen, rejected), cut = fit(**limits)
    assert prompt == [1, 12, 13]
    assert (chosen, rejected) == (ENCODED.chosen, ENCODED.rejected)
    assert cut == (2, False)
  bare = ENCODED._replace(prompt=[10, 11, 12, 13], has_bos=False)
  assert fit(bare, max_length=5) == (
    [[13], bare.chosen, bare.rejected],
    (3, False),
  )


def test_prompts_keep_one_token_besides_bos():
  assert fit(max_length=6)[0][0] == [1, 13]
  assert fit(row_length=8)[0][0] == [1, 13]
  for limits in ({"max_length": 5}, {"row_length": 7}):
    with pytest.raises(tokenization.TooLong, match="4 tokens does not fit"):
      fit(**limits)
  assert fit(ENCODED._replace(prompt=[1]), max_length=5)[0][0] == [1]


@pytest.mark.parametrize("policy", ["drop", "raise"])
def test_long_answers_are_refused_unless_truncated(policy):
  with pytest.raises(tokenization.TooLong, match="where at most 3 do"):
    fit(max_answer_length=3, on_long_answer=policy)


def test_truncated_answers_lose_their_end_and_eos():
  (prompt, chosen, rejected), cut = fit(
    max_answer_length=3, on_long_answer="truncate"
  )
  assert prompt == ENCODED.prompt
  assert (chosen, rejected) == ([20, 21, 22], [20, 31, 2])
  assert cut == (0, True)
  # In a row of 7 with 2 of the prompt there is room for 5: 20, and behind it
  # 21, 22 and 31, 2.
  (prompt, chosen, rejected), cut = fit(row_length=7, on_long_answer="truncate")
  assert (prompt, chosen, rejected) == ([1, 13], [20, 21, 22], [20, 31, 2])
  assert cut == (3, True)


def test_answers_that_truncation_makes_equal_are_refused():
  with pytest.raises(
    preferences.BadRow, match="the same in 1 tokens"
  ) as caught:
    fit(max_answer_length=1, on_long_answer="truncate")
  assert caught.value.reason == "identical answers"
  with pytest.raises(tokenization.TooLong):
    fit(max_length=2, on_long_answer="truncate")


ID_LISTS = strategies.lists(strategies.integers(3, 5), min_size=1, max_size=12)


@hypothesis.given(
  prompt=ID_LISTS,
  chosen=ID_LISTS,
  rejected=ID_LISTS,
  has_bos=strategies.booleans(),
  row_length=strategies.integers(2, 40),
  max_length=strategies.none() | strategies.integers(2, 30),
  max_answer_length=strategies.none() | strategies.integers(1, 15),
)
def test_whatever_fits_is_within_all_limits_and_no_shorter_than_need_be(
  prompt, chosen, rejected, has_bos, row_length, max_length, max_answer_length
):
  hypothesis.assume(chosen != rejected)
  prompt = [1] * has_bos + prompt
  encoded = tokenization.Encoded(prompt, [*chosen, 2], [*rejected, 2], has_bos)
  limits = tokenization.Limits(
    row_length=row_length,
    max_length=max_length,
    max_answer_length=max_answer_length,
    on_long_answer="truncate",
  )
  try:
    fitted = tokenization.fit(encoded, limits)
  except (preferences.BadRow, tokenization.TooLong):
    return
  new_prompt, new_chosen, new_rejected = (ids.tolist() for ids in fitted.pair)
  assert new_chosen == encoded.chosen[: len(new_chosen)]
  assert new_rejected == encoded.rejected[: len(new_rejected)]
  kept = len(new_prompt) - has_bos
  assert kept >= 1
  assert new_prompt == [1] * has_bos + prompt[-kept:]
  longer = max(len(new_chosen), len(new_rejected))
  paths = {
    tuple(ids[:end])
    for ids in (new_chosen, new_rejected)
    for end in range(1, len(ids) + 1)
  }
  tree = len(new_prompt) + len(paths)
  slack = [row_length - tree]
  if max_length is not None:
    slack.append(max_length - len(new_prompt) - longer)
  assert min(slack) >= 0
  if max_answer_length is not None:
    assert longer <= max_answer_length
  if fitted.num_cut and not fitted.is_truncated:
    assert min(slack) == 0


@pytest.fixture(scope="module")
def neox(shared_data):
  return tokenizers.load(
    str(shared_data / "tokenizers/gpt-neox-olmo"), chat_template="chatml"
  )


@pytest.fixture(scope="module")
def stories(shared_data):
  return tokenizers.load(
    str(shared_data / "models/stories260K"), chat_template="chatml"
  )


def decode(encoded, tokenizer, answer):
  """Text of prompt and answer without BOS and EOS."""
  assert answer[-1] == tokenizer.eos_id
  return tokenizer.decode(encoded.prompt[encoded.has_bos :] + answer[:-1])


@hypothesis.given(prompt=TEXTS, chosen=TEXTS, rejected=TEXTS)
def test_prompt_and_answers_decode_to_the_text(
  neox, stories, prompt, chosen, rejected
):
  # NeoX writes text in normal form C, and Llama a space as ▁.
  prompt, chosen, rejected = (
    unicodedata.normalize("NFC", text.replace("▁", "_"))
    for text in (prompt, chosen, rejected)
  )
  hypothesis.assume(prompt and chosen and rejected and chosen != rejected)
  for tokenizer in (neox, stories):
    encoded = encode(Example(prompt, chosen, rejected), tokenizer)
    hypothesis.assume(isinstance(encoded, tokenization.Encoded))
    assert encoded.has_bos == (tokenizer is stories)
    # A text may have a BOS and EOS of its own, which are then not doubled.
    begin = prompt.removeprefix("<s>") if tokenizer is stories else prompt
    for answer, ids in (
      (chosen, encoded.chosen),
      (rejected, encoded.rejected),
    ):
      text = begin + answer.removesuffix(tokenizer.eos_token)
      assert decode(encoded, tokenizer, ids) == text


def test_real_maths_rows_decode_to_the_text(shared_data, neox, stories):
  lines = (shared_data / "gsm8k/train.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines[::10]]
  examples = [
    Example(f"{row['question']}\n", row["answer"], None) for row in rows
  ]
  for tokenizer in (neox, stories):
    encoded = tokenization.encode(examples, tokenizer, add_bos=None)
    for example, ids in zip(examples, encoded, strict=True):
      text = unicodedata.normalize("NFC", example.prompt + example.chosen)
      if tokenizer is stories:
        text = example.prompt + example.chosen
      assert decode(ids, tokenizer, ids.chosen) == text


def test_both_answers_of_real_pairs_follow_the_same_prompt(shared_data, neox):
  # Encoded together, prompt and answer can merge across the seam.
  example = Example("The answer", "s are 4", " is 4")
  encoded = encode(example, neox)
  assert encoded.prompt == neox.encode("The answer")
  assert neox.encode("The answers")[: len(encoded.prompt)] != encoded.prompt
