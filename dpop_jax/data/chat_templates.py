"""Chat templates: Jinja programs that write messages out as text."""

import os
import pathlib
from collections.abc import Sequence

CHATML = """\
{%- for message in messages -%}
{{- "<|im_start|>" + message["role"] + "\\n" -}}
{{- message["content"] + "<|im_end|>\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|im_start|>assistant\\n" -}}{%- endif -%}
"""
BY_NAME = {"chatml": CHATML}


def read(chat_template: str | None) -> str | None:
  """Text of a template that is given as text, path or name.

  Raises:
    ValueError: If it is none of them.
  """
  if chat_template is None or "{" in chat_template:
    return chat_template
  if chat_template in BY_NAME:
    return BY_NAME[chat_template]
  if pathlib.Path(chat_template).is_file():
    return pathlib.Path(chat_template).read_text(encoding="utf-8")
  raise ValueError(
    "data.chat_template should be a Jinja template, the path of one, or one of "
    f"{', '.join(BY_NAME)}, got {chat_template!r}."
  )


def render(
  chat_template: str,
  messages: Sequence[dict[str, str]],
  *,
  add_generation_prompt: bool,
  bos_token: str,
  eos_token: str,
) -> str:
  """Text of a conversation, written as `transformers` does, in its sandbox.

  Args:
    chat_template: Jinja text.
    messages: With `role` and `content`.
    add_generation_prompt: Whether to go on to where an answer begins.
    bos_token: For templates that write it.
    eos_token: For templates that write it.

  Raises:
    ValueError: If the template is faulty or refuses the conversation.
  """
  # Else it says at every start that PyTorch, which nobody needs, is missing.
  os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
  import jinja2
  from transformers.utils import chat_template_utils

  try:
    texts, _ = chat_template_utils.render_jinja_template(
      conversations=[list(messages)],
      chat_template=chat_template,
      add_generation_prompt=add_generation_prompt,
      bos_token=bos_token,
      eos_token=eos_token,
    )
  # A template is a program: what it raises may be anything.
  except (jinja2.TemplateError, TypeError, AttributeError, KeyError) as error:
    raise ValueError(
      f"The chat template does not take a conversation: {error}."
    ) from error
  return texts[0]
