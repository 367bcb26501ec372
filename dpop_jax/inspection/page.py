"""A report as files: a page that needs no other file, and JSON."""

import html
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from dpop_jax import atomic_files, paths
from dpop_jax import report as report_lib
from dpop_jax.inspection import plots, tables
from dpop_jax.inspection.findings import Findings

_ABOUT_CONDITION = """Let a right token stand in both answers behind the edit,
with probability s_w behind the chosen beginning and s_l behind the rejected
one. DPO moves its logit by s_l − s_w times a positive factor, if both
beginnings lead to similar hidden states: below zero where the model knows
better behind the right beginning. DPOP's penalty adds lambda (1 − s_w)."""


def write(findings: Findings, out_dir: str) -> dict[str, pathlib.Path]:
  """Writes report.json and report.html, each whole or not at all.

  Args:
    findings: What to report.
    out_dir: The folder; files of these names in it are replaced.

  Returns:
    The paths by file name.
  """
  # Everything is made before anything is written.
  text = json.dumps(findings.report, indent=2, allow_nan=False) + "\n"
  texts = {"report.json": text, "report.html": page(findings)}
  folder = paths.local(out_dir, "--out")
  for name, text in texts.items():
    atomic_files.write_text(folder / name, text)
  return {name: folder / name for name in texts}


def page(findings: Findings) -> str:
  """The report as one HTML document."""
  report = findings.report
  files = ", ".join(report["data"]["train"]["files"])
  return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Pairs of {_escape(files)}</title>
<style>{report_lib.STYLE}</style>
</head>
<body>
<main>
<h1>{tables.count(report["data"]["train"]["num_pairs"])} preference pairs</h1>
<p class="soft">{_escape(files)}, tokens of
{_escape(report["data"]["tokenizer"]["name"])}</p>
<p class="lead">{_escape(report["verdict"]["sentence"])}</p>
{_condition(findings)}
<h2>The answers</h2>
{_figures(_answer_plots(findings))}
{_table(tables.answers(report))}
<p class="soft">Edit distance: the least number of insertions, deletions and
exchanges that turn one answer into the other, by the length of the longer one.
Tokens as trained on, EOS included; words are what white space separates.
Histograms hold all pairs; the few beyond an axis are in its last bar.</p>
<h2>What the pairs share</h2>
{_table(tables.sharing(report))}
<p class="soft">Saved: tokens of all sequences (prompt + chosen, prompt +
rejected) that a prefix tree does not run again. Speed-up: tokens of sequences
by tokens of trees.</p>
<h2>What to look into</h2>
{_table(tables.problems(report))}
{_left_out(report)}
<h2>The pairs that differ most</h2>
{_pairs(report["most_different_pairs"], "edit distance in tokens")}
</main>
</body>
</html>
"""


def _condition(findings: Findings) -> str:
  section, condition = findings.report["condition"], findings.condition
  if condition is None:
    return ""
  figures = [
    (
      "Which way DPO pushes right tokens",
      "Each token behind the edit that stands in both answers. Left of zero "
      "its logit goes down.",
      plots.pushes(condition),
    ),
    (
      "Lambda that turns it round",
      "Share of what DPO pushes down that DPOP's penalty pushes up instead, "
      "while it acts.",
      plots.lambdas_needed(condition),
    ),
    (
      "Where it happens",
      "Mean of max(0, s_w − s_l) by the distance from the first token that "
      "both answers share again.",
      plots.pushes_by_place(condition),
    ),
  ]
  if not section["num_tokens"]:
    figures = []
  return f"""<h2>What DPO would do to right tokens</h2>
<p class="soft">{_escape(_ABOUT_CONDITION)} From one forward pass of
{_escape(section["model"])} over {tables.count(section["num_pairs"])} of the
pairs.</p>
{_figures(figures)}
{_table(tables.condition(section))}
<h2>The pairs with the largest push down</h2>
{_pairs(section["worst_pairs"], "probability taken off right tokens")}"""


def _answer_plots(findings: Findings) -> list[tuple[str, str, str]]:
  statistics = findings.statistics
  return [
    (
      "Edit distance",
      "Low: the two answers differ in few places, the paper's case.",
      plots.edit_distances(statistics),
    ),
    (
      "Where the answers part",
      "All that is behind it is what DPO may spoil.",
      plots.first_differences(statistics),
    ),
    ("Length of the answers", "", plots.lengths(statistics)),
    (
      "Length bias",
      "Off centre, a model may learn length instead of quality.",
      plots.length_differences(statistics),
    ),
    (
      "Tokens saved by prefix trees",
      "50 % would be a pair whose two sequences are one.",
      plots.shared_beginnings(statistics),
    ),
  ]


def _figures(figures: Sequence[tuple[str, str, str]]) -> str:
  parts = [
    f"<figure><h3>{_escape(title)}</h3>{svg}"
    f"<figcaption>{_escape(caption)}</figcaption></figure>"
    for title, caption, svg in figures
  ]
  return '<div class="plots">\n' + "\n".join(parts) + "\n</div>"


def _table(table: tables.Table) -> str:
  header = "".join(f"<th>{_escape(cell)}</th>" for cell in table.header)
  rows = "\n".join(
    f"<tr><th>{_escape(first)}</th>"
    + "".join(f"<td>{_escape(cell)}</td>" for cell in others)
    + "</tr>"
    for first, *others in table.rows
  )
  return (
    f'<div class="scroll"><table>\n<thead><tr>{header}</tr></thead>\n'
    f"<tbody>\n{rows}\n</tbody>\n</table></div>"
  )


def _left_out(report: Mapping[str, Any]) -> str:
  parts = []
  for name in ("train", "eval"):
    rows = (report["data"][name] or {}).get("rows_left_out")
    if rows:
      shown = "\n".join(_escape(row) for row in rows[:50])
      more = f"\n… {len(rows) - 50:,} more in report.json" if rows[50:] else ""
      parts.append(
        f"<details><summary>{len(rows):,} rows of {name} left out</summary>"
        f"<pre>{shown}{more}</pre></details>"
      )
  return "\n".join(parts)


def _pairs(found: Sequence[Mapping[str, Any]], measure: str) -> str:
  return "\n".join(_pair(each, measure) for each in found)


def _pair(found: Mapping[str, Any], measure: str) -> str:
  cells = [("Prompt", _escape(found["prompt"].strip()))]
  for title in ("chosen", "rejected"):
    before, at, behind = map(_escape, found[title])
    mark = f"<mark>{at}</mark>" if at else ""
    cells.append((title.capitalize(), f"{before}{mark}{behind}"))
  figures = "\n".join(
    f"<figure><h3>{title}</h3><pre>{text}</pre></figure>"
    for title, text in cells
  )
  return (
    f'<p class="soft">Pair {found["pair"]}: '
    f"{tables.number(found['value'])} {_escape(measure)}</p>\n"
    f'<div class="pair">\n{figures}\n</div>'
  )


def _escape(text: str) -> str:
  return html.escape(text)
