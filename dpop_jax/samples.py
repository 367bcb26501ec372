"""A model's answers to questions, in files that a later start goes on with.

  OUT/manifest.json                    what was asked, of whom, and how
  OUT/answers-00003-of-00008.jsonl     {"prompt", "expected", "answers": [...]}

Each file is there whole or not at all, and its samples depend on the seed and
its number alone, so that an interrupted run ends with the same bytes.
"""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import jax

import dpop_jax
from dpop_jax import answers, atomic_files, exchange, generate, paths, processes
from dpop_jax.data import jsonl, question_sets, sources


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplesConfig:
  """How often and with what seed each question is answered.

  Attributes:
    num_samples: Answers to each question.
    seed: Of the samples.
    batch_size: Most prompts that are run at once.
    questions_per_file: Questions that are answered between two files.
  """

  num_samples: int = 8
  seed: int = 0
  batch_size: int = 64
  questions_per_file: int = 256

  def __post_init__(self):
    for name in ("num_samples", "batch_size", "questions_per_file"):
      if getattr(self, name) < 1:
        raise ValueError(
          f"{name} must be at least 1, got {getattr(self, name)}."
        )


def sample(
  answerer: Callable[[], answers.Answerer],
  questions: question_sets.QuestionSet,
  sampling: generate.SamplingConfig,
  config: SamplesConfig,
  *,
  model: str,
  out: str,
  on_question: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
  """Answers what has no answers yet; called by all processes alike.

  Args:
    answerer: Reads the model; called only if there is something to do.
    questions: What to ask.
    sampling: How tokens are chosen.
    config: How often.
    model: Which model it is, for the manifest.
    out: The folder to write to.
    on_question: Called with the questions done, and all there are.

  Returns:
    The manifest.

  Raises:
    ValueError: There are answers of another kind in the folder, or several
      greedy answers are asked for.
  """
  if sampling.is_greedy and config.num_samples > 1:
    raise ValueError(
      f"num_samples={config.num_samples} answers would all be the same with "
      "sampling.temperature 0.0; set a positive temperature, or one sample."
    )
  manifest = {
    "model": model,
    **questions.description,
    "sampling": dataclasses.asdict(sampling),
    "samples": dataclasses.asdict(config),
    "dpop_jax_version": dpop_jax.__version__,
  }
  folder = paths.of(out)
  exchange.check_equal({"--out": str(paths.absolute(out)), **manifest})
  exchange.check_shared(paths.absolute(out).parent)
  is_new = not (folder / sources.MANIFEST).exists()
  if not is_new:
    _check_same(folder / sources.MANIFEST, manifest)
  if is_new and processes.is_first():
    text = json.dumps(manifest, indent=2) + "\n"
    atomic_files.write_text(folder / sources.MANIFEST, text)
  per_file, total = config.questions_per_file, len(questions.questions)
  num_files = -(-total // per_file)
  names = [f"answers-{i:05}-of-{num_files:05}.jsonl" for i in range(num_files)]
  is_done = [(folder / name).exists() for name in names]
  exchange.check_equal({"the answers that are there": is_done})
  answer = None if all(is_done) else answerer().answer
  for i, name in enumerate(names):
    first, end = i * per_file, min((i + 1) * per_file, total)
    if answer is not None and not is_done[i]:
      part = questions.questions[first:end]
      prompts = [q.prompt for q in part for _ in range(config.num_samples)]
      found = answer(
        prompts,
        sampling,
        key=jax.random.fold_in(jax.random.key(config.seed), i),
        batch_size=config.batch_size,
      )
      rows = [
        {
          "prompt": question.prompt,
          "expected": question.expected,
          "answers": found[
            k * config.num_samples : (k + 1) * config.num_samples
          ],
        }
        for k, question in enumerate(part)
      ]
      if processes.is_first():
        jsonl.write(folder / name, rows)
    on_question(end, total)
  return manifest


def _check_same(path, manifest):
  """Raises ValueError if other samples were begun in the same folder."""
  old = json.loads(path.read_text())
  new = json.loads(json.dumps(manifest))
  # The same questions may come from another file.
  new.pop("source", None)
  changed = [key for key in new if old.get(key) != new[key]]
  if changed:
    raise ValueError(
      f"{path.parent} holds answers that were sampled otherwise: "
      f"{', '.join(changed)} differ; name another folder, or repeat the same "
      "command to go on."
    )
