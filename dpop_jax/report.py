"""Writes a study as a page with plots, as Markdown and as JSON.

  report.write(study, "runs/demo")

makes runs/demo/report.html, which holds everything it shows and fetches
nothing, report.md and report.json.
"""

import html
import json
import os
import pathlib

from dpop_jax import (
  atomic_files,
  paths,
  report_plots,
  report_tables,
  report_text,
)
from dpop_jax import study as study_lib

STYLE = """
:root { color-scheme: light dark; --page: #fbfaf8; --card: #ffffff;
  --ink: #22262b; --soft: #636b75; --grid: #e6e4df; --good: #00795a;
  --bad: #b3450a; --mark: #fbe0c8; }
@media (prefers-color-scheme: dark) { :root { --page: #15181b; --card: #1d2125;
  --ink: #e7e5e1; --soft: #a0a7b0; --grid: #343a41; --good: #3fc79d;
  --bad: #f0894a; --mark: #5a3415; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 70rem; margin: 0 auto; padding: 2.5rem 1.1rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .6rem; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .7rem; }
table + p, .plots + p { margin-top: 1rem; } .scroll { margin-top: 1.1rem; }
p, li { max-width: 46rem; } p { margin: .5rem 0; }
.lead { font-size: 1.12rem; } .soft, figcaption { color: var(--soft); }
figcaption, .soft { font-size: .92rem; }
.plots { display: grid; gap: 1.1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); }
figure { margin: 0; padding: .9rem; background: var(--card);
  border: 1px solid var(--grid); border-radius: .7rem; }
figure h3 { font-size: 1rem; margin: 0 0 .4rem; }
figure svg { display: block; width: 100%; height: auto; }
.claims { list-style: none; padding: 0; margin: 1rem 0 0; }
.claims li { display: flex; gap: .7rem; padding: .4rem 0;
  border-top: 1px solid var(--grid); }
.claims span { flex: 1; } .claims b { white-space: nowrap; }
.yes { color: var(--good); } .no { color: var(--bad); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem;
  font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; white-space: nowrap;
  padding: .4rem 1.1rem .4rem 0; border-bottom: 1px solid var(--grid); }
td small { color: var(--soft); }
thead th { color: var(--soft); font-weight: 500; }
tbody th { font-weight: 600; }
.pair { display: grid; gap: 1.1rem; margin-top: .8rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr)); }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere;
  font: .9rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
mark { background: var(--mark); color: inherit; border-radius: .2rem;
  padding: 0 .1em; }
summary { cursor: pointer; font-size: 1.2rem; font-weight: 700; }
details { margin-top: 2.6rem; }
"""


def write(
  study: study_lib.Study, out_dir: pathlib.Path | str
) -> dict[str, pathlib.Path]:
  """Writes report.json, report.md and report.html, each whole or not at all.

  Args:
    study: What to report.
    out_dir: The folder; files of these names in it are replaced.

  Returns:
    The three paths by file name.
  """
  # Everything is made before anything is written.
  texts = {
    "report.json": json.dumps(study.summary(), indent=2, allow_nan=False)
    + "\n",
    "report.md": report_tables.markdown(study),
    "report.html": page(study),
  }
  out_dir = paths.local(out_dir, "out_dir")
  for name, text in texts.items():
    atomic_files.write_text(out_dir / name, text)
  return {name: out_dir / name for name in texts}


def page(study: study_lib.Study) -> str:
  """The report as one HTML document that needs no other file."""
  names = ", ".join(map(report_text.name_of, study.losses))
  return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_escape(names)} compared</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{_escape(names)} from one model</h1>
<p class="lead">{_escape(report_text.verdict(study))}</p>
<p class="soft">{_escape(report_text.INTRODUCTION)}</p>
{_claims(study)}
{_example(study)}
{_panels(study)}
<h2>In numbers</h2>
<p class="soft">Mean over {report_text.seeds(len(study.seeds))}, below it the
least to the greatest where there are several.
{_escape(report_tables.units(study))}</p>
{_html_table(report_tables.results(study))}
<ul>
{_items(report_text.observations(study))}
</ul>
<p>{_escape(report_text.resolution(study))}</p>
{_ablations(study)}
<details>
<summary>Options</summary>
{_html_table(report_tables.options(study), has_header=False)}
</details>
</main>
</body>
</html>
"""


def _panels(study: study_lib.Study) -> str:
  seeds = report_text.seeds(len(study.seeds))
  panels = study.panels()
  parts = [
    "<h2>What became of the answers</h2>",
    f'<p class="soft">Held-out pairs. Lines are means over {seeds}, bands '
    "reach from the least to the greatest, dots are single seeds. The dotted "
    "line is the reference, where every run starts.</p>",
  ]
  for panel in panels:
    name = report_text.values_text(panel.values)
    if len(panels) > 1:
      parts.append(f"<h3>{_escape(name)}</h3>")
    parts.append(f'<div class="plots">\n{_plots(study, panel)}\n</div>')
  return "\n".join(parts)


def _plots(study: study_lib.Study, panel: study_lib.Group) -> str:
  name = report_text.values_text(panel.values)
  settings = panel.settings
  suffix = f", {name}" if name else ""

  def by_step(title: str, caption: str, metric: str, label: str):
    svg = report_plots.by_step(
      study, settings, metric, title=title + suffix, label=label
    )
    return title, caption, svg

  def shares(title: str, caption: str, values, reference, label: str):
    svg = report_plots.shares(
      study,
      settings,
      values,
      reference=reference,
      title=title + suffix,
      label=label,
    )
    return title, caption, svg

  figures = [
    by_step(
      "Log-prob of the chosen answer",
      "Below the dotted line the preferred answer has become less likely.",
      study_lib.CHOSEN_LOGP,
      "log-prob [nats]",
    ),
    by_step(
      "Log-prob of the rejected answer",
      "What every loss pushes down, against the chosen answer.",
      study_lib.REJECTED_LOGP,
      "log-prob [nats]",
    ),
  ]
  if any(map(study.has, study_lib.REGIONS)):
    title = "Chosen answer before, at and after the edit"
    figures.append(
      (
        title,
        "The edit is where chosen and rejected differ. A long bar is an "
        "unlikely token; the paper's fourth figure shows the part after the "
        "edit.",
        report_plots.by_region(study, settings, title=title + suffix),
      )
    )
  figures.append(
    shares(
      "Accuracy",
      "Share of pairs whose chosen answer gained more than the rejected one.",
      lambda name: study.final(name, study_lib.ACCURACY),
      None,
      "pairs [%]",
    )
  )
  if study.num_questions:
    figures.append(
      shares(
        "Exact match",
        "Greedy answers to held-out questions.",
        study.exact_match,
        study.reference.exact_match,
        "questions answered rightly [%]",
      )
    )
  figures += [
    by_step(
      "How often DPOP's penalty is, or would be, active",
      "Share of pairs whose chosen answer is less likely than under the "
      "reference.",
      study_lib.ACTIVE_FRACTION,
      "share of the pairs",
    ),
    by_step(
      "How large it is, or would be",
      "Mean of max(0, −log-ratio of the chosen answer), before its weight. "
      "Only DPOP trains on it.",
      study_lib.PENALTY,
      "penalty [nats]",
    ),
  ]
  return _figures(figures)


def _ablations(study: study_lib.Study) -> str:
  parts = []
  for key, groups in report_tables.ablations(study):
    name = report_text.key_name(key)
    parts.append(f"<h2>What {_escape(name)} does</h2>")
    figures = []
    results = [
      (
        "Log-ratio of the chosen answer",
        "log-ratio [nats]",
        0.0,
        lambda name: study.logratios(name, study_lib.CHOSEN_LOGP),
      ),
      (
        "Accuracy",
        "share of pairs",
        None,
        lambda name: study.final(name, study_lib.ACCURACY),
      ),
    ]
    if study.num_questions:
      start = study.reference.exact_match
      results.append(
        ("Exact match", "share of questions", start, study.exact_match)
      )
    for title, label, reference, values in results:
      svg = report_plots.by_value(
        study,
        key,
        groups,
        values,
        reference=reference,
        title=f"{title} by {name}",
        label=label,
      )
      caption = f"After the last step, by {key}; vertical lines span the seeds."
      figures.append((f"{title} by {name}", caption, svg))
    parts.append(f'<div class="plots">\n{_figures(figures)}\n</div>')
    for group in groups:
      common = report_text.values_text(group.values)
      parts.append(f"<p>{_escape(common)}:</p>")
      parts.append(_html_table(report_tables.ablation(study, key, group)))
  return "\n".join(parts)


def _figures(figures) -> str:
  return "\n".join(
    f"<figure><h3>{_escape(title)}</h3>{svg}"
    f"<figcaption>{_escape(caption)}</figcaption></figure>"
    for title, caption, svg in figures
  )


def _claims(study: study_lib.Study) -> str:
  found = report_text.claims(study)
  if not found:
    return ""
  items = "\n".join(
    f"<li><span>{_escape(claim.text)}</span>"
    f'<b class="{"yes" if claim.is_shown else "no"}">'
    f"{'✓' if claim.is_shown else '✗'} {_escape(claim.count)}</b></li>"
    for claim in found
  )
  return f'<ul class="claims">\n{items}\n</ul>'


def _example(study: study_lib.Study) -> str:
  if study.example is None:
    return ""
  chosen, rejected = study.example["chosen"], study.example["rejected"]
  start = len(os.path.commonprefix([chosen, rejected]))
  end = len(
    os.path.commonprefix([chosen[start:][::-1], rejected[start:][::-1]])
  )
  cells = [("Question", _escape(study.example["prompt"].strip()))]
  for title, text in (("Chosen", chosen), ("Rejected", rejected)):
    stop = len(text) - end
    edit = f"<mark>{_escape(text[start:stop])}</mark>" if stop > start else ""
    cells.append(
      (title, f"{_escape(text[:start])}{edit}{_escape(text[stop:])}")
    )
  figures = "\n".join(
    f"<figure><h3>{title}</h3><pre>{text}</pre></figure>"
    for title, text in cells
  )
  return f'<h2>A pair</h2>\n<div class="pair">\n{figures}\n</div>'


def _html_table(table: report_tables.Table, *, has_header: bool = True) -> str:
  header = "".join(f"<th>{_escape(cell)}</th>" for cell in table.header)
  rows = "\n".join(
    f"<tr><th>{_escape(first)}</th>"
    + "".join(f"<td>{_cell(cell)}</td>" for cell in others)
    + "</tr>"
    for first, *others in table.rows
  )
  head = f"<thead><tr>{header}</tr></thead>\n" if has_header else ""
  return (
    f'<div class="scroll"><table>\n{head}<tbody>\n{rows}\n</tbody>\n'
    "</table></div>"
  )


def _cell(text: str) -> str:
  """A mean with its range below it, where the text has both."""
  mean, bracket, others = text.partition(" (")
  if not bracket:
    return _escape(text)
  return f"{_escape(mean)}<br><small>{_escape(others.rstrip(')'))}</small>"


def _items(sentences: list[str]) -> str:
  return "\n".join(f"<li>{_escape(sentence)}</li>" for sentence in sentences)


def _escape(text: str) -> str:
  return html.escape(text)
