"""Every family computes what transformers computed, as recorded by
tests/parity/record.py; and real weights tell the story that they should.
"""

import json
import pathlib

import hf_computations
import numpy as np
import pytest
import safetensors

from dpop_jax import generate
from dpop_jax.data import tokenizers
from dpop_jax.hf import families

FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "hugging_face"
CASES = sorted(path.name for path in FIXTURES.iterdir())


def test_every_family_is_recorded():
  recorded = {
    json.loads((FIXTURES / case / "config.json").read_text())["model_type"]
    for case in CASES
  }
  assert recorded == families.FAMILIES.keys()


@pytest.mark.parametrize("case", CASES)
def test_logits_and_log_probs_are_those_of_transformers(case):
  expected = np.load(FIXTURES / case / "expected.npz")
  computed = hf_computations.compute(FIXTURES / case, is_optimized=False)
  scale = np.abs(expected["logits"]).max()
  hf_computations.assert_close(computed.logits, expected["logits"], scale)
  hf_computations.assert_close(
    computed.stepwise_logits, expected["logits"], scale
  )
  hf_computations.assert_close(computed.logps, expected["logps"], scale)


# Generation is the same code for all; these have windows, two rotations and
# experts.
@pytest.mark.parametrize("case", ["qwen2_windows", "gemma3", "mixtral"])
def test_new_tokens_are_those_of_transformers(case):
  expected = np.load(FIXTURES / case / "expected.npz")["new_tokens"]
  assert len(expected) > 4
  found = hf_computations.new_tokens(FIXTURES / case)
  np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("case", CASES)
def test_what_is_loaded_is_saved_bit_by_bit(case, tmp_path):
  hf_computations.save_again(FIXTURES / case, tmp_path)
  # Shapes, dtypes and bytes, as the library of the format reads them.
  original, copy = (
    dict(safetensors.deserialize((folder / "model.safetensors").read_bytes()))
    for folder in (FIXTURES / case, tmp_path)
  )
  assert copy == original


def test_stories260k_tells_the_story_of_its_page(shared_data):
  folder = shared_data / "models" / "stories260K"
  page = (folder / "stories260K.md").read_text()
  _, _, rest = page.partition("-t 0.0\n")
  story, _, _ = rest.partition("\n```")
  tokenizer = tokenizers.load(str(folder))
  _, config, params = hf_computations.load(folder)
  # As many as llama2.c makes by default.
  sampling = generate.SamplingConfig(max_new_tokens=256, temperature=0.0)
  (tokens,) = generate.generate(params, config, [[1]], sampling, eos_id=2)
  assert tokenizer.decode(tokens) == story
