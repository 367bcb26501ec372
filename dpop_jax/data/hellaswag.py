"""HellaSwag's contexts with their endings: one pair per wrong ending.

The prompt is the context, `ctx`, as it stands; an answer is an ending with the
space in front of it, or without one if it begins with punctuation that closes:

  prompt    A man is sitting on a roof. he
  chosen     starts pulling up roofing on a roof.
  rejected   is ripping level tiles off.

The parts that come from WikiHow hold the marks [header], [title], [step] and
[substeps]; `clean` takes them out. Pal et al. do not say what their prompt was;
a public rebuild of their pairs has `ctx` as well.

References:
  Zellers et al., 2019, https://arxiv.org/abs/1905.07830.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any

from dpop_jax.data import few_shot, multiple_choice, pair_builder, pair_tasks

_TITLE = re.compile(r"[.:;,!?]?\s*\[title\]\s*")
_MARK = re.compile(r"\[(?:header|title|step|substeps)\]\s*")
# An ending that begins like this follows the context directly.
_CLOSING = re.compile(r"[,.;:!?)\]]|'(?:s|re|ve|ll|d|t|m)\b|n't\b")


def make_task(
  row: Mapping[str, Any], seed: int = 0, *, strip_brackets: bool = False
) -> pair_tasks.Task:
  """A pair for each wrong ending.

  Args:
    row: "ctx" (or "ctx_a" and "ctx_b"), "endings", of any number from two on,
      and "label", the index of the right one as a number or its digits.
    seed: Nothing here is random.
    strip_brackets: Whether to `clean` context and endings.

  Raises:
    pair_tasks.Unusable: Something is missing or does not fit together.
  """
  del seed
  context = question_of(row, strip_brackets=strip_brackets)
  endings = row.get("endings")
  if isinstance(endings, str) or not hasattr(endings, "__len__"):
    raise _bad(f"`endings` should be a list of texts, got {endings!r:.80}")
  endings = list(endings or ())
  if len(endings) < 2:
    raise _bad(f"`endings` should hold two or more texts, got {endings!r}")
  multiple_choice.check_choices(endings)
  label = str(row.get("label")).strip()
  if not label.isdecimal() or int(label) >= len(endings):
    raise _bad(
      f"`label` should be an index from 0 to {len(endings) - 1}, got "
      f"{row.get('label')!r}; the test part of HellaSwag has none"
    )
  if strip_brackets:
    endings = [clean(ending) for ending in endings]
    multiple_choice.check_choices(endings)
  return multiple_choice.task_of(
    context,
    endings,
    int(label),
    answers=[_with_space(ending) for ending in endings],
  )


def question_of(row: Mapping[str, Any], *, strip_brackets: bool = False) -> str:
  """The context.

  Raises:
    pair_tasks.Unusable: There is none.
  """
  if row.get("ctx") is None and isinstance(row.get("ctx_a"), str):
    # What `ctx` is in every row of the original.
    context = f"{row['ctx_a']} {row.get('ctx_b') or ''}".strip()
    row = {"ctx": context}
  context = pair_tasks.required_text(row, "ctx").rstrip()
  return clean(context) if strip_brackets else context


def clean(text: str) -> str:
  """The text without the marks of its WikiHow parts.

  A title becomes a sentence of its own: "How to iron [title] Fill it" becomes
  "How to iron. Fill it".
  """
  text = _TITLE.sub(". ", text.strip())
  text = _MARK.sub("", text.removeprefix(". "))
  return re.sub(r" {2,}", " ", text).strip()


def kind(*, strip_brackets: bool) -> pair_builder.Kind:
  """How HellaSwag's rows are read, with or without the marks of WikiHow."""
  return pair_builder.Kind(
    functools.partial(make_task, strip_brackets=strip_brackets),
    functools.partial(question_of, strip_brackets=strip_brackets),
    few_shot.CONTINUATION,
  )


def _with_space(ending):
  ending = ending.strip()
  return ending if _CLOSING.match(ending) else f" {ending}"


def _bad(detail):
  return pair_tasks.Unusable(pair_tasks.BAD_ROW, detail)
