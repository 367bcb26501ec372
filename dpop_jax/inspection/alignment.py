"""Which tokens behind the edit stand in both answers of a pair."""

from typing import NamedTuple

import numpy as np
from rapidfuzz.distance import Levenshtein

from dpop_jax import pairs as pairs_lib
from dpop_jax.data import forests


class Alignment(NamedTuple):
  """The same token in both answers, behind different beginnings.

  Attributes:
    chosen: int64 [tokens]; places in the chosen answer, ascending.
    rejected: int64 [tokens]; the places in the rejected answer.
  """

  chosen: np.ndarray
  rejected: np.ndarray


def align(pair: pairs_lib.TokenPair) -> Alignment:
  """Tokens behind the first difference that a shortest edit script keeps.

    chosen      3 7 + 5 = 4 2 \\n 4 2 + 1 6 ...
    rejected    3 7 + 5 = 4 7 \\n 4 2 + 1 6 ...
    aligned                   *  * * * * *

  With one edit these are the common end of the answers. With several, tokens
  between them count as well; with answers that have little in common, it is
  chance which tokens do, but for the last (EOS).
  """
  common = forests.common_prefix_length(pair.chosen, pair.rejected)
  script = Levenshtein.opcodes(
    pair.chosen[common:].tolist(), pair.rejected[common:].tolist()
  )
  kept = [block for block in script if block.tag == "equal"]

  def places(starts_and_ends) -> np.ndarray:
    spans = [np.arange(*span) for span in starts_and_ends]
    return common + np.concatenate([np.zeros(0, np.int64), *spans])

  return Alignment(
    places((block.src_start, block.src_end) for block in kept),
    places((block.dest_start, block.dest_end) for block in kept),
  )
