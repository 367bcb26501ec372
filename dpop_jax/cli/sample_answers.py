"""Samples answers to questions whose answer is known, to be checked and paired.

  python -m dpop_jax.cli.sample_answers --model=MODEL_FOLDER --kind=maths \\
      --source=gsm8k/train.jsonl --out=runs/answers --num_samples=8
  python -m dpop_jax.cli.build_pairs --kind=sampled --checker=number \\
      --source=runs/answers --out=runs/pairs

The model is a Hugging Face folder (--model) or the newest checkpoint of a run
(--workdir). The same command goes on where it was interrupted.
"""

from absl import flags

from dpop_jax import processes, progress
from dpop_jax.cli import command, mesh_flag
from dpop_jax.data import question_sets

_MODEL = flags.DEFINE_string(
  "model", None, "A Hugging Face folder, or what import_hf wrote."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run, instead.")
_DTYPE = flags.DEFINE_enum(
  "dtype",
  None,
  ["float32", "bfloat16"],
  "Of the weights and the computation, with --model; float32.",
)
_KIND = flags.DEFINE_enum(
  "kind", None, list(question_sets.KINDS), "Layout of --source.", required=True
)
_SOURCE = flags.DEFINE_string(
  "source", None, "Questions with their answers, as for build_pairs.",
  required=True,
)  # fmt: skip
_OUT = flags.DEFINE_string("out", None, "Folder to write to.", required=True)
_NUM_QUESTIONS = flags.DEFINE_integer(
  "num_questions", None, "Most questions; all if not given."
)
_NUM_SHOTS = flags.DEFINE_integer(
  "num_shots", 0, "Solved examples in front of each question."
)
_SHOTS = flags.DEFINE_enum(
  "shots",
  "per_row",
  ["per_row", "fixed"],
  "Draw other shots for each row, or give all rows the same.",
)
_FORMAT = flags.DEFINE_enum(
  "format", "plain", ["plain", "chat"], "Prompts as text, or as messages."
)
_NUM_SAMPLES = flags.DEFINE_integer(
  "num_samples", 8, "Answers to each question."
)
_SEED = flags.DEFINE_integer("seed", 0, "Decides shots and samples.")
_BATCH_SIZE = flags.DEFINE_integer(
  "batch_size", 64, "Most prompts that are run at once."
)
_QUESTIONS_PER_FILE = flags.DEFINE_integer(
  "questions_per_file", 256, "Questions that are answered between two files."
)
_MAX_NEW_TOKENS = flags.DEFINE_integer(
  "sampling.max_new_tokens", 512, "Most tokens of an answer, its EOS included."
)
_TEMPERATURE = flags.DEFINE_float(
  "sampling.temperature", 1.0, "Divides the logits; 0 takes the likeliest."
)
_TOP_K = flags.DEFINE_integer(
  "sampling.top_k", None, "Sample from this many of the likeliest tokens."
)
_TOP_P = flags.DEFINE_float(
  "sampling.top_p",
  None,
  "Sample from the likeliest tokens of this total probability.",
)


def main() -> None:
  # Slow to import.
  from dpop_jax import generate, model_folders, samples

  if (_MODEL.value is None) == (_WORKDIR.value is None):
    raise ValueError("Give one of --model and --workdir.")
  if _WORKDIR.value is not None and _DTYPE.value is not None:
    raise ValueError("--dtype is for --model; a run has its own.")
  key = "--workdir" if _MODEL.value is None else "--model"
  # The newest checkpoint of a run may be another when the command is repeated.
  pinned = model_folders.pin(_MODEL.value or _WORKDIR.value, key=key)
  questions = question_sets.load(
    question_sets.QuestionConfig(
      kind=_KIND.value,
      source=_SOURCE.value,
      num_questions=_NUM_QUESTIONS.value,
      num_shots=_NUM_SHOTS.value,
      shots=_SHOTS.value,
      format=_FORMAT.value,
      seed=_SEED.value,
    )
  )
  total = len(questions.questions)
  with progress.Progress(
    "questions", num_steps=total, is_shown=processes.is_first()
  ) as bar:
    samples.sample(
      lambda: _read_model(pinned),
      questions,
      generate.SamplingConfig(
        max_new_tokens=_MAX_NEW_TOKENS.value,
        temperature=_TEMPERATURE.value,
        top_k=_TOP_K.value,
        top_p=_TOP_P.value,
      ),
      samples.SamplesConfig(
        num_samples=_NUM_SAMPLES.value,
        seed=_SEED.value,
        batch_size=_BATCH_SIZE.value,
        questions_per_file=_QUESTIONS_PER_FILE.value,
      ),
      model=pinned,
      out=_OUT.value,
      on_question=lambda done, total: bar.update(done),
    )
  if processes.is_first():
    answers = total * _NUM_SAMPLES.value
    print(f"{answers:,} answers to {total:,} questions in {_OUT.value}")


def _read_model(pinned):
  import dataclasses

  from dpop_jax import answers, saved_config

  if _MODEL.value is not None:
    config = answers.config_of(_MODEL.value, dtype=_DTYPE.value or "float32")
  else:
    config = saved_config.load(_WORKDIR.value)
  mesh = mesh_flag.config()
  if mesh is not None:
    config = dataclasses.replace(config, mesh=mesh)
  saved_config.check_started_alike(config)
  return answers.Answerer(config, pinned)


if __name__ == "__main__":
  command.run(main, in_several_processes=True)
