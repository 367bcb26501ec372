"""DPOP of a 7B, 34B or 72B model on the paper's three sets together. Not run.

  python -m dpop_jax.cli.train --config=configs/smaug_mixture.py:34b \
    --workdir=WORKDIR --config.run.init_from=START \
    --config.data.tokenizer=TOKENIZER_FOLDER \
    --config.data.weights="(1.0, 4.0, 0.5)"

The authors trained Smaug on these sets "as well as other existing datasets" and
do not say in which proportions. Here each pair comes once in an epoch; a weight
is how often those of a set do. For other sets as well, say

  --config.data.train="('runs/pairs/metamath', 'MORE.jsonl')" \
  --config.data.weights="(1.0, 1.0)"

The pairs are those that docs/building_pairs.md builds into runs/pairs, and the
rest is as in smaug_7b.py, smaug_34b.py and smaug_72b.py; docs/recipe.md walks
through it.
"""

import pathlib
import runpy

import ml_collections

_SIZES = ("7b", "34b", "72b")
_SETS = ("metamath", "arc", "hellaswag")
_WEIGHTS = (1.0, 1.0, 1.0)  # A guess.
_MAX_LENGTH = 2048  # A guess: enough for four shots of each.


def get_config(size: str = "7b") -> ml_collections.ConfigDict:
  """The run of one size: "7b", "34b" or "72b"."""
  if size not in _SIZES:
    raise ValueError(
      f"configs/smaug_mixture.py has the sizes {', '.join(_SIZES)}, not "
      f"{size!r}."
    )
  base = pathlib.Path(__file__).with_name(f"smaug_{size}.py")
  config = runpy.run_path(str(base))["get_config"]()
  # Made for one file, as text.
  del config.data.train
  config.data.train = tuple(f"runs/pairs/{name}" for name in _SETS)
  config.data.weights = _WEIGHTS
  config.data.max_length = _MAX_LENGTH
  # A row holds both answers of a pair.
  config.batch.row_length = 2 * _MAX_LENGTH
  return config
