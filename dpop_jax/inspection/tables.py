"""A report's numbers in tables, for the page and the terminal."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from dpop_jax import report_text

_Report = Mapping[str, Any]
_QUANTILES = ("mean", "p10", "median", "p90", "max")
_HEADER = ("mean", "10 %", "median", "90 %", "max")


class Table(NamedTuple):
  """Column names and rows of text; the first column names the row."""

  header: tuple[str, ...]
  rows: tuple[tuple[str, ...], ...]


def count(value: int) -> str:
  """A whole number with commas."""
  return f"{value:,}"


def number(value: float | None) -> str:
  """Three digits; "∞" for None, which stands for what is not finite."""
  return "∞" if value is None else report_text.number(value)


def percent(value: float | None) -> str:
  """A share as per cent; "–" where there is none."""
  return "–" if value is None else report_text.percent(value)


def answers(report: _Report) -> Table:
  """Lengths, distances and places of the first difference."""
  lengths, first = report["lengths"], report["first_difference"]
  rows = [
    _row("prompt [tokens]", lengths["prompt_tokens"]),
    _row("chosen [tokens]", lengths["chosen_tokens"]),
    _row("rejected [tokens]", lengths["rejected_tokens"]),
    _row("chosen − rejected", lengths["chosen_minus_rejected_tokens"]),
    *(
      _row(f"edit distance, {unit}", distribution, percent)
      for unit, distribution in report["edit_distance"].items()
    ),
    _row("first difference", first["relative_position"], percent),
    _row("common end [tokens]", first["common_end_tokens"]),
  ]
  return Table(("per pair", *_HEADER), tuple(rows))


def sharing(report: _Report) -> Table:
  """What prefix trees save."""
  found = report["shared_beginnings"]
  prompts, updates = found["prompts"], found["updates"]
  per_prompt = prompts["pairs_per_prompt"]
  return Table(
    ("", "saved", "speed-up"),
    (
      (
        "each pair by itself",
        _saved(found["pairs"]["speed_up"]),
        number(found["pairs"]["speed_up"]),
      ),
      (
        f"pairs of a prompt together ({count(prompts['num_prompts'])} prompts, "
        f"{number(per_prompt['mean'])} pairs each)",
        _saved(prompts["speed_up"]),
        number(prompts["speed_up"]),
      ),
      (
        f"updates of {updates['batch_size']} pairs in rows of "
        f"{count(updates['row_length'])} tokens, "
        f"{percent(updates['mean_fill'])} full",
        _saved(updates["speed_up"]),
        number(updates["speed_up"]),
      ),
    ),
  )


def problems(report: _Report) -> Table:
  """What was refused, cut, doubled or leaked, in pairs or rows."""
  data, overlaps = report["data"]["train"], report["overlaps"]
  lengths, held_out = report["lengths"], report["eval"]
  rows = [
    ("rows read", count(data["num_rows"])),
    *(
      (f"refused: {reason}", count(n)) for reason, n in data["bad_rows"].items()
    ),
    ("left out: an answer does not fit", count(data["num_dropped_for_length"])),
    ("answers cut short, without EOS", count(data["num_truncated_answers"])),
    (
      "prompts cut at their beginning",
      f"{count(data['num_cut_prompts'])}, by "
      f"{count(data['num_cut_prompt_tokens'])} tokens",
    ),
    ("pairs that repeat an earlier one", count(overlaps["num_duplicates"])),
    (
      "pairs whose reverse is there too",
      count(overlaps["num_contradictory"]),
    ),
    (
      "answers both chosen and rejected for one prompt",
      count(overlaps["num_both_chosen_and_rejected"]),
    ),
    (
      "chosen is longer / as long / shorter",
      " / ".join(
        percent(lengths[f"share_{name}"])
        for name in ("chosen_longer", "equally_long", "rejected_longer")
      ),
    ),
  ]
  if held_out is not None:
    of = f" of {count(held_out['num_pairs'])}"
    rows += [
      (
        "held-out pairs whose prompt is trained on",
        count(held_out["num_shared_prompts"]) + of,
      ),
      (
        "held-out pairs that are trained on",
        count(held_out["num_shared_pairs"]) + of,
      ),
      (
        "held-out chosen answers that are trained on",
        count(held_out["num_shared_chosen"]) + of,
      ),
    ]
  return Table(("", "count"), tuple(rows))


def condition(section: _Report) -> Table:
  """The paper's condition in numbers."""
  turned = section["share_of_push_turned_round"]
  tokens_turned = section["share_of_tokens_turned_round"]
  needed = section["lambda_needed"]
  rows = [
    ("tokens behind the edit in both answers", count(section["num_tokens"])),
    (
      "of these pushed down",
      percent(section["share_of_tokens_pushed_down"]),
    ),
    (
      "push down a pair (mean)",
      number(section["push_down_per_pair"].get("mean", 0.0)),
    ),
    (
      "push up a pair (mean)",
      number(section["push_up_per_pair"].get("mean", 0.0)),
    ),
    ("share of the push that is down", percent(section["share_of_push_down"])),
  ]
  rows.append(
    (
      "fall of chosen tokens at a margin of 10 nats",
      f"{number(section['look_ahead_fall'].get('mean', 0.0))} nats a pair",
    )
  )
  if section["head_step_fall"] is not None:
    rows.append(
      (
        "fall of other chosen answers by a step of the output layer",
        f"{number(section['head_step_fall'])} nats a pair",
      )
    )
  if needed["count"]:
    rows.append(
      (
        "lambda needed: median, 90 % of tokens",
        f"{number(needed['median'])}, {number(needed['p90'])}",
      )
    )
  rows += [
    (
      f"turned round by lambda {name}",
      f"{percent(share)} of the push, {percent(tokens_turned[name])} of tokens",
    )
    for name, share in turned.items()
  ]
  return Table(("", ""), tuple(rows))


def plain(table: Table) -> str:
  """A table in columns of spaces."""
  lines = [row for row in (table.header, *table.rows) if any(row)]
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  return "\n".join(
    "  ".join(
      cell.ljust(width) if i == 0 else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(line, widths, strict=True))
    ).rstrip()
    for line in lines
  )


def summary(report: _Report) -> str:
  """The report in short, for a terminal, its verdict last."""
  parts = [answers(report), sharing(report), problems(report)]
  if report["condition"] is not None:
    parts.append(condition(report["condition"]))
  return "\n\n".join([*map(plain, parts), report["verdict"]["sentence"]])


def _row(name, distribution, write=number) -> tuple[str, ...]:
  return (name, *(write(distribution[key]) for key in _QUANTILES))


def _saved(speed_up: float) -> str:
  return percent(1 - 1 / speed_up)
