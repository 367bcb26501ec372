"""Slices of TPUs: their names, their links, and what the compiler says."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest

from dpop_jax import sharding
from dpop_jax.planning import chips, compiler

needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="needs the TPU compiler: pip install dpop_jax[tpu]",
)
# The smallest slice of each chip that fills a host.
SMALLEST = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2")


def test_a_topology_is_a_chip_and_a_shape():
  slices = chips.parse("v5p:4x4x8", num_slices=2)
  assert slices.chip.name == "v5p"
  assert slices.shape == (4, 4, 8)
  assert slices.num_chips == 4 * 4 * 8 * 2
  assert slices.topology == "v5p:4x4x8"


@pytest.mark.parametrize(
  ("topology", "name"),
  [
    ("v4:2x2x1", "v4-8"),
    ("v5p:4x4x4", "v5p-128"),
    ("v5e:4x4", "v5litepod-16"),
    ("v6e:8x8", "v6e-64"),
  ],
)
def test_names_of_google_cloud(topology, name):
  assert chips.parse(topology).accelerator_type == name


@pytest.mark.parametrize(
  ("topology", "num_slices", "message"),
  [
    ("v9:4x4", 1, r"a chip \(v4, v5e, v5p, v6e\) and .*; got 'v9:4x4'\.$"),
    ("v5e", 1, "like v5p:4x4x4 or v5e:16x16; got 'v5e'"),
    ("v5e:4x", 1, "got 'v5e:4x'"),
    ("v5e:0x4", 1, "got 'v5e:0x4'"),
    ("v5e:4x4x4", 1, "A slice of v5e has 2 directions, like v5e:4x4; got"),
    ("v5p:4x4", 1, "A slice of v5p has 3 directions, like v5p:4x4x4; got"),
    ("v5e:4x4", 0, "--num_slices must be at least 1, got 0"),
  ],
)
def test_other_topologies_are_refused(topology, num_slices, message):
  with pytest.raises(ValueError, match=message) as caught:
    chips.parse(topology, num_slices)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("topology", "links"),
  [
    # Of whole cubes of 4 x 4 x 4 chips, each direction closes to a ring.
    ("v5p:4x4x8", (2, 2, 2)),
    ("v5p:4x4x2", (1, 1, 1)),
    ("v4:2x2x1", (1, 1, 0)),
    # Of v5e and v6e, a direction does that has 16 chips.
    ("v5e:16x16", (2, 2)),
    ("v6e:8x16", (1, 2)),
    ("v5e:4x4", (1, 1)),
  ],
)
def test_a_chip_at_the_end_of_a_line_has_one_link(topology, links):
  assert chips.parse(topology).links == links


def test_published_rates_of_a_link():
  # Of all links of a chip, both ways: 1200 GB/s for the six of a v5p, 400 for
  # the four of a v5e, 800 for those of a v6e.
  for name, total in (("v5p", 1200e9), ("v5e", 400e9), ("v6e", 800e9)):
    chip = chips.CHIPS[name]
    links = 2 * chip.torus_dimensions
    assert 2 * links * chip.link_bandwidth == pytest.approx(total)


def test_published_rates_between_slices():
  # A host of eight v5e has two network cards of 100 Gbit/s, of eight v6e four
  # of 200; of v5p the rate is that of a chip. Of v4 there is none.
  rates = {"v4": None, "v5e": 200e9 / 8, "v5p": 50e9, "v6e": 800e9 / 8}
  for name, rate in rates.items():
    found = chips.CHIPS[name].dcn_bandwidth
    assert (found and 8 * found) == (rate and pytest.approx(rate))


def test_without_the_compiler_the_error_tells_how_to_get_it(monkeypatch):
  find_spec = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util,
    "find_spec",
    lambda name: None if name == "libtpu" else find_spec(name),
  )
  with pytest.raises(ValueError, match=r'pip install "dpop_jax\[tpu\]"'):
    chips.devices(chips.parse("v5e:2x2"))


@needs_libtpu
@pytest.mark.parametrize("topology", SMALLEST)
def test_a_device_is_a_chip(topology):
  slices = chips.parse(topology)
  devices = chips.devices(slices)
  assert len(devices) == slices.num_chips
  assert {device.platform for device in devices} == {"tpu"}


@needs_libtpu
@pytest.mark.parametrize("topology", SMALLEST)
def test_the_memory_is_what_the_compiler_lets_a_program_use(topology):
  slices = chips.parse(topology)
  device = chips.devices(slices)[0]
  large = jax.ShapeDtypeStruct(
    (400_000, 400_000),
    jnp.bfloat16,
    sharding=jax.sharding.SingleDeviceSharding(device),
  )
  with pytest.raises(jax.errors.JaxRuntimeError) as caught:
    jax.jit(lambda x: (x @ x) @ x.T).lower(large).compile()
  gib = slices.chip.hbm_bytes / 2**30
  assert f"exceeds available HBM ({gib:.2f}G)" in str(caught.value)
  assert compiler.refused_bytes(str(caught.value)) > slices.chip.hbm_bytes


@needs_libtpu
def test_a_shape_that_the_compiler_does_not_know_is_one_sentence():
  with pytest.raises(ValueError, match="has no slice v5e:5x3: ") as caught:
    chips.devices(chips.parse("v5e:5x3"))
  assert "\n" not in str(caught.value)


@needs_libtpu
def test_of_several_slices_only_the_data_axis_leaves_one():
  devices = chips.devices(chips.parse("v5e:4x4", num_slices=2))
  mesh = sharding.make_mesh(
    sharding.MeshConfig(data=4, fsdp=-1, tensor=2), devices
  )
  assert mesh.devices.shape == (4, 4, 2)
  slices = [{d.slice_index for d in part.flat} for part in mesh.devices]
  assert slices == [{0}, {0}, {1}, {1}]
  with pytest.raises(ValueError, match=r"mesh.data \(1\) must be a multiple"):
    sharding.make_mesh(sharding.MeshConfig(data=1, fsdp=-1), devices)
