"""The steps of the large models are as they were, or the change is seen.

What the TPU compiler said of them is in plan_figures.json.
"""

import importlib.util
import json
import pathlib
import re
import shlex

import plan_figures
import pytest

FIGURES = plan_figures.read()
DOCS = pathlib.Path(__file__).parents[1] / "docs" / "tpu_pod.md"


@pytest.fixture(scope="module")
def docs():
  return DOCS.read_text()


def compiles_a_large_step(test):
  is_missing = importlib.util.find_spec("libtpu") is None
  reason = "needs the TPU compiler: make test-tpu"
  test = pytest.mark.skipif(is_missing, reason=reason)(test)
  return pytest.mark.tpu(pytest.mark.slow(test))


@compiles_a_large_step
@pytest.mark.parametrize("name", FIGURES)
def test_a_large_step_is_as_it_was(name):
  kept = FIGURES[name]
  found = plan_figures.plan(kept["arguments"])
  assert not plan_figures.differences(kept, found), (
    f"If that is meant: python tests/plan_figures.py {name}"
  )


@compiles_a_large_step
def test_code_is_made_of_the_72b_step_and_changes_no_figure():
  kept = FIGURES["72b-v5p-4x4x4"]
  told = plan_figures.told(kept["arguments"])
  assert told["fits"] and told["num_chips"] == 64
  memory = told["hbm_bytes_per_chip"]
  assert 0 < memory["code"] < 0.2e9 and memory["needed"] < 45e9
  memory["needed"] -= memory.pop("code")
  found = plan_figures.figures(kept["arguments"], told)
  assert not plan_figures.differences(kept, found)


@pytest.mark.parametrize("name", FIGURES)
def test_every_collective_of_a_large_step_has_a_reason(name):
  assert FIGURES[name]["collectives"]
  for entry in FIGURES[name]["collectives"]:
    assert entry["purpose"], entry


def test_what_got_worse_is_told():
  kept = FIGURES["72b-v5p-4x4x4"]
  found = json.loads(json.dumps(kept))
  assert plan_figures.differences(kept, found) == []
  found["hbm_bytes_per_chip"]["temporaries"] *= 1.03
  found["sent_bytes_per_chip"]["all-to-all"] = 1e9
  found["collectives"][0]["purpose"] = None
  told = plan_figures.differences(kept, found)
  assert [text.split(" ")[0] for text in told] == [
    "hbm_bytes_per_chip.temporaries",
    "sent_bytes_per_chip.all-to-all",
    "New:",
    "No",
  ]


def test_the_docs_have_the_commands_and_what_they_said(docs):
  text = docs.replace("\\\n", " ")
  lines = re.findall(r"^\$P (.*)$", text, flags=re.MULTILINE)
  commands = [shlex.split(line) for line in lines]
  for kept in FIGURES.values():
    assert kept["arguments"] in commands, kept["arguments"]
    memory = kept["hbm_bytes_per_chip"]
    model, topology = (
      re.search(pattern, " ".join(kept["arguments"]))[1]
      for pattern in (r"smaug_(\d+b)", r"topology=(\S+)")
    )
    several = "--num_slices=2" in kept["arguments"]
    topology = f"2 x {topology}" if several else topology
    parts = ("parameters", "optimizer", "reference", "temporaries")
    row = (
      f"| {model.upper()} | {topology} | {memory['needed'] / 1e9:.2f} | "
      f"{memory['capacity'] / 1e9:.2f} | "
      + ", ".join(f"{memory[part] / 1e9:.2f}" for part in parts)
      + f" | {kept['host_bytes_per_chip'] / 1e9:.2f} | "
      f"{kept['least_step_seconds']:.2f} s "
    )
    assert row in docs, row
    if several:
      between = kept["between_slices"]
      seconds = between["least_seconds"], kept["least_step_seconds"]
      row = (
        f"| {model.upper()} | {topology} | "
        f"{between['bytes_per_chip'] / 1e9:.2f} | "
        f"{seconds[0]:.2f} s | {seconds[1]:.2f} s |"
      )
      assert row in docs, row


def test_the_docs_list_the_collectives_of_the_72b_step(docs):
  section = docs.split("\n## What the chips of the 72B step")[1]
  listed = re.findall(
    r"^\| ([\d.]+) \| ([\w-]+) \| ([\w, ]+) \| (.*) \|$",
    section,
    flags=re.MULTILINE,
  )
  expected = [
    (entry["kind"], ", ".join(entry["mesh_axes"]), entry["purpose"])
    for entry in FIGURES["72b-v5p-4x4x4"]["collectives"]
    if entry["megabytes"] >= 1.0
  ]
  assert [entry[1:] for entry in listed] == expected
