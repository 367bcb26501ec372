"""Meshes of all shapes, and what is split over them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dpop_jax import sharding


def mesh_of(data, fsdp, tensor):
  return sharding.make_mesh(
    sharding.MeshConfig(data=data, fsdp=fsdp, tensor=tensor)
  )


@pytest.mark.parametrize(
  ("asked", "shape"),
  [
    ((1, -1, 1), (1, 8, 1)),
    ((-1, 1, 1), (8, 1, 1)),
    ((2, -1, 2), (2, 2, 2)),
    ((2, 4, -1), (2, 4, 1)),
    ((2, 2, 2), (2, 2, 2)),
  ],
)
def test_minus_one_takes_the_rest_of_the_devices(asked, shape):
  mesh = mesh_of(*asked)
  assert mesh.axis_names == ("data", "fsdp", "tensor")
  assert mesh.devices.shape == shape
  assert set(mesh.devices.flat) == set(jax.devices())
  assert sharding.num_row_shards(mesh) == shape[0] * shape[1]


def test_all_devices_share_the_weights_by_default():
  mesh = sharding.make_mesh(sharding.MeshConfig())
  assert dict(mesh.shape) == {"data": 1, "fsdp": 8, "tensor": 1}


def test_a_mesh_may_be_of_some_devices_only():
  mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[2:4])
  assert mesh.devices.flatten().tolist() == jax.devices()[2:4]
  assert mesh.shape["fsdp"] == 2


@pytest.mark.parametrize("sizes", [(0, 1, 1), (1, -2, 1), (-1, -1, 1)])
def test_bad_sizes_are_refused(sizes):
  with pytest.raises(ValueError, match="at most one of them -1") as caught:
    mesh_of(*sizes)
  assert str(sizes) in str(caught.value)


@pytest.mark.parametrize(
  "sizes", [(3, -1, 1), (1, 1, 1), (2, 2, 4), (16, -1, 1), (1, 3, 2)]
)
def test_sizes_that_do_not_give_all_devices_are_refused(sizes):
  with pytest.raises(ValueError, match="do not divide the 8 devices") as caught:
    mesh_of(*sizes)
  assert str(sizes) in str(caught.value)
  assert "\n" not in str(caught.value)


def test_without_a_mesh_nothing_is_split():
  assert sharding.active_axes(*sharding.MESH_AXES) == ()
  assert sharding.active_row_shards() == 1
  x = jnp.arange(4.0)
  assert sharding.constrain_rows(x) is x
  function = lambda x: x
  same = sharding.per_device(function, in_specs=P("data"), out_specs=P("data"))
  assert same is function


def test_with_a_mesh_every_device_gets_its_own_rows():
  mesh = mesh_of(2, 2, 2)
  with jax.set_mesh(mesh):
    assert sharding.active_axes("tensor", "data") == ("tensor", "data")
    assert sharding.active_row_shards() == 4

    @jax.jit
    def number_of_rows(x):
      count = lambda x: jnp.full(x.shape[:1], x.shape[0])
      rows = P(sharding.ROW_AXES)
      counts = sharding.per_device(count, in_specs=(rows,), out_specs=rows)(x)
      return counts, sharding.constrain_rows(x)

    counts, x = number_of_rows(np.ones((8, 3), np.float32))
  np.testing.assert_array_equal(counts, 2)
  wanted = jax.sharding.NamedSharding(mesh, P(("data", "fsdp")))
  assert x.sharding.is_equivalent_to(wanted, 2)
