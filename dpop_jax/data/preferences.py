"""The layouts of preference and supervised data, brought to one.

Preference rows are understood as any of

  {"prompt": "2+2", "chosen": " = 4", "rejected": " = 5"}
  {"prompt": [message, ...], "chosen": [message], "rejected": [message]}
  {"chosen": [message, ...], "rejected": [message, ...]}    implicit prompt
  {"conversations": [message, ...], "chosen": message, "rejected": message}
  {"chosen": "\\n\\nHuman: ...\\n\\nAssistant: ...", "rejected": ...}
  {"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8]}

and supervised rows as any of these without `rejected`, or as

  {"prompt": "2+2", "completion": " = 4"}     also `answer` or `response`
  {"messages": [message, ...]}                also `conversations`

The assistant's last turn is the answer, and what goes before it the prompt.
Only answers are scored, so a pair whose answers are several turns, with turns
of the user in between, is refused.

A message is {"role": "user", "content": "Hi"} or {"from": "human", "value":
"Hi"}; a list with one message may be written as its text or without the list.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

Message = dict[str, str]

_ROLES = {
  "system": "system",
  "user": "user",
  "human": "user",
  "assistant": "assistant",
  "gpt": "assistant",
}
_ID_KEYS = (
  ("prompt_ids", "chosen_ids", "rejected_ids"),
  ("prompt_input_ids", "chosen_input_ids", "rejected_input_ids"),
)
_COMPLETION_KEYS = ("completion", "answer", "response", "chosen")
_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


class BadRow(ValueError):
  """A row that cannot be used.

  Attributes:
    reason: A few words under which such rows are counted.
  """

  def __init__(self, reason: str, detail: str):
    super().__init__(f"{reason}: {detail}")
    self.reason = reason


class Example(NamedTuple):
  """A prompt with two answers, or with one for supervised data.

  Attributes:
    prompt: Text; messages for a chat template; or token ids.
    chosen: Text (of the assistant's turn, if the prompt is messages) or token
      ids.
    rejected: The same, or None for supervised data.
  """

  prompt: str | list[Message] | list[int]
  chosen: str | list[int]
  rejected: str | list[int] | None

  @property
  def is_chat(self) -> bool:
    return bool(self.prompt) and isinstance(self.prompt[0], dict)

  @property
  def is_tokenised(self) -> bool:
    return isinstance(self.chosen, list)


def parse_preference(value: Any) -> Example:
  """One row of preference data.

  Raises:
    BadRow: If the row is in none of the layouts above, an answer is empty, or
      the answers are the same.
  """
  row = _as_row(value)
  for keys in _ID_KEYS:
    if keys[1] in row:
      example = Example(*(_ids(row, key) for key in keys))
      break
  else:
    _require_pair(row)
    sides = [
      _split(_prompt_of(row), row[key], key) for key in ("chosen", "rejected")
    ]
    if sides[0][0] != sides[1][0]:
      raise BadRow(
        "different prompts",
        "`chosen` and `rejected` differ before their last turn, so they do not "
        "answer the same prompt",
      )
    example = Example(sides[0][0], sides[0][1], sides[1][1])
  _check_answer(example.chosen, "chosen")
  _check_answer(example.rejected, "rejected")
  if example.chosen == example.rejected:
    raise BadRow("identical answers", "`chosen` and `rejected` are the same")
  return example


def parse_supervised(value: Any) -> Example:
  """One row of supervised data; of preference data, `chosen` is the answer.

  Raises:
    BadRow: If the row is in none of the layouts above, or the answer is empty.
  """
  return _supervised(_as_row(value))


def parse_supervised_turns(value: Any) -> list[Example]:
  """One row of supervised data; each of the assistant's turns is an answer.

    messages    user 1, assistant 1, user 2, assistant 2, user 3
    examples    user 1 -> assistant 1
                user 1, assistant 1, user 2 -> assistant 2

  Turns of `messages` or `conversations` only; rows that say by themselves where
  the answer begins give one example, as by `parse_supervised`. The first turn
  of a conversation has nothing before it to be predicted from.

  Raises:
    BadRow: As `parse_supervised`, or if one of the answers is empty.
  """
  row = _as_row(value)
  key = _conversation_key(row)
  if key is None or not isinstance(row[key], list):
    return [_supervised(row)]
  turns = _add_system(_conversation(row[key], key), row)
  examples = [
    Example(turns[:i], turn["content"], None)
    for i, turn in enumerate(turns)
    if turn["role"] == "assistant" and i
  ]
  if not examples:
    raise BadRow(
      "no answer", f"`{key}` has no turn of the assistant behind another turn"
    )
  for example in examples:
    _check_answer(example.chosen, key)
  return examples


def _supervised(row):
  for prompt_key, chosen_key, _ in _ID_KEYS:
    if chosen_key in row:
      example = Example(_ids(row, prompt_key), _ids(row, chosen_key), None)
      _check_answer(example.chosen, chosen_key)
      return example
  _refuse_unpaired(row)
  for key in _COMPLETION_KEYS:
    if key in row:
      prompt, answer = _split(_prompt_of(row), row[key], key)
      break
  else:
    key = _conversation_key(row)
    if key is None:
      raise BadRow(
        "missing key",
        "supervised rows have `prompt` and `completion`, or `messages`; this "
        f"one has {_key_names(row)}",
      )
    turns = row[key]
    if isinstance(turns, list):
      turns = _add_system(_conversation(turns, key), row)
    prompt, answer = _split(None, turns, key)
  _check_answer(answer, key)
  return Example(prompt, answer, None)


def _conversation_key(row):
  """Of a conversation whose end is the answer; None if there is none."""
  if any(key in row for pair in _ID_KEYS for key in pair[1:]) or any(
    key in row for key in _COMPLETION_KEYS
  ):
    return None
  return next((k for k in ("messages", "conversations") if k in row), None)


def _as_row(value):
  if not isinstance(value, Mapping):
    raise BadRow(
      "wrong type", f"a row should be an object, not {_type_name(value)}"
    )
  # Tables have null where a row of another layout has no key.
  return {key: cell for key, cell in value.items() if cell is not None}


def _key_names(row):
  return ", ".join(f"`{key}`" for key in row) or "no keys"


def _type_name(value):
  return {
    str: "text",
    list: "a list",
    dict: "an object",
    bool: "a boolean",
  }.get(type(value), f"a {type(value).__name__}")


def _refuse_unpaired(row):
  if "completion" in row and "label" in row:
    raise BadRow(
      "unpaired",
      "one `completion` with a `label` (as for KTO) is not a pair; pairs have "
      "`chosen` and `rejected`",
    )


def _require_pair(row):
  _refuse_unpaired(row)
  missing = [f"`{key}`" for key in ("chosen", "rejected") if key not in row]
  if missing:
    raise BadRow(
      "missing key", f"{' and '.join(missing)} not among {_key_names(row)}"
    )


def _prompt_of(row):
  """Text, messages, or None where the answers hold the prompt."""
  key = "prompt" if "prompt" in row else "conversations"
  prompt = row.get(key)
  if isinstance(prompt, str):
    prompt = _text(prompt, key)
  elif prompt is not None:
    prompt = _conversation(prompt, key)
  return _add_system(prompt, row)


def _add_system(prompt, row):
  """The prompt with the row's `system`, if it has one, as its first turn."""
  system = row.get("system")
  if not system:
    return prompt
  turn = {"role": "system", "content": _text(system, "system")}
  if isinstance(prompt, list) and prompt[0] == turn:
    return prompt
  if not isinstance(prompt, list) or prompt[0]["role"] == "system":
    raise BadRow(
      "misplaced system",
      "`system` goes with a prompt of messages that has no system turn",
    )
  return [turn, *prompt]


def _split(prompt, answer, key):
  """Prompt and answer, of which `answer` may hold both."""
  if isinstance(answer, str):
    answer = _text(answer, key)
    return _split_dialogue(answer, key) if prompt is None else (prompt, answer)
  turns = _conversation(
    [answer] if isinstance(answer, Mapping) else answer, key
  )
  before, last = turns[:-1], turns[-1]
  if last["role"] != "assistant":
    raise BadRow("no answer", f"`{key}` ends with a turn of the {last['role']}")
  if isinstance(prompt, str):
    if not before:
      before = [{"role": "user", "content": prompt}]
    elif before[0]["role"] == "assistant":
      raise _several_turns(key)
    elif all(turn["content"] != prompt for turn in before):
      raise BadRow("different prompts", f"`prompt` is not a turn of `{key}`")
  elif prompt is not None:
    if before and before != prompt:
      raise _several_turns(key)
    before = prompt
  if not before:
    raise BadRow(
      "missing key", f"`{key}` is one turn, and there is no `prompt`"
    )
  return before, last["content"]


def _several_turns(key):
  return BadRow(
    "several turns",
    f"`{key}` should be one turn of the assistant, alone or behind all of "
    "`prompt`, for what the user says is not scored",
  )


def _split_dialogue(text, key):
  """Text with Human: and Assistant: turns, as in Anthropic's HH data."""
  before, turn, answer = text.rpartition(_ASSISTANT)
  if not turn or not text.startswith(_HUMAN) or _HUMAN in answer:
    raise BadRow(
      "missing key",
      f"there is no `prompt`, and `{key}` is text without Human: and "
      "Assistant: turns, so where the answer begins is unknown",
    )
  return before + turn, answer


def _conversation(turns, key):
  if not isinstance(turns, list) or not turns:
    raise BadRow(
      "wrong type",
      f"`{key}` should be text or a list of messages, not "
      f"{'an empty list' if turns == [] else _type_name(turns)}",
    )
  return [_message(turn, key) for turn in turns]


def _message(turn, key):
  if not isinstance(turn, Mapping):
    raise BadRow(
      "wrong type",
      f"a message of `{key}` should be an object, not {_type_name(turn)}",
    )
  role_key, content_key = (
    ("from", "value") if "from" in turn else ("role", "content")
  )
  for name in (role_key, content_key):
    if turn.get(name) is None:
      raise BadRow("missing key", f"a message of `{key}` has no `{name}`")
  role, content = turn[role_key], turn[content_key]
  if turn.get("tool_calls") or not isinstance(role, str) or role not in _ROLES:
    raise BadRow(
      "unknown role",
      f"a message of `{key}` is of {role!r}; only system, user and assistant "
      "turns of plain text are supported",
    )
  return {"role": _ROLES[role], "content": _text(content, key)}


def _text(text, key):
  if not isinstance(text, str):
    raise BadRow(
      "wrong type", f"`{key}` should hold text, not {_type_name(text)}"
    )
  try:
    text.encode("utf-8")
  except UnicodeEncodeError as error:
    raise BadRow(
      "not Unicode", f"`{key}` has half a surrogate pair at {error.start}"
    ) from error
  return text


def _ids(row, key):
  if key not in row:
    raise BadRow("missing key", f"`{key}` not among {_key_names(row)}")
  ids = row[key]
  if not isinstance(ids, list) or not all(type(i) is int for i in ids):
    raise BadRow("wrong type", f"`{key}` should be a list of integers")
  return ids


def _check_answer(answer, key):
  if not (answer.strip() if isinstance(answer, str) else answer):
    raise BadRow("empty answer", f"`{key}` is empty")
