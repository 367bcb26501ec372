"""Reading programs: how often each instruction is executed."""

import pathlib

import jax
import jax.numpy as jnp
import pytest

from dpop_jax.planning import hlo

# As the TPU compiler writes loops, shortened: one of 80 that carries its end
# and counts by one, in it one up to 8 that counts by two, and one whose end
# only the data tell.
PROGRAM = (pathlib.Path(__file__).parent / "programs/loops.hlo").read_text()


def test_loops_are_multiplied():
  asked = []

  def trip_counts(op_name):
    asked.append(op_name)
    return 5

  executed = hlo.parse(PROGRAM).executed(trip_counts)
  times = [e.times for e in executed if e.instruction.name == "negate"]
  # Of each outer execution (8 - 0) / 2 inner ones.
  assert times == [80 * 4, 5 * 4]
  assert asked == ["jit(step)/chunks"]


def test_parts_of_an_instruction():
  module = hlo.parse(PROGRAM)
  assert module.entry == "main.7_spmd"
  negate = module.computations["inner"]["negate"]
  assert negate.opcode == "negate"
  assert negate.operands == ("x.2",)
  assert negate.op_name == "a"
  assert not negate.is_root
  root = module.computations["inner"]["t.2"]
  assert root.is_root and root.operands == ("next.2", "negate")
  loop = module.computations["outer"]["loop"]
  assert loop.attribute("condition") == "inner_condition"
  assert loop.attribute("calls") is None


@pytest.mark.parametrize(
  ("text", "size"),
  [
    ("bf16[4,8]{1,0:T(8,128)(2,1)S(1)}", 64),
    ("(f32[3]{0}, /*index=1*/s32[], pred[7])", 12 + 4 + 7),
    ("f8e4m3fn[16]", 16),
    ("token[]", 0),
  ],
)
def test_bytes_of_a_type(text, size):
  assert hlo.num_bytes(text) == size


def test_loops_of_a_program_that_was_compiled_here():
  @jax.jit
  def nested(x, n):
    def inner(x, _):
      return jnp.sin(x) @ x, None

    def outer(x, _):
      return jax.lax.scan(inner, x, length=3)[0], None

    x = jax.lax.scan(outer, x, length=7)[0]
    return jax.lax.fori_loop(0, n, lambda _, x: x @ x, x)

  text = nested.lower(jnp.ones((64, 64)), 2).compile().as_text()
  executed = hlo.parse(text).executed(lambda op_name: 11)
  assert [e.times for e in executed if e.instruction.opcode == "dot"] == [
    21,
    11,
  ]
