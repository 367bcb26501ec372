"""Tells what a set of preference pairs is like, before anything is trained.

  python -m dpop_jax.cli.inspect_pairs --data=pairs.jsonl \\
      --tokenizer=FOLDER --out=DIR

writes DIR/report.html and DIR/report.json and prints a summary: edit distance,
lengths, shared beginnings, packing, duplicates, contradictions, what was left
out. With --model=FOLDER (of Hugging Face, an import or a run's workdir) it also
tells, from one forward pass, which right tokens DPO would push down, and what
lambda turns that round. See docs/inspect_pairs.md.
"""

from absl import flags

from dpop_jax.cli import command, mesh_flag

_DATA = flags.DEFINE_list(
  "data", None, "Pairs: files, folders, patterns or hub names.", required=True
)
_EVAL_DATA = flags.DEFINE_list(
  "eval_data", None, "Held-out pairs to look for in them."
)
_TOKENIZER = flags.DEFINE_string(
  "tokenizer", None, "As data.tokenizer; the model's, if not given."
)
_OUT = flags.DEFINE_string("out", None, "Folder of the report.", required=True)
_MODEL = flags.DEFINE_string(
  "model", None, "Hugging Face folder, import or workdir of a model to ask."
)
_ROW_LENGTH = flags.DEFINE_integer(
  "row_length", 2048, "Tokens of a row, as batch.row_length."
)
_BATCH_SIZE = flags.DEFINE_integer(
  "batch_size", 32, "Pairs of an update, as batch.batch_size."
)
_GROUP_BY_PROMPT = flags.DEFINE_bool(
  "group_by_prompt", False, "As batch.group_by_prompt."
)
_MAX_LENGTH = flags.DEFINE_integer("max_length", None, "As data.max_length.")
_MAX_ANSWER_LENGTH = flags.DEFINE_integer(
  "max_answer_length", None, "As data.max_answer_length."
)
_ON_LONG_ANSWER = flags.DEFINE_enum(
  "on_long_answer", "drop", ["drop", "truncate", "raise"], "As in data."
)
_MAX_PAIRS = flags.DEFINE_integer(
  "max_pairs", None, "Only the first so many pairs."
)
_BOS_TOKEN = flags.DEFINE_string("bos_token", None, "As data.bos_token.")
_EOS_TOKEN = flags.DEFINE_string("eos_token", None, "As data.eos_token.")
_CHAT_TEMPLATE = flags.DEFINE_string(
  "chat_template", None, "As data.chat_template."
)
_NUM_MODEL_PAIRS = flags.DEFINE_integer(
  "num_model_pairs", 512, "Pairs, drawn at random, that the model reads."
)
_NUM_WORST = flags.DEFINE_integer(
  "num_worst", 5, "Pairs of each kind that are shown with their text."
)
_DTYPE = flags.DEFINE_enum(
  "dtype", "float32", ["float32", "bfloat16"], "That the model is run in."
)
_IGNORE_OPTIONS = flags.DEFINE_list(
  "ignore_options",
  [],
  "Options of the model's config.json that are not known and may be ignored.",
)
_SEED = flags.DEFINE_integer(
  "seed", 0, "Of the order of pairs and the choice of those for the model."
)


def main() -> None:
  # Slow to import.
  from dpop_jax import model_folders, paths
  from dpop_jax.data import dataset, plan
  from dpop_jax.inspection import findings, page, tables

  # Before the work that it is the place for.
  paths.check_folder(paths.local(_OUT.value, "--out"), "--out")
  tokenizer = _TOKENIZER.value
  if tokenizer is None and _MODEL.value is not None:
    tokenizer = model_folders.tokenizer(_MODEL.value)
  if tokenizer is None:
    raise ValueError(
      "Give the tokenizer as --tokenizer: a Hugging Face folder, a "
      "tokenizer.json or a SentencePiece .model"
      + ("." if _MODEL.value is None else "; there is none with the model.")
    )
  data = dataset.DataConfig(
    train=tuple(_DATA.value),
    eval=None if _EVAL_DATA.value is None else tuple(_EVAL_DATA.value),
    tokenizer=tokenizer,
    bos_token=_BOS_TOKEN.value,
    eos_token=_EOS_TOKEN.value,
    chat_template=_CHAT_TEMPLATE.value,
    max_pairs=_MAX_PAIRS.value,
    max_length=_MAX_LENGTH.value,
    max_answer_length=_MAX_ANSWER_LENGTH.value,
    on_long_answer=_ON_LONG_ANSWER.value,
  )
  options = findings.Options(
    batch=plan.BatchConfig(
      batch_size=_BATCH_SIZE.value,
      row_length=_ROW_LENGTH.value,
      group_by_prompt=_GROUP_BY_PROMPT.value,
    ),
    seed=_SEED.value,
    num_model_pairs=_NUM_MODEL_PAIRS.value,
    num_worst=_NUM_WORST.value,
  )
  found = findings.gather(data, options, _load_model())
  written = page.write(found, _OUT.value)
  print(tables.summary(found.report))
  print(f"\nThe report is {written['report.html']}")


def _load_model():
  if _MODEL.value is None:
    return None
  from dpop_jax import sharding
  from dpop_jax.inspection import forward

  return forward.load(
    _MODEL.value,
    mesh=mesh_flag.config() or sharding.MeshConfig(),
    dtype=_DTYPE.value,
    ignored_options=_IGNORE_OPTIONS.value,
  )


if __name__ == "__main__":
  command.run(main)
