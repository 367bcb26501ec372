"""The demo's own corpus: sums in several steps, and pairs with one wrong step.

A question names four or five numbers, the answer adds them up one by one:

  prompt      Ada has 37 figs and gets 5, 16 and 12 more. How many now?
  chosen      37+5=42
              42+16=58
              58+12=70
              Answer 70
  rejected    37+5=42
              42+16=53
              58+12=70
              Answer 70

In the rejected answer one digit of one intermediate result is wrong and nothing
after it changes, so what follows is the right text behind a wrong prefix: the
case in which DPO lowers the likelihood of the right text. After the corrupted
digit the next line copies the result that should have been there.

Every row is a function of (seed, split, row id) alone. A question belongs to
the held-out split by a hash of its numbers, whatever the seed and the wording,
so training and evaluation never share a sum.
"""

import dataclasses
import hashlib
import pathlib
import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from dpop_jax import atomic_files
from dpop_jax.data import jsonl

TRAIN, EVAL = "train", "eval"
# One in so many sums is held out.
_EVAL_FRACTION = 10
# Streams of randomness, so that no two files draw the same rows.
_SFT, _PAIRS, _QUESTIONS = 0, 1, 2

_NAMES = ("Ada", "Ben", "Cleo", "Dan", "Ines", "Kofi", "Mila", "Tom")
_THINGS = ("figs", "nuts", "pens", "shells", "stamps", "coins")
_TEMPLATES = (
  "{name} has {first} {things} and gets {rest} more. How many now?",
  "{name} finds {all} {things}. How many in all?",
  "Boxes of {all} {things} reach {name}. How many in all?",
  "Day by day {name} sells {all} {things}. How many in all?",
  "There are {first} {things} here, then {name} adds {rest}. How many now?",
)
_ANSWER = re.compile(r"Answer (\d+)\s*\Z")

# Characters that always have a piece of their own: any printable ASCII text,
# not just the corpus, survives encoding and decoding.
_PIECES = "\n" + "".join(chr(code) for code in range(0x20, 0x7F))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArithmeticConfig:
  """Sizes of the corpus and of its numbers.

  Attributes:
    num_sft: Rows of supervised training.
    num_train_pairs: Preference pairs to train on; new sums from the same split.
    num_eval_pairs: Preference pairs with held-out sums.
    num_eval_questions: Held-out questions to generate answers for.
    min_terms: Fewest numbers in a question; at least 3, for with two there is
      no intermediate result.
    max_terms: Most numbers in a question.
    min_first: Smallest first number of a question.
    max_first: Largest first number.
    min_added: Smallest of the other numbers.
    max_added: Largest of the other numbers. Sums of two large numbers take a
      small model about twice as many steps to learn.
    vocab_size: Pieces of the tokenizer at most, characters and controls
      included.
    seed: Another seed gives other rows, with the same sums held out.
  """

  num_sft: int = 20_000
  num_train_pairs: int = 6_400
  num_eval_pairs: int = 256
  num_eval_questions: int = 256
  min_terms: int = 4
  max_terms: int = 5
  min_first: int = 10
  max_first: int = 59
  min_added: int = 2
  max_added: int = 19
  vocab_size: int = 192
  seed: int = 0

  def __post_init__(self):
    for name in (
      "num_sft",
      "num_train_pairs",
      "num_eval_pairs",
      "num_eval_questions",
    ):
      if getattr(self, name) < 1:
        raise ValueError(
          f"arithmetic.{name} must be at least 1, got {getattr(self, name)}."
        )
    if not 3 <= self.min_terms <= self.max_terms:
      raise ValueError(
        "arithmetic.min_terms must be at least 3 and at most "
        f"arithmetic.max_terms, got {self.min_terms} and {self.max_terms}."
      )
    if not 1 <= self.min_first <= self.max_first:
      raise ValueError(
        "arithmetic.min_first must be at least 1 and at most "
        f"arithmetic.max_first, got {self.min_first} and {self.max_first}."
      )
    # With fewer to choose from, few sums are left to be held out.
    if self.min_added < 1 or (
      self.max_added < self.min_added + 2 * self.max_terms
    ):
      raise ValueError(
        "arithmetic.max_added must exceed arithmetic.min_added (at least 1) by "
        f"{2 * self.max_terms} (twice arithmetic.max_terms) or more, got "
        f"{self.min_added} and {self.max_added}."
      )
    if self.seed < 0:
      raise ValueError(
        f"arithmetic.seed must not be negative, got {self.seed}."
      )


class Sum(NamedTuple):
  """A question about a sum and its worked answer.

  Attributes:
    terms: The numbers, in the order of the question.
    prompt: The question and a line break.
    completion: A line per addition and a line with the answer.
  """

  terms: tuple[int, ...]
  prompt: str
  completion: str


def split_of(terms: Iterable[int]) -> str:
  """TRAIN or EVAL: the split that a sum belongs to, whatever its wording.

  Order does not count: 12+17 is held out if 17+12 is.
  """
  key = ",".join(map(str, sorted(terms))).encode()
  bucket = int.from_bytes(hashlib.sha256(key).digest()[:8], "big")
  return EVAL if bucket % _EVAL_FRACTION == 0 else TRAIN


def solution(terms: Iterable[int]) -> list[str]:
  """The lines of the worked answer to the sum of `terms`."""
  total, *others = terms
  lines = []
  for term in others:
    lines.append(f"{total}+{term}={total + term}")
    total += term
  return [*lines, f"Answer {total}"]


def final_answer(completion: str) -> str | None:
  """The number a worked answer ends with, or None if it ends otherwise."""
  match = _ANSWER.search(completion)
  return match.group(1) if match else None


def draw_sum(
  config: ArithmeticConfig, split: str, rng: np.random.Generator
) -> Sum:
  """A random sum of the split in random words.

  Args:
    config: The range of the numbers.
    split: TRAIN or EVAL.
    rng: Decides everything.
  """
  # The chance to miss the held-out split this often in a row is 1e-46.
  for _ in range(1000):
    num_terms = int(rng.integers(config.min_terms, config.max_terms + 1))
    first = rng.integers(config.min_first, config.max_first + 1)
    # Distinct, so that the next number to add can be told by the last.
    added = config.min_added + rng.choice(
      config.max_added - config.min_added + 1,
      size=num_terms - 1,
      replace=False,
    )
    terms = tuple(map(int, (first, *added)))
    if split_of(terms) == split:
      break
  else:
    raise ValueError(
      f"No sum of the split {split!r} turned up; expected {TRAIN!r} or "
      f"{EVAL!r} and a range of numbers that leaves some to be held out."
    )
  template = _TEMPLATES[rng.integers(len(_TEMPLATES))]
  prompt = template.format(
    name=_NAMES[rng.integers(len(_NAMES))],
    things=_THINGS[rng.integers(len(_THINGS))],
    first=terms[0],
    rest=_enumerate(terms[1:]),
    all=_enumerate(terms),
  )
  return Sum(terms, prompt + "\n", "\n".join(solution(terms)))


def corrupt(completion: str, rng: np.random.Generator) -> str:
  """The same answer with one digit of one intermediate result wrong.

  The result of the last addition is the answer, so it stays, and so does every
  line behind the wrong one.

  Args:
    completion: A worked answer with at least two additions.
    rng: Chooses the line, the digit and what takes its place.

  Raises:
    ValueError: There is no intermediate result.
  """
  lines = completion.split("\n")
  if len(lines) < 3:
    raise ValueError(
      "An answer needs at least two additions to have an intermediate result, "
      f"got {completion!r}."
    )
  # The last two lines are the last addition and the answer.
  number = int(rng.integers(len(lines) - 2))
  calculation, result = lines[number].rsplit("=", 1)
  position = int(rng.integers(len(result)))
  digits = [
    digit
    for digit in "0123456789"
    if digit != result[position] and not (position == 0 and digit == "0")
  ]
  wrong = digits[rng.integers(len(digits))]
  result = result[:position] + wrong + result[position + 1 :]
  return "\n".join(
    [*lines[:number], f"{calculation}={result}", *lines[number + 1 :]]
  )


def sft_row(config: ArithmeticConfig, row_id: int) -> dict[str, str]:
  """Row `row_id` of supervised training: prompt and completion."""
  example = draw_sum(config, TRAIN, _rng(config, _SFT, TRAIN, row_id))
  return {"prompt": example.prompt, "completion": example.completion}


def pair_row(
  config: ArithmeticConfig, split: str, row_id: int
) -> dict[str, str]:
  """Preference pair `row_id` of the split: prompt, chosen and rejected."""
  rng = _rng(config, _PAIRS, split, row_id)
  example = draw_sum(config, split, rng)
  return {
    "prompt": example.prompt,
    "chosen": example.completion,
    "rejected": corrupt(example.completion, rng),
  }


def question_row(config: ArithmeticConfig, row_id: int) -> dict[str, str]:
  """Held-out question `row_id`: prompt and answer, the number alone."""
  example = draw_sum(config, EVAL, _rng(config, _QUESTIONS, EVAL, row_id))
  return {"prompt": example.prompt, "answer": str(sum(example.terms))}


def write_corpus(
  config: ArithmeticConfig, out_dir: pathlib.Path | str
) -> dict[str, pathlib.Path]:
  """Writes the four files of the corpus and the tokenizer trained on it.

  Args:
    config: Sizes, range of numbers and seed.
    out_dir: The folder; files of these names in it are replaced.

  Returns:
    The paths of `sft_train`, `pairs_train`, `pairs_eval`, `questions_eval` and
    `tokenizer`.
  """
  out_dir = pathlib.Path(out_dir)
  files = {
    "sft_train": [sft_row(config, i) for i in range(config.num_sft)],
    "pairs_train": [
      pair_row(config, TRAIN, i) for i in range(config.num_train_pairs)
    ],
    "pairs_eval": [
      pair_row(config, EVAL, i) for i in range(config.num_eval_pairs)
    ],
    "questions_eval": [
      question_row(config, i) for i in range(config.num_eval_questions)
    ],
  }
  paths = {name: out_dir / f"{name}.jsonl" for name in files}
  for name, rows in files.items():
    jsonl.write(paths[name], rows)
  paths["tokenizer"] = out_dir / "tokenizer.model"
  # Some thousand sentences hold every word of so small a language.
  texts = [
    row["prompt"] + row["completion"] for row in files["sft_train"][:2000]
  ]
  train_tokenizer(texts, paths["tokenizer"], vocab_size=config.vocab_size)
  return paths


def train_tokenizer(
  texts: Iterable[str], path: pathlib.Path | str, *, vocab_size: int
) -> None:
  """Trains a SentencePiece model on `texts` and writes it to `path`.

  Byte-pair encoding with digits one by one. Text is taken as it is (no dummy
  space, no normalisation, no squeezed spaces), so decoding gives it back
  exactly, as long as it is printable ASCII and line breaks. Ids: unknown 0, BOS
  1, EOS 2.

  Args:
    texts: What to train on.
    path: The .model file.
    vocab_size: Pieces at most; fewer if the texts do not yield as many.

  Raises:
    ValueError: `vocab_size` has no room for the characters.
  """
  # Three control pieces; the space is among the characters.
  smallest = len(_PIECES) + 3
  if vocab_size < smallest:
    raise ValueError(
      f"vocab_size must be at least {smallest} to hold every printable ASCII "
      f"character, got {vocab_size}."
    )
  import sentencepiece

  with atomic_files.replacing(path) as temporary, temporary.open("wb") as file:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(texts),
      model_writer=file,
      model_type="bpe",
      vocab_size=vocab_size,
      hard_vocab_limit=False,
      character_coverage=1.0,
      # A space is a piece of every model; a line break would end a sentence.
      required_chars=_PIECES[2:],
      user_defined_symbols=["\n"],
      split_digits=True,
      normalization_rule_name="identity",
      add_dummy_prefix=False,
      remove_extra_whitespaces=False,
      unk_id=0,
      bos_id=1,
      eos_id=2,
      pad_id=-1,
      # The same pieces on every machine.
      num_threads=1,
      minloglevel=2,
    )


def _rng(
  config: ArithmeticConfig, stream: int, split: str, row_id: int
) -> np.random.Generator:
  return np.random.default_rng(
    [config.seed, stream, int(split == EVAL), row_id]
  )


def _enumerate(terms: tuple[int, ...]) -> str:
  *others, last = map(str, terms)
  return f"{', '.join(others)} and {last}"
