"""One process of several that act as one run. Not a test itself.

  python tests/multihost_worker.py FOLDER

does what FOLDER/actions.json says, a list of [action, {argument: value}], and
writes what came of each to FOLDER/N.json in process N.
"""

import json
import os
import pathlib
import signal
import sys
import threading
import time
from unittest import mock

import jax

from dpop_jax import (
  answers,
  config,
  evaluate,
  exchange,
  exports,
  generate,
  imports,
  inputs,
  processes,
  program,
  reference_cache,
  saved_config,
  sharding,
  train,
  training_log,
)
from dpop_jax.cli import command
from dpop_jax.data import dataset, plan


def run_training(sections, workdir, *, stops=None):
  """Trains; returns what was read, and of a complete run its end.

  Args:
    sections: The config.
    workdir: Of the run.
    stops: None, or (process, step, signal): the process sends itself the signal
      after so many steps; before SIGKILL it waits for a checkpoint.
  """
  reads = Reads()
  add = training_log.TrainingLog.add

  def add_and_stop(self, step, *rest):
    add(self, step, *rest)
    if stops and [jax.process_index(), step] == stops[:2]:
      first = pathlib.Path(workdir, "checkpoints", "3")
      while stops[2] == signal.SIGKILL and not first.exists():
        time.sleep(0.01)
      os.kill(os.getpid(), stops[2])

  with reads, mock.patch.object(training_log.TrainingLog, "add", add_and_stop):
    result = train.train(config.from_dict(sections), workdir)
  return {
    "step": result.step,
    "is_complete": result.is_complete,
    "eval_metrics": result.eval_metrics,
    "num_built": reads.num_built,
    "laid_out": reads.laid_out,
    "read": reads.read,
  }


class Reads:
  """Counts what a process tokenises, and which pairs it reads for the steps."""

  def __init__(self):
    self.num_built = 0
    self.laid_out: list[int] = []
    self.read: dict[int, list[int]] = {}
    self._step = threading.local()

  def __enter__(self):
    build, get = dataset._build, dataset.TokenPairs.__getitem__
    lay_out, make_step = plan.Plan._lay_out, plan.Plan.step

    def count_build(*arguments):
      self.num_built += 1
      return build(*arguments)

    def note_layout(the_plan, step, **options):
      if the_plan._is_shuffled:
        self.laid_out.append(step)
      return lay_out(the_plan, step, **options)

    def note_step(the_plan, step, rows):
      self._step.number = step if the_plan._is_shuffled else None
      planned = make_step(the_plan, step, rows)
      self._step.number = None
      return planned

    def note_read(pairs, index):
      if (step := getattr(self._step, "number", None)) is not None:
        self.read.setdefault(step, []).append(int(index))
      return get(pairs, index)

    self._patches = [
      mock.patch.object(dataset, "_build", count_build),
      mock.patch.object(plan.Plan, "_lay_out", note_layout),
      mock.patch.object(plan.Plan, "step", note_step),
      mock.patch.object(dataset.TokenPairs, "__getitem__", note_read),
    ]
    for patch in self._patches:
      patch.start()
    return self

  def __exit__(self, *_):
    for patch in self._patches:
      patch.stop()


def stop_scoring(sections, workdir, stops):
  """Trains, and terminates one process while the reference is scored.

  Args:
    sections: The config, with `reference.cache_dir`.
    workdir: Of the run.
    stops: (process, how many steps are scored before).
  """
  call, scored = reference_cache._Scorer.__call__, []

  def call_and_stop(scorer, its_plan, step):
    logps = call(scorer, its_plan, step)
    scored.append(step)
    if [jax.process_index(), len(scored)] == stops:
      os.kill(os.getpid(), signal.SIGTERM)
    if len(scored) >= stops[1]:
      time.sleep(1)  # JAX looks for signals once a second.
    return logps

  with mock.patch.object(reference_cache._Scorer, "__call__", call_and_stop):
    result = train.train(config.from_dict(sections), workdir)
  return {
    "step": result.step,
    "is_complete": result.is_complete,
    "num_scored": len(scored),
  }


def use_run(workdir, prompts):
  """Metrics and answers of a run."""
  its_config = saved_config.load(workdir)
  return {
    "metrics": evaluate.evaluate_run(its_config, workdir),
    "answers": answers.generate_answers(
      its_config,
      workdir,
      prompts,
      generate.SamplingConfig(max_new_tokens=6, temperature=1.0),
      seed=3,
      batch_size=4,
    ),
  }


def export_and_import(workdir, exported, imported):
  """To Hugging Face and back."""
  mesh = sharding.MeshConfig()
  exports.export_hf(workdir, exported, mesh=mesh)
  imports.import_hf(exported, imported, mesh=mesh)


def keep_reference(sections, folder):
  """The reference's log-probs of four updates, twice; only one process keeps.

  Args:
    sections: The config.
    folder: Exists; each process has a folder of its own in it.
  """
  own = pathlib.Path(folder, str(jax.process_index()))
  sections = sections | {"reference": {"cache_dir": str(own)}}
  its_config = config.from_dict(sections)
  mesh = sharding.make_mesh(its_config.mesh)
  made = program.make_program(its_config, mesh, num_steps=4)
  data = inputs.load_data(its_config, str(own / "data"))
  reference = inputs.load_reference(its_config, mesh)
  found, scored = [], []
  score = reference_cache._score
  count = lambda scorer, to_score, is_stopped: (
    scored.append(len(to_score)) or score(scorer, to_score, is_stopped)
  )
  for _ in range(2):
    its_plan = plan.Plan(data.train, its_config.batch, seed=0, num_steps=4)
    with mock.patch.object(reference_cache, "_score", count):
      reference_cache.attach(its_config, made, reference, {"train": its_plan})
    found.append(
      [its_plan.step(step).batch.reference_logps.tolist() for step in range(4)]
    )
  parts = [path.name for path in own.glob("*/*.logps")]
  return {"logps": found, "scored": scored, "parts": parts}


def load_into_own_cache(sections, folder):
  """Loads the data where processes do not see each other's files."""
  own = pathlib.Path(folder, str(jax.process_index()))
  own.mkdir()
  os.chdir(own)
  with Reads() as reads:
    data = inputs.load_data(config.from_dict(sections), "workdir")
  return {"num_built": reads.num_built, **saved_config.digests(data)}


def train_in_own_workdir(sections):
  """Trains in what is another folder in each process."""
  train.train(config.from_dict(sections), "workdir")


def train_differently(sections, workdir):
  """Trains with another config in process 1."""
  if jax.process_index() == 1:
    sections["loss"]["beta"] = 0.1
  train.train(config.from_dict(sections), workdir)


def fail_first(text):
  """Something that goes wrong in process 0, before the others try it."""

  def fail():
    raise FileNotFoundError(text)

  exchange.after_first(fail)


def exchange_texts(texts):
  """Each process says its own, and each does a part of the work."""
  done = []

  def double(number):
    done.append(number)
    return [2 * number]

  return {
    "gathered": exchange.gather(texts[jax.process_index()]),
    "shared": exchange.share(double, range(5)),
    "done": done,
  }


ACTIONS = {
  function.__name__: function
  for function in (
    run_training,
    use_run,
    export_and_import,
    keep_reference,
    load_into_own_cache,
    stop_scoring,
    train_in_own_workdir,
    train_differently,
    fail_first,
    exchange_texts,
  )
}


def main():
  folder = pathlib.Path(sys.argv[0])
  if not processes.are_connected():
    # So that one process adds up as several do, with gloo.
    address = os.environ[processes.COORDINATOR]
    jax.distributed.initialize(address, num_processes=1, process_id=0)
  results = []
  for name, arguments in json.loads((folder / "actions.json").read_text()):
    may_fail = arguments.pop("may_fail", False)
    try:
      results.append(ACTIONS[name](**arguments))
    except (ValueError, OSError) as error:
      if not may_fail:
        raise
      results.append(str(error))
    path = folder / f"{jax.process_index()}.json"
    path.write_text(json.dumps(results))
  if isinstance(results[-1], dict) and not results[-1].get("is_complete", True):
    return 128 + signal.SIGTERM
  return 0


if __name__ == "__main__":
  sys.argv = sys.argv[1:]
  command.run(main, in_several_processes=True)
