"""Pairs in rows of static length, for one forward pass over them.

Each pair is a prefix tree of its own: prompt and common beginning, then the
rest of the chosen answer, then that of the rejected one.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from dpop_jax import pairs as pairs_lib
from dpop_jax.data import forests, packing
from dpop_jax.inspection import alignment


class Rows(NamedTuple):
  """A batch for the model; what is behind the pairs is padding.

  Attributes:
    tokens: int32 [rows, length].
    positions: int32 [rows, length].
    visible_until: int32 [rows, length]; see `pairs.PackedBatch`.
    score_positions: int32 [rows, scores]; where a token is predicted.
    score_targets: int32 [rows, scores]; the token.
    num_scores: int32 [rows]; entries that count.
    signs: int32 [rows, scores]; 1 for a token of the chosen answer behind the
      common beginning, -1 for one of the rejected answer, 0 before the edit.
    partners: int32 [rows, scores]; the entry of the other answer whose logits
      move together with those of this one: of the same token (see `alignment`),
      or of what the other answer has instead where they part. -1 for none.
    pair_ids: Of each row, the pairs in it; each has the scores of all tokens of
      its chosen answer and then those of its rejected answer.
  """

  tokens: np.ndarray
  positions: np.ndarray
  visible_until: np.ndarray
  score_positions: np.ndarray
  score_targets: np.ndarray
  num_scores: np.ndarray
  signs: np.ndarray
  partners: np.ndarray
  pair_ids: list[list[int]]


def batches(
  pairs: Sequence[pairs_lib.TokenPair],
  *,
  row_length: int,
  rows_per_batch: int,
) -> Iterator[Rows]:
  """All pairs, in batches of one shape.

  Args:
    pairs: What to place; `pair_ids` are indices of it.
    row_length: Tokens of a row, into which each pair fits.
    rows_per_batch: Rows of a batch; those of the last one may be empty.
  """
  common = [forests.common_prefix_length(p.chosen, p.rejected) for p in pairs]
  sizes = [
    len(p.prompt) + len(p.chosen) + len(p.rejected) - c
    for p, c in zip(pairs, common, strict=True)
  ]
  rows = packing.pack(sizes, row_length)
  num_scores = [
    sum(len(pairs[i].chosen) + len(pairs[i].rejected) for i in row)
    for row in rows
  ]
  most = max(num_scores, default=1)
  for start in range(0, len(rows), rows_per_batch):
    batch = _empty(rows_per_batch, row_length, most)
    for number, row in enumerate(rows[start : start + rows_per_batch]):
      token = score = 0
      for i in row:
        _place(batch, number, token, score, pairs[i], common[i])
        token += sizes[i]
        score += len(pairs[i].chosen) + len(pairs[i].rejected)
      batch.num_scores[number] = score
      batch.pair_ids[number].extend(row)
    yield batch


def split(
  values: np.ndarray, rows: Rows, pairs: Sequence[pairs_lib.TokenPair]
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
  """Scores by pair: its index, those of its chosen and its rejected tokens.

  Args:
    values: [rows, scores, ...], in the order of `rows.score_targets`.
    rows: The batch.
    pairs: As given to `batches`.
  """
  for number, ids in enumerate(rows.pair_ids):
    score = 0
    for i in ids:
      middle = score + len(pairs[i].chosen)
      end = middle + len(pairs[i].rejected)
      yield i, values[number, score:middle], values[number, middle:end]
      score = end


def _empty(num_rows, length, scores) -> Rows:
  zeros = lambda *shape: np.zeros(shape, np.int32)
  # Padding is seen by nobody.
  nobody = np.tile(np.arange(length, dtype=np.int32), (num_rows, 1))
  return Rows(
    tokens=zeros(num_rows, length),
    positions=zeros(num_rows, length),
    visible_until=nobody,
    score_positions=zeros(num_rows, scores),
    score_targets=zeros(num_rows, scores),
    num_scores=zeros(num_rows),
    signs=zeros(num_rows, scores),
    partners=np.full((num_rows, scores), -1, np.int32),
    pair_ids=[[] for _ in range(num_rows)],
  )


def _place(rows, number, token, score, pair, common) -> None:
  """Writes one pair into a row, its tokens and scores from there on."""
  trunk = np.concatenate([pair.prompt, pair.chosen[:common]])
  rests = [answer[common:] for answer in (pair.chosen, pair.rejected)]
  starts = [len(trunk), len(trunk) + len(rests[0])]
  end = starts[1] + len(rests[1])
  row = slice(token, token + end)
  rows.tokens[number, row] = np.concatenate([trunk, *rests])
  rows.positions[number, row] = np.concatenate(
    [np.arange(len(trunk))]
    + [np.arange(len(trunk), len(trunk) + len(rest)) for rest in rests]
  )
  rows.visible_until[number, row] = token + end
  rows.visible_until[number, token + starts[0] : token + starts[1]] -= len(
    rests[1]
  )
  signs = rows.signs[number, score:]
  signs[common : len(pair.chosen)] = 1
  signs[len(pair.chosen) :][common : len(pair.rejected)] = -1
  _pair_up(rows.partners[number], pair, common, score)
  for answer, start in zip((pair.chosen, pair.rejected), starts, strict=True):
    # Where each token of the answer is; it is predicted where the one before
    # it is.
    places = np.arange(len(answer)) + len(pair.prompt)
    places[common:] += start - len(trunk)
    parents = np.concatenate([[len(pair.prompt) - 1], places[:-1]])
    part = slice(score, score + len(answer))
    rows.score_positions[number, part] = token + parents
    rows.score_targets[number, part] = answer
    score += len(answer)


def _pair_up(partners, pair, common, score) -> None:
  """Writes the partners of a pair whose scores begin at `score`."""
  chosen, rejected = alignment.align(pair)
  if common < min(len(pair.chosen), len(pair.rejected)):
    # Where the answers part one hidden state predicts both.
    is_first = (chosen == common) | (rejected == common)
    chosen = np.append(chosen[~is_first], common)
    rejected = np.append(rejected[~is_first], common)
  chosen, rejected = score + chosen, score + len(pair.chosen) + rejected
  partners[chosen], partners[rejected] = rejected, chosen
