r"""Packed forests against two padded sequences per pair, side by side.

  DPOP_SHARED_DATA=DATA python benchmarks/forest.py

or, without that folder, with --gsm8k=train.jsonl
--arc=ARC-Challenge-train.jsonl --chat=PAIRS.json --tokenizer=FOLDER. There are
three parts; --parts=gsm8k runs one of them:

  gsm8k  4-shot pairs with one corrupted number, drawn at random
  arc    5-shot pairs of ARC-Challenge, all pairs of a question together
  fill   how full the rows are, and tokens saved; nothing is computed

The first two train the same model with the same loss and optimizer by both
methods on the same pairs, reference in the step, and count CPU-seconds
(`time.process_time`) per pair. Repetitions take turns, so that what else runs
on the machine meets all of them. The two-sequence step (see `naive`) comes with
our chunked head over the answers, which favours it, and with logits at every
position; its attention is whichever of two is faster here. That both methods
compute the same is checked: losses and gradient norms must agree.

The last line is JSON.
"""

import json
import os
import pathlib
import statistics
import tempfile
import time

import jax
import naive
import numpy as np
from absl import app, flags, logging

from dpop_jax import config as config_lib
from dpop_jax import optim, program, sharding, steps
from dpop_jax.data import dataset, jsonl, maths, multiple_choice, plan
from dpop_jax.models import decoder

_SHARED = pathlib.Path(os.environ.get("DPOP_SHARED_DATA", "."))


def _define_path(name, default, help_text):
  return flags.DEFINE_string(name, str(_SHARED / default), help_text)


_GSM8K = _define_path("gsm8k", "gsm8k/train.jsonl", "GSM8K's training file.")
_ARC = _define_path(
  "arc", "arc/ARC-Challenge-train.jsonl", "ARC-Challenge's training file."
)
_CHAT = _define_path(
  "chat", "prefs/llamafactory_dpo_en_demo.json", "Pairs of conversations."
)
_TOKENIZER = _define_path(
  "tokenizer", "tokenizers/gpt-neox-olmo", "A tokenizer that DataConfig takes."
)
_PARTS = flags.DEFINE_multi_enum(
  "parts", ["fill", "gsm8k", "arc"], ["fill", "gsm8k", "arc"], "What to run."
)
_REPETITIONS = flags.DEFINE_integer(
  "repetitions", 3, "Updates measured per method.", lower_bound=1
)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "GSM8K pairs per update.")
_ARC_BATCH_SIZE = flags.DEFINE_integer(
  "arc_batch_size", 48, "ARC pairs per update."
)
_ROW_LENGTH = flags.DEFINE_integer("row_length", 2048, "Tokens of a row.")
_ROWS = flags.DEFINE_integer(
  "rows_per_microbatch", 1, "Rows that are computed at once."
)
_NAIVE_PAIRS = flags.DEFINE_integer(
  "naive_pairs_per_microbatch", 4, "Pairs that the naive step computes at once."
)
_NAIVE_MULTIPLE = flags.DEFINE_integer(
  "naive_multiple", 128, "The naive step pads to a multiple of this."
)
_MAX_PAIRS = flags.DEFINE_integer(
  "max_pairs", 1024, "Pairs of each file that are used."
)
_VOCAB = flags.DEFINE_integer("vocab_size", 50_304, "Model: vocabulary.")
_HIDDEN = flags.DEFINE_integer("hidden_size", 256, "Model: width.")
_INTERMEDIATE = flags.DEFINE_integer(
  "intermediate_size", 1024, "Model: width of the MLP."
)
_LAYERS = flags.DEFINE_integer("num_hidden_layers", 4, "Model: layers.")
_HEADS = flags.DEFINE_integer("num_attention_heads", 4, "Model: heads.")
_KV_HEADS = flags.DEFINE_integer("num_key_value_heads", 2, "Model: KV heads.")
_DTYPE = flags.DEFINE_enum(
  "dtype", "float32", ["float32", "bfloat16"], "Model: activations."
)

_FILL_PAIRS = 64
_FILL_ROW_LENGTHS = (1024, 2048, 4096, 8192)
_FILL_STEPS = 24
_MAX_DIFFERENCE = 1e-3


def main(_) -> None:
  logging.set_verbosity(logging.ERROR)
  results = {}
  with tempfile.TemporaryDirectory() as folder:
    for part in _PARTS.value:
      if part == "fill":
        results[part] = _measure_fill(pathlib.Path(folder))
      else:
        results[part] = _measure_steps(part, pathlib.Path(folder))
  print(json.dumps(results))


def _load(name: str, folder: pathlib.Path, row_length: int):
  """Token pairs of "gsm8k_4", "gsm8k_0", "arc_5" or "chat"."""
  options = {}
  if name == "chat":
    train, options["chat_template"] = _CHAT.value, "chatml"
  else:
    kind, num_shots = name.split("_")
    train = str(folder / f"{name}.jsonl")
    if not os.path.exists(train):
      source, build = {
        "gsm8k": (_GSM8K.value, maths.build_pairs),
        "arc": (_ARC.value, multiple_choice.build_arc_pairs),
      }[kind]
      built = build(
        jsonl.read(source), num_shots=int(num_shots), seed=0, unusable="skip"
      )
      pathlib.Path(train).write_text(jsonl.dumps(built.pairs))
  config = dataset.DataConfig(
    train=train,
    tokenizer=_TOKENIZER.value,
    max_pairs=_MAX_PAIRS.value,
    **options,
  )
  return config, dataset.load(config, is_sft=False, row_length=row_length).train


def _measure_fill(folder: pathlib.Path) -> list[dict]:
  print(f"{_FILL_PAIRS} pairs per update, mean of {_FILL_STEPS} updates")
  print("pairs     row length  taken   rows   fill  naive / tree tokens")
  records = []
  for name in ("gsm8k_4", "gsm8k_0", "chat", "arc_5"):
    for row_length in _FILL_ROW_LENGTHS:
      pairs = _load(name, folder, row_length)[1]
      config = plan.BatchConfig(
        batch_size=_FILL_PAIRS,
        row_length=row_length,
        group_by_prompt=name.startswith("arc"),
      )
      the_plan = plan.Plan(pairs, config, seed=0, num_steps=_FILL_STEPS)
      planned = [the_plan.step(step) for step in range(_FILL_STEPS)]
      total = lambda name: sum(getattr(step, name) for step in planned)  # noqa: B023
      records.append(
        {
          "pairs": name,
          "row_length": row_length,
          "rows": total("num_rows") / _FILL_STEPS,
          "fill": total("num_tokens")
          / (total("num_microbatches") * the_plan.capacity.tokens),
          "length": the_plan.capacity.tokens,
          "naive_over_tree": total("num_sequence_tokens") / total("num_tokens"),
        }
      )
      print(
        "{pairs:9} {row_length:10} {length:6} {rows:6.1f} {fill:6.1%} "
        "{naive_over_tree:8.2f}".format(**records[-1]),
        flush=True,
      )
  return records


def _config(part: str, data: dataset.DataConfig) -> config_lib.Config:
  is_arc = part == "arc"
  return config_lib.Config(
    model=decoder.DecoderConfig(
      vocab_size=_VOCAB.value,
      hidden_size=_HIDDEN.value,
      intermediate_size=_INTERMEDIATE.value,
      num_hidden_layers=_LAYERS.value,
      num_attention_heads=_HEADS.value,
      num_key_value_heads=_KV_HEADS.value,
      dtype=_DTYPE.value,
    ),
    data=data,
    batch=plan.BatchConfig(
      batch_size=_ARC_BATCH_SIZE.value if is_arc else _BATCH_SIZE.value,
      row_length=_ROW_LENGTH.value,
      rows_per_microbatch=_ROWS.value,
      group_by_prompt=is_arc,
    ),
    loss=config_lib.LossConfig(name="dpop", beta=0.3, dpop_lambda=50.0),
    # Small steps: after each, both methods still stand at the same place.
    optimizer=optim.OptimizerConfig(name="adamw", peak_learning_rate=1e-6),
    run=config_lib.RunConfig(num_steps=_REPETITIONS.value + 1),
  )


class _Forest:
  """`program`'s train step on planned batches."""

  def __init__(self, the_program, the_plan):
    self._program = the_program
    self._step = program.compile_step(
      the_program.train_step,
      the_program,
      the_program.abstract_state,
      the_plan.empty_batch(),
    )

  def run(self, state, reference, planned):
    batch = program.put_batch(self._program, planned.batch)
    count = np.int32(planned.num_microbatches)
    state, report = self._step(state, reference, batch, count)
    return state, report.metrics["loss"].mean(), report.grad_norm


def _measure_steps(part: str, folder: pathlib.Path) -> dict:
  data, pairs = _load(
    {"gsm8k": "gsm8k_4", "arc": "arc_5"}[part], folder, _ROW_LENGTH.value
  )
  config = _config(part, data)
  num_steps = _REPETITIONS.value + 1
  the_plan = plan.Plan(pairs, config.batch, seed=0, num_steps=num_steps)
  planned = [the_plan.step(step) for step in range(num_steps)]
  drawn = [
    [pairs[i] for i in the_plan.pair_ids(step).tolist()]
    for step in range(num_steps)
  ]
  mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  the_program = program.make_program(config, mesh, num_steps=num_steps)
  params = decoder.make_params(jax.random.key(0), config.model, mesh)
  reference = decoder.make_params(jax.random.key(1), config.model, mesh)
  make_naive = lambda head, attention_name: naive.NaiveStep(
    config=config.model,
    objective=config_lib.make_objective(config.loss),
    optimizer=optim.make_optimizer(config.optimizer, num_steps=num_steps)[0],
    head=head,
    attention_name=attention_name,
    pairs_per_microbatch=_NAIVE_PAIRS.value,
    multiple=_NAIVE_MULTIPLE.value,
  )

  def fresh_state():
    copy = jax.tree.map(lambda x: x.copy(), params)
    return steps.State(np.int32(0), copy, the_program.init_opt_state(copy))

  steps_by_attention = {n: make_naive("answers", n) for n in naive.ATTENTIONS}
  trials = {}
  for name, step in steps_by_attention.items():
    batches = step.batches(drawn[0])[:1]
    state, *_ = jax.block_until_ready(step(fresh_state(), reference, batches))
    trials[name] = _cpu_seconds(step, state, reference, batches)[0]
  del state
  attention_name = min(trials, key=trials.__getitem__)

  methods = {"forest": (_Forest(the_program, the_plan).run, planned)}
  for head in naive.HEADS:
    step = steps_by_attention[attention_name]
    if head != "answers":
      step = make_naive(head, attention_name)
    batches = [step.batches(d) for d in drawn]
    methods[f"naive_{head}"] = (step, batches)
    # Every shape is compiled before anything is counted.
    shapes = {
      b.tokens.shape + b.score_targets.shape: b for d in batches for b in d
    }
    for batch in shapes.values():
      jax.block_until_ready(step(fresh_state(), reference, [batch]))

  states = {name: fresh_state() for name in methods}
  seconds = {name: [] for name in methods}
  for number in range(num_steps):
    outcomes = {}
    for name, (step, batches) in methods.items():
      spent, (states[name], *outcomes[name]) = _cpu_seconds(
        step, states[name], reference, batches[number]
      )
      if number:  # The first is a warm-up.
        seconds[name].append(spent / len(drawn[number]))
    for name in methods:
      if not np.allclose(
        outcomes[name], outcomes["forest"], rtol=_MAX_DIFFERENCE
      ):
        raise ValueError(
          f"{name} gave loss and gradient norm {outcomes[name]}, the forest "
          f"{outcomes['forest']}."
        )
  return _summary(part, planned, methods, seconds, trials)


def _cpu_seconds(step, *arguments):
  start = time.process_time()
  result = jax.block_until_ready(step(*arguments))
  return time.process_time() - start, result


def _summary(part, planned, methods, seconds, trials) -> dict:
  num_rows = sum(step.num_rows for step in planned)
  num_tokens = sum(step.num_tokens for step in planned)
  padded = sum(b.tokens.size for d in methods["naive_full"][1] for b in d)
  sequence_tokens = sum(step.num_sequence_tokens for step in planned)
  medians = {name: statistics.median(s) for name, s in seconds.items()}
  result = {
    "fill": num_tokens / (num_rows * planned[0].batch.tokens.shape[-1]),
    "rows_per_update": num_rows / len(planned),
    "naive_over_tree": sequence_tokens / num_tokens,
    "padded_naive_over_tree": padded / num_tokens,
    "naive_attention": min(trials, key=trials.__getitem__),
    "naive_attention_cpu_s_per_microbatch": trials,
    "cpu_s_per_pair": {
      name: {"median": medians[name], "min": min(s), "max": max(s)}
      for name, s in seconds.items()
    },
    "ratio": {
      name: {
        "of_medians": medians[name] / medians["forest"],
        "per_update": [
          a / b for a, b in zip(s, seconds["forest"], strict=True)
        ],
      }
      for name, s in seconds.items()
      if name != "forest"
    },
  }
  print(
    f"{part}: tokens of sequences / trees {result['naive_over_tree']:.2f}, "
    f"padded {result['padded_naive_over_tree']:.2f}; "
    f"{result['rows_per_update']:.1f} rows, {result['fill']:.1%} full; naive "
    f"attention: {result['naive_attention']}"
  )
  print("method          CPU-s per pair (min to max)   times the forest")
  for name, median in medians.items():
    low, high = min(seconds[name]), max(seconds[name])
    print(
      f"{name:15} {median:7.3f} ({low:.3f} to {high:.3f})"
      f"{median / medians['forest']:16.2f}",
      flush=True,
    )
  return result


if __name__ == "__main__":
  app.run(main)
