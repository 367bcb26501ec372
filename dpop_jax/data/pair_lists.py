"""Text pairs in the making, and an account of the rows that gave none."""

import collections
import dataclasses
from typing import Any, Literal, get_args

# What happens to a row that gives no pair.
Policy = Literal["skip", "raise"]

_MAX_EXAMPLES = 3


class Account:
  """Counts what gave no pair by reason, or refuses it.

  Attributes:
    skipped: How often each reason was given.
    examples: The first few sentences of each.
  """

  def __init__(self, unusable: Policy):
    """An empty account.

    Args:
      unusable: "skip" counts what gives no pair, "raise" refuses it.
    """
    if unusable not in get_args(Policy):
      raise ValueError(
        f"unusable must be one of {get_args(Policy)}, got {unusable!r}."
      )
    self.skipped: collections.Counter[str] = collections.Counter()
    self.examples: dict[str, list[str]] = {}
    self._unusable = unusable

  def skip(self, reason: str, sentence: str) -> None:
    """Counts `reason`.

    Raises:
      ValueError: The policy is "raise"; the message is `sentence`.
    """
    if self._unusable == "raise":
      raise ValueError(sentence)
    self.note(reason, sentence)

  def note(self, reason: str, sentence: str) -> None:
    """Counts what was left out because an option asks for it."""
    self.skipped[reason] += 1
    examples = self.examples.setdefault(reason, [])
    if len(examples) < _MAX_EXAMPLES:
      examples.append(sentence)

  def first_example(self) -> str:
    """A sentence about something that gave no pair, or "" if all did."""
    return next((found[0] for found in self.examples.values()), "")


@dataclasses.dataclass
class PairList:
  """Prompt, chosen and rejected of each pair, and what gave none."""

  pairs: list[dict[str, Any]]
  skipped: collections.Counter[str]
