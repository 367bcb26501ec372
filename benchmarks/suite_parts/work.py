"""The token pairs of each kind of work: made once, read by every library.

A file `<name>.npz` holds the pairs in the order in which updates take them:
`tokens` int32 [total] and `offsets` int64 [pairs, 4], as in
`dpop_jax.data.dataset.TokenPairs`, and `source`, what they were made from.
"""

import dataclasses
import json
import pathlib

import numpy as np

from dpop_jax import pairs as pairs_lib
from dpop_jax.data import dataset, jsonl, maths, multiple_choice, plan

# Ids below are special in most vocabularies; random pairs leave them out.
_FIRST_RANDOM_ID = 3
# Of each file, pairs that are drawn from.
_POOL = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
  """A decoder of Qwen3's shape, in `transformers`' names.

  Attributes:
    vocab_size: Tokens; input and output embeddings are not tied.
    hidden_size: Width.
    intermediate_size: Width of the MLP.
    num_hidden_layers: Layers.
    num_attention_heads: Heads of queries.
    num_key_value_heads: Heads of keys and values.
    head_dim: Width of a head.
  """

  vocab_size: int
  hidden_size: int = 256
  intermediate_size: int = 1024
  num_hidden_layers: int = 4
  num_attention_heads: int = 4
  num_key_value_heads: int = 2
  head_dim: int = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
  """What is trained on, by everybody alike.

  Attributes:
    title: For the table.
    model: The decoder.
    pairs: Of an update.
    updates: That are measured; one more comes before them.
    microbatch_pairs: Pairs that a library computes at once, if it counts
      in pairs.
    row_length: Tokens of our rows.
    num_shots: Of few-shot prompts.
    is_grouped: All pairs of a prompt in one update.
    bar: How many times the others' CPU-seconds a pair should take of ours.
  """

  title: str
  model: Model
  pairs: int
  updates: int
  microbatch_pairs: int = 2
  row_length: int = 2048
  num_shots: int = 0
  is_grouped: bool = False
  bar: float | None = None

  @property
  def num_pairs(self) -> int:
    """Of the file: the update that warms up, and those that are measured."""
    return self.pairs * (self.updates + 1)


_SMALL = Model(vocab_size=50_304)
_LARGE = Model(
  vocab_size=151_936,
  hidden_size=512,
  intermediate_size=2048,
  num_hidden_layers=8,
  num_attention_heads=8,
  num_key_value_heads=4,
)

WORK = {
  "a": Work(
    title="GSM8K, 4 shots",
    model=_SMALL,
    pairs=8,
    updates=1,
    row_length=1536,
    num_shots=4,
    bar=4.0,
  ),
  "b": Work(
    title="GSM8K, 0 shots",
    model=_SMALL,
    microbatch_pairs=4,
    pairs=16,
    updates=1,
    row_length=640,
  ),
  "c": Work(
    title="chat",
    model=_SMALL,
    pairs=8,
    updates=1,
    row_length=4096,
    bar=3.0,
  ),
  "d": Work(
    title="128 + 128 tokens",
    model=Model(vocab_size=32_000),
    microbatch_pairs=4,
    pairs=4,
    updates=6,
    row_length=768,
    bar=2.5,
  ),
  "e": Work(
    title="ARC, 5 shots",
    model=_SMALL,
    microbatch_pairs=4,
    pairs=24,
    updates=1,
    num_shots=5,
    is_grouped=True,
    bar=10.0,
  ),
  "large": Work(
    title="GSM8K, 4 shots, d 512, 8 layers, vocabulary 152k",
    model=_LARGE,
    pairs=4,
    updates=1,
    microbatch_pairs=1,
    row_length=1536,
    num_shots=4,
  ),
}


def make(
  name: str,
  folder: pathlib.Path,
  *,
  data: pathlib.Path,
  tokenizer: str,
  work: Work | None = None,
) -> pathlib.Path:
  """Writes the pairs of a kind of work, unless these are there.

  Args:
    name: A key of WORK.
    folder: Where to.
    data: Folder with gsm8k/train.jsonl, arc/ARC-Challenge-train.jsonl and
      prefs/llamafactory_dpo_en_demo.json.
    tokenizer: As `DataConfig.tokenizer`.
    work: Takes the place of WORK[name], of the same texts.

  Raises:
    FileNotFoundError: A file of the data is missing.
    ValueError: There are too few pairs that fit a row.
  """
  path, work = folder / f"{name}.npz", work or WORK[name]
  source = json.dumps(dataclasses.asdict(work) | {"tokenizer": tokenizer})
  if path.exists():
    with np.load(path) as file:
      if str(file.get("source")) == source:
        return path
  folder.mkdir(parents=True, exist_ok=True)
  if name == "d":
    pairs = _random(work)
  else:
    pairs = _first_updates(work, _read(name, work, folder, data, tokenizer))
  partial = path.with_suffix(".partial.npz")
  np.savez(partial, tokens=pairs.tokens, offsets=pairs.offsets, source=source)
  partial.replace(path)
  return path


def load(path: pathlib.Path) -> dataset.TokenPairs:
  """What `make` wrote."""
  with np.load(path) as file:
    return dataset.TokenPairs(file["tokens"], file["offsets"])


def _random(work):
  """Nothing is shared but the prompt, and nothing is padded."""
  generator = np.random.default_rng(0)
  ids = generator.integers(
    _FIRST_RANDOM_ID,
    work.model.vocab_size,
    (work.num_pairs, 3, 128),
    dtype=np.int32,
  )
  return dataset.TokenPairs.of(pairs_lib.TokenPair(*parts) for parts in ids)


def _first_updates(work, pairs):
  """The pairs of the first updates of a run of ours, in their order."""
  config = plan.BatchConfig(
    batch_size=work.pairs,
    row_length=work.row_length,
    group_by_prompt=work.is_grouped,
  )
  num_updates = work.updates + 1
  if len(pairs) < work.num_pairs:
    raise ValueError(
      f"{work.title!r} needs {work.num_pairs} pairs that fit "
      f"{work.row_length} tokens, but the data has {len(pairs)}."
    )
  the_plan = plan.Plan(pairs, config, seed=0, num_steps=num_updates)
  ids = np.concatenate([the_plan.pair_ids(i) for i in range(num_updates)])
  return dataset.TokenPairs.of(pairs[i] for i in ids.tolist())


def _read(name, work, folder, data, tokenizer):
  """All token pairs of a file."""
  if name == "c":
    train = str(data / "prefs/llamafactory_dpo_en_demo.json")
  else:
    source, build = {
      "e": ("arc/ARC-Challenge-train.jsonl", multiple_choice.build_arc_pairs),
    }.get(name, ("gsm8k/train.jsonl", maths.build_pairs))
    built = build(
      jsonl.read(str(data / source)),
      num_shots=work.num_shots,
      seed=0,
      unusable="skip",
    )
    train = str(folder / f"{name}.jsonl")
    pathlib.Path(train).write_text(jsonl.dumps(built.pairs))
  config = dataset.DataConfig(
    train=train,
    tokenizer=tokenizer,
    max_pairs=_POOL,
    chat_template="chatml" if name == "c" else None,
  )
  loaded = dataset.load(config, is_sft=False, row_length=work.row_length)
  return loaded.train
