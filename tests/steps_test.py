"""One update: on any mesh, in any packing, as worked out pair by pair."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import plain
import pytest

from dpop_jax import config as config_lib
from dpop_jax import pairs as pairs_lib
from dpop_jax import program, sharding, steps
from dpop_jax.data import dataset, jsonl, maths, plan
from dpop_jax.models import decoder

MODEL = decoder.DecoderConfig(
  vocab_size=40,
  hidden_size=16,
  intermediate_size=24,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
)
BATCH_SIZE = 24
BATCH = plan.BatchConfig(
  batch_size=BATCH_SIZE, row_length=40, rows_per_microbatch=8
)
# With 1 for eps the update is smooth in the gradient, as SGD's is. Without it
# AdamW's first update is the gradient's sign, also where that is rounding.
OPTIMIZER = dict(name="adamw", peak_learning_rate=0.1, b1=0.9, eps=1.0)
DPOP = dict(beta=0.3, dpop_lambda=5.0)


def make_pairs(count=40):
  """Prompts of their own, and some that share prompt and chosen answer."""
  generator = np.random.default_rng(0)
  draw = lambda low, high: generator.integers(
    2, 40, generator.integers(low, high)
  ).astype(np.int32)
  pairs = []
  while len(pairs) < count:
    prompt, chosen = np.append(np.int32(1), draw(1, 12)), draw(2, 12)
    for _ in range(int(generator.integers(1, 4))):
      edited = chosen.copy()
      edited[generator.integers(len(edited))] = 0
      rejected = edited if generator.integers(2) else draw(1, 12)
      pairs.append(pairs_lib.TokenPair(prompt, chosen, rejected))
  return pairs[:count]


PAIRS = make_pairs()


def make_config(*, model=MODEL, batch=BATCH, **loss):
  return config_lib.Config(
    model=model,
    data=dataset.DataConfig(train="-", tokenizer="-"),
    batch=batch,
    loss=config_lib.LossConfig(**loss or dict(name="dpop", **DPOP)),
    optimizer=config_lib.optim.OptimizerConfig(**OPTIMIZER),
    run=config_lib.RunConfig(num_steps=4),
  )


def make_plan(batch=BATCH, pairs=PAIRS, num_steps=4):
  return plan.Plan(
    dataset.TokenPairs.of(pairs), batch, seed=0, num_steps=num_steps
  )


def make_mesh(*shape):
  sizes = dict(zip(sharding.MESH_AXES, shape, strict=True))
  devices = jax.devices()[: math.prod(shape)]
  return sharding.make_mesh(sharding.MeshConfig(**sizes), devices)


class Run:
  """The compiled train step of a config on a mesh, as a run has it."""

  def __init__(self, config, the_plan, mesh):
    self.program = program.make_program(config, mesh, num_steps=4)
    self._compiled = program.compile_step(
      self.program.train_step,
      self.program,
      self.program.abstract_state,
      the_plan.empty_batch(),
    )

  def state(self, params):
    placed = self.place(params)
    return steps.State(
      step=jax.device_put(
        jnp.int32(0), self.program.abstract_state.step.sharding
      ),
      params=placed,
      opt_state=self.program.init_opt_state(placed),
    )

  def place(self, params):
    return jax.tree.map(
      lambda x, like: jax.device_put(x, like.sharding),
      params,
      self.program.abstract_state.params,
    )

  def reference(self, params):
    has_none = self.program.abstract_reference is None
    return None if has_none else self.place(params)

  def __call__(self, state, reference, batch, num_microbatches):
    batch = program.put_batch(self.program, batch)
    with jax.set_mesh(self.program.mesh):
      return self._compiled(
        state, reference, batch, jnp.int32(num_microbatches)
      )

  def once(self, policy, reference, batch, num_microbatches):
    """State and report after one update of fresh parameters."""
    return self(
      self.state(policy),
      self.reference(reference),
      batch,
      num_microbatches,
    )


def gradient_of(state):
  """What AdamW's first moment says the first gradient was."""
  moment = optax.tree_utils.tree_get(state.opt_state, "mu")
  return jax.tree.map(lambda m: np.asarray(m) / np.float32(0.1), moment)


def assert_trees_close(actual, expected, tolerance):
  """Each array within `tolerance` of its largest expected entry."""
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  actual = jax.tree.leaves(actual)
  for (path, want), got in zip(
    jax.tree.leaves_with_path(expected), actual, strict=True
  ):
    scale = np.abs(want).max()
    np.testing.assert_allclose(
      np.asarray(got) / scale,
      np.asarray(want) / scale,
      rtol=0,
      atol=tolerance,
      err_msg=jax.tree_util.keystr(path),
    )


def assert_metrics_close(actual, expected, rtol=1e-5):
  assert actual.keys() == expected.keys()
  for name, want in expected.items():
    np.testing.assert_allclose(actual[name], want, rtol=rtol, err_msg=name)


POLICY = plain.random_params(MODEL, seed=0)
REFERENCE = jax.tree.map(
  lambda p, q: np.float32(0.9) * p + np.float32(0.1) * q,
  POLICY,
  plain.random_params(MODEL, seed=1),
)


@functools.partial(jax.jit, static_argnames=("config", "mean_loss"))
def naive_value_and_gradient(mean_loss, params, config, batch, *arguments):
  """`mean_loss` of the policy's log-probs [pairs, 2], sequence by sequence."""

  def loss(params):
    return mean_loss(plain.pairs_logps(params, config, batch), *arguments)

  return jax.value_and_grad(loss)(params)


def mean_dpop(policy, reference):
  chosen, rejected = (
    policy[:, 0] - reference[:, 0],
    policy[:, 1] - reference[:, 1],
  )
  penalties = jnp.where(chosen < 0, -chosen, 0.0)
  margins = chosen - rejected - DPOP["dpop_lambda"] * penalties
  return jnp.log1p(jnp.exp(-DPOP["beta"] * margins)).mean()


@functools.partial(jax.jit, static_argnames="config")
def naive_logps(params, config, batch):
  return plain.pairs_logps(params, config, batch)


@pytest.fixture(scope="module")
def the_plan():
  return make_plan()


@pytest.fixture(scope="module")
def one_device(the_plan):
  return Run(make_config(), the_plan, make_mesh(1, 1, 1))


@pytest.fixture(scope="module")
def expected(the_plan, one_device):
  """State and report of one update on one device."""
  planned = the_plan.step(0)
  # Or the meshes below would not show that microbatches are added up.
  assert planned.num_microbatches == 2
  return one_device.once(
    POLICY, REFERENCE, planned.batch, planned.num_microbatches
  )


@pytest.fixture(scope="module")
def naive(the_plan):
  """Loss and gradient of the same update, worked out pair by pair."""
  pairs = [PAIRS[i] for i in the_plan.pair_ids(0)]
  sequences = plain.sequences(pairs)
  reference = naive_logps(REFERENCE, MODEL, sequences)
  return naive_value_and_gradient(
    mean_dpop, POLICY, MODEL, sequences, reference
  )


def test_an_update_is_the_gradient_of_the_mean_over_pairs(expected, naive):
  state, report = expected
  loss, gradient = naive
  # Both signs of the penalty's kink are there.
  assert 0 < report.metrics["dpop/active_fraction"].mean() < 1
  np.testing.assert_allclose(report.metrics["loss"].mean(), loss, rtol=2e-6)
  assert_trees_close(gradient_of(state), gradient, 2e-5)
  np.testing.assert_allclose(
    report.grad_norm, optax.tree.norm(gradient), rtol=1e-5
  )
  norms = [np.linalg.norm(leaf.ravel()) for leaf in jax.tree.leaves(gradient)]
  np.testing.assert_allclose(report.grad_norms, norms, rtol=2e-5)
  # AdamW's first update: bias correction turns the moments into g and g**2.
  updated = jax.tree.map(
    lambda p, g: p - 0.1 * g / (np.abs(g) + 1.0), POLICY, gradient
  )
  assert_trees_close(state.params, updated, 2e-6)
  assert state.step == 1


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 4, 2)])
def test_eight_devices_update_as_one(shape, the_plan, expected):
  run = Run(make_config(), the_plan, make_mesh(*shape))
  planned = the_plan.step(0)
  before, reference = run.state(POLICY), run.place(REFERENCE)
  state, report = run(
    before, reference, planned.batch, planned.num_microbatches
  )
  expected_state, expected_report = expected
  assert_metrics_close(report.metrics, expected_report.metrics)
  np.testing.assert_allclose(
    report.grad_norms, expected_report.grad_norms, rtol=1e-5
  )
  assert_trees_close(gradient_of(state), gradient_of(expected_state), 1e-5)
  assert_trees_close(state.params, expected_state.params, 1e-6)

  # The state was given away, the reference was not.
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(reference))
  # What comes out lies where the next step wants it.
  is_same = jax.tree.map(
    lambda x, like: x.sharding == like.sharding and x.dtype == like.dtype,
    state,
    run.program.abstract_state,
  )
  assert jax.tree.all(is_same), is_same
  num_pieces = math.prod(shape[1:])
  for tree in (state.params, optax.tree_utils.tree_get(state.opt_state, "nu")):
    piece = tree["embedding"].addressable_shards[0].data
    assert piece.size == MODEL.vocab_size * MODEL.hidden_size // num_pieces


@pytest.mark.parametrize(
  ("row_length", "rows_per_microbatch"), [(96, 1), (56, 24)]
)
def test_any_packing_gives_the_same_update(
  row_length, rows_per_microbatch, expected
):
  batch = plan.BatchConfig(
    batch_size=BATCH_SIZE,
    row_length=row_length,
    rows_per_microbatch=rows_per_microbatch,
  )
  the_plan = make_plan(batch, num_steps=1)
  planned = the_plan.step(0)
  is_accumulated = rows_per_microbatch == 1
  assert (planned.num_microbatches > 2) == is_accumulated
  assert planned.batch.tokens.shape[0] == planned.num_microbatches
  run = Run(make_config(batch=batch), the_plan, make_mesh(1, 1, 1))
  state, report = run.once(
    POLICY, REFERENCE, planned.batch, planned.num_microbatches
  )
  expected_state, expected_report = expected
  assert_metrics_close(report.metrics, expected_report.metrics)
  assert_trees_close(gradient_of(state), gradient_of(expected_state), 1e-5)
  assert_trees_close(state.params, expected_state.params, 1e-6)


def test_every_update_is_on_exactly_batch_size_pairs(the_plan, one_device):
  state, reference = one_device.state(POLICY), one_device.place(REFERENCE)
  seen = []
  for step in range(4):
    planned = the_plan.step(step)
    ids = planned.batch.pair_ids[planned.batch.pair_weights > 0]
    seen += ids.tolist()
    state, report = one_device(
      state, reference, planned.batch, planned.num_microbatches
    )
    assert report.metrics["loss"].weight == BATCH_SIZE
    assert report.metrics["rewards/chosen"].weight == BATCH_SIZE
    assert int(state.step) == step + 1
  # 4 * 24 draws of 40 pairs: all of them twice, and 16 a third time.
  assert sorted(np.bincount(seen).tolist()) == [2] * 24 + [3] * 16


def test_microbatches_beyond_the_count_are_not_read(
  the_plan, one_device, expected
):
  planned = the_plan.step(0)
  # A count of one leaves half of the update out; the loss then says so.
  _, report = one_device.once(POLICY, REFERENCE, planned.batch, 1)
  num_pairs = planned.batch.pair_weights[0].sum()
  assert 0 < num_pairs < BATCH_SIZE
  assert report.metrics["loss"].weight == num_pairs


def with_rubbish_in_the_padding(batch):
  """Fills all that means nothing with numbers that would mean something."""
  generator = np.random.default_rng(0)

  def fill(array, is_padding, high):
    rubbish = generator.integers(0, high, array.shape)
    return np.where(is_padding, rubbish.astype(array.dtype), array)

  length, scores = batch.tokens.shape[-1], batch.score_targets.shape[-1]
  is_unseen = batch.visible_until == np.arange(length)
  is_unscored = np.arange(scores) >= batch.num_scores[..., None]
  is_unlinked = batch.link_slots == batch.num_slots
  is_no_pair = batch.pair_weights == 0
  assert is_unseen.any() and is_unscored.any()
  assert is_unlinked.any() and is_no_pair.any()
  return batch._replace(
    tokens=fill(batch.tokens, is_unseen, MODEL.vocab_size),
    positions=fill(batch.positions, is_unseen, length),
    score_positions=fill(batch.score_positions, is_unscored, length),
    score_targets=fill(batch.score_targets, is_unscored, MODEL.vocab_size),
    link_branches=fill(
      batch.link_branches, is_unlinked, batch.link_slots.shape[-1]
    ),
    answer_lengths=fill(batch.answer_lengths, is_no_pair[..., None, None], 9),
    pair_ids=fill(batch.pair_ids, is_no_pair, 9),
  )


def test_padding_has_no_influence(the_plan, one_device, expected):
  planned = the_plan.step(0)
  state, report = one_device.once(
    POLICY,
    REFERENCE,
    with_rubbish_in_the_padding(planned.batch),
    planned.num_microbatches,
  )
  expected_state, expected_report = expected
  assert_metrics_close(report.metrics, expected_report.metrics, rtol=0)
  for got, want in zip(
    jax.tree.leaves(state), jax.tree.leaves(expected_state), strict=True
  ):
    np.testing.assert_array_equal(got, want)


LOSSES = {
  "dpop": DPOP,
  "dpo": dict(beta=0.3),
  "cdpo": dict(beta=0.3, label_smoothing=0.1),
  "ipo": dict(beta=0.3),
  "ipo_mean": dict(beta=0.3),
  "slic_hinge": dict(beta=0.3),
  "slic": dict(delta=1.0, likelihood_weight=0.1),
  "sft": {},
}


@pytest.mark.parametrize("name", config_lib.LOSSES)
def test_pairs_that_are_not_there_weigh_nothing_in_any_loss(name, monkeypatch):
  objective = config_lib.make_objective(
    config_lib.LossConfig(name=name, **LOSSES[name])
  )
  # The model is left out: parameters are the log-probs [rows, pairs, 2, 3].
  monkeypatch.setattr(steps, "region_logps", lambda logps, rows, config: logps)
  keys = jax.random.split(jax.random.key(0), 2)
  policy, reference = (-jax.random.uniform(key, (1, 2, 2, 3)) for key in keys)
  lengths = jnp.ones((1, 2, 2, 3), jnp.int32)
  reference = None if objective.is_sft else reference

  def run(policy, reference, lengths, weights):
    empty = [None] * len(pairs_lib.PackedBatch._fields)
    rows = pairs_lib.PackedBatch(*empty)._replace(
      answer_lengths=lengths, pair_weights=jnp.array([weights])
    )
    loss = functools.partial(
      steps.rows_loss,
      rows=rows,
      config=MODEL,
      reference_config=MODEL,
      objective=objective,
    )
    return jax.value_and_grad(loss, has_aux=True)(policy, reference)

  (loss, report), gradient = run(policy, reference, lengths, [1.0, 0.0])
  (want_loss, want_report), want_gradient = run(
    policy[:, :1],
    None if reference is None else reference[:, :1],
    lengths[:, :1],
    [1.0],
  )
  assert loss == want_loss
  assert_metrics_close(report, want_report, rtol=0)
  np.testing.assert_array_equal(gradient[:, :1], want_gradient)
  # Nor does an answer of no tokens, as padding is; or one beyond all bounds,
  # whose gradient is nobody's business.
  for rubbish in (0.0, -jnp.inf):
    (loss, report), gradient = run(
      policy.at[:, 1].set(rubbish),
      None if reference is None else reference.at[:, 1].set(0.0),
      lengths.at[:, 1].set(0),
      [1.0, 0.0],
    )
    assert loss == want_loss
    assert_metrics_close(report, want_report, rtol=0)
    np.testing.assert_array_equal(gradient[:, :1], want_gradient)
    if rubbish == 0.0:
      np.testing.assert_array_equal(gradient[:, 1:], 0.0)


def mean_over_tokens(policy, num_tokens):
  return -policy[:, 0].sum() / num_tokens


def test_supervised_loss_is_the_mean_over_tokens():
  none = np.zeros(0, np.int32)
  pairs = [pair._replace(rejected=none) for pair in PAIRS]
  batch = dataclasses.replace(BATCH, rows_per_microbatch=4)
  the_plan = make_plan(batch, pairs)
  planned = the_plan.step(0)
  assert planned.num_microbatches == 2
  run = Run(make_config(batch=batch, name="sft"), the_plan, make_mesh(1, 1, 1))
  state, report = run.once(
    POLICY, None, planned.batch, planned.num_microbatches
  )
  pairs = [pairs[i] for i in the_plan.pair_ids(0)]
  num_tokens = sum(len(pair.chosen) for pair in pairs)
  loss, gradient = naive_value_and_gradient(
    mean_over_tokens,
    POLICY,
    MODEL,
    plain.sequences(pairs),
    jnp.float32(num_tokens),
  )
  assert report.metrics["loss"].weight == num_tokens
  np.testing.assert_allclose(report.metrics["loss"].mean(), loss, rtol=2e-6)
  assert_trees_close(gradient_of(state), gradient, 2e-5)
  per_token = report.metrics["logps_per_token/chosen"].mean()
  np.testing.assert_allclose(per_token, -loss, rtol=2e-6)


def assert_all_log_ratios_vanish(report, bound=0.0):
  for name in ("logratios/chosen", "logratios/rejected", "rewards/margins"):
    assert abs(report.metrics[name].total) <= bound, name


@pytest.fixture
def optimized():
  """Compiles as outside of tests: the last bit may depend on it."""
  name = "jax_disable_most_optimizations"
  old = jax.config.read(name)
  jax.config.update(name, False)
  yield
  jax.config.update(name, old)


def test_the_first_loss_of_dpop_is_exactly_ln_2(the_plan, optimized):
  planned = the_plan.step(0)
  run = Run(make_config(), the_plan, make_mesh(1, 1, 1))
  _, report = run.once(POLICY, POLICY, planned.batch, planned.num_microbatches)
  assert_all_log_ratios_vanish(report)
  assert report.metrics["dpop/penalty"].total == 0.0
  assert report.metrics["dpop/active_fraction"].total == 0.0
  # BATCH_SIZE times the float32 nearest to ln 2; partial sums may round.
  np.testing.assert_allclose(
    report.metrics["loss"].total, BATCH_SIZE * np.float32(np.log(2)), rtol=1e-7
  )


@pytest.mark.parametrize(
  ("dtype", "remat"), [("float32", "full"), ("bfloat16", "dots")]
)
def test_the_first_loss_of_dpo_is_ln_2_for_long_answers(dtype, remat):
  generator = np.random.default_rng(0)
  draw = lambda size: generator.integers(2, 40, size).astype(np.int32)
  pairs = [pairs_lib.TokenPair(draw(20), draw(100), draw(80)) for _ in range(4)]
  # One pair an update, so that what two answers are off by can't cancel.
  batch = plan.BatchConfig(batch_size=1, row_length=200)
  model = dataclasses.replace(MODEL, dtype=dtype, remat=remat)
  config = make_config(model=model, batch=batch, name="dpo", beta=0.3)
  the_plan = make_plan(batch, pairs)
  run = Run(config, the_plan, make_mesh(1, 1, 1))
  for step in range(4):
    planned = the_plan.step(step)
    _, report = run.once(
      POLICY, POLICY, planned.batch, planned.num_microbatches
    )
    # On a CPU bfloat16 is exact as well: both models are compiled alike.
    assert_all_log_ratios_vanish(report, 0.0 if dtype == "float32" else 1e-3)
    if dtype == "float32":
      assert report.metrics["loss"].total == np.float32(np.log(2))


def test_real_pairs_on_forests_equal_single_sequences(shared_data, tmp_path):
  rows = jsonl.read(str(shared_data / "gsm8k" / "train.jsonl"))[:40]
  # With another seed the sigmoid may not be saturated, and then 15 (beta times
  # lambda) times float32's rounding of sums of 700 nats is above the tolerance.
  built = maths.build_pairs(rows, num_shots=1, seed=1, unusable="skip")
  # The shortest few, and two of one prompt.
  built = sorted(built.pairs, key=lambda pair: len(pair["prompt"]))[:4]
  built.append(built[0] | {"rejected": "I do not know."})
  (tmp_path / "pairs.jsonl").write_text(jsonl.dumps(built))
  loaded = dataset.load(
    dataset.DataConfig(
      train=str(tmp_path / "pairs.jsonl"),
      tokenizer=str(shared_data / "tokenizers" / "gpt-neox-olmo"),
    ),
    is_sft=False,
    row_length=512,
  )
  pairs = list(loaded.train)
  assert len(pairs) == 5
  batch = plan.BatchConfig(batch_size=5, row_length=512)
  the_plan = make_plan(batch, pairs, num_steps=1)
  planned = the_plan.step(0)
  assert planned.num_tokens < 0.7 * planned.num_sequence_tokens
  model = dataclasses.replace(MODEL, vocab_size=50_304)
  policy, reference = (plain.random_params(model, seed) for seed in (0, 1))
  # A small step away, as in training.
  reference = jax.tree.map(
    lambda p, q: p + np.float32(0.02) * (q - p), policy, reference
  )
  run = Run(make_config(model=model, batch=batch), the_plan, make_mesh(1, 1, 1))
  state, report = run.once(
    policy, reference, planned.batch, planned.num_microbatches
  )
  sequences = plain.sequences(pairs)
  reference_logps = naive_logps(reference, model, sequences)
  loss, gradient = naive_value_and_gradient(
    mean_dpop, policy, model, sequences, reference_logps
  )
  np.testing.assert_allclose(report.metrics["loss"].mean(), loss, rtol=1e-4)
  assert_trees_close(gradient_of(state), gradient, 1e-4)
