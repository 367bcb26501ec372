"""Token pairs in memory or on disk, and how the `data` section makes them."""

import array
import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from etils import epath

from dpop_jax import pairs
from dpop_jax.data import (
  chat_templates,
  ingest,
  kept_folders,
  mixtures,
  sources,
  tokenization,
  tokenizers,
)
from dpop_jax.data.data_config import DataConfig

_REPORT = "report.json"


class TokenPairs:
  """Pairs of one data set, one behind the other in two arrays.

  Attributes:
    tokens: int32 [total].
    offsets: int64 [num_pairs, 4]; where in `tokens` the prompt, the chosen and
      the rejected answer of a pair start, and where the pair ends.
  """

  def __init__(self, tokens: np.ndarray, offsets: np.ndarray):
    # Slicing a plain view of a memory map is many times faster than the map.
    self.tokens = tokens.view(np.ndarray)
    self.offsets = offsets.view(np.ndarray)

  @classmethod
  def of(cls, token_pairs: Iterable[pairs.TokenPair]) -> "TokenPairs":
    """Gathers pairs."""
    tokens, offsets = array.array("i"), array.array("q")
    for pair in token_pairs:
      for ids in pair:
        offsets.append(len(tokens))
        tokens.frombytes(np.asarray(ids, np.int32).tobytes())
      offsets.append(len(tokens))
    return cls(
      np.array(tokens, np.int32), np.array(offsets, np.int64).reshape(-1, 4)
    )

  @classmethod
  def open(cls, folder: pathlib.Path) -> "TokenPairs":
    """Maps what `save` wrote into memory."""
    return cls(
      *(
        np.load(folder / f"{name}.npy", mmap_mode="r")
        for name in ("tokens", "offsets")
      )
    )

  def save(self, folder: pathlib.Path) -> None:
    """Writes two .npy files."""
    folder.mkdir(parents=True)
    np.save(folder / "tokens.npy", self.tokens)
    np.save(folder / "offsets.npy", self.offsets)

  def __len__(self) -> int:
    return len(self.offsets)

  def __getitem__(self, index: int | np.integer) -> pairs.TokenPair:
    prompt, chosen, rejected, end = self.offsets[index].tolist()
    return pairs.TokenPair(
      self.tokens[prompt:chosen],
      self.tokens[chosen:rejected],
      self.tokens[rejected:end],
    )

  def __iter__(self) -> Iterator[pairs.TokenPair]:
    return (self[i] for i in range(len(self)))

  def only(self, ids: np.ndarray) -> "TokenPairs":
    """Some of the pairs, in this order, in arrays of their own."""
    return TokenPairs.of(self[i] for i in ids)

  def digest(self) -> str:
    """A hash of all ids and where they belong: equal for equal data sets."""
    digest = hashlib.sha256()
    for array_ in (self.offsets, self.tokens):
      digest.update(np.ascontiguousarray(array_).data)
    return digest.hexdigest()

  def lengths(self, ids: np.ndarray | None = None) -> np.ndarray:
    """Tokens of prompt, chosen and rejected: int64 [pairs, 3].

    Args:
      ids: Which pairs; all if not given.
    """
    return np.diff(self.offsets if ids is None else self.offsets[ids], axis=1)


class Loaded(NamedTuple):
  """What a run needs of its data.

  Attributes:
    train: Pairs to train on.
    eval: Held-out pairs, or None.
    report: What was read, skipped and cut; plain numbers and text for JSON.
      Keys: `train` and `eval` (see `ingest.Ingestion.summary`; also
      `num_pairs`, `num_tokens`, and mean and max `tokens`), `tokenizer` (name,
      vocab_size, bos_id, eos_id), `is_cached`, and `file`, where the report
      is kept (if it is).
  """

  train: TokenPairs
  eval: TokenPairs | None
  report: dict[str, Any]


def load(config: DataConfig, *, is_sft: bool, row_length: int) -> Loaded:
  """Reads, tokenises and holds out, or opens what an earlier run left on disk.

  Args:
    config: The `data` section.
    is_sft: Whether there is one answer per row.
    row_length: Tokens of a packed row, into which each pair has to fit.

  Raises:
    FileNotFoundError: If a file or the tokenizer is missing.
    ValueError: If a file cannot be read, the tokenizer has no EOS, no usable
      row is left, or a row is refused under "raise".
  """
  if row_length < 2:
    raise ValueError(f"A row must hold at least 2 tokens, got {row_length}.")
  if config.supervised_turns != "last" and not is_sft:
    raise ValueError(
      f"data.supervised_turns = {config.supervised_turns!r} is for supervised "
      "data; pairs are scored in their last turn, so leave it out."
    )
  paths = {"train": _resolve("train", config.train)}
  if config.eval is not None:
    paths["eval"] = _resolve("eval", config.eval)
  build = lambda: _build(config, paths, is_sft, row_length)
  if config.cache_dir is None:
    return _log(build())
  # What an unpinned name means may change from one day to the next.
  if any(
    path.startswith(sources.HUB_PREFIX)
    and not sources.parse_hub_name(path).is_pinned
    for path in itertools.chain(*paths.values())
  ):
    logging.info(
      "Tokenised data is not kept: a hub name without @ and the 40 digits of a "
      "commit may mean other rows tomorrow."
    )
    return _log(build())
  key = _key(config, paths, is_sft, row_length)
  return _log(_load_or_build(epath.Path(config.cache_dir) / key, build))


def _resolve(name, paths):
  try:
    return sources.resolve(paths)
  except (FileNotFoundError, ValueError) as error:
    raise type(error)(f"data.{name}: {error}") from error


def _key(config, paths, is_sft, row_length):
  """Of everything that the tokens depend on; other content, other key."""
  parts = dataclasses.asdict(config) | {
    "version": tokenization.VERSION,
    "packages": {
      name: importlib.metadata.version(name)
      for name in ("datasets", "sentencepiece", "tokenizers", "transformers")
    },
    "is_sft": is_sft,
    "row_length": row_length,
    "chat_template": chat_templates.read(config.chat_template),
    "tokenizer_files": [
      (file.name, kept_folders.digest(file))
      for file in tokenizers.files(config.tokenizer)
    ],
    "rows": {
      name: [
        (
          path,
          ""
          if path.startswith(sources.HUB_PREFIX)
          else kept_folders.version(path),
        )
        for path in names
      ]
      for name, names in paths.items()
    },
  }
  del parts["cache_dir"]
  return kept_folders.key_of(parts)


def _load_or_build(entry, build):
  def write(draft):
    loaded = build()
    loaded.train.save(draft / "train")
    if loaded.eval is not None:
      loaded.eval.save(draft / "eval")
    (draft / _REPORT).write_text(json.dumps(loaded.report, indent=2))

  entry, is_cached = kept_folders.keep(entry, write)
  try:
    report = json.loads((entry / _REPORT).read_text())
    return Loaded(
      TokenPairs.open(entry / "train"),
      TokenPairs.open(entry / "eval") if report["eval"] else None,
      report | {"is_cached": is_cached, "file": str(entry / _REPORT)},
    )
  except (OSError, ValueError, KeyError) as error:
    raise ValueError(
      f"The tokenised data in {entry} is damaged ({error}); delete that folder "
      "to have it made again."
    ) from error


def _build(config, paths, is_sft, row_length):
  tokenizer = tokenizers.load(
    config.tokenizer,
    bos_token=config.bos_token,
    eos_token=config.eos_token,
    chat_template=config.chat_template,
  )
  limits = tokenization.Limits(
    row_length=row_length,
    max_length=config.max_length,
    max_answer_length=config.max_answer_length,
    on_long_answer=config.on_long_answer,
  )
  sets: dict[str, TokenPairs] = {}
  report: dict[str, Any] = {"train": None, "eval": None}
  for name, files in paths.items():
    ingestion = ingest.Ingestion(
      name=name,
      tokenizer=tokenizer,
      is_sft=is_sft,
      supervised_turns=config.supervised_turns,
      add_bos=config.add_bos,
      limits=limits,
      skips_bad_rows=config.on_bad_row == "skip",
      max_pairs=config.max_pairs if name == "train" else None,
    )
    counts: list[int] = []
    groups = _groups(config, files) if name == "train" else [files]
    sets[name] = TokenPairs.of(
      mixtures.read_each(ingestion.read, groups, counts)
    )
    report[name] = ingestion.summary() | {"files": list(files)}
    if name == "eval":
      continue
    keys = np.array(ingestion.prompt_keys)
    is_held_out = np.zeros(len(keys), bool)
    if config.num_eval_pairs:
      is_held_out = _choose_held_out(
        keys, config.num_eval_pairs, config.holdout_seed
      )
      sets["eval"] = sets["train"].only(np.flatnonzero(is_held_out))
      report["eval"] = {"held_out_of": "train"}
      sets["train"] = sets["train"].only(np.flatnonzero(~is_held_out))
    if config.weights is not None:
      drawn = mixtures.draw(
        np.repeat(np.arange(len(counts)), counts)[~is_held_out],
        keys[~is_held_out],
        config.weights,
        seed=config.holdout_seed,
      )
      # Repeats share their tokens.
      train = sets["train"]
      sets["train"] = TokenPairs(train.tokens, train.offsets[drawn.ids])
      report["train"]["mixture"] = _mixture(config, drawn)
  for name, token_pairs in sets.items():
    report[name] |= _statistics(token_pairs)
  report["tokenizer"] = {
    "name": tokenizer.name,
    "vocab_size": tokenizer.vocab_size,
    "bos_id": tokenizer.bos_id,
    "eos_id": tokenizer.eos_id,
  }
  return Loaded(sets["train"], sets.get("eval"), report | {"is_cached": False})


def _groups(config, files):
  """The files of each entry of `data.train` that has a weight of its own."""
  if config.weights is None:
    return [files]
  entries = (config.train,) if isinstance(config.train, str) else config.train
  return [sources.resolve(entry) for entry in entries]


def _mixture(config, drawn):
  entries = (config.train,) if isinstance(config.train, str) else config.train
  return [
    {"source": entry, "weight": weight, "num_pairs": own, "num_drawn": count}
    for entry, weight, (own, count) in zip(
      entries, config.weights, drawn.counts, strict=True
    )
  ]


def _choose_held_out(prompt_keys, num_pairs, seed):
  """Which pairs are held out; those of a prompt are on the same side."""
  _, groups, sizes = np.unique(
    prompt_keys, return_inverse=True, return_counts=True
  )
  is_held_out = np.zeros(len(sizes), bool)
  room = num_pairs
  for group in np.random.default_rng(seed).permutation(len(sizes)):
    if sizes[group] <= room:
      is_held_out[group] = True
      room -= sizes[group]
  if room == num_pairs or is_held_out.all():
    raise ValueError(
      f"data.num_eval_pairs = {num_pairs} leaves nothing to train on or "
      f"nothing to hold out: data.train has {len(prompt_keys)} pairs of "
      f"{len(sizes)} prompts, and pairs of one prompt stay together."
    )
  return is_held_out[groups]


def _statistics(token_pairs):
  lengths = token_pairs.lengths()
  return {
    "num_pairs": len(token_pairs),
    "num_tokens": int(lengths.sum()),
    "tokens": {
      name: {"mean": float(column.mean()), "max": int(column.max())}
      for name, column in zip(pairs.TokenPair._fields, lengths.T, strict=True)
    },
  }


def _log(loaded):
  """One line per set, and what was left out of it."""
  for name in ("train", "eval"):
    summary = loaded.report[name]
    if summary is None:
      continue
    logging.info(
      "data.%s: %d pairs, %d tokens%s%s.",
      name,
      summary["num_pairs"],
      summary["num_tokens"],
      ", as cached" if loaded.report["is_cached"] else "",
      "".join(
        f"; {part['num_drawn']} of the {part['num_pairs']} of {part['source']}"
        for part in summary.get("mixture", ())
      ),
    )
    left_out = summary.get("left_out")
    if left_out:
      where = loaded.report.get("file")
      rest = f" Every such row is named in {where}." if where else ""
      logging.warning("data.%s: %s%s", name, left_out, rest)
  return loaded
