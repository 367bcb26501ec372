"""Writes tests/fixtures/hugging_face anew; needs PyTorch.

  PYTHONPATH=.:tests python tests/parity/record.py

For each case a model as transformers saves it, and in expected.npz what it
computes: the fields of `hf_computations.Computed` and `new_tokens`.
"""

import pathlib
import shutil

import numpy as np
import transformers_models

FIXTURES = pathlib.Path(__file__).parent.parent / "fixtures" / "hugging_face"


def main():
  shutil.rmtree(FIXTURES, ignore_errors=True)
  for case in transformers_models.CASES:
    folder = FIXTURES / case
    transformers_models.write(case, folder)
    # Nothing reads it here.
    (folder / "generation_config.json").unlink()
    computed = transformers_models.compute(folder)
    np.savez_compressed(
      folder / "expected.npz",
      # Of its own stepwise logits nothing is kept: they are the same.
      logits=computed.logits,
      logps=computed.logps,
      new_tokens=transformers_models.new_tokens(
        transformers_models.read(folder)
      ),
    )


if __name__ == "__main__":
  main()
