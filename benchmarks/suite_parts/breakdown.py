r"""Where the time of our own step goes, and at what rate it multiplies.

  python benchmarks/suite_breakdown.py --out=DIR --work=a,large

See `measure`.
"""

import collections
import dataclasses
import math
import pathlib
import re
import tempfile
import time
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpop_jax import config as config_lib
from dpop_jax import logprobs, optim, program, sharding, steps
from dpop_jax.data import dataset, plan
from dpop_jax.models import decoder
from dpop_jax.planning import flops

from . import runs
from . import work as work_lib

# The first of these that a frame of an operation's stack is of, innermost frame
# first, says which part it belongs to: (part, file, beginning of the function).
_PARTS = (
  ("head", "dpop_jax/logprobs.py", ""),
  ("attention", "dpop_jax/models/attention", ""),
  ("attention", "dpop_jax/models/layers.py", "Attention."),
  ("attention", "dpop_jax/models/rotary.py", ""),
  ("MLP", "dpop_jax/models/layers.py", "MLP."),
  ("MLP", "dpop_jax/models/experts.py", ""),
  ("embedding", "dpop_jax/models/embeddings.py", ""),
  ("norms", "dpop_jax/models/layers.py", "RMSNorm."),
  ("optimizer", "dpop_jax/optim.py", ""),
  ("optimizer", "/optax/", ""),
)
COPIES, REST = "copies", "rest"
# Sizes of the products that the rate is measured with: (rows, inner, columns).
_SQUARE = 2048
_PRODUCT_FLOPS = 2e10
_TRIALS = 5


def measure(
  name: str, pairs: dataset.TokenPairs, *, updates: int
) -> dict[str, Any]:
  """Our step on a kind of work: shares of time, and FLOPs per CPU-second.

  Args:
    name: A key of `work.WORK`.
    pairs: Its pairs.
    updates: That are measured; one more comes before them.

  Returns:
    "shares", of the time of all threads in a traced update, by part;
    "operations", the largest ones; "cpu_seconds" of an update; its FLOPs, all
    and without those of the recomputation in the backward pass;
    "product_rates", FLOPs per CPU-second of matrix products of some sizes in
    this process, taken before and after; and the share of the best of them
    that the step has reached.
  """
  work = work_lib.WORK[name]
  config = _config(work)
  mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  num_steps = len(pairs) // work.pairs
  the_program = program.make_program(config, mesh, num_steps=num_steps)
  the_plan = plan.Plan(
    pairs, config.batch, seed=0, num_steps=num_steps, is_shuffled=False
  )
  reference = decoder.make_params(jax.random.key(0), config.model, mesh)
  params = jax.tree.map(jnp.copy, reference)
  state = steps.State(jnp.int32(0), params, the_program.init_opt_state(params))
  step = program.compile_step(
    the_program.train_step,
    the_program,
    the_program.abstract_state,
    the_plan.empty_batch(),
  )
  rates = _product_rates(work.model)
  spent, counted = [], []
  for number in range(updates + 1):
    planned = the_plan.step(number % num_steps)
    batch = program.put_batch(the_program, planned.batch)
    count = np.int32(planned.num_microbatches)
    start = time.process_time()
    state, _ = jax.block_until_ready(step(state, reference, batch, count))
    if number:
      spent.append(time.process_time() - start)
      counted.append(_count(config.model, planned))
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      jax.block_until_ready(step(state, reference, batch, count))
    (trace,) = pathlib.Path(folder).glob("**/*.xplane.pb")
    found = self_times(_events(str(trace)))
  for size, rate in _product_rates(work.model).items():
    rates[size] = max(rates[size], rate)
  total = sum(x.total for x in counted) / sum(spent)
  useful = total * (1 - _recomputed(counted))
  hlo = step.as_text()
  # What else threads did was waiting.
  operations = parts_of(hlo)
  times = {name: time for name, time in found.items() if name in operations}
  return {
    "work": name,
    "title": work.title,
    "shares": shares(times, hlo),
    "operations": _largest(times, hlo),
    "cpu_seconds": spent,
    "pairs": work.pairs,
    "flops": [dataclasses.asdict(x) for x in counted],
    "flops_per_cpu_second": total,
    "useful_flops_per_cpu_second": useful,
    "product_rates": rates,
    "share_of_product_rate": total / max(rates.values()),
    "useful_share_of_product_rate": useful / max(rates.values()),
    "temporary_bytes": step.memory_analysis().temp_size_in_bytes,
  }


def _count(model, planned) -> flops.Flops:
  return flops.count(model, model, _work(planned, model.vocab_size))


def _recomputed(counted):
  return sum(x.recomputation for x in counted) / sum(x.total for x in counted)


def _config(work) -> config_lib.Config:
  return config_lib.Config(
    model=decoder.DecoderConfig(
      **dataclasses.asdict(work.model), qk_norm="head", rms_norm_eps=1e-6
    ),
    # Named because the config wants it; never opened.
    data=dataset.DataConfig(train="none", tokenizer="none"),
    batch=plan.BatchConfig(
      batch_size=work.pairs,
      row_length=work.row_length,
      group_by_prompt=work.is_grouped,
    ),
    loss=config_lib.LossConfig(name="dpo", beta=runs.BETA),
    optimizer=optim.OptimizerConfig(
      name="adamw", peak_learning_rate=runs.LEARNING_RATE
    ),
    run=config_lib.RunConfig(num_steps=1),
  )


def _work(planned: plan.PlannedStep, vocab_size: int) -> flops.Work:
  """What an update computes on: padding of rows counts as well, as it is
  multiplied; blocks of attention that are skipped do not."""
  rows = planned.num_microbatches * planned.batch.tokens.shape[1]
  length = planned.batch.tokens.shape[2]
  seen = planned.batch.visible_until - np.arange(length)
  most_scores = math.prod(planned.batch.score_targets.shape[1:])
  return flops.Work(
    positions=rows * length,
    scores=int(planned.batch.num_scores.sum()),
    visible_pairs=int(seen.sum()),
    are_logits_kept=logprobs.are_logits_kept(
      most_scores, vocab_size, logprobs.KEPT_BYTES
    ),
  )


def _product_rates(model: work_lib.Model) -> dict[str, float]:
  """FLOPs per CPU-second of float32 products: a large square, the MLP's and
  the vocabulary's; the best of some trials."""
  rates = {}
  for rows, inner, columns in (
    (_SQUARE, _SQUARE, _SQUARE),
    (_SQUARE, model.hidden_size, model.intermediate_size),
    (256, model.hidden_size, model.vocab_size),
  ):
    left, right = (
      jax.random.normal(jax.random.key(0), shape)
      for shape in ((rows, inner), (inner, columns))
    )
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(left, right))
    repeats = max(1, round(_PRODUCT_FLOPS / (2 * rows * inner * columns)))
    best = 0.0
    for _ in range(_TRIALS):
      start = time.process_time()
      for _ in range(repeats):
        jax.block_until_ready(product(left, right))
      done = 2 * rows * inner * columns * repeats
      best = max(best, done / (time.process_time() - start))
    rates[f"{rows} x {inner} x {columns}"] = best
  return rates


def _events(path: str):
  """(start, duration, name) in ns of a trace's events, one list a thread."""
  trace = jax.profiler.ProfileData.from_file(path)
  return [
    [(event.start_ns, event.duration_ns, event.name) for event in line.events]
    for plane in trace.planes
    for line in plane.lines
    if line.name != "python"
  ]


def self_times(
  threads: Iterable[Iterable[tuple[float, float, str]]],
) -> dict[str, float]:
  """Time of each name without that of the events inside it, over all threads.

  Args:
    threads: (start, duration, name) of the events of each thread.
  """
  times = collections.Counter()
  for events in threads:
    open_events: list[tuple[float, str]] = []
    for start, duration, name in sorted(events, key=lambda e: (e[0], -e[1])):
      while open_events and open_events[-1][0] <= start:
        open_events.pop()
      if open_events:
        times[open_events[-1][1]] -= duration
      times[name] += duration
      open_events.append((start + duration, name))
  return dict(times)


def shares(times: Mapping[str, float], hlo: str) -> dict[str, float]:
  """Share of each part of the model in the time of the operations.

  Args:
    times: Of each operation, by its name in the program.
    hlo: The compiled program as text, which says where operations come from.
  """
  parts = parts_of(hlo)
  sums = collections.Counter()
  for name, spent in times.items():
    sums[parts.get(name, REST)] += spent
  total = sum(sums.values())
  return {part: spent / total for part, spent in sums.most_common()}


def _largest(times, hlo, count=25):
  parts, total = parts_of(hlo), sum(times.values())
  kinds = {
    match[1]: match[2] for match in re.finditer(_INSTRUCTION, hlo, re.MULTILINE)
  }
  return [
    (name, kinds.get(name, ""), parts.get(name, REST), spent / total)
    for name, spent in sorted(times.items(), key=lambda item: -item[1])[:count]
  ]


_INSTRUCTION = r"^\s*(?:ROOT )?%?([\w.\-]+) = (\(?\S+) .*$"


def parts_of(hlo: str) -> dict[str, str]:
  """Which part of the model each operation of a program belongs to.

  An operation is of the innermost function on its stack that `_PARTS` knows;
  copies of arguments and what else the compiler adds has none.
  """
  files = _table(hlo, "FileNames", r'^(\d+) "(.*)"$')
  functions = _table(hlo, "FunctionNames", r'^(\d+) "(.*)"$')
  locations = _table(
    hlo,
    "FileLocations",
    r"^(\d+) {file_name_id=(\d+) function_name_id=(\d+) ",
  )
  frames = _table(
    hlo,
    "StackFrames",
    r"^(\d+) {file_location_id=(\d+)(?: parent_frame_id=(\d+))?",
  )
  found: dict[str | None, str | None] = {}

  def part_of(frame):
    while frame in frames:
      location, parent = frames[frame]
      file, function = locations[location]
      for part, path, beginning in _PARTS:
        if path in files[file] and functions[function].startswith(beginning):
          return part
      # Written from 1, with 0 for none, where frames themselves begin at 1.
      frame = parent and str(int(parent) - 1)
    return None

  parts = {}
  for match in re.finditer(_INSTRUCTION, hlo, re.MULTILINE):
    frame = re.search(r"stack_frame_id=(\d+)", match[0])
    number = frame and frame[1]
    if number not in found:
      found[number] = part_of(number)
    is_copy = re.search("copy|broadcast", match[1])
    parts[match[1]] = found[number] or (COPIES if is_copy else REST)
  return parts


def _table(hlo, title, pattern):
  """Of a section of the text: its number to what the pattern's groups hold."""
  section = re.search(rf"^{title}\n(.*?)(?:\n\n|\Z)", hlo, re.M | re.S)
  rows = section[1].splitlines() if section else []
  matches = [re.match(pattern, row) for row in rows]
  return {
    m[1]: m[2] if len(m.groups()) == 2 else m.groups()[1:] for m in matches if m
  }
