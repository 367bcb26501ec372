"""Commands that pages show can be given: their files, flags and verbs exist."""

import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import textwrap

import launch_place
import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = ["README.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
# Parses each of some commands as it would itself, and goes no further.
PARSE = """
  import json, runpy, sys
  from absl import flags
  from dpop_jax import cli
  from dpop_jax.cli import command

  def check(module, *arguments):
    # Where flags of configs look for what they override.
    sys.argv = [module, *arguments]
    def run(main, **options):
      rest = flags.FLAGS(sys.argv)
      assert len(rest) == 1, f"{rest[1:]} are no flags"
      command.check_config_file(sys.argv)
    kept, command.run = set(flags.FLAGS), run
    try:
      runpy.run_module(module, run_name="__main__")
    except (Exception, SystemExit) as error:
      return f"{type(error).__name__}: {str(error)[:300]}"
    finally:
      for name in set(flags.FLAGS) - kept:
        delattr(flags.FLAGS, name)
      # Its flags belong to modules, which have to be imported again.
      for name in set(vars(cli)) - {"command"}:
        if sys.modules.pop(f"{cli.__name__}.{name}", None):
          delattr(cli, name)

  print(json.dumps([check(*words) for words in json.load(sys.stdin)]))
"""


def commands(page):
  """The command lines of a page's shell blocks and sentences."""
  text = (ROOT / page).read_text()
  blocks = re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
  lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
  variables, found = {}, []
  for line in lines:
    assigned = re.fullmatch(r"(\w+)=(\"[^\"]*\"|\S+)", line)
    if assigned:
      variables[assigned[1]] = assigned[2].strip('"')
      continue
    for name, value in variables.items():
      line = re.sub(rf"\${name}\b", lambda _, value=value: value, line)
    for command in line.split("&&"):
      if words := shlex.split(command, comments=True):
        found.append(words)
  # Names of commands, without flags, are none.
  inline = re.findall(
    r"`((?:python -m dpop_jax[\w.]+|launch/tpu.sh) [^`]+)`", text
  )
  return found + [words for command in inline if (words := command.split())]


def of_ours(words):
  """The module and the flags behind `python -m`; None for others."""
  if words[:2] != ["python", "-m"] or not words[2].startswith("dpop_jax."):
    return None
  any_config = "--config=configs/demo.py"
  return [
    word.replace("--config=configs/X.py", any_config)
    for word in words[2:]
    if word != "..."
  ]


def errors(asked):
  done = subprocess.run(
    [sys.executable, "-c", textwrap.dedent(PARSE)],
    cwd=ROOT,
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
    input=json.dumps(asked),
    capture_output=True,
    text=True,
    check=True,
  )
  return json.loads(done.stdout.splitlines()[-1])


def test_the_flags_and_configs_of_commands_exist():
  asked = [words for page in PAGES for words in map(of_ours, commands(page))]
  # Without those of loops in the shell.
  asked = [words for words in asked if words and "$" not in " ".join(words)]
  assert len(asked) > 20
  plan = ["dpop_jax.cli.plan", "--topology=v5e:4x4"]
  config = "--config=configs/smaug_7b.py"
  wrong = {
    "serach": [*plan, config, "--serach"],
    "SystemExit": [*plan, "--config=configs/smaug_8b.py"],
    "fdsp": [*plan, config, "--config.mesh.fdsp=2"],
    "no flags": [*plan, config, "stray"],
    "topology": ["dpop_jax.cli.plan", config],
    "cli.plot": ["dpop_jax.cli.plot"],
  }
  found = errors(asked + list(wrong.values()))
  for words, error in zip(asked, found, strict=False):
    assert error is None, (words, error)
  for sign, error in zip(wrong, found[len(asked) :], strict=True):
    assert error and sign in error, (sign, error)


def test_every_command_of_a_week_with_a_pod_is_of_a_kind_that_is_tested(
  tmp_path,
):
  place = launch_place.Place(tmp_path)
  settings = tmp_path / "settings.env"
  settings.write_text(
    (ROOT / "launch" / "settings.example.env").read_text()
    + "POLL_SECONDS=1\nCOMMAND=(true)\n"
  )
  place.succeed("create")
  seen = set()
  for words in commands("docs/tpu_pod.md"):
    match words:
      case ["python", "-m", module, *_] if of_ours(words):
        seen.add(module)
      case ["launch/tpu.sh", verb, "run.env", *flags]:
        assert set(flags) <= {"--dry-run", "--yes"}
        assert "gcloud compute tpus" in place.succeed(verb, "--dry-run").stdout
        seen.add(verb)
      case ["cp", "launch/settings.example.env", "run.env"]:
        pass
      case [".venv/bin/pip", "install", "-c", "constraints.txt", "-e", what]:
        extras = re.fullmatch(r"\.\[(.*)\]", what)[1].split(",")
        setup = (ROOT / "setup.py").read_text()
        assert all(f'"{extra}": [' in setup for extra in extras)
      case ["gcloud", "storage", *_] | ["tensorboard", _]:
        pass  # Google's.
      case _:
        pytest.fail(f"No test covers {shlex.join(words)}.")
  assert seen >= {"create", "watch", "follow", "stop", "delete"}
  assert seen >= {
    f"dpop_jax.cli.{verb}"
    for verb in (
      *("plan", "build_pairs", "import_hf", "train", "evaluate"),
      *("generate", "export_hf"),
    )
  }
