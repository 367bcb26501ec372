"""From files to pairs that fit, with a count of all that was left out."""

import collections
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import tqdm

from dpop_jax import pairs
from dpop_jax.data import preferences, sources, tokenization, tokenizers

# Rows that are encoded together: enough to keep the tokenizer's threads busy.
_ROWS_PER_CHUNK = 512
_MAX_EXAMPLES_IN_SENTENCE = 5


_PARSERS = {
  "pair": lambda value: [preferences.parse_preference(value)],
  "last": lambda value: [preferences.parse_supervised(value)],
  "all": preferences.parse_supervised_turns,
}


class Ingestion:
  """Reads one set; afterwards knows what became of its rows.

  Attributes:
    prompt_keys: One integer per pair; equal for pairs of the same prompt, also
      if it was cut differently, and for those of one row. Rows without a prompt
      have one of their own.
  """

  def __init__(
    self,
    *,
    name: str,
    tokenizer: tokenizers.Tokenizer,
    is_sft: bool,
    supervised_turns: str,
    add_bos: bool | None,
    limits: tokenization.Limits,
    skips_bad_rows: bool,
    max_pairs: int | None,
  ):
    """Args as in `dataset.DataConfig`; `name` is "train" or "eval"."""
    self.prompt_keys: list[int] = []
    self._name = name
    self._tokenizer = tokenizer
    self._parse = _PARSERS[supervised_turns if is_sft else "pair"]
    self._add_bos = add_bos
    self._limits = limits
    self._skips_bad_rows = skips_bad_rows
    self._max_pairs = max_pairs
    self._num_rows = 0
    self._num_dropped = 0
    self._num_truncated = 0
    self._num_cut_prompts = 0
    self._num_cut_tokens = 0
    self._bad_rows = collections.Counter()
    self._rows_left_out: list[str] = []

  def read(self, files: Sequence[str]) -> Iterator[pairs.TokenPair]:
    """Pairs of the rows of all files, in their order.

    Args:
      files: As given by `sources.resolve`.

    Raises:
      ValueError: If a file cannot be read, a row is refused, or none is usable.
    """
    rows = itertools.chain.from_iterable(map(sources.read, files))
    # Quick ones need no bar, and a log file is no place for one.
    bar = tqdm.tqdm(
      desc=f"Tokenizing data.{self._name}", unit=" rows", delay=1, disable=None
    )
    with bar:
      while chunk := list(itertools.islice(rows, _ROWS_PER_CHUNK)):
        yield from self._pairs_of_chunk(chunk)
        if len(self.prompt_keys) == self._max_pairs:
          return
        bar.update(len(chunk))
    if not self.prompt_keys:
      raise ValueError(
        f"data.{self._name}: none of {self._num_rows} rows can be used. "
        f"{self._left_out()}"
      )

  def summary(self) -> dict[str, Any]:
    """Counts for the report.

    `left_out` is a sentence about them, "" if nothing was left out or cut;
    `rows_left_out` names every row that gave no pair, and why.
    """
    return {
      "num_rows": self._num_rows,
      "bad_rows": dict(self._bad_rows.most_common()),
      "num_dropped_for_length": self._num_dropped,
      "num_truncated_answers": self._num_truncated,
      "num_cut_prompts": self._num_cut_prompts,
      "num_cut_prompt_tokens": self._num_cut_tokens,
      "rows_left_out": list(self._rows_left_out),
      "left_out": self._left_out(),
    }

  def _pairs_of_chunk(self, rows):
    parsed = [self._parse_row(row) for row in rows]
    encoded = iter(
      tokenization.encode(
        list(itertools.chain.from_iterable(parsed)),
        self._tokenizer,
        add_bos=self._add_bos,
      )
    )
    for row, examples in zip(rows, parsed, strict=True):
      self._num_rows += 1
      of_row = list(itertools.islice(encoded, len(examples)))
      yield from self._pairs_of_row(row, of_row)
      if len(self.prompt_keys) == self._max_pairs:
        return

  def _pairs_of_row(self, row, encoded):
    """Pairs of a row that fit; a row with one unusable turn has none."""
    try:
      fitted = self._fit_row(row, encoded)
    except preferences.BadRow as problem:
      if not self._skips_bad_rows:
        raise ValueError(
          f'{row.place}: {problem}. With data.on_bad_row = "skip" such rows '
          "are counted and left out."
        ) from problem
      self._bad_rows[problem.reason] += 1
      self._remember(row, problem)
      return
    if not fitted:
      return
    # Turns of a conversation hold each other's text, so they stay together.
    key = self._prompt_key(encoded[0])
    for each in fitted:
      self._num_truncated += each.is_truncated
      self._num_cut_prompts += each.num_cut > 0
      self._num_cut_tokens += each.num_cut
      self.prompt_keys.append(key)
      yield each.pair
      if len(self.prompt_keys) == self._max_pairs:
        return

  def _fit_row(self, row, encoded):
    for item in encoded:
      if isinstance(item, preferences.BadRow):
        raise item
    fitted, too_long = [], []
    for item in encoded:
      try:
        fitted.append(tokenization.fit(item, self._limits))
      except tokenization.TooLong as problem:
        if self._limits.on_long_answer == tokenization.RAISE:
          raise ValueError(
            f"{row.place}: {problem}. Allow more (data.max_length, "
            "data.max_answer_length, the length of a row), or set "
            'data.on_long_answer to "drop" or "truncate".'
          ) from problem
        too_long.append(problem)
    self._num_dropped += len(too_long)
    for problem in too_long:
      self._remember(row, problem)
    return fitted

  def _parse_row(self, row):
    if row.problem:
      return [preferences.BadRow("unreadable", row.problem)]
    try:
      return self._parse(row.value)
    except preferences.BadRow as problem:
      return [problem]

  def _prompt_key(self, encoded):
    if len(encoded.prompt) == encoded.has_bos:
      return hash((-1, len(self.prompt_keys)))
    # Unlike that of text, the hash of integers is the same in every process.
    return hash(tuple(encoded.prompt))

  def _remember(self, row, problem):
    self._rows_left_out.append(f"{row.place}: {problem}")

  def _left_out(self):
    sentences = []
    if self._bad_rows:
      reasons = ", ".join(f"{n} {r}" for r, n in self._bad_rows.most_common())
      sentences.append(
        f"{self._bad_rows.total()} of {self._num_rows} rows are unusable "
        f"({reasons})."
      )
    if self._num_dropped:
      sentences.append(
        f"{self._num_dropped} pairs have an answer that does not fit."
      )
    if self._num_truncated:
      sentences.append(
        f"{self._num_truncated} pairs have an answer cut short, without EOS."
      )
    if self._num_cut_prompts:
      sentences.append(
        f"{self._num_cut_prompts} prompts lost {self._num_cut_tokens} tokens "
        "at their beginning."
      )
    if self._rows_left_out:
      shown = self._rows_left_out[:_MAX_EXAMPLES_IN_SENTENCE]
      sentences.append("For example " + "; ".join(shown) + ".")
    return " ".join(sentences)
