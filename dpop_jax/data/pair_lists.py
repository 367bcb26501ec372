"""Text pairs in the making, and an account of the rows that gave none."""

import collections
from typing import Literal, get_args

# What happens to a row that gives no pair.
Policy = Literal["skip", "raise"]


class PairList:
  """Collects pairs; rows that give none are counted by reason, or refused.

  Attributes:
    pairs: Prompt, chosen and rejected of each pair, in the order they came.
    skipped: How often each reason was given.
  """

  def __init__(self, unusable: Policy):
    """An empty list.

    Args:
      unusable: "skip" counts what gives no pair, "raise" refuses it.
    """
    if unusable not in get_args(Policy):
      raise ValueError(
        f"unusable must be one of {get_args(Policy)}, got {unusable!r}."
      )
    self.pairs: list[dict[str, str]] = []
    self.skipped: collections.Counter[str] = collections.Counter()
    self._unusable = unusable

  def add(self, *, prompt: str, chosen: str, rejected: str) -> None:
    self.pairs.append(
      {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    )

  def skip(self, reason: str, sentence: str) -> None:
    """Counts `reason`.

    Raises:
      ValueError: The policy is "raise"; the message is `sentence`.
    """
    if self._unusable == "raise":
      raise ValueError(sentence)
    self.skipped[reason] += 1
