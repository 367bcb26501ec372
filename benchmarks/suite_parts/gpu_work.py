"""What benchmarks/gpu.py trains, and how much computing that is."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from dpop_jax import config as config_lib
from dpop_jax import optim
from dpop_jax.data import dataset, plan
from dpop_jax.models import decoder
from dpop_jax.planning import flops

from . import runs
from . import work as work_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
  """A model, with random weights, and how it is trained on one GPU.

  Attributes:
    title: For the table.
    architecture: Of `transformers`, whose config has the sizes below.
    sizes: In `transformers`' names, which are those of `DecoderConfig`.
    optimizer: "adamw" or "adafactor".
    is_reference_cached: The reference is scored before training and freed.
    remat: `DecoderConfig.remat` of ours.
    peer_weights: The dtype of TRL's weights. Ours are float32, and multiplied
      in bfloat16.
    is_checkpointed: Whether TRL computes activations again.
  """

  title: str
  architecture: str
  sizes: dict[str, Any]
  optimizer: str = "adamw"
  is_reference_cached: bool = False
  remat: str = "none"
  peer_weights: str = "float32"
  is_checkpointed: bool = False

  @property
  def decoder(self) -> decoder.DecoderConfig:
    """Ours."""
    return decoder.DecoderConfig(
      **self.sizes,
      attention_bias=self.architecture == "Qwen2",
      dtype="bfloat16",
      remat=self.remat,
    )


SHAPES = {
  "0.5b": Shape(
    title="Qwen2.5-0.5B",
    architecture="Qwen2",
    sizes=dict(
      vocab_size=151_936,
      hidden_size=896,
      intermediate_size=4864,
      num_hidden_layers=24,
      num_attention_heads=14,
      num_key_value_heads=2,
      rope_theta=1_000_000.0,
      rms_norm_eps=1e-6,
      tie_word_embeddings=True,
    ),
  ),
  # With Adam, weights, moments and gradients in float32 are 120 GiB. Adafactor
  # leaves 60, and nothing beside them for a reference. TRL trains with
  # bfloat16 weights, as its examples do where float32 does not fit.
  "8b": Shape(
    title="Llama-3-8B",
    architecture="Llama",
    sizes=dict(
      vocab_size=128_256,
      hidden_size=4096,
      intermediate_size=14_336,
      num_hidden_layers=32,
      num_attention_heads=32,
      num_key_value_heads=8,
      rope_theta=500_000.0,
      rms_norm_eps=1e-5,
      tie_word_embeddings=False,
    ),
    optimizer="adafactor",
    is_reference_cached=True,
    remat="full",
    peer_weights="bfloat16",
    is_checkpointed=True,
  ),
  # Of no interest but that everything runs, on a CPU as well.
  "tiny": Shape(
    title="tiny",
    architecture="Qwen2",
    sizes=dict(
      vocab_size=512,
      hidden_size=32,
      intermediate_size=64,
      num_hidden_layers=2,
      num_attention_heads=4,
      num_key_value_heads=2,
      rope_theta=10_000.0,
      rms_norm_eps=1e-6,
      tie_word_embeddings=True,
    ),
  ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
  """What a shape is trained on.

  Attributes:
    source: A key of `work.WORK`, whose pairs these are.
    pairs: Of an update.
    updates: In all; the first WARM_UP_UPDATES are not measured.
    row_length: Tokens of our rows, at most.
    rows: Of ours that are computed at once. Where that is all of an update,
      gradients are not added up in a second copy.
    peer_pairs: That TRL computes at once, if memory is enough.
  """

  source: str
  pairs: int
  updates: int
  row_length: int
  rows: int
  peer_pairs: int

  @property
  def work(self) -> work_lib.Work:
    """As `work.make` wants it."""
    work = dataclasses.replace(
      work_lib.WORK[self.source],
      pairs=self.pairs,
      updates=self.updates - 1,
      row_length=self.row_length,
    )
    if self.source != "d":
      return work
    sizes = dataclasses.replace(work.model, vocab_size=_TINY_VOCABULARY)
    return dataclasses.replace(work, model=sizes)

  @property
  def batch(self) -> plan.BatchConfig:
    """Ours."""
    return plan.BatchConfig(
      batch_size=self.pairs,
      row_length=self.row_length,
      rows_per_microbatch=self.rows,
    )

  def plan(self, pairs: dataset.TokenPairs) -> plan.Plan:
    """The updates of ours, of pairs that come in their order."""
    return plan.Plan(
      pairs, self.batch, seed=0, num_steps=self.updates, is_shuffled=False
    )


WARM_UP_UPDATES = 2
_MEASURED = 6
_TINY_VOCABULARY = SHAPES["tiny"].sizes["vocab_size"]


def _load(source, pairs, row_length, rows, peer_pairs, measured=_MEASURED):
  return Load(
    source=source,
    pairs=pairs,
    updates=measured + WARM_UP_UPDATES,
    row_length=row_length,
    rows=rows,
    peer_pairs=peer_pairs,
  )


LOADS = {
  ("0.5b", "a"): _load("a", 32, 2048, rows=8, peer_pairs=16),
  ("0.5b", "c"): _load("c", 32, 4096, rows=2, peer_pairs=8),
  ("8b", "a"): _load("a", 8, 2048, rows=4, peer_pairs=8),
  ("8b", "c"): _load("c", 8, 4096, rows=4, peer_pairs=8),
  ("tiny", "d"): _load("d", 2, 512, rows=2, peer_pairs=1, measured=1),
}


def config(shape: Shape, load: Load) -> config_lib.Config:
  """Our run."""
  return config_lib.Config(
    model=shape.decoder,
    # Named because the config wants it; never opened.
    data=dataset.DataConfig(train="none", tokenizer="none"),
    batch=load.batch,
    loss=config_lib.LossConfig(name="dpo", beta=runs.BETA),
    optimizer=optim.OptimizerConfig(
      name=shape.optimizer, peak_learning_rate=runs.LEARNING_RATE
    ),
    reference=config_lib.ReferenceConfig(
      # Its log-probs come with the batch; nothing is kept on disk here.
      cache_dir="none" if shape.is_reference_cached else None
    ),
    run=config_lib.RunConfig(num_steps=load.updates),
  )


class Amounts(NamedTuple):
  """What the measured updates compute on, padding left out.

  Attributes:
    unique: Every distinct prefix of an update once, and every distinct edge
      that is scored.
    naive: Every sequence by itself, prompt and answer.
  """

  unique: flops.Work
  naive: flops.Work


def amounts(load: Load, pairs: dataset.TokenPairs) -> Amounts:
  """Of the updates of a load that are measured.

  Args:
    load: What is trained on.
    pairs: Its pairs, in their order.
  """
  the_plan = load.plan(pairs)
  steps = [the_plan.step(i) for i in range(WARM_UP_UPDATES, load.updates)]
  index = np.arange(the_plan.capacity.tokens)
  seen = [(step.batch.visible_until - index).sum() for step in steps]
  prompts, *answers = pairs.lengths().T[:, load.pairs * WARM_UP_UPDATES :]
  lengths = np.stack([prompts + answer for answer in answers])
  return Amounts(
    unique=flops.Work(
      positions=sum(step.num_tokens for step in steps),
      scores=int(sum(step.batch.num_scores.sum() for step in steps)),
      visible_pairs=int(sum(seen)),
    ),
    naive=flops.Work(
      positions=int(lengths.sum()),
      scores=int(np.stack(answers).sum()),
      visible_pairs=int((lengths * (lengths + 1) // 2).sum()),
    ),
  )


def model_flops(shape: Shape, work: flops.Work) -> int:
  """Operations that a model needs for a work: nothing that is done twice.

  Forward and backward of the policy, forward of the reference unless it was
  scored before.
  """
  model = shape.decoder
  reference = None if shape.is_reference_cached else model
  counted = flops.count(model, reference, work)
  return counted.total - counted.recomputation
