r"""The reference's log-probs kept, or scored in the step, side by side.

  DPOP_SHARED_DATA=DATA python benchmarks/reference_cache.py --dtype=bfloat16

or, without that folder, with --pairs=FILE --tokenizer=FOLDER. It trains the
same model on the same pairs both ways, and tells

  numerics  by how much what batches hold differs from what the step would
            compute, in nats of an answer; for comparison also if log-probs were
            kept by pair (as they are in float32) or by step (as in bfloat16);
            and the first loss, which should be 0.693147
  cost      CPU-seconds (`time.process_time`) of an update, which take turns,
            and what the compiled update takes of memory

With --init_from, policy and reference are the model of a Hugging Face folder
with its own tokenizer, instead of fresh numbers. The last line is JSON.
"""

import dataclasses
import functools
import json
import os
import pathlib
import statistics
import tempfile
import time
from unittest import mock

import jax
import numpy as np
from absl import app, flags, logging

from dpop_jax import config as config_lib
from dpop_jax import (
  inputs,
  program,
  reference_cache,
  reference_key,
  sharding,
  steps,
)
from dpop_jax.data import plan as plan_lib

_SHARED = pathlib.Path(os.environ.get("DPOP_SHARED_DATA", "."))
_PAIRS = flags.DEFINE_string(
  "pairs",
  str(_SHARED / "prefs/llamafactory_dpo_en_demo.json"),
  "Preference pairs as data.train takes them.",
)
_TOKENIZER = flags.DEFINE_string(
  "tokenizer", str(_SHARED / "tokenizers/gpt-neox-olmo"), "data.tokenizer."
)
_CHAT_TEMPLATE = flags.DEFINE_string(
  "chat_template", "chatml", "data.chat_template; empty for none."
)
_INIT_FROM = flags.DEFINE_string("init_from", None, "run.init_from.")
_DTYPE = flags.DEFINE_enum(
  "dtype", "float32", ["float32", "bfloat16"], "model.dtype."
)
_PARTS = flags.DEFINE_multi_enum(
  "parts", ["numerics", "cost"], ["numerics", "cost"], "What to run."
)
_REPETITIONS = flags.DEFINE_integer(
  "repetitions", 3, "Updates measured each way.", lower_bound=1
)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Pairs of an update.")
_MAX_PAIRS = flags.DEFINE_integer("max_pairs", 32, "Pairs that are used.")
_ROW_LENGTH = flags.DEFINE_integer("row_length", 2048, "Tokens of a row.")
_HIDDEN = flags.DEFINE_integer("hidden_size", 256, "Model: width.")
_LAYERS = flags.DEFINE_integer("num_hidden_layers", 4, "Model: layers.")
_VOCAB = flags.DEFINE_integer("vocab_size", 50_304, "Model: vocabulary.")
_RANGE = flags.DEFINE_float(
  "initializer_range", 0.06, "Model: size of its fresh numbers."
)


def main(_) -> None:
  logging.set_verbosity(logging.ERROR)
  with tempfile.TemporaryDirectory() as folder:
    run = _Run(folder)
    results = {
      "pairs": _PAIRS.value,
      "init_from": _INIT_FROM.value,
      "dtype": _DTYPE.value,
    }
    if "numerics" in _PARTS.value:
      results["numerics"] = run.numerics()
    if "cost" in _PARTS.value:
      results["cost"] = run.cost()
  print(json.dumps(results))


def _config(folder) -> config_lib.Config:
  model = dict(dtype=_DTYPE.value)
  if _INIT_FROM.value is None:
    model |= dict(
      vocab_size=_VOCAB.value,
      hidden_size=_HIDDEN.value,
      intermediate_size=4 * _HIDDEN.value,
      num_hidden_layers=_LAYERS.value,
      num_attention_heads=4,
      num_key_value_heads=2,
      initializer_range=_RANGE.value,
    )
  data = dict(
    train=_PAIRS.value,
    max_pairs=_MAX_PAIRS.value,
    chat_template=_CHAT_TEMPLATE.value or None,
    max_length=_ROW_LENGTH.value,
  )
  if _INIT_FROM.value is None:
    data["tokenizer"] = _TOKENIZER.value
  sections = config_lib.config_dict(
    model=model,
    data=data,
    batch=dict(batch_size=_BATCH_SIZE.value, row_length=_ROW_LENGTH.value),
    loss=dict(name="dpop", beta=0.3, dpop_lambda=50.0),
    # Small steps: after each, both ways still stand at the same place.
    optimizer=dict(name="adamw", peak_learning_rate=1e-6),
    run=dict(num_steps=_REPETITIONS.value + 1, init_from=_INIT_FROM.value),
    reference=dict(cache_dir=str(folder)),
    mesh=dict(fsdp=1),
  )
  return config_lib.from_config_dict(sections)


class _Run:
  """A run with kept log-probs and, beside it, one without."""

  def __init__(self, folder):
    self.config = _config(folder)
    pairs = inputs.load_data(self.config, folder).train
    self.num_steps = self.config.run.num_steps
    self.plan = plan_lib.Plan(
      pairs, self.config.batch, seed=0, num_steps=self.num_steps
    )
    self.mesh = sharding.make_mesh(self.config.mesh, jax.devices()[:1])
    make = functools.partial(
      program.make_program, mesh=self.mesh, num_steps=self.num_steps
    )
    in_step = dataclasses.replace(
      self.config, reference=config_lib.ReferenceConfig()
    )
    self.programs = {"kept": make(self.config), "in_step": make(in_step)}
    self.params = inputs.initial_params(self.config, self.mesh)
    self._attach()

  def _attach(self):
    self.plan.reference_logps = None
    reference_cache.attach(
      self.config, self.programs["kept"], self.params, {"train": self.plan}
    )

  def numerics(self) -> dict:
    """Largest and mean differences of answers, in nats."""
    score = jax.jit(
      functools.partial(steps.region_logps, config=self.config.model)
    )
    batches = [self.plan.step(i).batch for i in range(self.num_steps)]
    now, masks = [], []
    for batch in (b._replace(reference_logps=None) for b in batches):
      for index in range(len(batch.tokens)):
        rows = batch.map(lambda x: x[index])  # noqa: B023
        now.append(np.asarray(score(self.params, rows)).sum(axis=-1))
        masks.append(rows.pair_weights > 0)
    now, mask = np.concatenate(now), np.concatenate(masks)
    own = reference_key.is_by_pair(self.config.model, self.mesh)
    result = {
      "num_answers": int(mask.sum() * 2),
      "mean_size": float(np.abs(now[mask]).mean()),
      "as_kept": "by pair" if own else "by step",
    }
    print(
      f"{_DTYPE.value}: {result['num_answers']} answers of "
      f"{result['mean_size']:.1f} nats on average, {result['as_kept']}"
    )
    for by_pair in (True, False):
      with (
        mock.patch.object(reference_key, "is_by_pair", lambda *_: by_pair),  # noqa: B023
        # Else the check would refuse what is measured here.
        mock.patch.object(reference_cache, "TOLERANCE", np.inf),
      ):
        self._attach()
      kept = [self.plan.step(i).batch for i in range(self.num_steps)]
      kept = np.concatenate(
        [b.reference_logps.reshape(-1, *b.reference_logps.shape[2:])
         for b in kept]
      ).sum(axis=-1)  # fmt: skip
      found = np.abs(kept - now.reshape(kept.shape))
      found = found[mask.reshape(kept.shape[:-1])]
      name = "by pair" if by_pair else "by step"
      result[name] = {"max": float(found.max()), "mean": float(found.mean())}
      print(
        f"  kept {name}: off by {found.max():.1e} nats at most, "
        f"{found.mean():.1e} on average",
        flush=True,
      )
    self._attach()
    return result

  def cost(self) -> dict:
    """CPU-seconds and bytes of an update, both ways."""
    compiled, states, result = {}, {}, {}
    for name, made in self.programs.items():
      batch = self._batch(0, name)
      compiled[name] = program.compile_step(
        made.train_step, made, made.abstract_state, batch
      )
      found = compiled[name].memory_analysis()
      result[name] = {
        "argument_bytes": found.argument_size_in_bytes,
        "temporary_bytes": found.temp_size_in_bytes,
        "cpu_seconds": [],
      }
      copy = jax.tree.map(lambda x: x.copy(), self.params)
      states[name] = steps.State(np.int32(0), copy, made.init_opt_state(copy))
    for step in range(self.num_steps):
      count = np.int32(self.plan.step(step).num_microbatches)
      for name, made in self.programs.items():
        batch = program.put_batch(made, self._batch(step, name))
        reference = self.params if name == "in_step" else None
        start = time.process_time()
        states[name], report = jax.block_until_ready(
          compiled[name](states[name], reference, batch, count)
        )
        spent = time.process_time() - start
        if step:  # The first is a warm-up.
          result[name]["cpu_seconds"].append(spent)
        else:
          loss = float(report.metrics["loss"].mean())
          result[name]["first_loss"] = loss
    print("reference  first loss  CPU-s an update (min to max)  GB args  temp")
    for name, found in result.items():
      spent = found["cpu_seconds"]
      print(
        f"{name:9} {found['first_loss']:11.6f} "
        f"{statistics.median(spent):10.2f} "
        f"({min(spent):.2f} to {max(spent):.2f})"
        f"{found['argument_bytes'] / 1e9:15.3f}"
        f"{found['temporary_bytes'] / 1e9:7.3f}"
      )
    return result

  def _batch(self, step, name):
    batch = self.plan.step(step).batch
    return batch if name == "kept" else batch._replace(reference_logps=None)


if __name__ == "__main__":
  app.run(main)
