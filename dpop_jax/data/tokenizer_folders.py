"""What a tokenizer's folder says besides its vocabulary."""

import json
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

# The named tokens of Hugging Face's files.
_NAMED_TOKENS = (
  "bos_token",
  "eos_token",
  "unk_token",
  "sep_token",
  "pad_token",
  "cls_token",
  "mask_token",
)


class AddedToken(NamedTuple):
  """A token that is not in the vocabulary's own file.

  Attributes:
    text: What stands for it.
    index: Its id.
    takes_space_before: Whether white space in front of it is part of it.
    takes_space_behind: The same behind it.
  """

  text: str
  index: int
  takes_space_before: bool = False
  takes_space_behind: bool = False


class Settings(NamedTuple):
  """What the files of a folder say.

  Attributes:
    tokens: Text of named tokens, as `{"bos_token": "<s>"}`; None where a file
      says that there is none.
    added_tokens: Tokens that are declared with their ids.
    adds_bos: Whether sequences begin with BOS; None if nothing says so.
    chat_template: Jinja text, or None.
    num_templates: How many templates there are, the default one or not.
  """

  tokens: dict[str, str | None]
  added_tokens: tuple[AddedToken, ...]
  adds_bos: bool | None
  chat_template: str | None
  num_templates: int


def read(root: pathlib.Path) -> Settings:
  """Reads the settings of a folder; a file has none beside it.

  Raises:
    ValueError: If a file of the folder is broken.
  """
  if not root.is_dir():
    return Settings({}, (), None, None, 0)
  config = read_json(root / "tokenizer_config.json")
  tokens = _named_tokens(read_json(root / "special_tokens_map.json"))
  tokens |= _named_tokens(config)
  templates = _templates(root, config)
  return Settings(
    tokens,
    tuple(_added_tokens(root, config)),
    config.get("add_bos_token"),
    templates.get("default"),
    len(templates),
  )


def read_json(file: pathlib.Path) -> dict[str, Any]:
  """The object in a file; an empty one if there is no such file.

  Raises:
    ValueError: If there is something else in it.
  """
  if not file.is_file():
    return {}
  try:
    value = json.loads(file.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(
      f"{file} of data.tokenizer is no JSON: {error}."
    ) from error
  if not isinstance(value, dict):
    raise ValueError(f"{file} of data.tokenizer should hold a JSON object.")
  return value


def _named_tokens(values):
  tokens = {key: values[key] for key in _NAMED_TOKENS if key in values}
  return {
    key: token["content"] if isinstance(token, dict) else token
    for key, token in tokens.items()
  }


def _templates(root: pathlib.Path, config: dict[str, Any]) -> dict[str, str]:
  """Chat templates by name; what comes later goes before."""
  # Of processors, for models of images.
  templates = _named(read_json(root / "chat_template.json"), root)
  templates |= _named(config, root)
  for file in sorted((root / "additional_chat_templates").glob("*.jinja")):
    templates[file.stem] = file.read_text(encoding="utf-8")
  if (root / "chat_template.jinja").is_file():
    text = (root / "chat_template.jinja").read_text(encoding="utf-8")
    templates["default"] = text
  return templates


def _named(config, root):
  templates = config.get("chat_template") or ()
  if isinstance(templates, str):
    return {"default": templates}
  try:
    return {str(each["name"]): str(each["template"]) for each in templates}
  except (KeyError, TypeError) as error:
    raise ValueError(
      f"The chat templates of data.tokenizer {root} should be text, or objects "
      "with `name` and `template`."
    ) from error


def _added_tokens(
  root: pathlib.Path, config: dict[str, Any]
) -> Iterator[AddedToken]:
  declared = config.get("added_tokens_decoder") or {}
  try:
    for index, token in declared.items():
      if token.get("single_word"):
        raise ValueError(f"the token {token['content']!r} is single_word")
      yield AddedToken(
        token["content"],
        int(index),
        bool(token.get("lstrip")),
        bool(token.get("rstrip")),
      )
    texts = {token["content"] for token in declared.values()}
    for text, index in read_json(root / "added_tokens.json").items():
      if text not in texts:
        yield AddedToken(text, int(index))
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise ValueError(
      f"The added tokens of data.tokenizer {root} cannot be used: {error}."
    ) from error
