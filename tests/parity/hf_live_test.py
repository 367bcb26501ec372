"""Every family computes what transformers computes, side by side.

  make test-parity

prints the largest difference of each case.
"""

import json
import shutil

import hf_computations
import numpy as np
import pytest

pytest.importorskip(
  "torch", reason="needs PyTorch: pip install 'dpop_jax[parity]'"
)
import transformers_models  # noqa: E402

from dpop_jax.hf import families, names, weights  # noqa: E402

pytestmark = pytest.mark.parity
CASES = sorted(transformers_models.CASES)


@pytest.fixture(scope="module", params=CASES)
def case(request):
  return request.param


@pytest.fixture(scope="module")
def folder(case, tmp_path_factory):
  path = tmp_path_factory.mktemp(case)
  transformers_models.write(case, path)
  return path


@pytest.fixture(scope="module")
def expected(folder):
  return transformers_models.compute(folder)


@pytest.fixture(scope="module")
def scale(expected):
  return float(np.abs(expected.logits).max())


@pytest.fixture(scope="module")
def computed(folder):
  return hf_computations.compute(folder)


def test_logits(case, computed, expected, scale):
  hf_computations.assert_close(computed.logits, expected.logits, scale)
  difference = np.abs(computed.logits - expected.logits).max()
  print(f"{case}: {difference:.1e} of {scale:.1f}: {difference / scale:.1e}")


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_of_a_padded_batch(folder, computed, scale, side):
  padded = transformers_models.padded_logits(
    transformers_models.read(folder), side
  )
  hf_computations.assert_close(computed.logits, padded, scale)


def test_logits_token_by_token(case, computed, expected, scale):
  hf_computations.assert_close(computed.stepwise_logits, expected.logits, scale)
  # There the first tokens have the short factors in any case, and later keys
  # the long ones: its cache is not what it computes without.
  if case != "phi3_long":
    hf_computations.assert_close(
      computed.stepwise_logits, expected.stepwise_logits, scale
    )


def test_summed_log_probs(computed, expected, scale):
  hf_computations.assert_close(computed.logps, expected.logps, scale)


def test_transformers_continues_from_what_we_save(folder, tmp_path):
  hf_computations.save_again(folder, tmp_path)
  shutil.copy(folder / "config.json", tmp_path)
  saved = transformers_models.read(tmp_path)
  expected = transformers_models.new_tokens(saved)
  np.testing.assert_array_equal(hf_computations.new_tokens(folder), expected)


def test_transformers_computes_the_same_of_a_config_of_ours(
  folder, expected, scale, tmp_path
):
  _, config, params = hf_computations.load(folder)
  hf_config = families.to_hf(config)
  (tmp_path / "config.json").write_text(json.dumps(hf_config))
  parts = names.parts(config, hf_config["model_type"])
  weights.save(params, parts, tmp_path, dtype="float32")
  model = transformers_models.read(tmp_path)
  found = [
    transformers_models.logits(model, tokens)
    for tokens in hf_computations.sequences()
  ]
  hf_computations.assert_close(np.concatenate(found), expected.logits, scale)
