"""Commands as a shell sees them: exit codes, one sentence, no debris."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import tiny_runs

from dpop_jax import config as config_lib

ROOT = pathlib.Path(__file__).parent.parent
ONE_DEVICE = dict(mesh__data=1, mesh__fsdp=1, mesh__tensor=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return tiny_runs.write_data(tmp_path_factory.mktemp("data"))


def start(command, *arguments):
  return subprocess.Popen(
    [sys.executable, "-m", f"dpop_jax.cli.{command}", *map(str, arguments)],
    cwd=ROOT,
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def run(command, *arguments):
  process = start(command, *arguments)
  stdout, stderr = process.communicate()
  return subprocess.CompletedProcess(
    process.args, process.returncode, stdout, stderr
  )


def write_config(path, sections):
  path.write_text(
    "from dpop_jax import config\n"
    f"def get_config():\n  return config.config_dict(**{sections!r})\n"
  )
  return path


def assert_one_sentence(done, message):
  assert done.returncode == 1
  assert done.stdout == ""
  assert done.stderr.startswith("Error: ")
  assert done.stderr.count("\n") == 1
  assert message in done.stderr


BAD_ROW = {"prompt": "a", "chosen": "c", "rejected": "c"}


@pytest.mark.parametrize(
  ("changes", "arguments", "message"),
  [
    ({}, ["--config.loss.betta=0.1"], "Unknown config key loss.betta. Did you"),
    (
      {},
      ["--config.los.beta=0.1"],
      "Unknown config key los.beta. Did you mean",
    ),
    ({"loss__betta": 0.1}, [], "Unknown config key loss.betta; did you mean"),
    ({}, ["--config.loss.beta=high"], "loss.beta"),
    ({}, ["--config.loss.delta=1"], "loss.delta is 1.0, but loss.name='dpop'"),
    ({"data__train": "no.jsonl"}, [], "data.train: There is no file"),
    ({"data__tokenizer": "nowhere"}, [], "data.tokenizer should be a Hugging"),
    (
      {"data__eos_token": None},
      [],
      "does not say which token ends a sequence; set data.eos_token",
    ),
    (
      {"data__train": [tiny_runs.PAIRS[0], BAD_ROW], "data__num_eval_pairs": 0},
      ["--config.data.on_bad_row=raise"],
      "bad.jsonl row 2: identical answers: `chosen` and `rejected` are the",
    ),
    ({"mesh__fsdp": 3}, [], "mesh.tensor = (1, 3, 1) do not divide the 1 dev"),
    ({"run__init_from": "nowhere"}, [], "run.init_from='nowhere'"),
  ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing_half_written(
  data, tmp_path, changes, arguments, message
):
  sections = tiny_runs.make_sections(data, **ONE_DEVICE | changes)
  if isinstance(sections["data"]["train"], list):
    rows = sections["data"]["train"]
    sections["data"]["train"] = tiny_runs.write_rows(
      tmp_path / "bad.jsonl", rows
    )
  config = write_config(tmp_path / "tiny.py", sections)
  workdir = tmp_path / "run"
  done = run("train", f"--config={config}", f"--workdir={workdir}", *arguments)
  assert_one_sentence(done, message)
  left = [p.name for p in workdir.glob("*")] if workdir.exists() else []
  assert set(left) <= {"tokens"}
  assert list(workdir.glob("tokens/*/*")) == []


def test_a_config_file_that_is_missing_is_named(tmp_path):
  done = run("train", "--config=missing.py", f"--workdir={tmp_path}/run")
  assert_one_sentence(done, "There is no config file 'missing.py'.")
  done = run("train", f"--workdir={tmp_path}/run")
  assert_one_sentence(done, "--config")
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("size", ["0", "inf"])
def test_files_of_weights_have_a_size(tmp_path, size):
  arguments = (f"--workdir={tmp_path}", f"--out={tmp_path}/out")
  done = run("export_hf", *arguments, f"--max_file_gb={size}")
  assert_one_sentence(done, "--max_file_gb must be positive and finite, got")
  assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def stopped_run(data, tmp_path_factory):
  """A run that is sent SIGTERM: its process, workdir, and arguments."""
  folder = tmp_path_factory.mktemp("stopped")
  sections = tiny_runs.make_sections(
    data,
    **ONE_DEVICE,
    run__num_steps=3000,
    run__eval_every_steps=None,
    checkpoints__save_every_steps=None,
  )
  config = write_config(folder / "tiny.py", sections)
  arguments = [f"--config={config}", f"--workdir={folder}/run"]
  arguments += [f"--config.run.compilation_cache_dir={folder}/compiled"]
  process = start("train", *arguments)
  metrics = folder / "run" / "metrics.jsonl"
  while process.poll() is None:
    if metrics.exists() and '"train"' in metrics.read_text():
      process.send_signal(signal.SIGTERM)
      break
    time.sleep(0.02)
  stdout, stderr = process.communicate()
  done = subprocess.CompletedProcess(
    process.args, process.returncode, stdout, stderr
  )
  return done, folder / "run", arguments


def test_on_sigterm_a_command_saves_and_exits_with_143(stopped_run):
  done, workdir, arguments = stopped_run
  assert done.returncode == 143, done.stderr
  (folder,) = (workdir / "checkpoints").iterdir()
  step = int(folder.name)
  assert 2 <= step < 3000
  assert f"Asked to stop: saved step {step}. Run again to cont" in done.stderr
  assert "Traceback" not in done.stderr

  more = run("train", *arguments, f"--config.run.num_steps={step + 2}")
  assert more.returncode == 0, more.stderr
  assert f"Continuing from step {step}." in more.stderr
  assert "loss  " in more.stdout
  steps = sorted(int(p.name) for p in (workdir / "checkpoints").iterdir())
  assert steps == [step, step + 2]

  other = run("train", *arguments, "--config.loss.beta=0.7")
  assert_one_sentence(other, "undo: loss.beta: 0.3 -> 0.7.")


def test_evaluate_prints_a_table_and_json(stopped_run, data, tmp_path):
  _, workdir, _ = stopped_run
  done = run("evaluate", f"--workdir={workdir}", "--json")
  assert done.returncode == 0, done.stderr
  *table, last = done.stdout.splitlines()
  metrics = json.loads(last)
  assert len(table) == len(metrics)
  shown = dict(line.split() for line in table)
  assert float(shown["loss"]) == pytest.approx(metrics["loss"], rel=1e-5)
  assert metrics["rewards/chosen"] == pytest.approx(
    0.3 * metrics["logratios/chosen"], rel=1e-5
  )
  # The answer is 2 tokens and EOS.
  assert metrics["num_tokens/chosen"] == 3.0

  rows = [{"prompt": "ab", "chosen": "cdef", "rejected": "cd"}]
  other = tiny_runs.write_rows(tmp_path / "other.jsonl", rows)
  done = run("evaluate", f"--workdir={workdir}", f"--data={other}", "--json")
  assert json.loads(done.stdout.splitlines()[-1])["num_tokens/chosen"] == 5.0


def test_generate_prints_text(stopped_run, tmp_path):
  _, workdir, _ = stopped_run
  flags = [f"--workdir={workdir}", "--sampling.max_new_tokens=5"]
  done = run("generate", *flags, "--prompt=ab")
  assert done.returncode == 0, done.stderr
  (answer,) = done.stdout.splitlines()
  assert len(answer) <= 5 and "$" not in answer
  prompts = tiny_runs.write_rows(
    tmp_path / "prompts.jsonl", [{"prompt": "ba"}, {"prompt": "ab"}]
  )
  done = run("generate", *flags, f"--prompts={prompts}")
  rows = [json.loads(line) for line in done.stdout.splitlines()]
  assert [row["prompt"] for row in rows] == ["ba", "ab"]
  assert rows[1]["answer"] == answer


@pytest.mark.parametrize(
  ("command", "arguments", "message"),
  [
    ("evaluate", [], "There is no run in"),
    ("generate", ["--prompt=a"], "There is no run in"),
    ("generate", [], "Give one of --prompt and --prompts."),
    ("generate", ["--prompts=no.jsonl"], "There is no file no.jsonl."),
    (
      "generate",
      ["--prompt=a", "--sampling.top_k=3"],
      "nothing is sampled with sampling.temperature 0.0",
    ),
  ],
)
def test_mistakes_with_finished_runs_are_one_sentence(
  tmp_path, command, arguments, message
):
  done = run(command, f"--workdir={tmp_path}", *arguments)
  assert_one_sentence(done, message)


def test_a_mesh_for_a_finished_run_is_given_on_the_command_line(stopped_run):
  _, workdir, _ = stopped_run
  for mesh, message in (
    ("1,2,1", "(1, 2, 1) do not divide the 1 devices"),
    ("1,2", "--mesh must be three whole numbers, such as 1,-1,1; got '1,2'."),
  ):
    done = run("evaluate", f"--workdir={workdir}", f"--mesh={mesh}")
    assert_one_sentence(done, message)


def test_the_saved_config_is_read_back(stopped_run):
  _, workdir, _ = stopped_run
  saved = json.loads((workdir / "config.json").read_text())
  assert config_lib.to_dict(config_lib.from_dict(saved))["loss"]["beta"] == 0.3
