"""All that a report says, gathered from a set of pairs and perhaps a model."""

import dataclasses
import time
from typing import Any, NamedTuple

import numpy as np
import tqdm

import dpop_jax
from dpop_jax.data import dataset, tokenizers
from dpop_jax.data import plan as plan_lib
from dpop_jax.inspection import (
  condition as condition_lib,
)
from dpop_jax.inspection import (
  forward,
  head_step,
  overlaps,
  pair_statistics,
  sharing,
  verdict,
  worst_pairs,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """What to inspect beside the data.

  Attributes:
    batch: Pairs of an update and rows, for what trees save and rows hold.
    seed: Of the shuffle of updates, and of the choice of pairs for the model.
    num_model_pairs: Pairs that the model reads, drawn at random.
    num_worst: Pairs of each kind that are shown with their text.
  """

  batch: plan_lib.BatchConfig
  seed: int = 0
  num_model_pairs: int = 512
  num_worst: int = 5

  def __post_init__(self):
    for name in ("num_model_pairs", "num_worst"):
      if getattr(self, name) < 1:
        raise ValueError(
          f"--{name} must be at least 1, got {getattr(self, name)}."
        )


class Findings(NamedTuple):
  """What was found.

  Attributes:
    report: Plain numbers, text, lists and objects, for JSON.
    statistics: Of every pair, for plots.
    condition: Of the pairs that the model read, or None.
  """

  report: dict[str, Any]
  statistics: pair_statistics.PairStatistics
  condition: condition_lib.Condition | None


def gather(
  data: dataset.DataConfig,
  options: Options,
  model: forward.Model | None = None,
) -> Findings:
  """Reads the pairs, measures them, and lets the model read some of them.

  Args:
    data: Which pairs; `eval` for held-out ones to compare with.
    options: See there.
    model: To tell at which tokens DPO would push the wrong way; None for none.

  Raises:
    FileNotFoundError: A file or the tokenizer is missing.
    ValueError: A file cannot be read, no row is usable, or the model does not
      know the tokens.
  """
  start = time.monotonic()
  row_length = options.batch.row_length
  loaded = dataset.load(data, is_sft=False, row_length=row_length)
  tokenizer = tokenizers.load(
    data.tokenizer,
    bos_token=data.bos_token,
    eos_token=data.eos_token,
    chat_template=data.chat_template,
  )
  texts = pair_statistics.text_reader(loaded.train, tokenizer)
  with _bar("Measuring pairs", len(loaded.train)) as bar:
    statistics = pair_statistics.measure(
      loaded.train, texts, lambda _: bar.update()
    )
  groups = overlaps.prompt_groups(loaded.train)
  with _bar("Packing updates", None) as bar:
    shared = {
      "pairs": sharing.of_pairs(statistics),
      "prompts": sharing.of_prompts(
        loaded.train, statistics, groups, row_length=row_length
      ),
      "updates": sharing.of_updates(
        loaded.train,
        options.batch,
        seed=options.seed,
        progress=lambda _: bar.update(),
      ),
    }
  held_out = None
  if loaded.eval is not None:
    held_out = overlaps.between(loaded.train, loaded.eval)
  report = {
    "dpop_jax_version": dpop_jax.__version__,
    "data": loaded.report,
    **pair_statistics.summary(statistics),
    "shared_beginnings": shared,
    "overlaps": overlaps.within(loaded.train, groups),
    "eval": held_out,
    "most_different_pairs": worst_pairs.most_different(
      statistics, texts, count=options.num_worst
    ),
    "condition": None,
  }
  condition = None
  if model is not None:
    condition, section = _read(loaded.train, texts, options, model)
    report["condition"] = section
    report["verdict"] = verdict.of_model(section)
  else:
    report["verdict"] = verdict.without_model(report)
  report["seconds"] = round(time.monotonic() - start, 1)
  return Findings(report, statistics, condition)


def _read(pairs, texts, options, model):
  """The model's part: the condition of pairs drawn at random."""
  drawn = np.random.default_rng(options.seed).permutation(len(pairs))
  ids = np.sort(drawn[: options.num_model_pairs]).tolist()
  sample = [pairs[i] for i in ids]
  with _bar("Running the model", len(sample)) as bar:
    logps = forward.token_logps(
      model,
      sample,
      row_length=options.batch.row_length,
      progress=lambda _: bar.update(),
    )
  condition = condition_lib.measure(sample, logps)
  worst = worst_pairs.by_value(
    condition.push_down_of_pairs(),
    texts,
    count=options.num_worst,
    pair_ids=ids,
  )
  section = {"model": model.name, **condition_lib.summary(condition)}
  section["head_step_fall"] = head_step.fall(
    model, sample, row_length=options.batch.row_length
  )
  return condition, section | {"worst_pairs": worst}


def _bar(name, total):
  # Quick ones need no bar, and a log file is no place for one.
  return tqdm.tqdm(desc=name, total=total, delay=1, disable=None)
