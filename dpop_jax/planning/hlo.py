"""The text of a compiled program: computations, instructions, loops.

Only as much of the language is read as is needed to find instructions and to
tell how often each of them is executed.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import NamedTuple

# Executions of a loop whose number only the data tell, by its `op_name`.
TripCounts = Callable[[str], int]

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_CALLED = re.compile(
  r"(?:calls|body|branch_computations|to_apply)=\{?([^,)}]+)"
)
_SHAPE = re.compile(r"\b([a-z]+\d*)\w*\[([\d,]*)\]")
_BITS = re.compile(r"\d+")


class Instruction(NamedTuple):
  """One line.

  Attributes:
    name: Without the percent sign.
    type: Of the result, as written.
    opcode: Such as `all-gather-start`.
    operands: Names.
    text: What stands behind the opcode.
    is_root: Whether it is the computation's result.
  """

  name: str
  type: str
  opcode: str
  operands: tuple[str, ...]
  text: str
  is_root: bool

  @property
  def op_name(self) -> str:
    """What in the source it came from; empty if that is not known."""
    found = _OP_NAME.search(self.text)
    return found[1] if found else ""

  def attribute(self, name: str) -> str | None:
    """The word behind `name=`; None without it."""
    found = re.search(rf"\b{name}=%?([^\s,]+)", self.text)
    return found[1] if found else None


class Executed(NamedTuple):
  """An instruction of a program, and how often it is executed.

  Attributes:
    instruction: Itself.
    computation: The name of the computation that it stands in.
    caller: The name of the instruction that runs this; empty for the entry.
    times: Executions in one run of the program.
  """

  instruction: Instruction
  computation: str
  caller: str
  times: int


@dataclasses.dataclass(frozen=True)
class Module:
  """A program.

  Attributes:
    computations: Instructions by name, by the name of their computation.
    entry: Name of the computation that the program starts with.
  """

  computations: dict[str, dict[str, Instruction]]
  entry: str

  def executed(self, trip_counts: TripCounts) -> list[Executed]:
    """All instructions that are executed, those in fusions included.

    Args:
      trip_counts: For loops whose number of executions is not a constant.
    """
    found: list[Executed] = []

    def visit(computation: str, caller: str, times: int):
      for instruction in self.computations[computation].values():
        found.append(Executed(instruction, computation, caller, times))
        inner = times
        if instruction.opcode == "while":
          count = self.trip_count(computation, instruction)
          if count is None:
            count = trip_counts(instruction.op_name)
          inner = times * count
        for called in _CALLED.findall(instruction.text):
          name = called.strip().removeprefix("%")
          if name in self.computations:
            visit(name, instruction.name, inner)

    visit(self.entry, "", 1)
    return found

  def trip_count(self, computation: str, loop: Instruction) -> int | None:
    """Executions of a `while` that counts up to a constant; None of others."""
    known = re.search(r'known_trip_count[^\d]*"?(\d+)', loop.text)
    if known:
      return int(known[1])
    condition = self.computations[loop.attribute("condition") or ""]
    body = self.computations[loop.attribute("body") or ""]
    test = next(i for i in condition.values() if i.is_root)
    if test.opcode != "compare" or "direction=LT" not in test.text:
      return None
    counter = self._source(condition, test.operands[0])
    if counter is None or counter.opcode != "get-tuple-element":
      return None
    index = int(counter.attribute("index") or 0)
    result = next(i for i in body.values() if i.is_root)
    start = self.computations[computation][loop.operands[0]]
    if result.opcode != "tuple" or start.opcode != "tuple":
      return None
    first = self._constant(
      self.computations[computation], start.operands[index]
    )
    step = self._step(body, result.operands[index], index)
    last = self._constant(condition, test.operands[1])
    if last is None:
      last = self._carried_constant(
        condition, test.operands[1], self.computations[computation], start
      )
    if first is None or last is None or not step:
      return None
    return max(0, -(-(last - first) // step))

  def _source(self, instructions, name) -> Instruction | None:
    """What a value is a copy of."""
    found = instructions.get(name)
    while found is not None and found.opcode in ("copy", "bitcast", "convert"):
      found = instructions.get(found.operands[0])
    return found

  def _constant(self, instructions, name) -> int | None:
    found = self._source(instructions, name)
    if found is None or found.opcode != "constant":
      return None
    number = re.match(r"\(?(-?\d+)\)", found.text)
    return int(number[1]) if number else None

  def _carried_constant(self, condition, name, outside, start) -> int | None:
    found = self._source(condition, name)
    if found is None or found.opcode != "get-tuple-element":
      return None
    index = int(found.attribute("index") or 0)
    return self._constant(outside, start.operands[index])

  def _step(self, body, name, index) -> int | None:
    """By how much a loop's body raises an element of its tuple."""
    found = self._source(body, name)
    if found is None or found.opcode != "add":
      return None
    sources = [self._source(body, operand) for operand in found.operands]
    steps = [self._constant(body, operand) for operand in found.operands]
    for source, step in zip(sources, reversed(steps), strict=True):
      if (
        source is not None
        and source.opcode == "get-tuple-element"
        and int(source.attribute("index") or 0) == index
      ):
        return step
    return None


def parse(text: str) -> Module:
  """Reads what `jax.stages.Compiled.as_text` gives."""
  computations: dict[str, dict[str, Instruction]] = {}
  entry, current = "", None
  for line in text.splitlines():
    if not line.startswith(" "):
      found = _COMPUTATION.match(line)
      current = computations.setdefault(found[2], {}) if found else None
      if found and found[1]:
        entry = found[2]
    elif current is not None:
      instruction = _parse_line(line)
      if instruction is not None:
        current[instruction.name] = instruction
  return Module(computations, entry)


@functools.cache
def num_bytes(type_text: str) -> int:
  """Bytes of the arrays of a type; tokens and the like are none."""
  total = 0
  for element, sizes in _SHAPE.findall(type_text):
    bits = _BITS.search(element)
    width = int(bits[0]) if bits else 8 * (element == "pred")
    count = 1
    for size in filter(None, sizes.split(",")):
      count *= int(size)
    total += count * width // 8
  return total


def _parse_line(line: str) -> Instruction | None:
  name, equals, rest = line.strip().partition(" = ")
  if not equals:
    return None
  is_root = name.startswith("ROOT ")
  name = name.removeprefix("ROOT ").removeprefix("%")
  end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
  opcode = _OPCODE.match(rest, end)
  if opcode is None:
    return None
  close = _closing(rest, opcode.end() - 1)
  operands = re.findall(r"%([\w.\-]+)", rest[opcode.end() : close])
  return Instruction(
    name=name,
    type=rest[:end],
    opcode=opcode[1],
    operands=tuple(operands),
    text=rest[opcode.end() - 1 :],
    is_root=is_root,
  )


def _closing(text: str, start: int) -> int:
  """Where the parenthesis that opens at `start` closes."""
  depth = 0
  for found in re.finditer(r"[()]", text[start:]):
    depth += 1 if found[0] == "(" else -1
    if not depth:
      return start + found.start()
  return len(text)
