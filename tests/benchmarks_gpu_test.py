"""benchmarks/gpu.py: its accounting, and all of it once, tiny, on the CPU."""

import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from benchmarks.suite_parts import gpu_runs, gpu_table, gpu_work, runs
from dpop_jax import pairs as pairs_lib
from dpop_jax.data import dataset
from dpop_jax.models import decoder
from dpop_jax.planning import flops

ROOT = pathlib.Path(__file__).parent.parent
TINY = "tiny", "d"


def run(*flags):
  return subprocess.run(
    [sys.executable, "benchmarks/gpu.py", *flags],
    cwd=ROOT,
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
  )


def test_it_refuses_in_one_sentence_where_there_is_no_gpu(tmp_path):
  done = run(f"--out={tmp_path}")
  assert done.returncode
  assert "This needs a GPU, and JAX finds a device of the platform cpu" in (
    done.stdout + done.stderr
  )
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_everything_runs_tiny_on_a_cpu(tmp_path):
  done = run(f"--out={tmp_path}", "--smoke")
  assert not done.returncode, done.stderr
  results = json.loads((tmp_path / "gpu.json").read_text())
  assert not results["complaints"]
  ours, trl = results["reports"]
  assert (ours["library"], trl["library"]) == ("ours", "trl")
  assert "--trl_python" in trl["error"]
  assert ours["losses"][0] == pytest.approx(np.log(2), abs=1e-4)
  # Three updates of two pairs, each with two answers of 128 tokens.
  assert len(ours["losses"]) == 3
  assert ours["answer_tokens"] == 3 * 2 * 2 * 128
  # A pair is 384 distinct tokens, or two sequences of 256.
  assert ours["unique_tokens"] == pytest.approx(384 * ours["pairs"])
  assert ours["naive_tokens"] == pytest.approx(512 * ours["pairs"])
  assert ours["unique_mfu"] is None
  assert 0 < ours["unique_of_product"] < ours["naive_of_product"]
  assert ours["planned_bytes"] > 0
  # What is there is not measured again.
  report = tmp_path / "runs" / "tiny_d_ours" / "report.json"
  written = report.stat().st_mtime_ns
  text = (tmp_path / "gpu.md").read_text()
  assert run(f"--out={tmp_path}", "--smoke").returncode == 0
  assert report.stat().st_mtime_ns == written
  assert (tmp_path / "gpu.md").read_text() == text


def load(pairs, updates):
  return gpu_work.Load(
    source="d",
    pairs=pairs,
    updates=updates,
    row_length=32,
    rows=1,
    peer_pairs=1,
  )


def test_unique_and_naive_work_are_counted_of_the_measured_updates():
  # What warms up has other lengths, so that it would show.
  warm_up = pairs_lib.TokenPair(*(np.arange(3, dtype=np.int32),) * 3)
  # Prompt 1 2 3; answers 4 5 and 4 6 7: of 3 + 2 and 3 + 3 tokens six are
  # distinct, and three of the answers' five edges.
  pair = pairs_lib.TokenPair(
    *(np.array(ids, np.int32) for ids in ([1, 2, 3], [4, 5], [4, 6, 7]))
  )
  found = gpu_work.amounts(
    load(1, 3), dataset.TokenPairs.of([warm_up, warm_up, pair])
  )
  # 5 and 6 follow 1 2 3 4; 7 follows 6: each sees its ancestors and itself.
  visible = (1 + 2 + 3 + 4) + 5 + (5 + 6)
  assert found.unique == flops.Work(
    positions=7, scores=4, visible_pairs=visible
  )
  assert found.naive == flops.Work(
    positions=5 + 6, scores=2 + 3, visible_pairs=15 + 21
  )


def test_operations_are_those_that_the_model_needs():
  work = flops.Work(positions=100, scores=10, visible_pairs=1000)
  shape = gpu_work.SHAPES["tiny"]
  forward = flops.count(shape.decoder, None, work).forward
  # There, twice as much on the way back, and the reference there.
  assert gpu_work.model_flops(shape, work) == 4 * forward
  replace = functools.partial(gpu_work.dataclasses.replace, shape)
  cached = replace(is_reference_cached=True)
  assert gpu_work.model_flops(cached, work) == 3 * forward
  again = replace(remat="full")
  assert gpu_work.model_flops(again, work) == 4 * forward


@pytest.mark.parametrize(
  ("name", "parameters"),
  # As the models' cards have them: 0.49 and 8.03 billion.
  [("0.5b", 494_032_768), ("8b", 8_030_261_248)],
)
def test_shapes_are_those_of_the_models_they_are_named_after(name, parameters):
  params = jax.eval_shape(
    functools.partial(
      decoder.init_params, config=gpu_work.SHAPES[name].decoder
    ),
    jax.random.key(0),
  )
  assert sum(x.size for x in jax.tree.leaves(params)) == parameters


def test_mfu_is_over_the_published_rate_and_over_the_measured_product():
  shape = gpu_work.SHAPES["tiny"]
  works = gpu_work.Amounts(
    unique=flops.Work(positions=30, scores=6, visible_pairs=300),
    naive=flops.Work(positions=60, scores=8, visible_pairs=900),
  )
  found = gpu_table.figures(
    {"wall_seconds_per_pair": 0.25},
    shape,
    load(2, 5),
    works,
    peak=1e9,
    product=5e8,
  )
  # Three measured updates of two pairs, in 1.5 s.
  assert found.pairs == 4
  assert found.unique_tokens == pytest.approx(30 / 1.5)
  assert found.naive_tokens == pytest.approx(60 / 1.5)
  unique, naive = (gpu_work.model_flops(shape, work) / 1.5 for work in works)
  assert found.unique_mfu == pytest.approx(unique / 1e9)
  assert found.naive_mfu == pytest.approx(naive / 1e9)
  assert found.unique_of_product == pytest.approx(unique / 5e8)
  assert found.naive_of_product == pytest.approx(naive / 5e8)


@pytest.mark.parametrize(
  ("kind", "tera"),
  [
    ("NVIDIA H100 80GB HBM3", 989.4),
    ("NVIDIA H100 PCIe", 756),
    ("NVIDIA H200", 989.4),
    ("NVIDIA A100-SXM4-80GB", 312),
    ("Tesla T4", None),
  ],
)
def test_the_published_rate_of_a_card(kind, tera):
  peak = gpu_table.peak_of(kind)
  assert peak == (None if tera is None else tera * 1e12)


def test_tables_say_what_was_not_had():
  figures = gpu_table.Figures(*[1.5] * 5, None, None, 0.25, 0.5)
  reports = {
    (*TINY, "ours"): {"losses": [0.6931], "gpu_peak_bytes": 3 * 2**30},
    (*TINY, "trl"): {"error": "no | luck"},
  }
  text = gpu_table.markdown(
    {(*TINY, "ours"): figures}, reports, {TINY: "the title"}
  )
  head, _, ours, trl = text.splitlines()[2:6]
  assert "not known | not known | 25.0% (50.0%) | 3.0 | 0.6931" in ours
  assert "skipped: no / luck" in trl
  assert head.count("|") == ours.count("|") == trl.count("|")


def test_trl_gets_half_where_memory_is_not_enough(tmp_path, monkeypatch):
  asked = []

  def execute(order, **_):
    asked.append(order.peer_pairs)
    if order.peer_pairs > 4:
      return {"error": "ended with 1: CUDA out of memory."}
    return {"losses": [0.7]}

  monkeypatch.setattr(runs, "execute", execute)
  train = functools.partial(
    gpu_runs.run,
    ("0.5b", "a"),
    python=sys.executable,
    pairs_file=tmp_path / "a.npz",
    folder=tmp_path,
    is_smoke=True,
  )
  assert train(library="trl") == {"losses": [0.7]}
  assert asked == [16, 8, 4]
  # Ours is planned for the card and has nothing to try.
  assert "out of memory" in train(library="ours")["error"]
  assert asked == [16, 8, 4, 16]
