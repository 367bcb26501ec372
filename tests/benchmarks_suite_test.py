"""The accounting of benchmarks/suite.py; nothing is trained."""

import functools
import json
import sys

import numpy as np
import pytest

from benchmarks.suite_parts import (
  breakdown,
  environments,
  plots,
  runs,
  table,
  work,
)

MIB = 2**20


def _report(cpu, *, peak=100, answer_tokens=7, losses=(0.693147, 0.69)):
  return {
    "cpu_seconds_per_pair": cpu,
    "wall_seconds_per_pair": 2 * cpu,
    "peak_bytes": peak * MIB,
    "seconds_to_first_step": 9.0,
    "cpu_seconds_to_first_step": 5.0,
    "losses": list(losses),
    "answer_tokens": answer_tokens,
  }


REPORTS = {
  ("a", "ours", 0): _report(1.0, peak=40),
  ("a", "trl", 0): _report(3.0),
  ("a", "tunix", 0): {"error": "ended with 1: no | luck"},
  ("a", "ours", 1): _report(2.0, peak=60),
  ("a", "trl", 1): _report(10.0, peak=200),
  ("a", "ours", 2): _report(1.5, peak=50),
  ("a", "trl", 2): _report(6.0, peak=120),
}


def test_spread_is_median_lowest_and_highest():
  spread = table.figures(REPORTS, "cpu_seconds_per_pair")
  assert spread["a", "ours"] == (1.5, 1.0, 2.0)
  assert spread["a", "trl"] == (6.0, 3.0, 10.0)
  assert ("a", "tunix") not in spread


def test_ratio_is_taken_within_a_repetition():
  # 3 / 1, 10 / 2 and 6 / 1.5; of the medians it would be 4 as well, but of
  # the lows and highs 3 and 5 only this way.
  assert table.ratios(REPORTS, "cpu_seconds_per_pair") == {
    ("a", "trl"): (4.0, 3.0, 5.0)
  }


def test_bars_say_reached_missed_and_not_measured():
  bars = table.bars(REPORTS, {"a": 4.5})
  trl, tunix, memory = bars
  assert (trl.found, trl.verdict) == (4.0, "missed")
  assert (tunix.found, tunix.verdict) == (None, "not measured")
  # 50 of 120 MiB.
  assert memory.found == pytest.approx(50 / 120)
  assert memory.verdict == "reached"
  assert table.bars(REPORTS, {"a": 4.0})[0].verdict == "reached"


def test_the_memory_bar_is_against_the_best_other_one():
  reports = {
    ("a", "ours", 0): _report(1.0, peak=60),
    ("a", "trl", 0): _report(3.0, peak=200),
    ("a", "tunix", 0): _report(3.0, peak=100),
  }
  memory = table.bars(reports, {})[-1]
  assert memory.found == pytest.approx(0.6)
  assert memory.verdict == "missed"


def test_reports_of_other_work_are_named():
  assert table.check(REPORTS) == []
  reports = {
    ("a", "ours", 0): _report(1.0),
    ("a", "trl", 0): _report(1.0, answer_tokens=8),
    ("a", "tunix", 0): _report(1.0, losses=(0.7,)),
    ("a", "easydel", 0): _report(1.0, losses=()),
  }
  complaints = table.check(reports)
  assert [c.split(",")[1].strip() for c in complaints] == [
    "trl",
    "tunix",
    "easydel",
  ]
  assert "8 answer tokens, ours 7" in complaints[0]
  assert "0.7, not ln 2" in complaints[1]


def test_table_says_why_a_library_was_skipped():
  text = table.markdown(REPORTS, {"a": "GSM8K"})
  rows = [line for line in text.splitlines() if line.startswith("| t")]
  assert "4.00 (3.00 to 5.00)" in rows[0]
  # The pipe would end the cell.
  assert "skipped: ended with 1: no / luck" in rows[1]
  # All rows have as many cells as the head.
  head = next(line for line in text.splitlines() if "library" in line)
  assert {row.count("|") for row in rows} == {head.count("|")}


def test_bars_as_a_table():
  text = table.bars_markdown(table.bars(REPORTS, {"a": 4.5}))
  assert "| at least 4.5 | 4.00 | missed |" in text
  assert "| at most 0.5 | 0.42 | reached |" in text


def test_an_environment_that_cannot_be_made_is_skipped_with_pips_words(
  tmp_path, monkeypatch
):
  monkeypatch.setitem(environments.REQUIREMENTS, "trl", ("trl==1",))

  def run(command, **_):
    is_pip = "install" in command
    return type("Done", (), {
      "returncode": int(is_pip), "stdout": "", "stderr": "x\nno such version\n"
    })  # fmt: skip

  monkeypatch.setattr(environments.subprocess, "run", run)
  with pytest.raises(table.Skipped, match="no such version"):
    environments.python_of("trl", tmp_path)


def test_an_environment_is_made_again_only_for_other_requirements(
  tmp_path, monkeypatch
):
  commands = []

  def run(command, **_):
    commands.append(command)
    return type("Done", (), {"returncode": 0})

  monkeypatch.setattr(environments.subprocess, "run", run)
  (tmp_path / "trl").mkdir()
  first = environments.python_of("trl", tmp_path)
  assert len(commands) == 3
  assert environments.python_of("trl", tmp_path) == first
  assert len(commands) == 3
  monkeypatch.setitem(environments.REQUIREMENTS, "trl", ("trl==2",))
  environments.python_of("trl", tmp_path)
  assert len(commands) == 6
  assert environments.python_of("ours", tmp_path) == sys.executable


def test_random_pairs_are_the_same_for_everybody(tmp_path):
  path = work.make("d", tmp_path, data=tmp_path, tokenizer="none")
  pairs = work.load(path)
  assert len(pairs) == work.WORK["d"].num_pairs
  np.testing.assert_array_equal(pairs.lengths(), 128)
  assert pairs.tokens.min() >= 3
  assert pairs.tokens.max() < work.WORK["d"].model.vocab_size
  # What is there is not made again, unless it was made from something else.
  stamp = path.stat().st_mtime_ns
  assert work.make("d", tmp_path, data=tmp_path, tokenizer="none") == path
  assert path.stat().st_mtime_ns == stamp
  work.make("d", tmp_path, data=tmp_path, tokenizer="other")
  assert path.stat().st_mtime_ns != stamp


_PEER = """
import json, pathlib, sys
order = json.loads(pathlib.Path(sys.argv[1]).read_text())
if order["beta"] != 0.1:
  sys.exit("no such beta")
pathlib.Path(order["report_file"]).write_text(json.dumps({"cores": 1}))
with open(pathlib.Path(__file__).parent / "starts", "a") as file:
  file.write("x")
"""


def test_a_report_is_kept_for_the_same_order_only(tmp_path, monkeypatch):
  (tmp_path / "train_trl.py").write_text(_PEER)
  monkeypatch.setattr(runs, "_PEERS", tmp_path)
  run = functools.partial(
    runs.run,
    "d",
    library="trl",
    python=sys.executable,
    pairs_file=tmp_path / "d.npz",
    tokenizer="none",
    folder=tmp_path / "run",
    num_cores=1,
  )
  starts = lambda: (tmp_path / "starts").read_text()
  assert run(is_reference_cached=False) == {"cores": 1}
  assert run(is_reference_cached=False) == {"cores": 1}
  assert starts() == "x"
  assert run(is_reference_cached=True) == {"cores": 1}
  assert starts() == "xx"
  monkeypatch.setattr(runs, "BETA", 0.2)
  assert run(is_reference_cached=True) == {
    "error": "ended with 1: no such beta"
  }


def test_time_inside_an_event_is_not_its_own():
  # A loop of 10 holds two bodies of 3 and 4; beside it, a thread of its own.
  threads = [
    [(0, 10, "while"), (1, 3, "body"), (5, 4, "body"), (12, 2, "copy")],
    [(0, 5, "body")],
  ]
  assert breakdown.self_times(threads) == {"while": 3, "body": 12, "copy": 2}


HLO = """HloModule jit_train_step

FileNames
1 "/there/dpop_jax/steps.py"
2 "/there/dpop_jax/logprobs.py"
3 "/there/dpop_jax/models/layers.py"
4 "/elsewhere/flax/linen/linear.py"

FunctionNames
1 "train_step"
2 "_forward_chunks.<locals>.score"
3 "MLP.__call__"
4 "Dense.__call__"

FileLocations
1 {file_name_id=1 function_name_id=1 line=1 end_line=1 column=1 end_column=2}
2 {file_name_id=2 function_name_id=2 line=1 end_line=1 column=1 end_column=2}
3 {file_name_id=3 function_name_id=3 line=1 end_line=1 column=1 end_column=2}
4 {file_name_id=4 function_name_id=4 line=1 end_line=1 column=1 end_column=2}

StackFrames
1 {file_location_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=2}
4 {file_location_id=4 parent_frame_id=4}

%fused_computation {
  %dot.1 = f32[2,8]{1,0} dot(%a, %b), metadata={op_name="x" stack_frame_id=2}
  ROOT %dot.2 = f32[2,8]{1,0} dot(%a, %b), metadata={stack_frame_id=4}
  %copy.3 = f32[8]{0} copy(%c), metadata={op_name="state.params"}
  %add.4 = f32[8]{0} add(%c, %c), metadata={stack_frame_id=1}
}
"""


def test_an_operation_is_of_the_innermost_part_on_its_stack():
  assert breakdown.parts_of(HLO) == {
    "dot.1": "head",
    "dot.2": "MLP",
    "copy.3": "copies",
    "add.4": "rest",
  }
  times = {"dot.1": 6.0, "dot.2": 3.0, "copy.3": 0.5, "unknown": 0.5}
  shares = breakdown.shares(times, HLO)
  assert shares == {"head": 0.6, "MLP": 0.3, "copies": 0.05, "rest": 0.05}


def test_a_picture_is_written(tmp_path):
  plots.write(REPORTS, {"a": "GSM8K, 4 shots"}, tmp_path / "results.png")
  assert (tmp_path / "results.png").stat().st_size > 10_000


@pytest.fixture
def meter(tmp_path, monkeypatch):
  """A meter with an order of two updates of one pair each."""
  monkeypatch.syspath_prepend("benchmarks/peers")
  import meter as meter_lib

  pairs = {"tokens": np.arange(12), "offsets": [[0, 2, 3, 6], [6, 8, 9, 12]]}
  np.savez(tmp_path / "pairs.npz", **pairs)
  order = {
    "pairs_file": str(tmp_path / "pairs.npz"),
    "pairs": 1,
    "updates": 1,
    "started": 0.0,
    "report_file": str(tmp_path / "report.json"),
  }
  (tmp_path / "order.json").write_text(json.dumps(order))
  monkeypatch.setattr(sys, "argv", ["train", str(tmp_path / "order.json")])
  clock = iter([(5.0, 3.0), (9.0, 7.0)])
  monkeypatch.setattr(meter_lib.time, "time", lambda: now[0])
  monkeypatch.setattr(meter_lib, "cpu_seconds", lambda: (now[1], 1.0))
  now = [0.0, 0.0]
  result = meter_lib.Meter()
  result.tick = lambda: now.__setitem__(slice(None), next(clock))
  return result


def test_meter_leaves_out_the_update_that_warms_up(meter, tmp_path):
  assert meter.pairs == [([0, 1], [2], [3, 4, 5]), ([6, 7], [8], [9, 10, 11])]
  for count in (4, 3):
    meter.tick()
    meter.end_update()
    meter.add_loss(0.5)
    meter.count_answer_tokens(count)
  assert meter.is_done
  meter.write(versions={}, settings={"x": 1})
  report = json.loads((tmp_path / "report.json").read_text())
  assert report["cpu_seconds_per_pair"] == 4.0
  assert report["seconds_to_first_step"] == 5.0
  assert report["cpu_seconds_to_first_step"] == 3.0
  assert report["answer_tokens"] == 7
  assert report["peak_bytes"] > 10 * MIB


def test_meter_leaves_out_as_many_updates_as_it_is_told(meter, tmp_path):
  meter.order["warm_up_updates"] = 2
  assert meter.num_updates == 3
  for mark in ((5.0, 3.0, 0.0), (9.0, 7.0, 0.0), (10.0, 7.5, 0.0)):
    meter._marks.append(mark)
  meter.write(versions={}, settings={}, extra=4)
  report = json.loads((tmp_path / "report.json").read_text())
  assert report["wall_seconds_per_pair"] == 1.0
  assert report["cpu_seconds_per_pair"] == 0.5
  assert report["seconds_to_first_step"] == 5.0
  assert report["extra"] == 4


def test_meter_refuses_a_report_of_too_few_updates(meter):
  meter.tick()
  meter.end_update()
  with pytest.raises(ValueError, match="Expected 2 updates, but 1"):
    meter.write(versions={}, settings={})
