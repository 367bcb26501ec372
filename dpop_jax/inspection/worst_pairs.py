"""The pairs that stand out, with their text."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dpop_jax.inspection.pair_statistics import PairStatistics, PairTexts

# Characters of a text that are shown.
_MAX_PROMPT, _MAX_ANSWER = 300, 600


def by_value(
  values: np.ndarray,
  texts: Callable[[int], PairTexts],
  *,
  count: int,
  pair_ids: Sequence[int] | None = None,
) -> list[dict[str, Any]]:
  """The pairs of the largest values, largest first.

  Args:
    values: float [pairs].
    texts: Of the pair of an index.
    count: How many.
    pair_ids: Index of each pair in its set, if `values` is of some of them.

  Returns:
    Of each `pair` (its index), `value`, and `prompt`, `chosen`, `rejected` cut
    to what can be read; answers as [before, at, behind the difference].
  """
  order = np.argsort(-values, kind="stable")[:count]
  return [
    describe(i if pair_ids is None else int(pair_ids[i]), texts)
    | {"value": float(values[i])}
    for i in order.tolist()
  ]


def describe(number: int, texts: Callable[[int], PairTexts]) -> dict[str, Any]:
  """The texts of a pair, its answers split where they differ."""
  prompt, chosen, rejected = texts(number)
  start = len(os.path.commonprefix([chosen, rejected]))
  end = len(
    os.path.commonprefix([chosen[start:][::-1], rejected[start:][::-1]])
  )
  return {
    "pair": number,
    "prompt": _cut(prompt, _MAX_PROMPT, keeps_end=True),
    "chosen": _parts(chosen, start, end),
    "rejected": _parts(rejected, start, end),
  }


def most_different(
  statistics: PairStatistics,
  texts: Callable[[int], PairTexts],
  *,
  count: int,
) -> list[dict[str, Any]]:
  """The pairs whose answers have least in common."""
  return by_value(statistics.edit_distances["tokens"], texts, count=count)


def _parts(text: str, start: int, end: int) -> list[str]:
  stop = len(text) - end
  return [
    _cut(text[:start], _MAX_ANSWER // 3, keeps_end=True),
    _cut(text[start:stop], _MAX_ANSWER, keeps_end=False),
    _cut(text[stop:], _MAX_ANSWER // 3, keeps_end=False),
  ]


def _cut(text: str, length: int, *, keeps_end: bool) -> str:
  if len(text) <= length:
    return text
  return f"… {text[-length:]}" if keeps_end else f"{text[:length]} …"
