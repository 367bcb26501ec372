"""The whole report on pairs of a few letters, and what it says of them."""

import html.parser
import json

import pytest
import tiny_runs

from dpop_jax import sharding
from dpop_jax.data import dataset, plan
from dpop_jax.inspection import findings, forward, head_step, page, tables

ROWS = [
  {"prompt": "ab", "chosen": "cd", "rejected": "ce"},
  {"prompt": "ab", "chosen": "cd", "rejected": "ce"},
  {"prompt": "ab", "chosen": "ce", "rejected": "cd"},
  {"prompt": "b", "chosen": "cdef", "rejected": "cgef"},
  {"prompt": "b", "chosen": "cc", "rejected": "cc"},
  {"prompt": "b", "chosen": "cc"},
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
  folder = tmp_path_factory.mktemp("pairs")
  data = dataset.DataConfig(
    train=tiny_runs.write_rows(folder / "<train>.jsonl", ROWS),
    eval=tiny_runs.write_rows(folder / "eval.jsonl", ROWS[:1]),
    tokenizer=tiny_runs.write_tokenizer(folder / "tokenizer.json"),
    bos_token="^",
    eos_token="$",
  )
  batch = plan.BatchConfig(batch_size=2, row_length=32)
  return findings.gather(data, findings.Options(batch=batch, num_worst=2))


def test_report_counts_what_is_wrong_with_the_pairs(found):
  report = found.report
  assert report["data"]["train"]["num_pairs"] == 4
  assert report["data"]["train"]["bad_rows"] == {
    "identical answers": 1,
    "missing key": 1,
  }
  assert report["overlaps"]["num_duplicates"] == 1
  assert report["overlaps"]["num_contradictory"] == 3
  assert report["eval"]["num_shared_pairs"] == 1
  # One letter of two, of four with their EOS: 1/3 three times, and 1/5.
  distance = report["edit_distance"]["tokens"]
  assert distance["mean"] == pytest.approx((3 / 3 + 1 / 5) / 4)
  assert report["most_different_pairs"][0]["chosen"] == ["c", "d", ""]
  assert report["verdict"]["is_at_risk"] is None


def test_files_are_a_page_that_fetches_nothing_and_json(found, tmp_path):
  pytest.importorskip("matplotlib")
  written = page.write(found, str(tmp_path / "out"))
  assert json.loads(written["report.json"].read_text()) == found.report
  text = written["report.html"].read_text()
  ids = []

  class Reader(html.parser.HTMLParser):
    def handle_starttag(self, tag, attributes):
      values = dict(attributes)
      assert tag not in ("script", "link", "img")
      assert not values.get("src") and "http" not in values.get("href", "")
      if "id" in values:
        ids.append(values["id"])

  Reader().feed(text)
  assert len(set(ids)) == len(ids) > 0
  # What comes from outside is escaped.
  assert "&lt;train&gt;.jsonl" in text
  assert "<train>" not in text


def test_summary_ends_in_the_verdict(found):
  text = tables.summary(found.report)
  assert text.endswith(found.report["verdict"]["sentence"])
  assert "refused: identical answers" in text


def test_a_model_adds_a_section_and_the_verdict_takes_it_up(tmp_path):
  data = dataset.DataConfig(
    train=tiny_runs.write_rows(tmp_path / "train.jsonl", ROWS),
    tokenizer=tiny_runs.write_tokenizer(tmp_path / "tokenizer.json"),
    bos_token="^",
    eos_token="$",
  )
  folder = tiny_runs.write_model(tmp_path / "model")
  model = forward.load(folder, mesh=sharding.MeshConfig())
  options = findings.Options(
    batch=plan.BatchConfig(batch_size=2, row_length=32)
  )
  found = findings.gather(data, options, model)
  section = found.report["condition"]
  assert section["num_pairs"] == 4
  pairs = list(dataset.load(data, is_sft=False, row_length=32).train)
  expected = head_step.fall(model, pairs, row_length=32)
  assert section["head_step_fall"] == pytest.approx(expected, rel=1e-5)
  assert "large step of the output layer" in found.report["verdict"]["sentence"]
  assert "step of the output layer" in tables.summary(found.report)
  text = page.write(found, str(tmp_path / "out"))["report.html"].read_text()
  assert "What DPO would do to right tokens" in text
