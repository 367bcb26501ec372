"""Kept log-probs of the reference: those of the step, and never stale ones."""

import dataclasses
import functools
import json
import pathlib
import shutil
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpop_jax import config as config_lib
from dpop_jax import (
  pairs as pairs_lib,
)
from dpop_jax import (
  program,
  reference_cache,
  reference_key,
  sharding,
  steps,
)
from dpop_jax.data import dataset, jsonl, maths, plan
from dpop_jax.models import decoder

MODEL = decoder.DecoderConfig(
  vocab_size=64,
  hidden_size=16,
  intermediate_size=24,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  initializer_range=0.3,
)
BATCH = plan.BatchConfig(batch_size=8, row_length=64, rows_per_microbatch=2)


@pytest.fixture(scope="module", autouse=True)
def shared_compilations():
  """What is the same program for the same shapes is compiled once."""
  compile_step, compiled = program.compile_score_step, {}

  def compile_once(made, batch):
    key = id(made), *(x.shape for x in jax.tree.leaves(batch))
    if key not in compiled:
      compiled[key] = compile_step(made, batch)
    return compiled[key]

  with mock.patch.object(program, "compile_score_step", compile_once):
    yield


def make_pairs(count=20):
  """Some prompts have several pairs, which share the chosen answer."""
  generator = np.random.default_rng(0)
  draw = lambda low, high: generator.integers(
    2, 64, generator.integers(low, high)
  ).astype(np.int32)
  pairs = []
  while len(pairs) < count:
    prompt, chosen = np.append(np.int32(1), draw(1, 12)), draw(2, 12)
    for _ in range(int(generator.integers(1, 4))):
      edited = chosen.copy()
      edited[generator.integers(len(edited))] = 0
      pairs.append(pairs_lib.TokenPair(prompt, chosen, edited))
  return dataset.TokenPairs.of(pairs[:count])


PAIRS = make_pairs()


def make_config(folder, *, model=MODEL, batch=BATCH):
  return config_lib.Config(
    model=model,
    data=dataset.DataConfig(train="-", tokenizer="-"),
    batch=batch,
    loss=config_lib.LossConfig(name="dpop", beta=0.3, dpop_lambda=50.0),
    optimizer=config_lib.optim.OptimizerConfig(
      name="adamw", peak_learning_rate=1e-3
    ),
    run=config_lib.RunConfig(num_steps=4),
    reference=config_lib.ReferenceConfig(cache_dir=str(folder)),
  )


def make_mesh(*shape):
  devices = jax.devices()[: int(np.prod(shape))]
  sizes = dict(zip(sharding.MESH_AXES, shape, strict=True))
  return sharding.make_mesh(sharding.MeshConfig(**sizes), devices)


@functools.cache
def make_params(model=MODEL, seed=0):
  return decoder.make_params(jax.random.key(seed), model, make_mesh(1, 1, 1))


@functools.cache
def make_program(model, batch):
  config = make_config("-", model=model, batch=batch)
  return program.make_program(config, make_mesh(1, 1, 1), num_steps=4)


@functools.partial(jax.jit, static_argnums=2)
def score_rows(params, rows, config):
  return steps.region_logps(params, rows, config)


class Attached:
  """A plan with log-probs, and how many steps were scored for it."""

  def __init__(self, config, *, params=None, pairs=PAIRS, seed=0):
    self.model = config_lib.reference_model(config)
    self.plan = plan.Plan(pairs, config.batch, seed=seed, num_steps=4)
    self.params = make_params(self.model) if params is None else params
    self.num_scored = self.num_checked = 0
    call = reference_cache._Scorer.__call__

    def count(scorer, its_plan, step):
      is_check = its_plan.reference_logps is not None
      self.num_checked += is_check
      self.num_scored += not is_check
      return call(scorer, its_plan, step)

    made = make_program(config.model, config.batch)
    with mock.patch.object(reference_cache._Scorer, "__call__", count):
      reference_cache.attach(config, made, self.params, {"train": self.plan})

  def batches(self):
    return [self.plan.step(i).batch for i in range(self.plan.num_steps)]

  def logps(self):
    """What the batches of all steps hold: float32 [steps, ..., 2, 3]."""
    return np.stack([batch.reference_logps for batch in self.batches()])

  def in_step(self):
    """What the parameters give on the very same rows."""
    return np.stack(
      [
        [
          score_rows(self.params, batch.map(lambda x: x[i]), self.model)  # noqa: B023
          for i in range(len(batch.tokens))
        ]
        for batch in (b._replace(reference_logps=None) for b in self.batches())
      ]
    )


def folders(path):
  return sorted(p.name for p in pathlib.Path(path).iterdir())


def parts(path):
  return sorted(pathlib.Path(path).glob("*/*.logps"))


def largest_difference(attached):
  """Of answers, in nats."""
  kept, now = attached.logps().sum(axis=-1), attached.in_step().sum(axis=-1)
  assert np.abs(now).max() > 1.0
  return np.abs(kept - now).max()


@pytest.mark.parametrize(
  "dtype, allowed", [("float32", 1e-4), ("bfloat16", 0.0)]
)
def test_batches_hold_what_the_step_would_compute(dtype, allowed, tmp_path):
  model = dataclasses.replace(MODEL, dtype=dtype)
  attached = Attached(make_config(tmp_path, model=model))
  assert attached.plan.max_microbatches > 1
  assert largest_difference(attached) <= allowed
  # Nor is anything added to rows of the batch that are built alone.
  some = attached.plan.step(2, [1]).batch.reference_logps
  whole = attached.plan.step(2).batch.reference_logps
  np.testing.assert_array_equal(some, whole[:, 1:])


@pytest.mark.parametrize(
  "dtype, allowed", [("float32", 1e-3), ("bfloat16", 0.0)]
)
def test_batches_of_real_pairs_too(dtype, allowed, tmp_path, shared_data):
  rows = jsonl.read(str(shared_data / "gsm8k" / "train.jsonl"))[:40]
  built = maths.build_pairs(rows, num_shots=0, seed=0, unusable="skip")
  (tmp_path / "pairs.jsonl").write_text(jsonl.dumps(built.pairs[:16]))
  data = dataset.DataConfig(
    train=str(tmp_path / "pairs.jsonl"),
    tokenizer=str(shared_data / "tokenizers" / "gpt-neox-olmo"),
  )
  pairs = dataset.load(data, is_sft=False, row_length=512).train
  model = dataclasses.replace(MODEL, vocab_size=50_304, dtype=dtype)
  batch = dataclasses.replace(BATCH, batch_size=4, row_length=512)
  config = make_config(tmp_path / "cache", model=model, batch=batch)
  attached = Attached(config, pairs=pairs)
  assert np.abs(attached.logps().sum(axis=-1)).max() > 500
  assert largest_difference(attached) <= allowed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_kept_is_only_checked(dtype, tmp_path):
  model = dataclasses.replace(MODEL, dtype=dtype)
  config = make_config(tmp_path, model=model)
  first = Attached(config)
  assert first.num_scored > 0 < first.num_checked
  before = {p: p.read_bytes() for p in tmp_path.rglob("*.*")}
  second = Attached(config)
  assert second.num_scored == 0 < second.num_checked
  assert {p: p.read_bytes() for p in tmp_path.rglob("*.*")} == before
  np.testing.assert_array_equal(first.logps(), second.logps())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pairs_are_scored_in_rows_of_the_length_that_they_have(dtype, tmp_path):
  model = dataclasses.replace(MODEL, dtype=dtype)
  config = make_config(tmp_path, model=model)
  longer = dataclasses.replace(BATCH, row_length=96)
  plans = {
    "train": plan.Plan(PAIRS, BATCH, seed=0, num_steps=2),
    "eval": plan.Plan(PAIRS, longer, seed=0, num_steps=2),
  }
  made, lengths = make_program(model, BATCH), []
  compile_step = program.compile_score_step

  def note_length(made, batch):
    lengths.append(batch.tokens.shape[-1])
    return compile_step(made, batch)

  with mock.patch.object(program, "compile_score_step", note_length):
    reference_cache.attach(config, made, make_params(model), plans)
  assert sorted(lengths) == [64, 96]
  for its_plan in plans.values():
    assert its_plan.step(0).batch.reference_logps.any()


def test_float32_log_probs_are_shared_by_runs_that_batch_otherwise(tmp_path):
  first = Attached(make_config(tmp_path))
  batch = dataclasses.replace(BATCH, batch_size=6, rows_per_microbatch=4)
  second = Attached(make_config(tmp_path, batch=batch), seed=3)
  assert first.num_scored > 0 == second.num_scored
  assert largest_difference(second) < 1e-4


def test_bfloat16_log_probs_are_those_of_one_layout(tmp_path):
  model = dataclasses.replace(MODEL, dtype="bfloat16")
  config = make_config(tmp_path, model=model)
  Attached(config)
  other = Attached(config, seed=3)
  assert other.num_scored == 4
  assert len(folders(tmp_path)) == 2
  assert largest_difference(other) == 0.0


def changed_weight():
  params = dict(make_params())
  # The last bit of one number.
  params["embedding"] = params["embedding"].at[5, 3].multiply(1 + 2**-23)
  return params


def changed_tokens():
  tokens = PAIRS.tokens.copy()
  tokens[-1] ^= 1
  return dataset.TokenPairs(tokens, PAIRS.offsets)


@pytest.mark.parametrize(
  "change",
  [
    lambda: dict(params=changed_weight()),
    lambda: dict(pairs=changed_tokens()),
    lambda: dict(model=dataclasses.replace(MODEL, rope_theta=9_999.0)),
    lambda: dict(model=dataclasses.replace(MODEL, dtype="bfloat16")),
  ],
  ids=["weight", "tokens", "architecture", "dtype"],
)
def test_what_was_kept_for_something_else_is_not_taken(change, tmp_path):
  Attached(make_config(tmp_path))
  options = change()
  config = make_config(tmp_path, model=options.pop("model", MODEL))
  options.setdefault("params", make_params(config.model))
  attached = Attached(config, **options)
  assert attached.num_scored > 0
  assert len(folders(tmp_path)) == 2
  assert largest_difference(attached) < 1e-4


def test_neither_is_what_another_scorer_computed(tmp_path):
  Attached(make_config(tmp_path))
  with mock.patch.object(reference_key, "scorer_digest", lambda: "other"):
    assert Attached(make_config(tmp_path)).num_scored > 0
  assert Attached(make_config(tmp_path)).num_scored == 0


def test_a_scorer_is_its_code_without_comments(tmp_path):
  code = "def f(x):\n  return 2 * x\n"
  digest = reference_key.code_digest
  assert digest(code) == digest(f"# Twice.\n{code}".replace("2 *", "2*"))
  assert digest(code) != digest(code.replace("2", "3"))
  names = [
    file.name
    for name in reference_key._SCORER
    for file in (pathlib.Path(reference_key.__file__).parent / name,)
    if file.exists()
  ]
  assert len(names) == len(reference_key._SCORER)


def flip(content):
  return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize(
  "damage",
  [
    flip,
    lambda content: content[:-4],
    lambda content: content + bytes(4),
    lambda content: bytes(len(content)),
    lambda content: b"",
  ],
  ids=["a bit", "short", "long", "zeros", "empty"],
)
def test_a_damaged_part_is_made_again(damage, tmp_path):
  config = make_config(tmp_path)
  Attached(config)
  (part,) = parts(tmp_path)
  content = part.read_bytes()
  part.write_bytes(damage(content))
  attached = Attached(config)
  assert attached.num_scored > 0
  assert part.read_bytes() == content


def test_a_part_of_another_folder_is_not_taken(tmp_path):
  Attached(make_config(tmp_path))
  (own,) = parts(tmp_path)
  content = own.read_bytes()
  other = make_params(seed=1)
  Attached(make_config(tmp_path), params=other)
  (foreign,) = set(parts(tmp_path)) - {own}
  shutil.copy(foreign, own)
  assert Attached(make_config(tmp_path)).num_scored > 0
  assert own.read_bytes() == content


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_a_killed_run_had_finished_is_used(dtype, tmp_path):
  config = make_config(tmp_path, model=dataclasses.replace(MODEL, dtype=dtype))
  with mock.patch.object(reference_cache, "_PAIRS_A_PART", 8):
    add = reference_cache._Table.add

    def add_or_die(table, part, logps):
      if part.file.name == "000001.logps":
        raise KeyboardInterrupt
      add(table, part, logps)

    with (
      mock.patch.object(reference_cache._Table, "add", add_or_die),
      pytest.raises(KeyboardInterrupt),
    ):
      Attached(config)
    assert [part.name for part in parts(tmp_path)] == ["000000.logps"]
    # What a writing process leaves when it is killed is no part.
    (parts(tmp_path)[0].parent / ".000001.logps.x").write_bytes(b"half")
    attached = Attached(config)
  # 20 pairs of the data set, or 4 steps of 8; the first part was there.
  assert len(parts(tmp_path)) == (3 if dtype == "float32" else 4)
  assert attached.num_scored == (2 if dtype == "float32" else 3)
  assert largest_difference(attached) < 1e-4


def test_wrong_values_under_the_right_name_are_refused(tmp_path):
  config = make_config(tmp_path)
  Attached(config)
  (part,) = parts(tmp_path)
  logps = np.frombuffer(part.read_bytes()[32:], "<f4") * np.float32(1.01)
  part.write_bytes(reference_cache._sealed(part, logps.tobytes()))
  with pytest.raises(ValueError, match=r"are not those of this reference: it"):
    Attached(config)


def test_a_reference_that_is_not_finite_is_refused(tmp_path):
  params = dict(make_params())
  params["embedding"] = params["embedding"].at[5].set(jnp.nan)
  with pytest.raises(ValueError, match="a log-prob that is not finite"):
    Attached(make_config(tmp_path), params=params)
  assert not parts(tmp_path)


def test_the_digest_of_parameters_sees_every_bit_and_no_mesh():
  params = {
    "a": jnp.arange(8, dtype=jnp.float32).reshape(2, 4),
    "b": {"c": jnp.ones((8, 4), jnp.bfloat16)},
  }
  digest = reference_key.params_digest
  expected = digest(params)
  mesh = make_mesh(2, 2, 2)
  spec = jax.sharding.PartitionSpec("fsdp", "tensor")
  place = jax.sharding.NamedSharding(mesh, spec)
  assert digest(jax.device_put(params, place)) == expected
  a, c = params["a"], params["b"]["c"]
  others = [
    {"a": a.at[0, 0].set(-0.0), "b": {"c": c}},
    {"a": a[:, ::-1], "b": {"c": c}},
    {"a": a[::-1], "b": {"c": c}},
    {"a": a.reshape(4, 2), "b": {"c": c}},
    {"a": a, "b": {"d": c}},
    {"a": a, "b": {"c": c.astype(jnp.float32)}},
    {"a": a, "b": {"c": c.at[7, 3].set(1.0078125)}},
  ]
  assert len({expected, *map(digest, others)}) == 8


def test_the_key_is_kept_beside(tmp_path):
  Attached(make_config(tmp_path))
  (name,) = folders(tmp_path)
  parts = json.loads((tmp_path / name / "key.json").read_text())
  assert parts["pairs"] == PAIRS.digest()
  assert parts["model"]["hidden_size"] == 16
  assert "remat" not in parts["model"]


def test_log_probs_are_kept_in_a_bucket(gcs):
  gcs.buckets["kept"] = {}
  config = make_config("gs://kept/reference")
  assert Attached(config).num_scored > 0
  assert Attached(config).num_scored == 0
  names = sorted(name.split("/")[-1] for name in gcs.buckets["kept"])
  assert names == ["000000.logps", "key.json"]
