"""Lengths, edit distances and shared beginnings of every pair."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from rapidfuzz.distance import Levenshtein

from dpop_jax import pairs as pairs_lib
from dpop_jax.data import dataset, forests, tokenizers
from dpop_jax.inspection import summaries

UNITS = ("tokens", "words", "characters")


class PairTexts(NamedTuple):
  """What the tokens of a pair stand for; answers without their EOS."""

  prompt: str
  chosen: str
  rejected: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairStatistics:
  """One entry per pair in every array.

  Attributes:
    prompt_tokens: int64; BOS included.
    chosen_tokens: int64; EOS included, as everywhere.
    rejected_tokens: int64.
    common_tokens: int64; leading tokens that both answers begin with.
    common_end_tokens: int64; tokens that both end with, behind the difference.
    edit_distances: float64 by unit (UNITS): Levenshtein distance of the two
      answers by the length of the longer one; 0 for equal, 1 for nothing in
      common. Tokens count as scored, EOS included; words are what white space
      separates; words and characters are those of the decoded answers.
  """

  prompt_tokens: np.ndarray
  chosen_tokens: np.ndarray
  rejected_tokens: np.ndarray
  common_tokens: np.ndarray
  common_end_tokens: np.ndarray
  edit_distances: dict[str, np.ndarray]

  @property
  def sequence_tokens(self) -> np.ndarray:
    """Tokens of prompt + chosen and prompt + rejected, one by one."""
    return 2 * self.prompt_tokens + self.chosen_tokens + self.rejected_tokens

  @property
  def tree_tokens(self) -> np.ndarray:
    """Tokens of the pair's prefix tree."""
    return self.sequence_tokens - self.prompt_tokens - self.common_tokens

  @property
  def first_difference(self) -> np.ndarray:
    """Where the answers part: leading common tokens by chosen tokens."""
    return self.common_tokens / self.chosen_tokens

  @property
  def length_differences(self) -> np.ndarray:
    """Tokens by which the chosen answer is longer than the rejected one."""
    return self.chosen_tokens - self.rejected_tokens


def measure(
  pairs: dataset.TokenPairs,
  texts: Callable[[int], PairTexts],
  progress: Callable[[int], Any] = lambda number: None,
) -> PairStatistics:
  """Measures all pairs.

  Args:
    pairs: With rejected answers.
    texts: Of the pair of an index.
    progress: Called with each index.
  """
  prompts, chosen, rejected = pairs.lengths().T
  common = np.zeros((len(pairs), 2), np.int64)
  distances = np.zeros((len(UNITS), len(pairs)))
  for number in range(len(pairs)):
    pair = pairs[number]
    regions = forests.answer_regions(pair)[pairs_lib.CHOSEN]
    common[number] = regions[1], regions[3] - regions[2]
    distances[:, number] = edit_distances(pair, texts(number))
    progress(number)
  return PairStatistics(
    prompt_tokens=prompts,
    chosen_tokens=chosen,
    rejected_tokens=rejected,
    common_tokens=common[:, 0],
    common_end_tokens=common[:, 1],
    edit_distances=dict(zip(UNITS, distances, strict=True)),
  )


def edit_distances(pair: pairs_lib.TokenPair, texts: PairTexts) -> list[float]:
  """The pair's normalised edit distance in each of UNITS."""
  answers: Sequence[tuple[Sequence, Sequence]] = (
    (pair.chosen.tolist(), pair.rejected.tolist()),
    (texts.chosen.split(), texts.rejected.split()),
    (texts.chosen, texts.rejected),
  )
  # By the longer one, since insertion, deletion and exchange all cost 1.
  return [Levenshtein.normalized_distance(*each) for each in answers]


def text_reader(
  pairs: dataset.TokenPairs, tokenizer: tokenizers.Tokenizer
) -> Callable[[int], PairTexts]:
  """A function from the index of a pair to its texts, decoded."""

  def text(answer: np.ndarray) -> str:
    ids = answer.tolist()
    return tokenizer.decode(ids[:-1] if ids[-1] == tokenizer.eos_id else ids)

  def read(number: int) -> PairTexts:
    pair = pairs[number]
    prompt = tokenizer.decode(pair.prompt.tolist())
    return PairTexts(prompt, text(pair.chosen), text(pair.rejected))

  return read


def summary(statistics: PairStatistics) -> dict[str, Any]:
  """The sections `lengths`, `edit_distance`, `first_difference` of a report."""
  longer = statistics.length_differences
  return {
    "lengths": {
      "prompt_tokens": summaries.distribution(statistics.prompt_tokens),
      "chosen_tokens": summaries.distribution(statistics.chosen_tokens),
      "rejected_tokens": summaries.distribution(statistics.rejected_tokens),
      "tree_tokens": summaries.distribution(statistics.tree_tokens),
      "chosen_minus_rejected_tokens": summaries.distribution(longer),
      "share_chosen_longer": summaries.share(longer > 0),
      "share_equally_long": summaries.share(longer == 0),
      "share_rejected_longer": summaries.share(longer < 0),
    },
    "edit_distance": {
      unit: summaries.distribution(distances)
      for unit, distances in statistics.edit_distances.items()
    },
    "first_difference": {
      "relative_position": summaries.distribution(statistics.first_difference),
      "common_tokens": summaries.distribution(statistics.common_tokens),
      "chosen_tokens_behind_it": summaries.distribution(
        statistics.chosen_tokens - statistics.common_tokens
      ),
      "common_end_tokens": summaries.distribution(statistics.common_end_tokens),
    },
  }
