"""DPOP of Llama-2-7B-Chat's shape on one of the paper's three sets. Not run.

  python -m dpop_jax.cli.train --config=configs/paper_sets.py:metamath \
    --workdir=WORKDIR --config.run.init_from=START \
    --config.data.tokenizer=TOKENIZER_FOLDER

or with :arc or :hellaswag, or with :sft for supervised training on the chosen
answers of all three, where START has not had any. The pairs are those that
docs/building_pairs.md builds into runs/pairs. Everything but the data is as in
smaug_7b.py, which says what is the paper's and what is a guess; docs/recipe.md
walks through it.
"""

import pathlib
import runpy

import ml_collections

# Of a pair, in tokens. Guesses: enough for four shots of each.
_MAX_LENGTHS = {"metamath": 2048, "arc": 1024, "hellaswag": 1024}


def get_config(name: str = "metamath") -> ml_collections.ConfigDict:
  """The run on one set, "metamath", "arc" or "hellaswag", or "sft"."""
  if name not in (*_MAX_LENGTHS, "sft"):
    raise ValueError(
      f"configs/paper_sets.py has the sets {', '.join(_MAX_LENGTHS)} and "
      f"sft, not {name!r}."
    )
  base = pathlib.Path(__file__).with_name("smaug_7b.py")
  config = runpy.run_path(str(base))["get_config"]()
  if name == "sft":
    # Made for one file and for pairs.
    del config.data.train
    config.data.train = tuple(f"runs/pairs/{name}" for name in _MAX_LENGTHS)
    config.data.max_length = max(_MAX_LENGTHS.values())
    config.batch.row_length = config.data.max_length
    config.loss.name = "sft"
    config.loss.beta = config.loss.dpop_lambda = None
    config.optimizer.peak_learning_rate = 2e-5  # A guess.
    return config
  config.data.train = f"runs/pairs/{name}"
  config.data.max_length = _MAX_LENGTHS[name]
  # A row holds both answers of a pair.
  config.batch.row_length = 2 * _MAX_LENGTHS[name]
  return config
