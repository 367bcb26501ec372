"""Checkpoints: bit-exact, asynchronous, on any mesh, and never half-written."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import logging as absl_logging

from dpop_jax import checkpoints

P = jax.sharding.PartitionSpec


class State(NamedTuple):
  step: Any
  params: Any
  opt_state: Any


def mesh_of(*sizes):
  axis_types = (jax.sharding.AxisType.Auto,) * 3
  names = ("data", "fsdp", "tensor")
  return jax.make_mesh(sizes, names, axis_types=axis_types)


def optimizer():
  """Nested and empty states, a masked tree, counters: what Optax can return."""
  is_matrix = {"embed": {"table": True}, "norm": False}
  schedule = optax.linear_schedule(1e-3, 0.0, 10)
  return optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(schedule, mask=is_matrix),
    optax.masked(optax.trace(0.9), is_matrix),
  )


def make_state(mesh, dtype=jnp.float32, seed=0):
  """A state with random bits, split over the mesh as training would."""
  keys = jax.random.split(jax.random.key(seed), 2)
  params = {
    "embed": {"table": jax.random.normal(keys[0], (16, 8), dtype)},
    "norm": jax.random.normal(keys[1], (8,), jnp.float32),
  }
  specs = {"embed": {"table": P("fsdp", "tensor")}, "norm": P()}
  params = jax.tree.map(
    lambda array, spec: jax.device_put(array, jax.NamedSharding(mesh, spec)),
    params,
    specs,
  )
  step = jax.device_put(jnp.int32(7), jax.NamedSharding(mesh, P()))
  return State(step, params, jax.jit(optimizer().init)(params))


def abstract_of(tree, mesh):
  """Matrices split over fsdp and tensor, everything else on all devices."""

  def abstract(array):
    spec = P("tensor", "fsdp") if array.ndim == 2 else P()
    sharding = jax.NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

  return jax.tree.map(abstract, tree)


def assert_same_bits(actual, expected):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for a, b in zip(
    jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
  ):
    assert a.dtype == b.dtype
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def opened(workdir, **options):
  config = checkpoints.CheckpointConfig(**options)
  return checkpoints.Checkpoints(str(workdir), config)


def saved(workdir, state, step=1):
  with opened(workdir) as run:
    run.save(step, state)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_state_comes_back_bit_for_bit_on_another_mesh(tmp_path, dtype):
  state = make_state(mesh_of(2, 2, 2), dtype)
  saved(tmp_path, state)
  abstract = abstract_of(state, mesh_of(1, 4, 2))
  with opened(tmp_path) as run:
    restored = run.restore(abstract)
  assert_same_bits(restored, state)
  for array, wanted in zip(
    jax.tree.leaves(restored), jax.tree.leaves(abstract), strict=True
  ):
    assert array.sharding == wanted.sharding
  # Born sharded: a device holds 16/2 x 8/4 of the table, and never more.
  table = restored.params["embed"]["table"]
  assert table.addressable_shards[0].data.shape == (8, 2)


def test_eight_devices_can_save_for_one(tmp_path):
  state = make_state(mesh_of(1, 8, 1))
  saved(tmp_path, state)
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device), state
  )
  with opened(tmp_path) as run:
    assert_same_bits(run.restore(abstract), state)


def test_dataclass_states_and_nan_payloads_survive(tmp_path):
  dataclass_state = jax.tree_util.register_dataclass(
    checkpoints.dataclasses.make_dataclass(
      "DataclassState", ["step", "params", "opt_state"]
    )
  )
  payloads = jnp.array([0x7FC00001, 0x80000000, 0x00000001], jnp.uint32)
  params = jax.lax.bitcast_convert_type(payloads, jnp.float32)
  state = dataclass_state(jnp.int32(3), {"w": params}, optax.EmptyState())
  saved(tmp_path, state)
  with opened(tmp_path) as run:
    restored = run.restore(abstract_of(state, mesh_of(1, 1, 1)))
  assert isinstance(restored, dataclass_state)
  assert_same_bits(restored, state)


def test_donating_the_state_right_after_save_does_not_change_what_is_saved(
  tmp_path,
):
  mesh = mesh_of(2, 2, 2)
  sharding = jax.NamedSharding(mesh, P("fsdp"))
  # Large enough that the write outlasts the train steps below.
  table = jax.device_put(jnp.ones((4096, 1024)), sharding)
  state = State(jnp.int32(0), {"table": table}, optax.EmptyState())
  before = np.array(table)
  abstract = abstract_of(state, mesh)
  train = jax.jit(lambda s: jax.tree.map(lambda x: x * 2, s), donate_argnums=0)
  train(jax.tree.map(jnp.copy, state))  # Compile before the race starts.
  with opened(tmp_path) as run:
    run.save(1, state)
    for _ in range(3):
      state = train(state)
    jax.block_until_ready(state)
    assert table.is_deleted()  # The buffers really were given away.
    restored = run.restore(abstract)
  np.testing.assert_array_equal(restored.params["table"], before)


def test_only_the_newest_are_kept(tmp_path):
  state = make_state(mesh_of(1, 1, 1))
  with opened(tmp_path, keep=2) as run:
    assert run.latest_step() is None
    for step in (5, 10, 15):
      run.save(step, state)
    assert run.latest_step() == 15
  folders = {path.name for path in (tmp_path / "checkpoints").iterdir()}
  assert folders == {"10", "15"}


def test_saving_a_step_twice_keeps_the_first_and_earlier_steps_are_refused(
  tmp_path,
):
  mesh = mesh_of(1, 1, 1)
  first, second = make_state(mesh, seed=0), make_state(mesh, seed=1)
  with opened(tmp_path) as run:
    run.save(5, first)
    run.save(5, second)
    assert_same_bits(run.restore(abstract_of(first, mesh)), first)
    with pytest.raises(
      ValueError, match="Step 4 cannot be saved.*holds step 5"
    ):
      run.save(4, second)


def test_a_save_is_due_at_multiples_only(tmp_path):
  with opened(tmp_path, save_every_steps=3) as run:
    assert [s for s in range(8) if run.is_due(s)] == [3, 6]
  with opened(tmp_path) as run:
    assert not any(run.is_due(s) for s in range(8))


# Saves step 1, then dies as soon as files of step 2 are on disk.
KILLED_WHILE_SAVING = """
  import os, pathlib, signal, sys, threading
  import jax.numpy as jnp
  from tests import checkpoints_test
  from dpop_jax import checkpoints

  folder = pathlib.Path(sys.argv[1]) / "checkpoints"
  arrays = [jnp.full((2048, 1024), i, jnp.float32) for i in range(32)]
  state = checkpoints_test.State(jnp.int32(1), arrays, ())

  def die_in_the_middle():
    while not any(p.is_file() for p in folder.glob("2*/params/**/d/*")):
      pass
    os.kill(os.getpid(), signal.SIGKILL)

  with checkpoints_test.opened(sys.argv[1], keep=1) as run:
    run.save(1, state)
    run.wait()
    threading.Thread(target=die_in_the_middle, daemon=True).start()
    run.save(2, state)
"""


def test_a_checkpoint_half_written_by_a_killed_process_is_never_seen(tmp_path):
  script = textwrap.dedent(KILLED_WHILE_SAVING)
  died = subprocess.run(
    [sys.executable, "-c", script, str(tmp_path)], timeout=60
  )
  assert died.returncode == -signal.SIGKILL
  folder = tmp_path / "checkpoints"
  (half_written,) = (p for p in folder.iterdir() if p.name != "1")
  assert list(half_written.glob("params/**/d/*"))  # It had got somewhere.

  arrays = [jnp.full((2048, 1024), i, jnp.float32) for i in range(32)]
  state = State(jnp.int32(1), arrays, ())
  abstract = abstract_of(state, mesh_of(2, 2, 2))
  # Step 1 was the only one kept and is still there: it goes after step 2 is.
  assert_same_bits(
    checkpoints.load_params(str(tmp_path), abstract.params), arrays
  )
  with pytest.raises(ValueError):
    checkpoints.load_params(str(half_written), abstract.params)
  with opened(tmp_path, keep=1) as run:
    assert run.latest_step() == 1
    assert_same_bits(run.restore(abstract), state)
    run.save(2, state)
  assert [path.name for path in folder.iterdir()] == ["2"]


# Saves step 1, then step 2 with too little room for it. A process of its own,
# because what else writes after the failure ends with it.
OUT_OF_ROOM_WHILE_SAVING = """
  import resource, sys
  import jax
  from tests import checkpoints_test

  run = checkpoints_test.opened(sys.argv[1])
  state = checkpoints_test.noisy_state()
  run.save(1, state)
  run.wait()
  resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
  run.save(2, state)
  try:
    run.wait()
  except ValueError as error:
    assert "File too large" in str(error), error
    assert run.latest_step() == 1
    print("reported")
"""


def noisy_state():
  """4 MiB that do not compress."""
  noise = jax.random.normal(jax.random.key(0), (1024, 1024))
  return State(jnp.int32(1), {"w": noise}, ())


def test_a_save_that_fails_in_the_background_is_reported_and_not_latest(
  tmp_path,
):
  script = textwrap.dedent(OUT_OF_ROOM_WHILE_SAVING)
  done = subprocess.run(
    [sys.executable, "-c", script, str(tmp_path)],
    timeout=120,
    capture_output=True,
    text=True,
  )
  assert done.stdout == "reported\n", done.stderr
  state = noisy_state()
  with opened(tmp_path) as run:
    assert run.latest_step() == 1
    run.save(2, state)  # What is left of the first attempt is not in the way.
    assert run.latest_step() == 2
    assert_same_bits(run.restore(abstract_of(state, mesh_of(1, 1, 1))), state)


def test_a_folder_that_cannot_be_made_fails_at_once(tmp_path):
  state = make_state(mesh_of(1, 1, 1))
  run = opened(tmp_path)
  run.save(1, state)
  run.wait()  # From here on nothing looks at the folder but what we call.
  # A file where a folder should come: not even root can write there.
  (tmp_path / "checkpoints").rename(tmp_path / "elsewhere")
  (tmp_path / "checkpoints").write_text("")
  with pytest.raises(OSError, match="[Nn]ot a directory"):
    run.save(2, state)


@pytest.mark.parametrize("folder", ["", "checkpoints", "checkpoints/2"])
def test_load_params_reads_the_newest_parameters_and_nothing_else(
  tmp_path, folder
):
  state = make_state(mesh_of(2, 2, 2))
  with opened(tmp_path) as run:
    run.save(1, make_state(mesh_of(2, 2, 2), seed=1))
    run.save(2, state)
  # A broken optimizer state shows that nobody looks at it.
  for path in (tmp_path / "checkpoints" / "2" / "training").rglob("*"):
    if path.is_file() and path.name != "commit_success.txt":
      path.write_text("broken")
  abstract = abstract_of(state.params, mesh_of(1, 2, 4))
  params = checkpoints.load_params(str(tmp_path / folder), abstract)
  assert_same_bits(params, state.params)


def test_load_params_casts_as_asked_rounding_to_nearest_even(tmp_path):
  state = make_state(mesh_of(2, 2, 2))
  saved(tmp_path, state)
  bfloat16 = jax.tree.map(lambda a: a.astype(jnp.bfloat16), state.params)
  abstract = abstract_of(bfloat16, mesh_of(2, 2, 2))
  assert_same_bits(checkpoints.load_params(str(tmp_path), abstract), bfloat16)


def test_restore_refuses_another_dtype(tmp_path):
  mesh = mesh_of(1, 1, 1)
  saved(tmp_path, make_state(mesh))
  with opened(tmp_path) as run:
    with pytest.raises(
      ValueError,
      match="of another dtype: embed/table float32 instead of bfloat16",
    ):
      run.restore(abstract_of(make_state(mesh, jnp.bfloat16), mesh))


def test_parameters_that_do_not_fit_are_named(tmp_path):
  mesh = mesh_of(1, 1, 1)
  saved(tmp_path, make_state(mesh))
  float32 = lambda *shape: jnp.zeros(shape)
  other = {"embed": {"table": float32(4, 8)}, "layers": [float32(2)] * 6}
  with pytest.raises(ValueError) as error:
    checkpoints.load_params(str(tmp_path), abstract_of(other, mesh))
  names = "layers/0, layers/1, layers/2, layers/3 and 2 more"
  assert f"missing in the checkpoint: {names};" in str(error.value)
  assert "only in the checkpoint: norm;" in str(error.value)
  shapes = "embed/table [16, 8] instead of [4, 8]"
  assert f"of another shape: {shapes}." in str(error.value)


def test_another_optimizer_is_named(tmp_path):
  mesh = mesh_of(1, 1, 1)
  state = make_state(mesh)
  saved(tmp_path, state)
  other = state._replace(opt_state=optax.sgd(0.1).init(state.params))
  with opened(tmp_path) as run:
    with pytest.raises(
      ValueError,
      match="training saved in .* only in the checkpoint: opt_state/1",
    ):
      run.restore(abstract_of(other, mesh))


def test_arrays_without_a_sharding_are_refused(tmp_path):
  state = make_state(mesh_of(1, 1, 1))
  saved(tmp_path, state)
  abstract = jax.eval_shape(lambda: {"norm": jnp.zeros(8)})
  with pytest.raises(ValueError, match="needs a sharding.*norm"):
    checkpoints.load_params(str(tmp_path), abstract)


def test_a_place_without_checkpoints_is_named(tmp_path):
  abstract = abstract_of(make_state(mesh_of(1, 1, 1)), mesh_of(1, 1, 1))
  with opened(tmp_path) as run:
    with pytest.raises(ValueError, match="no complete checkpoint"):
      run.restore(abstract)
  for path in (tmp_path, tmp_path / "nowhere"):
    with pytest.raises(ValueError, match=f"no complete checkpoint in {path}"):
      checkpoints.load_params(str(path), abstract.params)


@pytest.mark.parametrize("bad", [{"save_every_steps": 0}, {"keep": 0}])
def test_a_bad_config_names_its_key(bad):
  (key,) = bad
  with pytest.raises(ValueError, match=f"checkpoints.{key} must be at least 1"):
    checkpoints.CheckpointConfig(**bad)


def test_saving_is_quiet_and_leaves_other_messages_alone(tmp_path, caplog):
  verbosity = absl_logging.get_verbosity()
  absl_logging.set_verbosity(absl_logging.INFO)
  try:
    saved(tmp_path, make_state(mesh_of(1, 1, 1)))
    absl_logging.info("ours")
  finally:
    absl_logging.set_verbosity(verbosity)
  assert [r.getMessage() for r in caplog.records if r.name == "absl"] == [
    "ours"
  ]


def test_threads_and_open_files_do_not_pile_up_over_saves(tmp_path):
  state = make_state(mesh_of(1, 1, 1))
  count = lambda: (threading.active_count(), len(os.listdir("/proc/self/fd")))
  with opened(tmp_path / "first") as run:  # Some pools are made once and stay.
    for step in range(1, 4):
      run.save(step, state)
  before = count()
  with opened(tmp_path / "second") as run:
    for step in range(1, 8):
      run.save(step, state)
  after = count()
  assert after[0] <= before[0] and after[1] <= before[1]


def test_sigterm_is_noticed_and_the_previous_handler_comes_back():
  received = []
  previous = signal.signal(signal.SIGTERM, lambda *_: received.append("ours"))
  try:
    with checkpoints.Preemption() as preemption:
      assert not preemption.requested()
      os.kill(os.getpid(), signal.SIGTERM)
      assert preemption.requested()
      assert preemption.requested()
    assert received == []
    os.kill(os.getpid(), signal.SIGTERM)
    assert received == ["ours"]
  finally:
    signal.signal(signal.SIGTERM, previous)
