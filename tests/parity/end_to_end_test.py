"""Import, train, export, and transformers goes on with what came out."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

torch = pytest.importorskip(
  "torch", reason="needs PyTorch: pip install 'dpop_jax[parity]'"
)
import transformers  # noqa: E402

from dpop_jax import inputs, model_folders, saved_config, sharding, steps  # noqa: E402
from dpop_jax.data import plan as plan_lib  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.slow]
ROOT = pathlib.Path(__file__).parents[2]


def run(command, *arguments):
  environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
  result = subprocess.run(
    [sys.executable, "-m", f"dpop_jax.cli.{command}", *map(str, arguments)],
    cwd=ROOT,
    env=environment,
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.returncode == 0, result.stderr
  return result.stdout


@pytest.fixture(scope="module")
def exported(shared_data, tmp_path_factory):
  """Workdir and folder of stories260K after 20 steps on real ARC pairs."""
  root = tmp_path_factory.mktemp("end_to_end")
  start, workdir, out = root / "start", root / "run", root / "out"
  source = shared_data / "models" / "stories260K"
  run("import_hf", f"--source={source}", f"--out={start}")
  pairs = root / "pairs"
  rows = shared_data / "arc" / "ARC-Challenge-train.jsonl"
  run("build_pairs", "--kind=arc", f"--source={rows}", f"--out={pairs}")
  run(
    "train",
    "--config=configs/finetune_cpu.py",
    f"--workdir={workdir}",
    f"--config.run.init_from={start}",
    f"--config.data.train={pairs}/pairs.jsonl",
    "--config.data.max_pairs=200",
    "--config.optimizer.peak_learning_rate=1e-4",
    "--config.batch.batch_size=4",
  )
  run("export_hf", f"--workdir={workdir}", f"--out={out}")
  return workdir, out


def score(model, pair):
  """Summed log-probs of the chosen and the rejected answer, in PyTorch."""
  logps = []
  for answer in (pair.chosen, pair.rejected):
    tokens = torch.tensor(np.concatenate([pair.prompt, answer])[None]).long()
    with torch.no_grad():
      logits = model(tokens).logits[0, :-1].log_softmax(-1)
    scores = logits.gather(-1, tokens[0, 1:, None])[:, 0]
    logps.append(float(scores[len(pair.prompt) - 1 :].double().sum()))
  return logps


def our_scores(workdir, config, pairs):
  """Summed log-probs [pairs, 2], by the function that training uses."""
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
  params = model_folders.load_params(workdir, config.model, mesh)
  plan = plan_lib.Plan(
    pairs, config.batch, seed=0, num_steps=4, is_shuffled=False
  )
  logps_of = jax.jit(steps.region_logps, static_argnames="config")
  found = np.zeros((len(pairs), 2))
  for step in range(-(-len(pairs) // config.batch.batch_size)):
    batch = plan.step(step).batch
    for i in range(len(batch.tokens)):
      rows = jax.tree.map(lambda x, i=i: x[i], batch)
      logps = logps_of(params, rows, config=config.model).sum(axis=-1)
      is_pair = rows.pair_weights > 0
      found[rows.pair_ids[is_pair]] = np.asarray(logps)[is_pair]
  return found


def test_log_probs_of_the_trained_model_are_those_of_transformers(exported):
  workdir, out = exported
  model = transformers.AutoModelForCausalLM.from_pretrained(
    out, dtype=torch.float32, attn_implementation="eager"
  )
  config = saved_config.load(str(workdir))
  pairs = inputs.load_data(config, str(workdir)).eval
  expected = np.array([score(model, pairs[i]) for i in range(len(pairs))])
  found = our_scores(str(workdir), config, pairs)
  print(np.abs(found - expected).max(), found.shape, found.min())
  # In nats per answer. Sums of thousands of nats float32 does not know as well.
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_transformers_continues_as_our_generate_does(exported):
  workdir, out = exported
  prompt = "Once upon a time"
  ours = run(
    "generate",
    f"--workdir={workdir}",
    f"--prompt={prompt}",
    "--sampling.max_new_tokens=40",
  )
  tokenizer = transformers.AutoTokenizer.from_pretrained(out)
  model = transformers.AutoModelForCausalLM.from_pretrained(
    out, dtype=torch.float32, attn_implementation="eager"
  )
  encoded = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
  ids = encoded["input_ids"]
  begins = tokenizer.bos_token_id
  generation = json.loads((out / "generation_config.json").read_text())
  assert generation["bos_token_id"] == begins
  ids = torch.cat([torch.tensor([[begins]]), ids], dim=1)
  new = model.generate(
    ids,
    attention_mask=torch.ones_like(ids),
    max_new_tokens=40,
    do_sample=False,
    pad_token_id=0,
  )
  text = tokenizer.decode(new[0], skip_special_tokens=True)
  assert text == prompt + ours.rstrip("\n")
