"""What the batches of a run will look like, from its data or without them."""

import dataclasses
import math
import pathlib
import tempfile

import numpy as np

from dpop_jax import config as config_lib
from dpop_jax import inputs
from dpop_jax import pairs as pairs_lib
from dpop_jax.data import packing
from dpop_jax.data import plan as plan_lib
from dpop_jax.planning import flops

# Steps of the data that are averaged over.
_NUM_SAMPLES = 16
_NO_FILE = "-"


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchShapes:
  """The static shapes of a run's batches, and what a typical one holds.

  Attributes:
    capacity: Of a row.
    num_rows: Rows of the largest step.
    mean_rows: Rows of an average step.
    mean_scores: Scored positions of an average row.
    mean_visible_pairs: Pairs of a query and a key of an average row.
    source: Where this comes from, in a sentence.
  """

  capacity: packing.Capacity
  num_rows: int
  mean_rows: float
  mean_scores: float
  mean_visible_pairs: float
  source: str

  def num_microbatches(self, rows_per_microbatch: int) -> int:
    """Of the largest step."""
    return -(-self.num_rows // rows_per_microbatch)

  def empty_batch(self, rows_per_microbatch: int) -> pairs_lib.PackedBatch:
    """A batch of the shapes of every step, which holds nothing."""
    shape = (self.num_microbatches(rows_per_microbatch), rows_per_microbatch)
    return packing.empty_rows(shape, self.capacity)

  def work(self, rows_per_microbatch: int) -> flops.Work:
    """What an average step computes on; rows that hold nothing included."""
    count = math.ceil(self.mean_rows / rows_per_microbatch)
    positions = count * rows_per_microbatch * self.capacity.tokens
    return flops.Work(
      positions=positions,
      scores=round(self.mean_rows * self.mean_scores),
      visible_pairs=round(self.mean_rows * self.mean_visible_pairs),
    )


def of_config(
  config: config_lib.Config, *, tokens_per_pair: int | None = None
) -> BatchShapes:
  """From the data, if they are on this machine; else from what is assumed.

  Args:
    config: Of the run.
    tokens_per_pair: Tokens of the tree of a pair, where there are no data;
      data.max_length or, without it, batch.row_length, if not given.

  Raises:
    ValueError: A pair does not fit a row, or the data do not fit the model.
  """
  if not has_data(config):
    return assumed(config, tokens_per_pair=tokens_per_pair)
  if tokens_per_pair is not None:
    raise ValueError(
      "--tokens_per_pair is for runs without data, but data.train is here; "
      "leave it out."
    )
  return measured(config)


def has_data(config: config_lib.Config) -> bool:
  """Whether the training data and their tokenizer are on this machine."""
  paths = config.data.train
  paths = (paths,) if isinstance(paths, str) else paths
  return all(
    path != _NO_FILE and pathlib.Path(path).exists()
    for path in (*paths, config.data.tokenizer)
  )


def assumed(
  config: config_lib.Config, *, tokens_per_pair: int | None = None
) -> BatchShapes:
  """Full rows of pairs of one size, of which every position is scored.

  Raises:
    ValueError: Such a pair does not fit a row.
  """
  batch = config.batch
  size = tokens_per_pair or config.data.max_length or batch.row_length
  if not 1 <= size <= batch.row_length:
    raise ValueError(
      f"A pair of {size} tokens (--tokens_per_pair, or data.max_length) does "
      f"not fit batch.row_length, which is {batch.row_length}."
    )
  per_row = min(batch.row_length // size, batch.batch_size)
  num_rows = -(-batch.batch_size // per_row)
  length = batch.row_length
  # What an answer shares before the edit, and its edit and what follows, of
  # each side: five branches, and six links for the shared one is in both.
  links = 6 * per_row
  return BatchShapes(
    capacity=packing.Capacity(length, length, links, per_row),
    num_rows=num_rows,
    mean_rows=float(num_rows),
    mean_scores=float(length),
    mean_visible_pairs=per_row * size * (size + 1) / 2,
    source=(
      f"assumed, without data: pairs of {size} tokens, {per_row} in a row of "
      f"{length}, every position scored, so {num_rows} rows a step"
    ),
  )


def measured(config: config_lib.Config) -> BatchShapes:
  """From the plan of the run's data, exactly as it will be trained on."""
  with tempfile.TemporaryDirectory() as folder:
    data = inputs.load_data(config, folder)
    num_steps = config.run.steps_for(len(data.train), config.batch.batch_size)
    plan = plan_lib.Plan(
      data.train, config.batch, seed=config.run.seed, num_steps=num_steps
    )
    samples = np.linspace(
      0, num_steps - 1, min(num_steps, _NUM_SAMPLES), dtype=int
    )
    steps = [plan.step(int(step)) for step in samples]
  num_rows = sum(step.num_rows for step in steps)
  scores = sum(int(step.batch.num_scores.sum()) for step in steps)
  length = plan.capacity.tokens
  seen = sum(
    int((step.batch.visible_until - np.arange(length)).sum()) for step in steps
  )
  return BatchShapes(
    capacity=plan.capacity,
    num_rows=plan.max_rows,
    mean_rows=num_rows / len(steps),
    mean_scores=scores / num_rows,
    mean_visible_pairs=seen / num_rows,
    source=(
      f"data.train: {len(data.train)} pairs, rows of {length} tokens with up "
      f"to {plan.capacity.scores} scored positions and {plan.capacity.pairs} "
      f"pairs, up to {plan.max_rows} rows a step and "
      f"{num_rows / len(steps):.1f} on average"
    ),
  )
