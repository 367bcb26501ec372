"""Names in an error: a few of many, so that it stays one sentence."""

from collections.abc import Iterable

_MAX_NAMES = 4


def listed(names: Iterable[str]) -> str:
  """The first of the names, and how many more there are."""
  names = list(names)
  more = len(names) - _MAX_NAMES
  text = ", ".join(names[:_MAX_NAMES])
  return f"{text} and {more} more" if more > 0 else text
