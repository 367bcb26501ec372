"""Continues prompts with the newest checkpoint of a run.

  python -m dpop_jax.cli.generate --workdir=DIR --prompt="2 + 2" \\
      --sampling.temperature=0.7 --seed=1

prints the text of the answer. With `--prompts=FILE.jsonl`, an object with a
`prompt` (text, or messages for the chat template) per line, it prints an object
with the `prompt` and its `answer` per line. Prompts are encoded as in training.
"""

import json

from absl import flags

from dpop_jax import processes
from dpop_jax.cli import command, finished_run
from dpop_jax.data import jsonl

_PROMPT = flags.DEFINE_string("prompt", None, "Text to continue.")
_PROMPTS = flags.DEFINE_string(
  "prompts", None, "A .jsonl or .jsonl.gz file of objects with a `prompt`."
)
_MAX_NEW_TOKENS = flags.DEFINE_integer(
  "sampling.max_new_tokens", 256, "Most tokens of an answer, its EOS included."
)
_TEMPERATURE = flags.DEFINE_float(
  "sampling.temperature",
  0.0,
  "Divides the logits; 0 takes the likeliest token.",
)
_TOP_K = flags.DEFINE_integer(
  "sampling.top_k", None, "Sample from this many of the likeliest tokens."
)
_TOP_P = flags.DEFINE_float(
  "sampling.top_p",
  None,
  "Sample from the likeliest tokens of this total probability.",
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the samples.")
_BATCH_SIZE = flags.DEFINE_integer(
  "batch_size", 64, "Most prompts that are run at once."
)


def main() -> None:
  # Slow to import.
  from dpop_jax import answers as answers_lib
  from dpop_jax import generate

  prompts = _read_prompts()
  sampling = generate.SamplingConfig(
    max_new_tokens=_MAX_NEW_TOKENS.value,
    temperature=_TEMPERATURE.value,
    top_k=_TOP_K.value,
    top_p=_TOP_P.value,
  )
  answers = answers_lib.generate_answers(
    finished_run.load_config(),
    finished_run.workdir(),
    prompts,
    sampling,
    seed=_SEED.value,
    batch_size=_BATCH_SIZE.value,
  )
  if not processes.is_first():
    return
  if _PROMPT.value is not None:
    print(answers[0])
    return
  for prompt, answer in zip(prompts, answers, strict=True):
    line = {"prompt": prompt, "answer": answer}
    print(json.dumps(line, ensure_ascii=False))


def _read_prompts():
  if (_PROMPT.value is None) == (_PROMPTS.value is None):
    raise ValueError("Give one of --prompt and --prompts.")
  if _PROMPT.value is not None:
    return [_PROMPT.value]
  rows = jsonl.read(_PROMPTS.value)
  for number, row in enumerate(rows, start=1):
    if not row.get("prompt"):
      raise ValueError(
        f"{_PROMPTS.value}, row {number}, should have a `prompt`; it has "
        f"{', '.join(row) or 'nothing'}."
      )
  return [row["prompt"] for row in rows]


if __name__ == "__main__":
  command.run(main, in_several_processes=True)
