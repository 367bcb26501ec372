"""What is sent, read from programs of both compilers."""

import math
import pathlib

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dpop_jax import sharding
from dpop_jax.planning import collectives, purposes

# Instructions as the TPU compiler writes them, shortened.
PROGRAM = (
  pathlib.Path(__file__).parent / "programs/collectives.hlo"
).read_text()
SIZES = {"data": 1, "fsdp": 4, "tensor": 4}


def test_collectives_of_the_tpu_compiler():
  read = collectives.read(PROGRAM, 16, lambda op_name: 1)
  size = 64 * 8 * 2
  found = [
    (c.kind, c.num_bytes, collectives.mesh_axes(c.group, SIZES), c.sent_bytes)
    for c in read
  ]
  assert found == [
    # Rings of 4: each device passes on three parts.
    ("all-gather", size, ("fsdp",), 3 * size),
    ("all-gather", size, ("fsdp", "tensor"), 15 * size),
    ("reduce-scatter", size, ("fsdp",), 3 / 4 * size),
    ("collective-permute", size, ("tensor",), size),
    ("all-reduce", 2 * size, ("fsdp", "tensor"), 2 * 15 / 16 * 2 * size),
  ]
  names = [c.op_name for c in read]
  # Those without a name have that of what uses them, or of their fusion.
  assert names[:3] == ["jit(step)/gate", "jit(step)/up", "jit(step)/dot"]


@pytest.mark.parametrize(
  ("groups", "expected"),
  [
    ("{{0,2},{1,3}}", (0, 2)),
    ("[2,2]<=[4]", (0, 1)),
    ("[2,2]<=[2,2]T(1,0)", (0, 2)),
    ("mesh['a'=2,'b'=2] {'b'}", (0, 1)),
    ("mesh['a'=2,'b'=2] {'a'}", (0, 2)),
    ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", (0, 2)),
    # The outer and the inner half of an axis.
    ("mesh['a'=4] {'a':(1)2}", (0, 2)),
    ("mesh['a'=4] {'a':(2)2}", (0, 1)),
  ],
)
def test_all_ways_to_write_groups(groups, expected):
  text = (
    "ENTRY %main (p: f32[4]) -> f32[4] {\n  %p = f32[4] parameter(0)\n"
    f"  ROOT %r = f32[4] all-reduce(%p), replica_groups={groups}, channel_id=1"
    "\n}\n"
  )
  (found,) = collectives.read(text, 4, lambda op_name: 1)
  assert found.group == expected


def test_a_nameless_collective_has_the_name_of_what_it_is_about():
  text = """
%scatter (input: f32[8]) -> f32[4] {
  %input = f32[8] parameter(0)
  %zero = f32[] constant(0)
  %padded = f32[16] pad(%input, %zero), padding=0_8
  %reduced = f32[16] all-reduce(%padded), replica_groups={{0,1}}, to_apply=%add
  ROOT %part = f32[4] dynamic-slice(%reduced, %zero), dynamic_slice_sizes={4}
}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%add.named (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0), metadata={op_name="jit(step)/norm/reduce_sum"}
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

ENTRY %main (p: f32[8]) -> f32[4] {
  %p = f32[8] parameter(0)
  %made = f32[8] negate(%p), metadata={op_name="jit(step)/gate/dot_general"}
  %moved = f32[8] reshape(%made)
  %sum = f32[8] all-reduce(%moved), replica_groups={{0,1}}, to_apply=%add.named
  ROOT %fusion = f32[4] fusion(%moved), kind=kCustom, calls=%scatter
}
"""
  found = collectives.read(text, 2, lambda op_name: 1)
  # A sum's own computation says what it adds; else it is looked further back,
  # out of the fusion.
  assert [(c.kind, c.op_name) for c in found] == [
    ("all-reduce", "jit(step)/norm/reduce_sum"),
    ("reduce-scatter", "jit(step)/gate/dot_general"),
  ]


def test_what_only_moves_a_result_does_not_name_it():
  place = "jit(step)/while/body/dynamic_update_slice"
  text = f"""
ENTRY %main (p: f32[8], all: f32[4,8]) -> f32[4,8] {{
  %p = f32[8] parameter(0)
  %all = f32[4,8] parameter(1)
  %zero = s32[] constant(0)
  %made = f32[1,8] reduce(%p), metadata={{op_name="jit(step)/norm/reduce_sum"}}
  %put = f32[4,8] dynamic-update-slice(%all, %made, %zero), \
metadata={{op_name="{place}"}}
  ROOT %sum = f32[4,8] all-reduce(%put), replica_groups={{{{0,1}}}}
}}
"""
  (found,) = collectives.read(text, 2, lambda op_name: 1)
  assert found.op_name == "jit(step)/norm/reduce_sum"


def test_a_sum_over_slices_is_put_together_of_what_chips_receive():
  text = """
%part (received: f32[4]) -> f32[2] {
  %received = f32[4] parameter(0)
  ROOT %slice = f32[2] slice(%received), slice={[0:2]}
}

%scaled (received.1: f32[4]) -> f32[4] {
  %received.1 = f32[4] parameter(0)
  ROOT %product = f32[4] multiply(%received.1, %received.1)
}

ENTRY %main (p: f32[4], q: f32[4]) -> f32[8] {
  %p = f32[4] parameter(0)
  %q = f32[4] parameter(1)
  %token = token[] after-all()
  %recv = (f32[4], u32[], token[]) recv(%token), is_host_transfer=true
  %recv-done = (f32[4], token[]) recv-done(%recv), is_host_transfer=true
  %sum = f32[4] get-tuple-element(%recv-done), index=0
  %two = f32[2] fusion(%sum), kind=kLoop, calls=%part
  %other = f32[4] fusion(%sum), kind=kLoop, calls=%scaled
  %a = f32[8] all-gather(%sum), replica_groups={{0,1}}, dimensions={0}
  %b = f32[4] all-gather(%two), replica_groups={{0,1}}, dimensions={0}
  %c = f32[8] all-gather(%other), replica_groups={{0,1}}, dimensions={0}
  ROOT %d = f32[8] all-gather(%p), replica_groups={{0,1}}, dimensions={0}
}
"""
  found = collectives.read(text, 2, lambda op_name: 1)
  assert [c.is_received for c in found] == [True, True, False, False]
  told = [purposes.purpose(c, ["fsdp"]) for c in found]
  assert [text.startswith("sums are put together") for text in told] == [
    *[True, True, False, False]
  ]


def test_collectives_of_a_program_that_was_compiled_here():
  mesh = sharding.make_mesh(sharding.MeshConfig(data=1, fsdp=4, tensor=2))
  split = NamedSharding(mesh, P("fsdp", "tensor"))

  @jax.jit
  def step(x):
    def scaled(total, _):
      whole = jax.lax.with_sharding_constraint(
        total, NamedSharding(mesh, P(None, "tensor"))
      )
      total = jax.lax.with_sharding_constraint(jnp.cumsum(whole, axis=0), split)
      return total, None

    return jax.lax.scan(scaled, x, length=5)[0]

  x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=split)
  text = step.lower(x).compile().as_text()
  (gather,) = collectives.read(text, mesh.size, lambda op_name: 1)
  assert gather.kind == "all-gather"
  assert gather.times == 5
  assert collectives.mesh_axes(gather.group, dict(mesh.shape)) == ("fsdp",)
  part = math.prod((64 // 4, 32 // 2)) * 4
  assert gather.num_bytes == part
  assert gather.step_bytes == 5 * 3 * part
