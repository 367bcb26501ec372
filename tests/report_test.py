"""The report says what the numbers say, whichever way they come out."""

import html.parser
import json
import math
import re

import pytest

from dpop_jax import report, report_plots, report_tables, report_text, study

REGIONS = {
  "logps_per_token/chosen_before_edit": -0.01,
  "logps_per_token/chosen_at_edit": -0.02,
  "logps_per_token/chosen_after_edit": -0.03,
}
REFERENCE = study.Reference(
  metrics={"logps/chosen": -1.0, "logps/rejected": -9.0, **REGIONS},
  exact_match=0.75,
)


def setting(loss, name=None, **values):
  """One of a loss; values are of the section `loss`, or of others by `a__b`."""
  values = {
    key.replace("__", ".") if "__" in key else f"loss.{key}": value
    for key, value in values.items()
  }
  return study.Setting(name=name or loss, values={"loss.name": loss, **values})


def run(name, seed, *, chosen, after_edit, exact_match=None):
  start = {
    **REFERENCE.metrics,
    "step": 0,
    "rewards/accuracies": 0.0,
    "dpop/active_fraction": 0.0,
    "dpop/penalty": 0.0,
  }
  end = {
    **start,
    "step": 10,
    "logps/chosen": chosen,
    "logps_per_token/chosen_after_edit": after_edit,
    "rewards/accuracies": 0.5,
    "dpop/active_fraction": 0.5,
    "dpop/penalty": max(0.0, -1.0 - chosen),
  }
  return study.Run(
    setting=name, seed=seed, records=(start, end), exact_match=exact_match
  )


def make_study(runs, **changes):
  options = dict(
    settings=tuple(
      setting(name) for name in dict.fromkeys(run.setting for run in runs)
    ),
    options={"loss": {"beta": 0.3}, "steps": 10},
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


def swept_study(num_seeds=1):
  """DPO and DPOP of several lambdas, at two betas; -beta - 1 / lambda nats."""
  settings, runs = [], []
  for beta in (0.1, 0.3):
    settings.append(setting("dpo", f"dpo{beta}", beta=beta))
    for strength in (500.0, 5.0, 50.0):
      settings.append(
        setting(
          "dpop", f"dpop{beta}_{strength}", beta=beta, dpop_lambda=strength
        )
      )
  for one in settings:
    loss = 1 / one.values.get("loss.dpop_lambda", 0.1) + one.values["loss.beta"]
    runs += [
      run(one.name, seed, chosen=-1.0 - loss - seed, after_edit=-0.03)
      for seed in range(num_seeds)
    ]
  return make_study(
    runs,
    settings=tuple(settings),
    reference=study.Reference(metrics=REFERENCE.metrics),
    num_questions=0,
  )


def test_the_json_has_each_seed_and_the_spread_over_them(tmp_path):
  paths = report.write(expected_study(), tmp_path)
  found = json.loads(paths["report.json"].read_text())
  assert found["seeds"] == [0, 1, 2]
  assert found["options"] == {"loss": {"beta": 0.3}, "steps": 10}
  assert found["reference"] == {
    "logps/chosen": -1.0,
    "logps/rejected": -9.0,
    **REGIONS,
    "exact_match": 0.75,
  }
  dpo = found["settings"]["dpo"]
  # -3, -4 and -5 less -1.
  assert dpo["final"]["chosen_logratio"] == {
    "by_seed": [-2.0, -3.0, -4.0],
    "mean": -3.0,
    "std": 1.0,
    "min": -4.0,
    "max": -2.0,
  }
  assert [curve["logps/chosen"] for curve in dpo["curves"]] == [
    [-1.0, -3.0],
    [-1.0, -4.0],
    [-1.0, -5.0],
  ]
  assert dpo["curves"][0]["step"] == [0, 10]
  dpop = found["settings"]["dpop"]["final"]
  assert dpop["exact_match"]["by_seed"] == [0.75, 0.8125, 0.875]
  assert dpop["logps_per_token/chosen_after_edit"]["mean"] == pytest.approx(
    -0.01
  )


def test_the_json_goes_by_seed_whatever_the_order_of_the_runs():
  forth = expected_study()
  runs = sorted(forth.runs, key=lambda run: -run.seed)
  back = make_study(runs, settings=forth.settings)
  assert back.summary() == forth.summary()


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


def test_a_verdict_does_not_list_what_fails_everywhere():
  # All chosen answers fall, and after the edit nothing does: of two statements
  # each on eight settings, two hold of DPO and six of DPOP.
  verdict = report_text.verdict(swept_study())
  assert "8 of 16 statements" in verdict and "holds in" not in verdict
  assert verdict.endswith("The statements that do not are marked below.")


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
  found = json.loads(paths["report.json"].read_text())["settings"]["dpo"]
  assert found["final"]["chosen_logratio"]["by_seed"] == [None, None]
  assert found["final"]["chosen_logratio"]["mean"] is None
  assert "not finite" in paths["report.md"].read_text()
  # What is not a number is not below the reference.
  assert report_text.claims(make_study(runs))[0].holds == (False, False)


def test_runs_that_never_ended_are_told_and_the_others_compared(tmp_path):
  whole = expected_study()
  failures = [
    study.Failure("dpop", 2, "Not <finite>."),
    *(study.Failure("ipo", seed, "Not finite.") for seed in range(3)),
  ]
  found = make_study(
    [r for r in whole.runs if (r.setting, r.seed) != ("dpop", 2)],
    settings=(*whole.settings, setting("ipo")),
    failures=tuple(failures),
  )
  assert [s.name for s in found.shown] == ["dpo", "dpop"]
  text = report.write(found, tmp_path)["report.html"].read_text()
  assert "dpop with seed 2 did not reach its end: Not &lt;finite&gt;." in text
  claim = report_text.claims(found)[2]
  assert "DPOP" in claim.text and claim.count == "2 of 2 seeds"


def test_pairs_without_a_token_after_the_edit_have_no_such_column():
  gone = "logps_per_token/chosen_after_edit"
  without = lambda values: {k: v for k, v in values.items() if k != gone}
  runs = [
    study.Run(
      setting=r.setting, seed=r.seed, records=tuple(map(without, r.records))
    )
    for r in expected_study().runs
  ]
  found = make_study(
    runs,
    reference=study.Reference(metrics=without(REFERENCE.metrics)),
    num_questions=0,
  )
  header = report_tables.results(found).header
  assert "at edit" in header and "after edit" not in header
  assert "exact match" not in header
  assert len(report_text.claims(found)) == 2
  page = report.page(found)
  assert ">after the edit<" not in page and ">at the edit<" in page


def test_each_option_that_is_varied_has_its_table_and_plots():
  found = swept_study()
  assert found.varied == ("loss.beta", "loss.dpop_lambda")
  by_lambda = found.series("loss.dpop_lambda")
  # In the order of its values, whatever the order of the settings.
  assert [[s.name for s in group.settings] for group in by_lambda] == [
    [f"dpop{beta}_{strength}" for strength in (5.0, 50.0, 500.0)]
    for beta in (0.1, 0.3)
  ]
  assert [report_text.values_text(group.values) for group in by_lambda] == [
    "DPOP, β = 0.1",
    "DPOP, β = 0.3",
  ]
  table = report_tables.ablation(found, "loss.dpop_lambda", by_lambda[0])
  assert [row[:2] for row in table.rows] == [
    ("reference", "0"),
    # -0.1 - 1 / 5, and so on.
    ("λ = 5", "−0.3"),
    ("λ = 50", "−0.12"),
    ("λ = 500", "−0.102"),
  ]
  by_beta = found.series("loss.beta")
  assert [len(group.settings) for group in by_beta] == [2] * 4
  page = report.page(found)
  assert "What λ does" in page and "What β does" in page
  text = report_tables.markdown(found)
  assert "## By λ" in text and "## By β" in text and "DPO, β = 0.3" in text


def test_settings_are_shown_by_loss_and_by_value():
  assert [s.name for s in swept_study().shown] == [
    "dpo0.1",
    "dpo0.3",
    *(f"dpop{b}_{x}" for b in (0.1, 0.3) for x in (5.0, 50.0, 500.0)),
  ]


def test_a_plot_holds_few_settings():
  runs = swept_study()
  assert len(runs.settings) == 8 and len(runs.panels()) == 1
  more = make_study(
    [*runs.runs, run("ipo", 0, chosen=-1.0, after_edit=-0.03)],
    settings=(*runs.settings, setting("ipo", beta=0.3)),
    reference=runs.reference,
    num_questions=0,
  )
  assert [len(panel.settings) for panel in more.panels()] == [4, 5]
  page = Page(report.page(more))
  assert page.open == [] and len(page.ids) == len(set(page.ids))
  assert "β = 0.1" in page.text


def test_the_spread_over_seeds_is_in_the_table():
  table = report_tables.results(swept_study(num_seeds=3))
  # -0.1 - 1 / 0.1, and one and two less.
  assert table.rows[1][:2] == ("DPO, β = 0.1", "−11.1 (−12.1 to −10.1)")


def test_dpop_without_a_penalty_is_taken_for_dpo():
  one = setting("dpop", dpop_lambda=0.0)
  assert one.is_dpo and not one.is_dpop
  other = setting("dpop", dpop_lambda=5.0)
  assert other.is_dpop and not other.is_dpo


def test_a_terminal_gets_aligned_columns():
  table = report_tables.Table(("", "loss"), (("DPO", "−1"), ("DPOP", "10")))
  assert report_tables.plain(table) == "      loss\nDPO     −1\nDPOP    10"


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
  # Chosen, rejected, regions, accuracy, exact match, and two of the penalty.
  assert text.count("<svg") == 7
  assert 'name="viewport"' in text


def test_plots_take_their_ink_from_the_page():
  found = expected_study()
  svg = report_plots.by_step(
    found, found.shown, "logps/chosen", title="<Chosen>", label="log-prob"
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
    expected_study(example=example, options={"a|b": "<i>", "c": {"d": 1}})
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
  text = report_tables.markdown(expected_study(options={"a|b": 1}))
  assert "a\\|b" in text
  assert "| DPO | −3 (−4 to −2) |" in text
  assert "| DPOP | 0.5 (0.5 to 0.5) |" in text


def test_every_file_is_written_whole_and_nothing_else(tmp_path):
  report.write(expected_study(), tmp_path)
  report.write(opposite_study(), tmp_path)
  names = sorted(path.name for path in tmp_path.iterdir())
  assert names == ["report.html", "report.json", "report.md"]
  assert "does not show" in (tmp_path / "report.md").read_text()


def good(name="dpo", seed=0):
  return run(name, seed, chosen=-1.0, after_edit=0.0, exact_match=1.0)


def test_settings_with_other_seeds_are_refused():
  with pytest.raises(ValueError, match=r"'dpop' has \[1\]"):
    make_study([good(), good("dpop", seed=1)])


def test_runs_without_their_setting_are_refused():
  with pytest.raises(ValueError, match=r"one setting of its name.*\['dpop'\]"):
    make_study([good(), good("dpop")], settings=(setting("dpo"),))


def test_runs_with_other_steps_are_refused():
  short = study.Run(
    setting="dpo", seed=1, records=good().records[:1], exact_match=1.0
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
    study.Run(setting="dpo", seed=0, records=records)


def test_a_study_without_runs_is_refused():
  with pytest.raises(ValueError, match="at least one run"):
    make_study([])


def test_exact_match_is_there_for_all_or_for_none():
  with pytest.raises(ValueError, match="With num_questions=0, exact match"):
    make_study([good()], num_questions=0)
  without = run("dpo", 0, chosen=-1.0, after_edit=0.0)
  with pytest.raises(ValueError, match="With num_questions=16"):
    make_study([good("dpop"), without])
