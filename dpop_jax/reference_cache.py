"""Log-probs of the reference, computed once for all runs that need them.

Kept is one folder for each set of pairs, named by what they depend on (see
`reference_key`), with

  key.json           what that was
  000000.logps, ...  log-probs of some thousand pairs each, behind a hash of
                     them and of where they belong

A part is written whole or not at all, so what is there can be used, and what a
killed process had not come to is computed by the next one.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from dpop_jax import (
  atomic_files,
  exchange,
  paths,
  progress,
  reference_key,
  steps,
)
from dpop_jax import config as config_lib
from dpop_jax import pairs as pairs_lib
from dpop_jax import program as program_lib
from dpop_jax.data import dataset, kept_folders, packing
from dpop_jax.data import plan as plan_lib

KEY_NAME = "key.json"
_PAIRS_A_PART = 4096
# Of pairs that need not be scored where the run has them.
_PAIRS_A_STEP = 512
_SHAPE = (2, pairs_lib.NUM_REGIONS)
_HASH_BYTES = 32
# Steps of the run that are scored again at every start.
_NUM_CHECKED = 2
# In nats of an answer, or of a thousand nats of a long one.
TOLERANCE = 1e-3


class _Part(NamedTuple):
  """What is scored and kept together.

  Attributes:
    file: Where it is kept.
    entries: Which log-probs of the table it holds.
    steps: Which steps of the run's plan, where they depend on the layout.
  """

  file: epath.Path
  entries: slice
  steps: range


class _Table:
  """The log-probs of one set of pairs.

  Attributes:
    folder: Where they are kept.
    logps: float32 [entries, 2, 3], nan where unknown. An entry is a pair of the
      data set, or one of a step, pairs of step 0 in the order of its layout
      first.
  """

  def __init__(self, folder: epath.Path, plan: plan_lib.Plan, *, by_pair: bool):
    self.folder, self._plan, self._by_pair = folder, plan, by_pair
    if by_pair:
      starts = [*range(0, len(plan.pairs), _PAIRS_A_PART), len(plan.pairs)]
      step_ranges = [range(0)] * (len(starts) - 1)
    else:
      counts = [len(plan.layout(s).pair_ids) for s in range(plan.num_steps)]
      self._starts = np.cumsum([0, *counts])
      stride = max(1, _PAIRS_A_PART // max(counts))
      bounds = [*range(0, plan.num_steps, stride), plan.num_steps]
      step_ranges = [
        range(*pair) for pair in zip(bounds[:-1], bounds[1:], strict=True)
      ]
      starts = self._starts[bounds].tolist()
    self.parts = [
      _Part(
        folder / f"{i:06d}.logps", slice(*starts[i : i + 2]), step_ranges[i]
      )
      for i in range(len(step_ranges))
    ]
    self.logps = np.full((starts[-1], *_SHAPE), np.nan, np.float32)

  def of_step(self, step: int, pair_ids: np.ndarray) -> np.ndarray:
    """Those of a step of the run, for `Plan.reference_logps`."""
    if self._by_pair:
      return self.logps[pair_ids]
    return self.logps[self._starts[step] : self._starts[step + 1]]

  def missing(self) -> list[_Part]:
    return [p for p in self.parts if np.isnan(self.logps[p.entries]).any()]

  def read(self) -> None:
    """Takes over the parts that are there, whole and in their place."""
    if jax.process_index() == 0:
      for part in self.parts:
        logps = self.logps[part.entries]
        content = _read(part.file)
        if content is None:
          continue
        if content != _sealed(part.file, content[_HASH_BYTES:]) or (
          len(content) != _HASH_BYTES + logps.nbytes
        ):
          logging.warning("%s is damaged and is made again.", part.file)
          continue
        logps[...] = np.frombuffer(content[_HASH_BYTES:], "<f4").reshape(
          logps.shape
        )
    if jax.process_count() > 1:
      self.logps = np.array(multihost_utils.broadcast_one_to_all(self.logps))

  def add(self, part: _Part, logps: np.ndarray) -> None:
    """Keeps what was computed of a part."""
    self.logps[part.entries] = logps
    if jax.process_index() == 0:
      content = np.ascontiguousarray(logps, "<f4").tobytes()
      with atomic_files.replacing(part.file) as temporary:
        temporary.write_bytes(_sealed(part.file, content))

  def plan_of(self, part: _Part, config: plan_lib.BatchConfig):
    """A plan and its steps that hold the pairs of a part, each once.

    Where the run has them if that matters, else as it packs best.
    """
    if not self._by_pair:
      return self._plan, part.steps
    pairs = self._plan.pairs
    pairs = dataset.TokenPairs(pairs.tokens, pairs.offsets[part.entries])
    plan = plan_lib.Plan(
      pairs,
      plan_lib.BatchConfig(
        batch_size=_PAIRS_A_STEP,
        row_length=config.row_length,
        rows_per_microbatch=config.rows_per_microbatch,
      ),
      seed=0,
      num_steps=-(-len(pairs) // _PAIRS_A_STEP),
      is_shuffled=False,
      share=exchange.share,
    )
    return plan, range(plan.num_steps)

  def in_order(self, ids: np.ndarray, logps: np.ndarray) -> np.ndarray:
    """Log-probs as entries, from those of a plan of `plan_of` step by step."""
    if not self._by_pair:
      return logps
    entries = np.empty_like(logps)
    entries[ids] = logps
    return entries


class _Scorer:
  """Scores pairs of several plans, with one program for each length of rows."""

  def __init__(self, program, params, plans, config: plan_lib.BatchConfig):
    self._program, self._params = program, params
    self._num_rows = config.rows_per_microbatch
    self._rows = program_lib.local_rows(program, self._num_rows)
    self._capacities: dict[int, packing.Capacity] = {}
    for plan in plans:
      own = plan.capacity
      most = self._capacities.setdefault(own.tokens, own)
      self._capacities[own.tokens] = packing.Capacity(*map(max, most, own))
    self._steps: dict[int, jax.stages.Compiled] = {}

  def _step(self, capacity):
    if capacity.tokens not in self._steps:
      rows = packing.empty_rows((1, self._num_rows), capacity)
      step = program_lib.compile_score_step(self._program, rows)
      self._steps[capacity.tokens] = step
    return self._steps[capacity.tokens]

  def __call__(self, plan: plan_lib.Plan, step: int) -> np.ndarray:
    """float32 [pairs, 2, 3], in the order of the step's layout."""
    # Rows of another length may round otherwise.
    capacity = self._capacities[plan.capacity.tokens]
    planned = plan.step(step, self._rows, capacity=capacity)
    batch = planned.batch._replace(reference_logps=None)
    layout, found = plan.layout(step), []
    for index in range(planned.num_microbatches):
      rows = program_lib.put_batch(
        self._program,
        batch.map(lambda x: x[index : index + 1]),  # noqa: B023
        num_rows=self._num_rows,
      )
      found.append(self._step(capacity)(self._params, rows))
    by_row = np.concatenate(jax.device_get(found))
    spans = [layout.row_pairs(i) for i in range(len(layout.row_ends))]
    logps = np.concatenate(
      [row[: s.stop - s.start] for row, s in zip(by_row, spans, strict=False)]
    )
    if not np.isfinite(logps).all():
      bad = ~np.isfinite(logps).all(axis=(1, 2))
      raise ValueError(
        f"The reference gives pair {layout.pair_ids[bad][0]} a log-prob that "
        "is not finite; check its weights, or score it in float32."
      )
    return logps


def attach(
  config: config_lib.Config,
  program: program_lib.Program,
  reference: steps.Params,
  plans: Mapping[str, plan_lib.Plan],
  *,
  first_step: int = 0,
  is_stopped: Callable[[], bool] = lambda: False,
) -> bool:
  """Gives plans the reference's log-probs, from the cache or computed now.

  Afterwards the plans' batches hold them, and the reference is not needed.
  Called by all processes alike.

  Args:
    config: Of the run.
    program: Its steps, made with `reference.cache_dir`.
    reference: Parameters.
    plans: All that will be run, by names of their pairs.
    first_step: Of the run; some steps from there on are checked.
    is_stopped: Asked before every step that is scored: whether to stop there.

  Returns:
    False if it was stopped. What it had kept by then is there the next time.

  Raises:
    ValueError: What is kept is not what this reference gives, or something is
      not finite.
  """
  digest = reference_key.params_digest(reference)
  model = config_lib.reference_model(config)
  by_pair = reference_key.is_by_pair(model, program.mesh)
  tables = {}
  for name, plan in plans.items():
    parts = reference_key.key_parts(config, program.mesh, digest, plan)
    folder = paths.of(str(config.reference.cache_dir)) / kept_folders.key_of(
      parts
    )
    tables[name] = table = _Table(folder, plan, by_pair=by_pair)
    table.read()
    if jax.process_index() == 0 and table.missing():
      text = json.dumps(parts, indent=2)
      atomic_files.write_text(folder / KEY_NAME, text + "\n")
  to_score = [
    (table, part, *table.plan_of(part, config.batch))
    for table in tables.values()
    for part in table.missing()
  ]
  all_plans = [*plans.values(), *(plan for _, _, plan, _ in to_score)]
  scorer = _Scorer(program, reference, all_plans, config.batch)
  if not _score(scorer, to_score, is_stopped):
    return False
  for name, plan in plans.items():
    plan.reference_logps = tables[name].of_step
    _check(scorer, name, plan, tables[name], first_step)
    logging.info(
      "Reference: %d log-probs of data.%s from %s.",
      tables[name].logps[:, :, 0].size,
      name,
      tables[name].folder,
    )
  return True


def _score(scorer, to_score, is_stopped):
  """Whether all of it was scored, and kept."""
  if not to_score:
    return True
  num_steps, done = sum(len(steps) for *_, steps in to_score), 0
  with progress.Progress(
    "reference", num_steps=num_steps, is_shown=jax.process_index() == 0
  ) as bar:
    for table, part, plan, its_steps in to_score:
      found = []
      for step in its_steps:
        if is_stopped():
          return False
        found.append(scorer(plan, step))
        done += 1
        bar.update(done)
      ids = np.concatenate([plan.layout(step).pair_ids for step in its_steps])
      table.add(part, table.in_order(ids, np.concatenate(found)))
  return True


def _check(scorer, name, plan, table, first_step):
  """Scores some of what the run is about to use, where it uses it."""
  last = plan.num_steps - 1
  generator = np.random.default_rng(first_step)
  first = first_step if name == "train" else 0
  drawn = generator.integers(min(first, last), last + 1, _NUM_CHECKED)
  for step in sorted({*drawn.tolist()}):
    ids = plan.layout(step).pair_ids
    kept = plan.reference_logps(step, ids).sum(axis=-1)
    now = scorer(plan, step).sum(axis=-1)
    allowed = TOLERANCE * np.maximum(1.0, np.abs(now) / 1000)
    excess = np.abs(kept - now) - allowed
    worst = np.unravel_index(np.argmax(excess), excess.shape)
    if not excess[worst] <= 0:
      raise ValueError(
        f"The log-probs kept in {table.folder} are not those of this "
        f"reference: it gives an answer of pair {ids[worst[0]]} of data.{name} "
        f"{now[worst]:.4f} nats, but {kept[worst]:.4f} are kept, and "
        f"{allowed[worst]:.4f} of difference is allowed. Remove that folder, "
        "or set reference.cache_dir to another one, or to None."
      )


def _read(file):
  try:
    with paths.explained(file):
      return file.read_bytes()
  except FileNotFoundError:
    return None


def _sealed(file, content):
  """Behind a hash, also of where it belongs: its folder is named by a key."""
  place = f"{file.parent.name}/{file.name}".encode()
  return hashlib.sha256(place + content).digest() + content
