"""The report says what the numbers say, whichever way they come out."""

import html.parser
import json
import math
import re

import pytest

from dpop_jax import report, report_plots, report_text, study

REFERENCE = study.Reference(
  metrics={
    "logps/chosen": -1.0,
    "logps/rejected": -9.0,
    "logps_per_token/chosen_before_edit": -0.01,
    "logps_per_token/chosen_at_edit": -0.02,
    "logps_per_token/chosen_after_edit": -0.03,
  },
  exact_match=0.75,
)


def run(loss, seed, *, chosen, after_edit, exact_match):
  start = {
    **REFERENCE.metrics,
    "step": 0,
    "dpop/active_fraction": 0.0,
    "dpop/penalty": 0.0,
  }
  end = {
    **start,
    "step": 10,
    "logps/chosen": chosen,
    "logps_per_token/chosen_after_edit": after_edit,
    "dpop/active_fraction": 0.5,
    "dpop/penalty": max(0.0, -1.0 - chosen),
  }
  return study.Run(
    loss=loss, seed=seed, records=(start, end), exact_match=exact_match
  )


def make_study(runs, **changes):
  options = dict(
    settings={"loss": {"beta": 0.3}, "steps": 10},
    reference=REFERENCE,
    num_questions=16,
  )
  return study.Study(runs=tuple(runs), **(options | changes))


def expected_study(**changes):
  """Three seeds each, as the paper would have it."""
  runs = [
    run("dpo", s, chosen=-3.0 - s, after_edit=-0.5, exact_match=0.25)
    for s in range(3)
  ] + [
    run("dpop", s, chosen=-0.5, after_edit=-0.01, exact_match=0.75 + s / 16)
    for s in range(3)
  ]
  return make_study(runs, **changes)


def opposite_study():
  runs = [
    run("dpo", s, chosen=-0.5, after_edit=-0.01, exact_match=1.0)
    for s in range(3)
  ] + [
    run("dpop", s, chosen=-3.0, after_edit=-0.5, exact_match=0.25)
    for s in range(3)
  ]
  return make_study(runs)


def test_the_summary_lists_seeds_and_log_ratios_to_the_reference(tmp_path):
  paths = report.write(expected_study(), tmp_path)
  assert json.loads(paths["summary.json"].read_text()) == {
    "settings": {"loss": {"beta": 0.3}, "steps": 10},
    "seeds": [0, 1, 2],
    "sft": {
      "chosen_logp": -1.0,
      "chosen_logratio": 0.0,
      "post_edit_logp": -0.03,
      "exact_match": 0.75,
    },
    "losses": {
      "dpo": {
        # -3, -4 and -5 less -1.
        "chosen_logratio": [-2.0, -3.0, -4.0],
        "post_edit_logp": [-0.5, -0.5, -0.5],
        "exact_match": [0.25, 0.25, 0.25],
      },
      "dpop": {
        "chosen_logratio": [0.5, 0.5, 0.5],
        "post_edit_logp": [-0.01, -0.01, -0.01],
        "exact_match": [0.75, 0.8125, 0.875],
      },
    },
  }


def test_the_summary_goes_by_seed_whatever_the_order_of_the_runs():
  forth = expected_study()
  runs = sorted(forth.runs, key=lambda run: (run.loss, -run.seed))
  assert make_study(runs).summary() == forth.summary()


def test_the_effect_is_said_to_show_where_it_shows():
  claims = report_text.claims(expected_study())
  assert len(claims) == 5
  assert all(claim.holds == (True, True, True) for claim in claims)
  assert report_text.verdict(expected_study()).startswith(
    "The paper's effect shows: each of the 5 statements"
  )


def test_the_effect_is_said_not_to_show_where_it_does_not():
  claims = report_text.claims(opposite_study())
  assert all(claim.holds == (False, False, False) for claim in claims)
  verdict = report_text.verdict(opposite_study())
  assert verdict.startswith("The paper's effect does not show here.")
  assert verdict.count("holds in 0 of 3 seeds only") == 5
  page = report.page(opposite_study())
  assert "✗" in page and "✓" not in page
  assert verdict.split(".")[0].replace("'", "&#x27;") in page
  assert (
    "is higher in each seed" in report_text.observations(opposite_study())[0]
  )


def test_an_effect_in_one_seed_of_three_shows_in_part():
  runs = [
    run("dpo", s, chosen=-3.0, after_edit=(-0.5, 0, 0)[s], exact_match=0.5)
    for s in range(3)
  ] + list(expected_study().runs[3:])
  verdict = report_text.verdict(make_study(runs))
  assert verdict == (
    "The paper's effect shows in part: 4 of 5 statements hold in at least two "
    "thirds of the seeds. “DPO makes the tokens after the edit less likely.” "
    "holds in 1 of 3 seeds only."
  )
  assert (
    "is lower in 1 and higher in 2 of 3"
    in report_text.observations(make_study(runs))[0]
  )


@pytest.mark.parametrize(
  "holds, is_shown",
  [([1, 1, 0], True), ([1, 0, 0], False), ([1], True), ([0], False)],
)
def test_a_claim_is_shown_by_two_thirds_of_the_seeds(holds, is_shown):
  assert report_text.Claim("", tuple(map(bool, holds))).is_shown is is_shown


def test_equal_to_the_reference_is_neither_lower_nor_a_loss_for_dpop():
  same = dict(chosen=-1.0, after_edit=-0.03, exact_match=0.75)
  runs = [run("dpo", 0, **same), run("dpop", 0, **same)]
  flags = [claim.holds for claim in report_text.claims(make_study(runs))]
  assert flags == [(False,), (False,), (True,), (True,), (True,)]


def test_other_losses_are_shown_without_claims():
  runs = [run("ours", 0, chosen=-1.0, after_edit=-1.0, exact_match=0.5)]
  only = make_study(runs)
  assert report_text.claims(only) == []
  assert "does not hold both" in report_text.verdict(only)
  assert "ours" in report.page(only)


def test_a_run_that_diverged_is_shown_as_it_is(tmp_path):
  runs = [
    run("dpo", s, chosen=math.nan, after_edit=math.nan, exact_match=0.0)
    for s in range(2)
  ]
  paths = report.write(make_study(runs), tmp_path)
  summary = json.loads(paths["summary.json"].read_text())
  assert summary["losses"]["dpo"]["chosen_logratio"] == [None, None]
  assert "not finite" in paths["report.md"].read_text()
  # What is not a number is not below the reference.
  assert report_text.claims(make_study(runs))[0].holds == (False, False)


@pytest.mark.parametrize(
  "value, text",
  [
    (-1.23456, "−1.23"),
    (-0.0000867, "−0.0000867"),
    (0.0, "0"),
    (-0.0, "0"),
    (1234.5, "1230"),
    (math.inf, "not finite"),
  ],
)
def test_numbers_are_written_with_three_digits(value, text):
  assert report_text.number(value) == text


def test_a_spread_is_mean_least_and_greatest():
  assert report_text.spread([1.0, 2.0, 6.0]) == "3 (1 to 6)"
  assert report_text.spread([2.0]) == "2"


def test_the_standard_error_of_exact_match_is_worked_out():
  # sqrt(0.75 * 0.25 / 16) is 0.108.
  text = report_text.resolution(expected_study())
  assert "one question is 6.2 %" in text and text.endswith("is 10.8 %.")


class Page(html.parser.HTMLParser):
  """Collects ids and what a page would fetch, and checks that tags close."""

  VOID = {"meta", "br", "link", "img", "path", "use", "rect"}

  def __init__(self, text):
    super().__init__()
    self.open, self.ids, self.fetched, self.text = [], [], [], ""
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    if tag not in self.VOID:
      self.open.append(tag)
    for name, value in attrs:
      if name == "id":
        self.ids.append(value)
      if name in ("src", "srcset") or (
        name in ("href", "xlink:href") and not value.startswith("#")
      ):
        self.fetched.append(value)

  def handle_startendtag(self, tag, attrs):
    self.handle_starttag(tag, attrs)
    if tag not in self.VOID:
      self.open.pop()

  def handle_endtag(self, tag):
    if tag not in self.VOID:
      assert self.open.pop() == tag

  def handle_data(self, data):
    self.text += data


def test_the_page_holds_all_it_shows_and_fetches_nothing():
  text = report.page(expected_study())
  page = Page(text)
  assert page.open == []
  assert page.fetched == []
  assert "@import" not in text and "<script" not in text
  assert len(page.ids) == len(set(page.ids))
  # Whatever an SVG refers to is in it.
  used = re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', text)
  assert {a or b for a, b in used} <= set(page.ids)
  assert text.count("<svg") == 6
  assert 'name="viewport"' in text


def test_plots_take_their_ink_from_the_page():
  svg = report_plots.by_step(
    expected_study(), "logps/chosen", title="<Chosen>", label="log-prob"
  )
  assert 'aria-label="&lt;Chosen&gt;"' in svg
  assert "currentColor" in svg and "var(--grid)" in svg
  assert not re.search(r"#0[1-6]0[1-6]0[1-6]", svg)


def test_the_same_study_gives_the_same_page():
  assert report.page(expected_study()) == report.page(expected_study())


def test_what_users_wrote_is_escaped_and_the_edit_marked():
  example = {
    "prompt": "<b>2+2?\n",
    "chosen": "2+2=4\n<end>",
    "rejected": "2+2=5\n<end>",
  }
  text = report.page(
    expected_study(example=example, settings={"a|b": "<i>", "c": {"d": 1}})
  )
  assert "&lt;b&gt;2+2?" in text and "<b>2+2" not in text
  assert "2+2=<mark>4</mark>\n&lt;end&gt;" in text
  assert "2+2=<mark>5</mark>" in text
  assert "<td>&lt;i&gt;</td>" in text and "<th>c.d</th>" in text


def test_an_answer_that_is_the_beginning_of_the_other_is_marked_too():
  example = {"prompt": "?", "chosen": "aa", "rejected": "a"}
  text = report.page(expected_study(example=example))
  assert "<pre>a<mark>a</mark></pre>" in text and "<pre>a</pre>" in text


def test_markdown_escapes_bars_and_holds_every_loss():
  text = report_text.markdown(expected_study(settings={"a|b": 1}))
  assert "a\\|b" in text
  assert "| DPO | −4 (−5 to −3) |" in text
  assert "| DPOP | −0.5 (−0.5 to −0.5) |" in text


def test_every_file_is_written_whole_and_nothing_else(tmp_path):
  report.write(expected_study(), tmp_path)
  report.write(opposite_study(), tmp_path)
  names = sorted(path.name for path in tmp_path.iterdir())
  assert names == ["report.html", "report.md", "summary.json"]
  assert "does not show" in (tmp_path / "report.md").read_text()


def good(loss="dpo", seed=0):
  return run(loss, seed, chosen=-1.0, after_edit=0.0, exact_match=1.0)


def test_losses_with_other_seeds_are_refused():
  with pytest.raises(ValueError, match=r"'dpop' has \(1,\)"):
    make_study([good(), good("dpop", seed=1)])


def test_runs_with_other_steps_are_refused():
  short = study.Run(
    loss="dpo", seed=1, records=good().records[:1], exact_match=1.0
  )
  with pytest.raises(ValueError, match="evaluated at the same steps"):
    make_study([good(), short])


@pytest.mark.parametrize(
  "records, message",
  [
    ((), "has no records"),
    (({"step": 0},), "lacks .'logps/chosen'"),
    (good().records[::-1], "must increase"),
  ],
)
def test_records_that_cannot_be_used_are_refused(records, message):
  with pytest.raises(ValueError, match=message):
    study.Run(loss="dpo", seed=0, records=records, exact_match=1.0)


def test_a_study_without_runs_or_questions_is_refused():
  with pytest.raises(ValueError, match="at least one run"):
    make_study([])
  with pytest.raises(ValueError, match="num_questions must be at least 1"):
    make_study([good()], num_questions=0)
