"""The demo's corpus: what a row holds, what is held out, what round-trips."""

import json
import re

import numpy as np
import pytest
import sentencepiece

from dpop_jax.data import arithmetic

CONFIG = arithmetic.ArithmeticConfig(
  num_sft=400, num_train_pairs=300, num_eval_pairs=100, num_eval_questions=100
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  return arithmetic.write_corpus(CONFIG, tmp_path_factory.mktemp("corpus"))


def read(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def numbers(text):
  return [int(number) for number in re.findall(r"\d+", text)]


def test_the_solution_of_a_hand_worked_sum():
  assert arithmetic.solution([17, 25, 31, 12]) == [
    "17+25=42",
    "42+31=73",
    "73+12=85",
    "Answer 85",
  ]


def test_every_answer_adds_up_the_numbers_of_its_question(corpus):
  for row in read(corpus["sft_train"]):
    terms = numbers(row["prompt"])
    assert CONFIG.min_terms <= len(terms) <= CONFIG.max_terms
    *additions, last = row["completion"].split("\n")
    totals = np.cumsum(terms)
    assert additions == [
      f"{total}+{term}={total + term}"
      for total, term in zip(totals[:-1], terms[1:], strict=True)
    ]
    assert last == f"Answer {totals[-1]}"


@pytest.mark.parametrize("name", ["pairs_train", "pairs_eval"])
def test_one_digit_of_one_intermediate_result_is_wrong(corpus, name):
  steps = set()
  for row in read(corpus[name]):
    chosen, rejected = row["chosen"].split("\n"), row["rejected"].split("\n")
    (step,) = [
      i
      for i, (right, wrong) in enumerate(zip(chosen, rejected, strict=True))
      if right != wrong
    ]
    steps.add(step)
    # Neither the last addition, whose result is the answer, nor the answer.
    assert step < len(chosen) - 2
    calculation, right = chosen[step].split("=")
    same_calculation, wrong = rejected[step].split("=")
    assert same_calculation == calculation
    assert len(wrong) == len(right) and wrong[0] != "0"
    assert sum(a != b for a, b in zip(right, wrong, strict=True)) == 1
    first, second = map(int, calculation.split("+"))
    assert int(right) == first + second != int(wrong)
  # Five numbers make four additions, three of which may go wrong.
  assert steps == {0, 1, 2}


def test_a_two_term_sum_has_nothing_to_corrupt():
  with pytest.raises(ValueError, match="at least two additions"):
    arithmetic.corrupt("1+2=3\nAnswer 3", np.random.default_rng(0))


def test_no_sum_is_both_in_training_and_held_out(corpus):
  def sums(name):
    return {tuple(sorted(numbers(row["prompt"]))) for row in read(corpus[name])}

  trained = sums("sft_train") | sums("pairs_train")
  held_out = sums("pairs_eval") | sums("questions_eval")
  assert len(trained) > 600 and len(held_out) > 190
  assert not trained & held_out


def test_the_split_does_not_depend_on_the_order_of_the_numbers():
  splits = [arithmetic.split_of([n, 20, 30]) for n in range(1000)]
  assert splits == [arithmetic.split_of([30, 20, n]) for n in range(1000)]
  # One in ten: 100 of 1,000, give or take three standard deviations of 9.5.
  assert 70 < splits.count(arithmetic.EVAL) < 130


def test_rows_depend_on_seed_and_id_and_not_on_the_order():
  other_seed = arithmetic.ArithmeticConfig(seed=1)
  longer = arithmetic.ArithmeticConfig(num_sft=7)
  forth = [arithmetic.sft_row(CONFIG, i) for i in range(20)]
  back = [arithmetic.sft_row(longer, i) for i in reversed(range(20))]
  assert forth == back[::-1]
  assert forth != [arithmetic.sft_row(other_seed, i) for i in range(20)]
  assert arithmetic.pair_row(CONFIG, "eval", 3) == arithmetic.pair_row(
    longer, "eval", 3
  )


def test_pairs_are_other_sums_than_those_of_supervised_training():
  same = [
    arithmetic.sft_row(CONFIG, i)["prompt"]
    == arithmetic.pair_row(CONFIG, "train", i)["prompt"]
    for i in range(50)
  ]
  assert not any(same)


def test_a_corpus_is_the_same_to_the_byte_when_written_again(corpus, tmp_path):
  again = arithmetic.write_corpus(CONFIG, tmp_path)
  for name, path in corpus.items():
    assert path.read_bytes() == again[name].read_bytes(), name
  assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
    path.name for path in again.values()
  )


def test_questions_hold_the_number_that_their_answer_ends_with(corpus):
  for row in read(corpus["questions_eval"]):
    assert row["answer"] == str(sum(numbers(row["prompt"])))


@pytest.mark.parametrize(
  "completion, answer",
  [
    ("1+2=3\n3+4=7\nAnswer 7", "7"),
    ("1+2=3\n3+4=7\nAnswer 7\n", "7"),
    ("1+2=3\n3+4=7", None),
    ("Answer 7\n3+4=7", None),
    ("", None),
  ],
)
def test_final_answer_of(completion, answer):
  assert arithmetic.final_answer(completion) == answer


@pytest.fixture(scope="module")
def tokenizer(corpus):
  return sentencepiece.SentencePieceProcessor(
    model_file=str(corpus["tokenizer"])
  )


@pytest.mark.parametrize(
  "text",
  [
    "12+30=42\n42+5=47\nAnswer 47",
    "  two  spaces\n\nand   a tail ",
    "".join(chr(code) for code in range(0x20, 0x7F)),
    "\n",
    "",
  ],
)
def test_printable_text_survives_the_tokenizer(tokenizer, text):
  ids = tokenizer.encode(text)
  assert tokenizer.unk_id() not in ids
  assert tokenizer.decode(ids) == text


def test_digits_are_pieces_of_their_own(tokenizer):
  pieces = tokenizer.encode("178+25=203\n", out_type=str)
  assert pieces == list("178+25=203\n")


def test_prompt_and_completion_are_encoded_alike_apart_and_together(
  corpus, tokenizer
):
  for row in read(corpus["sft_train"])[:50]:
    prompt, completion = row["prompt"], row["completion"]
    assert tokenizer.encode(prompt) + tokenizer.encode(
      completion
    ) == tokenizer.encode(prompt + completion)


def test_control_ids_and_size_are_as_documented(tokenizer):
  assert tokenizer.unk_id() == 0
  assert tokenizer.bos_id() == 1
  assert tokenizer.eos_id() == 2
  assert tokenizer.vocab_size() <= CONFIG.vocab_size


def test_a_vocabulary_too_small_for_the_characters_is_refused(tmp_path):
  with pytest.raises(ValueError, match="at least 99 .* got 98"):
    arithmetic.train_tokenizer(
      ["1+2=3"], tmp_path / "tokenizer.model", vocab_size=98
    )
  assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
  "field, value",
  [
    ("num_sft", 0),
    ("num_eval_pairs", 0),
    ("min_terms", 2),
    ("max_terms", 3),
    ("min_first", 60),
    ("max_added", 11),
    ("min_added", 0),
    ("seed", -1),
  ],
)
def test_a_config_that_cannot_be_is_refused_by_name(field, value):
  with pytest.raises(ValueError, match=f"arithmetic.{field}"):
    arithmetic.ArithmeticConfig(**{field: value})
