"""The `data` section: which rows, which tokenizer, and how long."""

import dataclasses
import math

from dpop_jax.data import tokenization


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """The `data` section: which rows, which tokenizer, and how long.

  Attributes:
    train: Files, folders, patterns, or hub names `hub:owner/name:split`.
    weights: How often the pairs of each entry of `train` come in an epoch, such
      as (1.0, 4.0, 0.5); None for once each.
    eval: As `train`, for held-out pairs; None to take them from `train`, or
      none.
    num_eval_pairs: Pairs to hold out of `train`. Pairs of one prompt stay
      together, so there may be a few less.
    holdout_seed: Decides which, and which part of an entry of `train` a weight
      with a fraction takes.
    max_pairs: Use only the first so many pairs of `train`; None for all.
    tokenizer: A Hugging Face folder, a tokenizer.json, or a SentencePiece
      .model.
    bos_token: Text of the token that begins a sequence, if not the tokenizer's.
    eos_token: Text of the token that ends a sequence, if not the tokenizer's.
    add_bos: Whether prompts begin with BOS; None to do as the tokenizer does.
    chat_template: Jinja template, path of one, or "chatml", if not the
      tokenizer's.
    supervised_turns: Of a conversation in supervised data, score the "last"
      turn of the assistant, or "all" of them: one example for each, whose
      prompt is what goes before it. Those that meet in an update share a prefix
      tree, which then holds the conversation about once.
    max_length: Tokens of prompt and longer answer; None: only the row limits
      them.
    max_answer_length: Tokens of an answer with its EOS; None for no such limit.
    on_bad_row: "skip" (counted and reported) or "raise".
    on_long_answer: "drop" the pair (counted and reported), "truncate" the
      answer (which then has no EOS), or "raise".
    cache_dir: Where tokenised data is kept for the next start; None to not keep
      it. Of a folder in a bucket, a copy on this machine is used.
  """

  train: str | tuple[str, ...]
  tokenizer: str
  weights: tuple[float, ...] | None = None
  eval: str | tuple[str, ...] | None = None
  num_eval_pairs: int = 0
  holdout_seed: int = 0
  max_pairs: int | None = None
  bos_token: str | None = None
  eos_token: str | None = None
  add_bos: bool | None = None
  chat_template: str | None = None
  supervised_turns: str = "last"
  max_length: int | None = None
  max_answer_length: int | None = None
  on_bad_row: str = "skip"
  on_long_answer: str = tokenization.DROP
  cache_dir: str | None = None

  def __post_init__(self):
    for name in ("train", "tokenizer"):
      if not getattr(self, name):
        raise ValueError(f"data.{name} must name a file, got nothing.")
    self._check_weights()
    for name in ("num_eval_pairs", "holdout_seed"):
      if getattr(self, name) < 0:
        raise ValueError(
          f"data.{name} must not be negative, got {getattr(self, name)}."
        )
    if self.eval is not None and self.num_eval_pairs:
      raise ValueError(
        "data.num_eval_pairs holds pairs out of data.train, which is of no use "
        "with data.eval; set one of them."
      )
    for name, least in (
      ("max_pairs", 1),
      ("max_length", 2),
      ("max_answer_length", 1),
    ):
      value = getattr(self, name)
      if value is not None and value < least:
        raise ValueError(
          f"data.{name} must be at least {least}, or None, got {value}."
        )
    for name, choices in (
      ("supervised_turns", ("last", "all")),
      ("on_bad_row", ("skip", "raise")),
      ("on_long_answer", ("drop", "truncate", "raise")),
    ):
      if getattr(self, name) not in choices:
        raise ValueError(
          f"data.{name} must be one of {', '.join(choices)}, got "
          f"{getattr(self, name)!r}."
        )

  def _check_weights(self):
    if self.weights is None:
      return
    num_sources = 1 if isinstance(self.train, str) else len(self.train)
    if len(self.weights) != num_sources:
      raise ValueError(
        f"data.weights has {len(self.weights)} entries, but data.train has "
        f"{num_sources}; give one weight for each."
      )
    if not all(0 < weight < math.inf for weight in self.weights):
      raise ValueError(
        "data.weights must be positive; leave out of data.train what should "
        f"not be trained on. Got {self.weights}."
      )
    if self.max_pairs is not None:
      raise ValueError(
        "data.max_pairs takes the first pairs of data.train, which is of no "
        "use with data.weights; set one of them."
      )
