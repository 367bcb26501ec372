"""Plans: memory, least times, searches, and the command."""

import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs

from dpop_jax import config as config_lib
from dpop_jax import program, sharding
from dpop_jax.data import plan as plan_lib
from dpop_jax.planning import (
  batch_shapes,
  chips,
  collectives,
  compiler,
  flops,
  plan,
  plan_search,
  plan_text,
  purposes,
  step_time,
)


def needs_libtpu(test):
  is_missing = importlib.util.find_spec("libtpu") is None
  reason = "needs the TPU compiler: make test-tpu"
  return pytest.mark.tpu(pytest.mark.skipif(is_missing, reason=reason)(test))


ROOT = pathlib.Path(__file__).parent.parent
NO_DATA = {"train": "-", "tokenizer": "-"}
# Large enough to be split as real models are.
MODEL = dict(
  vocab_size=512,
  hidden_size=256,
  intermediate_size=256,
  num_attention_heads=8,
  num_key_value_heads=4,
  dtype="bfloat16",
  remat="full",
)


def make_config(mesh=(1, 4, 2), rows=8, **changes):
  changes = {f"model__{name}": value for name, value in MODEL.items()} | changes
  config = tiny_runs.make_config(NO_DATA, **changes)
  return dataclasses.replace(
    config,
    mesh=sharding.MeshConfig(data=mesh[0], fsdp=mesh[1], tensor=mesh[2]),
    batch=dataclasses.replace(
      config.batch, batch_size=8, row_length=256, rows_per_microbatch=rows
    ),
    reference=config_lib.ReferenceConfig(param_dtype="bfloat16"),
  )


# Batches.


def test_batches_without_data_are_full_of_pairs_of_one_size():
  config = make_config()
  shapes = batch_shapes.of_config(config, tokens_per_pair=100)
  # Two pairs in each row of 256, eight pairs a step.
  assert shapes.capacity == (256, 256, 12, 2)
  assert shapes.num_rows == 4
  assert shapes.num_microbatches(3) == 2
  assert "assumed, without data: pairs of 100 tokens" in shapes.source
  work = shapes.work(3)
  assert work.positions == 2 * 3 * 256
  assert work.scores == 4 * 256
  assert work.visible_pairs == 4 * 2 * (100 * 101 // 2)
  batch = shapes.empty_batch(3)
  assert batch.tokens.shape == (2, 3, 256)
  assert batch.pair_weights.shape == (2, 3, 2)


def test_a_pair_has_the_longest_length_unless_told():
  config = make_config()
  assert batch_shapes.of_config(config).num_rows == 8
  data = dataclasses.replace(config.data, max_length=128)
  config = dataclasses.replace(config, data=data)
  assert batch_shapes.of_config(config).num_rows == 4
  with pytest.raises(ValueError, match="A pair of 257 tokens .* not fit batch"):
    batch_shapes.of_config(config, tokens_per_pair=257)


def test_batches_with_data_are_those_of_the_run(tmp_path):
  config = tiny_runs.make_config(tiny_runs.write_data(tmp_path))
  shapes = batch_shapes.of_config(config)
  with_folder = batch_shapes.inputs.load_data(config, str(tmp_path / "run"))
  the_plan = plan_lib.Plan(
    with_folder.train, config.batch, seed=0, num_steps=config.run.num_steps
  )
  rows = config.batch.rows_per_microbatch
  expected = the_plan.empty_batch()
  got = shapes.empty_batch(rows)
  shapes_of = lambda batch: [x.shape for x in jax.tree.leaves(batch)]
  assert shapes_of(got) == shapes_of(expected)
  steps = [the_plan.step(i).batch for i in range(config.run.num_steps)]
  scores = np.mean([batch.num_scores.sum() for batch in steps])
  assert shapes.work(rows).scores == round(scores)
  # Counted the long way: a query sees a key of a smaller index whose subtree
  # it is in.
  index = np.arange(config.batch.row_length)
  visible = np.mean(
    [
      (
        (index[:, None] >= index)
        & (index[:, None] < batch.visible_until[..., None, :])
      ).sum()
      for batch in steps
    ]
  )
  assert shapes.work(rows).visible_pairs == round(visible)
  with pytest.raises(ValueError, match="--tokens_per_pair is for runs without"):
    batch_shapes.of_config(config, tokens_per_pair=8)


# Memory.


def test_arguments_take_what_the_compiler_says():
  config = make_config(mesh=(2, 2, 2))
  mesh = sharding.make_mesh(config.mesh)
  shapes = batch_shapes.of_config(config)
  made, memory = plan.prepare(config, mesh, shapes)
  step = program.compile_step(
    made.train_step, made, made.abstract_state, shapes.empty_batch(8)
  )
  # pair_ids are for people: the step does not read them, nor the number of
  # microbatches where there is one.
  unused = math.prod((1, 8 // 4, 1)) * 4
  told = step.memory_analysis().argument_size_in_bytes
  assert memory.arguments - unused == told


def test_what_is_on_hosts_is_not_in_hbm():
  plain = make_config(mesh=(2, 2, 2))
  offloaded = dataclasses.replace(
    plain,
    optimizer=dataclasses.replace(plain.optimizer, host_offload=True),
    reference=dataclasses.replace(plain.reference, host_offload=True),
  )
  mesh = sharding.make_mesh(plain.mesh)
  shapes = batch_shapes.of_config(plain)
  before, after = (
    plan.prepare(config, mesh, shapes)[1] for config in (plain, offloaded)
  )
  # Queries, keys, values, outputs with 8 and 4 heads of 32; three of the MLP.
  weights = 2 * 256 * (2 * 256 + 2 * 128 + 3 * 256)
  # Two moments of 4 bytes, a reference of 2, over fsdp 2 and tensor 2.
  assert before.host == 0 and after.host == weights * (8 + 2) // 4
  assert after.params == before.params
  assert after.optimizer == before.optimizer - weights * 8 // 4
  assert after.reference == before.reference - weights * 2 // 4


@pytest.mark.parametrize(
  ("message", "needed"),
  [
    (
      "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required "
      "for HLO temporaries (894.07G) exceeds available HBM (15.75G).",
      894.07 * 2**30,
    ),
    (
      "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 512.00M "
      "of 15.75G hbm. Exceeded hbm capacity by 4.4G.",
      2**29,
    ),
    ("INTERNAL: Mosaic failed to compile", None),
  ],
)
def test_what_the_compiler_needs_is_read_from_its_message(message, needed):
  found = compiler.refused_bytes(message)
  assert found == (needed if needed is None else int(needed))


# Least times.


def device(x, y, slice_index=0):
  return types.SimpleNamespace(coords=(x, y, 0), slice_index=slice_index)


def collective(kind, num_bytes, group):
  return collectives.Collective(kind, num_bytes, 2, group, "", "")


def test_the_least_time_is_that_of_the_busiest_part():
  slices = chips.parse("v5e:2x4")
  devices = [device(x, y) for x in range(2) for y in range(4)]
  chip = slices.chip
  bound = step_time.lower_bound(
    slices,
    devices,
    flops=int(8 * chip.peak_flops * 0.5),
    hbm_bytes=int(chip.hbm_bandwidth * 0.25),
    moved=[
      # Along y, over one link: twice three parts of 1e9 bytes at 50e9 a second.
      collective("all-gather", 10**9, (0, 1, 2, 3)),
      # Along both: 2 * 7/8 * 1e9 bytes, twice, over two links.
      collective("all-reduce", 10**9, tuple(range(8))),
    ],
  )
  assert bound.compute == pytest.approx(0.5)
  assert bound.hbm == pytest.approx(0.25)
  assert bound.ici == pytest.approx(6e9 / 50e9 + 3.5e9 / 100e9)
  assert bound.dcn == 0
  assert bound.seconds == bound.compute and bound.limit == "compute"


def test_between_slices_each_chip_sends_its_part():
  slices = chips.parse("v5e:2x2", num_slices=2)
  devices = [
    device(x, y, s) for s in range(2) for x in range(2) for y in range(2)
  ]
  bound = step_time.lower_bound(
    slices,
    devices,
    flops=0,
    hbm_bytes=0,
    moved=[collective("all-reduce", 10**9, tuple(range(8)))],
  )
  # In each slice 2 * 3/4 of the bytes, then of a quarter of them 2 * 1/2.
  assert bound.ici == pytest.approx(2 * 1.5e9 / 100e9)
  assert bound.dcn_bytes == pytest.approx(2 * 0.25e9)
  assert bound.dcn == pytest.approx(2 * 0.25e9 / 3.125e9)
  assert bound.limit == "dcn"
  v4 = step_time.lower_bound(
    chips.parse("v4:2x2x1", num_slices=2),
    devices,
    flops=0,
    hbm_bytes=0,
    moved=[collective("all-reduce", 10**9, (0, 4))],
  )
  assert v4.dcn is None and v4.ici == 0 and v4.seconds == 0


# Searches.


@pytest.fixture(scope="module")
def small_slice():
  """A slice of the eight devices that tests have."""
  return chips.parse("v5e:2x4")


@pytest.fixture(scope="module")
def shapes():
  return batch_shapes.of_config(make_config())


@pytest.fixture(scope="module")
def layouts(small_slice, shapes):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(chips, "devices", lambda slices: jax.devices())
    return plan_search.layouts(make_config(), small_slice, shapes)


def fake_plan(layout, slices, shapes, *, fits, seconds=1.0):
  bound = step_time.LowerBound(compute=seconds, hbm=0.0, ici=0.0, dcn=0.0)
  mesh = dict(zip(sharding.MESH_AXES, layout.mesh, strict=True))
  return plan.Plan(
    fits=fits,
    needed_bytes=10**9,
    memory=layout.memory,
    slices=slices,
    mesh=mesh,
    remat=layout.config.model.remat,
    rows_per_microbatch=layout.config.batch.rows_per_microbatch,
    num_microbatches=1,
    batch_size=8,
    batch_source=shapes.source,
    flops=flops.Flops(forward=1, backward=2, recomputation=1, reference=1),
    bound=bound if fits else None,
  )


def test_layouts_are_all_that_divide(layouts, small_slice, shapes):
  # The model has four key heads, so tensor is at most 4.
  expected = {
    (d, f, t)
    for t in (1, 2, 4)
    for f in (1, 2, 4, 8)
    for d in (1, 2, 4, 8)
    if d * f * t == 8
  }
  assert {layout.mesh for layout in layouts} == expected
  assert {layout.config.model.remat for layout in layouts} == {
    "none",
    "dots",
    "full",
  }
  estimates = [layout.estimate_seconds for layout in layouts]
  assert estimates == sorted(estimates)
  for layout in layouts:
    rows = layout.config.batch.rows_per_microbatch
    shards = layout.mesh[0] * layout.mesh[1]
    # Eight rows a step: more at once would only be padding.
    assert rows % shards == 0 and rows <= max(8, shards)
    assert layout.least_bytes > layout.memory.arguments + layout.memory.params


def test_what_did_not_fit_rules_out_what_takes_more(
  layouts, small_slice, shapes, monkeypatch
):
  smallest = [
    layout
    for layout in layouts
    if layout.config.model.remat == "full" and layout.mesh == (1, 2, 4)
  ]
  smallest.sort(key=lambda layout: layout.config.batch.rows_per_microbatch)
  others = [layout for layout in layouts if layout.mesh == (1, 2, 4)]
  compiled = []

  def make_plan(config, slices, shapes, *, has_code):
    assert not has_code
    compiled.append(config)
    return fake_plan(smallest[0], slices, shapes, fits=False)

  monkeypatch.setattr(plan, "make_plan", make_plan)
  searched = [smallest[0], *others]
  results = list(
    plan_search.search(searched, small_slice, shapes, max_compiles=5)
  )
  assert compiled == [smallest[0].config]
  assert [found is None for _, found in results] == [True, False]


def test_what_would_not_fit_if_it_were_like_others_is_not_compiled(
  layouts, small_slice, shapes, monkeypatch
):
  # The layers keep ten times what they keep at the least, in this world.
  needed = lambda layout: layout.state_bytes + 10 * layout.kept_bytes
  order = sorted(layouts, key=needed, reverse=True)
  capacity = needed(order[len(order) // 2])
  chip = dataclasses.replace(small_slice.chip, hbm_bytes=capacity)
  slices = dataclasses.replace(small_slice, chip=chip)
  compiled = []

  def make_plan(config, slices, shapes, *, has_code):
    layout = next(x for x in layouts if x.config == config)
    compiled.append(layout)
    fits = needed(layout) <= capacity
    found = fake_plan(layout, slices, shapes, fits=fits)
    return dataclasses.replace(found, needed_bytes=needed(layout))

  monkeypatch.setattr(plan, "make_plan", make_plan)
  monkeypatch.setattr(plan_search, "NUM_BEST", 1000)
  list(plan_search.search(order, slices, shapes, max_compiles=1000))
  fitting = [layout for layout in order if needed(layout) <= capacity]
  # Nothing that fits is missed, and of each policy, the one that takes most
  # says enough of the others.
  assert [x for x in compiled if x in fitting] == fitting
  assert len(compiled) <= len(fitting) + 3
  assert len(order) - len(fitting) > 10


@pytest.mark.parametrize("limit", ["compute", "estimate"])
def test_what_cannot_be_faster_than_enough_that_fit_is_not_compiled(
  layouts, small_slice, shapes, monkeypatch, limit
):
  # Operations alone limit the steps, or what limits them is three times what
  # it was estimated at.
  seconds = {
    "compute": lambda layout: layout.compute_seconds,
    "estimate": lambda layout: 3 * layout.estimate_seconds,
  }[limit]
  compiled = []

  def make_plan(config, slices, shapes, *, has_code):
    layout = next(x for x in layouts if x.config == config)
    compiled.append(seconds(layout))
    return fake_plan(layout, slices, shapes, fits=True, seconds=compiled[-1])

  def searched(order):
    compiled.clear()
    list(plan_search.search(order, small_slice, shapes, max_compiles=1000))
    return list(compiled)

  monkeypatch.setattr(plan, "make_plan", make_plan)
  order = sorted(layouts, key=seconds)
  best = [seconds(layout) for layout in order[: plan_search.NUM_BEST]]
  assert searched(order) == pytest.approx(best) and len(order) > 40
  # The slowest first: the best are found all the same, or others as fast.
  found = sorted(searched(order[::-1]))
  assert found[: plan_search.NUM_BEST] == pytest.approx(best)


def test_a_search_ends_after_so_many_compilations(
  layouts, small_slice, shapes, monkeypatch
):

  def make_plan(config, slices, shapes, *, has_code):
    layout = next(x for x in layouts if x.config == config)
    return fake_plan(layout, slices, shapes, fits=True)

  monkeypatch.setattr(plan, "make_plan", make_plan)
  results = plan_search.search(layouts, small_slice, shapes, max_compiles=3)
  assert sum(plan is not None for _, plan in results) == 3
  too_small = dataclasses.replace(
    small_slice, chip=dataclasses.replace(small_slice.chip, hbm_bytes=10)
  )
  assert not list(
    plan_search.search(layouts, too_small, shapes, max_compiles=3)
  )


def test_tables_are_best_first(layouts, small_slice, shapes):
  layout = layouts[0]
  fake = lambda fits, seconds: fake_plan(
    layout, small_slice, shapes, fits=fits, seconds=seconds
  )
  plans = plan_search.best_first(
    [fake(False, 0.0), fake(True, 2.0), fake(True, 1.0)]
  )
  lines = plan_text.table(plans).splitlines()[-3:]
  assert " 1.000 " in lines[0] and " 2.000 " in lines[1]
  assert "does not fit: needs 1.0 GB of 16.9" in lines[2]


def test_a_kept_reference_is_scored_before_the_steps_and_not_in_them():
  config = make_config()
  kept = dataclasses.replace(config.reference, cache_dir="-")
  shapes = batch_shapes.of_config(config)
  mesh = sharding.make_mesh(config.mesh)
  _, expected = plan.prepare(config, mesh, shapes)
  config = dataclasses.replace(config, reference=kept)
  made, memory = plan.prepare(config, mesh, shapes)
  assert memory.reference == 0 < expected.reference
  # float32 by pair, side and region, of two rows a device.
  logps = 2 * shapes.capacity.pairs * 2 * 3 * 4
  assert memory.batch == expected.batch + logps * shapes.num_microbatches(8)
  found = compiler.compiled(
    lambda options: program.compile_score_step(
      made, shapes.empty_batch(8), options
    )
  )
  scoring = plan.scoring_bytes(made, found)
  assert scoring > memory.params + expected.reference


# With the TPU compiler.


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
  ("topology", "num_slices", "mesh"),
  [
    ("v4:2x2x1", 1, (1, 2, 2)),
    ("v5e:2x2", 1, (1, 4, 1)),
    ("v5p:2x2x1", 1, (1, 2, 2)),
    ("v6e:2x2", 1, (2, 2, 1)),
    ("v5e:2x2", 2, (2, 2, 2)),
  ],
)
def test_a_step_is_planned_for_every_chip(topology, num_slices, mesh):
  config = make_config(mesh=mesh, rows=4)
  slices = chips.parse(topology, num_slices)
  shapes = batch_shapes.of_config(config)
  found = plan.make_plan(config, slices, shapes)
  assert found.fits and found.num_microbatches == 2
  memory = found.memory
  assert memory.temporaries > memory.params
  # Heads of 32 may be padded to 128 lanes; large arrays are as counted.
  assert 0 <= memory.padding < 0.5 * memory.arguments
  assert found.needed_bytes == memory.total < slices.chip.hbm_bytes
  assert all(moved.purpose for moved in found.moved), found.moved
  axes = {axis for moved in found.moved for axis in moved.axes}
  used = {a for a, n in zip(sharding.MESH_AXES, mesh, strict=True) if n > 1}
  assert axes == used
  assert found.bound.seconds > 0
  if num_slices > 1:
    assert found.bound.dcn > 0
  text = json.loads(json.dumps(plan_text.to_dict(found)))
  assert text["fits"] and text["num_chips"] == slices.num_chips
  assert sum(text["sent_bytes_per_chip"].values()) == pytest.approx(
    sum(entry["bytes_per_chip"] for entry in text["collectives"])
  )
  assert "Fits: needs" in plan_text.describe(found)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
  ("topology", "num_slices", "mesh", "rows"),
  [
    # Eight rows a step, so two microbatches, or one and no loop over them.
    ("v4:2x2x1", 2, (2, 2, 2), 4),
    ("v5p:2x2x1", 2, (2, 2, 2), 8),
    # Copies of the parameters within a slice as well.
    ("v6e:2x2", 2, (4, 1, 2), 4),
    ("v5e:2x2", 4, (4, 2, 2), 8),
    ("v6e:2x4", 2, (2, 2, 4), 8),
    ("v5e:2x4", 2, (2, 8, 1), 16),
  ],
)
def test_all_that_several_slices_send_has_a_reason(
  topology, num_slices, mesh, rows
):
  config = make_config(mesh=mesh, rows=rows)
  slices = chips.parse(topology, num_slices)
  shapes = batch_shapes.of_config(config)
  found = plan.make_plan(config, slices, shapes, has_code=False)
  assert all(moved.purpose for moved in found.moved), found.moved
  assert any(moved.axes == ("data",) for moved in found.moved)


@needs_libtpu
def test_memory_is_what_the_compiler_lays_out():
  device = chips.devices(chips.parse("v5e:2x2"))[0]
  x = jax.ShapeDtypeStruct(
    (4096, 4096),
    jnp.float32,
    sharding=jax.sharding.SingleDeviceSharding(device),
  )
  lowered = jax.jit(lambda x: jnp.sin(x @ x)).lower(x)
  found = compiler.compiled(
    lambda options: lowered.compile(compiler_options=options)
  )
  assert found.argument_bytes == x.size * 4
  # The argument, the result, and no more than one between them.
  assert 2 * x.size * 4 <= found.hbm_bytes < 3.1 * x.size * 4


@needs_libtpu
def test_what_does_not_fit_says_what_it_needs():
  config = make_config(
    mesh=(1, 4, 1),
    rows=4,
    model__hidden_size=16384,
    model__intermediate_size=65536,
    model__num_hidden_layers=4,
  )
  slices = chips.parse("v5e:2x2")
  found = plan.make_plan(config, slices, batch_shapes.of_config(config))
  assert not found.fits and found.bound is None
  assert found.needed_bytes > slices.chip.hbm_bytes
  assert plan_text.to_dict(found)["hbm_bytes_per_chip"]["temporaries"] is None
  assert "Does not fit: needs" in plan_text.describe(found)


def test_a_collective_that_nothing_calls_for_has_no_purpose():
  step = "jit(train_step)/"
  gathered = collectives.Collective(
    "all-gather", 8, 1, (0, 1), step + "jvp(Decoder)/layers/x/dot_general", ""
  )
  assert "gathered for its products" in purposes.purpose(gathered, ["fsdp"])
  # Nothing is gathered over the axis that splits heads.
  assert purposes.purpose(gathered, ["tensor"]) == ""
  other = gathered._replace(op_name=step + "sort")
  assert purposes.purpose(other, ["fsdp"]) == ""


# The command.


COMMAND = [sys.executable, "-m", "dpop_jax.cli.plan"]


def command_environment():
  return {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}


def run_command(*arguments):
  return subprocess.run(
    [*COMMAND, *arguments],
    cwd=ROOT,
    env=command_environment(),
    capture_output=True,
    text=True,
    check=False,
  )


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
  path = tmp_path_factory.mktemp("plan") / "tiny.py"
  sections = tiny_runs.make_sections({})
  sections["model"] |= MODEL
  sections["batch"] |= dict(batch_size=8, row_length=256)
  path.write_text(
    "from dpop_jax import config\n"
    f"def get_config():\n  return config.config_dict(**{sections!r})\n"
  )
  return f"--config={path}"


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (
      ["--topology=v9:4"],
      "--topology should be a chip (v4, v5e, v5p, v6e) and",
    ),
    (
      ["--topology=v5e:2x2", "--config.mesh.fdsp=2"],
      "Unknown config key mesh.",
    ),
    (
      ["--topology=v5e:2x2", "--tokens_per_pair=300"],
      "does not fit batch.row_",
    ),
    ([], "--topology"),
  ],
)
def test_a_mistake_is_one_sentence(config_file, arguments, message):
  done = run_command(config_file, *arguments)
  assert done.returncode == 1 and done.stdout == ""
  assert done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1
  assert message in done.stderr


@needs_libtpu
@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--topology=v5e:3x5"], "The TPU compiler has no slice v5e:3x5: INVALID"),
    (["--topology=v5e:4x4"], "= (2, 2, 2) do not divide the 16 devices"),
    (["--topology=v5e:2x2", "--num_slices=2", "--config.mesh.data=1",
      "--config.mesh.fsdp=4"], "mesh.data (1) must be a multiple of the num"),
    (["--topology=v5e:2x4", "--config.batch.rows_per_microbatch=6"],
     "batch.rows_per_microbatch (6) must be a multiple of mesh.data"),
  ],
)  # fmt: skip
def test_what_does_not_divide_is_one_sentence(config_file, arguments, message):
  done = run_command(config_file, *arguments)
  assert done.returncode == 1 and done.stdout == ""
  assert message in done.stderr.splitlines()[-1]
  assert done.stderr.splitlines()[-1].startswith("Error: ")


@needs_libtpu
@pytest.mark.slow
def test_the_command_prints_a_page_and_json(config_file):
  done = run_command(config_file, "--topology=v5e:2x4", "--json")
  assert done.returncode == 0, done.stderr
  *page, last = done.stdout.splitlines()
  told = json.loads(last)
  assert told["fits"] and told["mesh"] == {"data": 2, "fsdp": 2, "tensor": 2}
  assert page[0].startswith("v5e:2x4, 8 chips, mesh 2x2x2")


@needs_libtpu
@pytest.mark.slow
def test_a_search_prints_a_table_and_json(config_file):
  done = run_command(
    config_file, "--topology=v5e:2x2", "--search", "--max_compiles=2", "--json"
  )
  assert done.returncode == 0, done.stderr
  told = json.loads(done.stdout.splitlines()[-1])
  assert told["num_compiled"] == len(told["plans"]) == 2
  seconds = [found["least_step_seconds"]["step"] for found in told["plans"]]
  assert seconds == sorted(seconds)
  assert "layouts, of which" in done.stderr
  assert told["stopped_by"] == "--max_compiles"
  assert "others may fit, and be faster." in done.stdout


@needs_libtpu
@pytest.mark.slow
def test_a_search_that_is_interrupted_says_what_it_knows(config_file):
  search = [*COMMAND, config_file, "--topology=v5e:2x2", "--search", "--json"]
  with subprocess.Popen(
    search,
    cwd=ROOT,
    env=command_environment(),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  ) as started:
    for line in started.stderr:
      if line.startswith("[2]"):
        started.terminate()
        break
    stdout, stderr = started.communicate(timeout=60)
  assert started.returncode == 130, stderr
  assert "Stopped by interrupt: " in stdout
  told = json.loads(stdout.splitlines()[-1])
  assert told["num_compiled"] == len(told["plans"]) == 1
