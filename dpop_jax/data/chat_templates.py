"""Chat templates: Jinja programs that write messages out as text."""

import datetime
import os
from collections.abc import Sequence
from typing import Any

from dpop_jax import paths

CHATML = """\
{%- for message in messages -%}
{{- "<|im_start|>" + message["role"] + "\\n" -}}
{{- message["content"] + "<|im_end|>\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|im_start|>assistant\\n" -}}{%- endif -%}
"""
BY_NAME = {"chatml": CHATML}

# What templates take for today. The real day would change the tokens of a data
# set over night, so that a run could not be continued. It is what Llama 3's
# templates take where there is no clock.
_TODAY = datetime.datetime(2024, 7, 26)
_DATE_CODES = "AaBbdeFHIjMmpSYy"


def read(chat_template: str | None) -> str | None:
  """Text of a template that is given as text, path or name.

  Raises:
    ValueError: If it is none of them.
  """
  if chat_template is None or "{" in chat_template:
    return chat_template
  if chat_template in BY_NAME:
    return BY_NAME[chat_template]
  if paths.of(chat_template).is_file():
    return paths.of(chat_template).read_text(encoding="utf-8")
  raise ValueError(
    "data.chat_template should be a Jinja template, the path of one, or one of "
    f"{', '.join(BY_NAME)}, got {chat_template!r}."
  )


def render(
  chat_template: str,
  messages: Sequence[dict[str, str]],
  *,
  add_generation_prompt: bool,
  special_tokens: dict[str, str],
) -> str:
  """Text of a conversation, written as `transformers` does, in its sandbox.

  There are no tools and no documents, and today is always 26 July 2024.

  Args:
    chat_template: Jinja text.
    messages: With `role` and `content`.
    add_generation_prompt: Whether to go on to where an answer begins.
    special_tokens: Text by name, as `{"bos_token": "<s>"}`.

  Raises:
    ValueError: If the template is faulty or refuses the conversation.
  """
  # Else it says at every start that PyTorch, which nobody needs, is missing.
  os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
  import jinja2
  from transformers.utils import chat_template_utils

  tokens: dict[str, Any] = dict(special_tokens)
  try:
    texts, _ = chat_template_utils.render_jinja_template(
      conversations=[list(messages)],
      chat_template=_with_fixed_date(chat_template),
      add_generation_prompt=add_generation_prompt,
      **tokens,
    )
  # A template is a program: what it raises may be anything.
  except (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
  ) as error:
    message = " ".join(str(error).split()).rstrip(".")
    raise ValueError(
      f"The chat template does not take a conversation: {message}."
    ) from error
  return texts[0]


def _with_fixed_date(chat_template: str) -> str:
  """Defines `strftime_now` in front of a template that uses it."""
  if "strftime_now" not in chat_template:
    return chat_template
  replaced = "".join(
    f'.replace("%{code}", "{_TODAY.strftime("%" + code)}")'
    for code in _DATE_CODES
  )
  # The end of the line goes with the block, so that nothing is written.
  return (
    "{% macro strftime_now(format) %}{{ format"
    f"{replaced} }}}}{{% endmacro %}}\n{chat_template}"
  )
