"""What devices send to each other, read from a compiled program."""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dpop_jax.planning import hlo

_BETWEEN_SLICES = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
# The name of what only puts a result in its place says nothing of it.
_MOVES = "/dynamic_update_slice"
_COPIES = ("get-tuple-element", "bitcast", "copy")
_PARTS = (*_COPIES, "parameter", "slice", "reshape", "transpose")
# How far back it is looked for what a nameless collective is about.
_MAX_STEPS_BACK = 16
KINDS = (
  "all-gather",
  "reduce-scatter",
  "all-reduce",
  "collective-permute",
  "all-to-all",
)


class Collective(NamedTuple):
  """One collective instruction of a program.

  Attributes:
    kind: One of KINDS.
    num_bytes: Of its operands on one device.
    times: Executions in a step.
    group: The devices that the first of them exchanges with, itself included,
      as indices into the flattened mesh.
    op_name: What in the source it came from.
    computation: The part of the program that it stands in.
    is_sparse: Whether it adds up arrays that are zero but for a device's own
      part: a gather, as the TPU compiler writes it over a whole 3D torus.
    is_received: Whether it gathers what has come from other slices: a sum over
      slices is made of a part of it on each chip.
  """

  kind: str
  num_bytes: int
  times: int
  group: tuple[int, ...]
  op_name: str
  computation: str
  is_sparse: bool = False
  is_received: bool = False

  @property
  def sent_bytes(self) -> float:
    """Least that a device sends in one execution, with rings or better."""
    count = len(self.group)
    if self.kind == "collective-permute":
      return float(self.num_bytes)
    if self.kind == "all-gather":
      return float(self.num_bytes * (count - 1))
    share = self.num_bytes * (count - 1) / count
    return 2 * share if self.kind == "all-reduce" else share

  @property
  def step_bytes(self) -> float:
    """The same of a whole step."""
    return self.sent_bytes * self.times


def read(
  text: str,
  num_devices: int,
  trip_counts: hlo.TripCounts,
  *,
  num_slices: int = 1,
) -> list[Collective]:
  """All collectives of a program, without those that move nothing.

  The parts of an asynchronous one count once. An all-reduce of which each
  device keeps a part, which is how the TPU compiler writes one that it runs as
  a reduce-scatter, is a reduce-scatter.

  Args:
    text: Of the compiled program.
    num_devices: Devices that it runs on.
    trip_counts: Executions of loops that only the data tell.
    num_slices: TPU slices that the devices are of, one behind the other. What
      goes between slices is a `send` to the host, which names its collective.
  """
  module = hlo.parse(text)
  callers = _callers(module)
  found = []
  for instruction, computation, caller, times in module.executed(trip_counts):
    kind = instruction.opcode.removesuffix("-start")
    between = _BETWEEN_SLICES.search(instruction.text)
    if instruction.opcode == "send" and between:
      kind = between[1].lower().replace("_", "-")
    if kind not in KINDS or _is_continued(computation, caller):
      continue
    instructions = module.computations[computation]
    if kind == "all-reduce" and _is_scattered(instructions):
      kind = "reduce-scatter"
    group = _group(instruction.text, num_devices)
    operands = instruction.operands
    if instruction.opcode == "send":
      group = tuple(range(0, num_devices, num_devices // num_slices))
      operands = operands[:1]
    if len(group) == 1:
      continue
    num_bytes = sum(hlo.num_bytes(instructions[name].type) for name in operands)
    found.append(
      Collective(
        kind=kind,
        num_bytes=num_bytes,
        times=times,
        group=group,
        op_name=instruction.op_name
        or _op_name_nearby(module, callers, instruction, computation),
        computation=computation,
        is_sparse=kind == "all-reduce"
        and any("dynamic-update-slice" in n for n in instruction.operands),
        is_received=kind == "all-gather"
        and _is_received(module, callers, instruction, computation),
      )
    )
  return found


def mesh_axes(group: Sequence[int], sizes: dict[str, int]) -> tuple[str, ...]:
  """The axes of a mesh, with these sizes, along which a group extends."""
  places = np.unravel_index(np.asarray(group), tuple(sizes.values()))
  return tuple(
    name
    for name, along in zip(sizes, places, strict=True)
    if len(np.unique(along)) > 1
  )


def _is_continued(computation: str, caller: str) -> bool:
  """Whether a collective that began elsewhere is shown once more.

  The TPU compiler runs some a part at a time, inside of other fusions, and
  writes the whole of it into each of these.
  """
  return computation.startswith("async_collective_fusion") or caller.startswith(
    "async-collective-done"
  )


def _is_scattered(instructions: dict[str, hlo.Instruction]) -> bool:
  """Whether a fusion ends with a part of its all-reduce."""
  root = next(i for i in instructions.values() if i.is_root)
  while root.opcode == "bitcast":
    root = instructions[root.operands[0]]
  source = instructions.get(root.operands[0]) if root.operands else None
  return (
    root.opcode == "dynamic-slice"
    and source is not None
    and source.opcode == "all-reduce"
  )


def _op_name_nearby(module, callers, instruction, computation) -> str:
  """Of the fusion that it stands in, what it uses, or who uses it.

  Else of the sum that it makes, or of what it is made from, some steps back.
  """
  instructions = module.computations[computation]
  sources = [
    _behind_copies(instructions, name) for name in instruction.operands
  ]
  users = [i for i in instructions.values() if instruction.name in i.operands]
  around = [caller for _, caller in callers.get(computation, ())]
  # A sum is a computation of its own, of two numbers.
  added = module.computations.get(instruction.attribute("to_apply") or "", {})
  nearby = (*around, *sources, *users, *added.values())
  names = (other.op_name for other in nearby)
  is_telling = lambda name: name.startswith("jit(") and _tells(name)
  if found := next(filter(is_telling, names), ""):
    return found
  edge = [(computation, instruction.name)]
  seen = set(edge)
  for _ in range(_MAX_STEPS_BACK):
    made_from = []
    for place, name in edge:
      for source in _made_from(module, callers, place, name):
        if source not in seen:
          seen.add(source)
          made_from.append(source)
    edge = made_from
    for place, name in edge:
      found = module.computations[place][name].op_name
      if _tells(found):
        return found
  return ""


def _tells(op_name: str) -> bool:
  return bool(op_name) and not op_name.endswith(_MOVES)


def _is_received(module, callers, instruction, computation) -> bool:
  """Whether it is made of what a `recv` gives, or of a part of that."""
  is_part = lambda source: (
    source.opcode in _PARTS
    or (
      source.opcode == "fusion"
      and all(
        inner.opcode in _PARTS
        for inner in module.computations[
          source.attribute("calls") or ""
        ].values()
      )
    )
  )
  edge = _made_from(module, callers, computation, instruction.name)
  while edge:
    place, name = edge.pop()
    source = module.computations[place][name]
    if source.opcode == "recv-done":
      return True
    if is_part(source):
      edge += _made_from(module, callers, place, name)
  return False


def _behind_copies(instructions, name) -> hlo.Instruction:
  source = instructions[name]
  while source.opcode in _COPIES:
    source = instructions[source.operands[0]]
  return source


def _made_from(module, callers, computation, name) -> list[tuple[str, str]]:
  """Where the operands of an instruction stand; a fusion's are its caller's."""
  instruction = module.computations[computation][name]
  if instruction.opcode == "parameter":
    number = int(instruction.text.strip("()").split(")")[0])
    return [
      (place, caller.operands[number])
      for place, caller in callers.get(computation, ())
      if caller.opcode != "while" and number < len(caller.operands)
    ]
  operands = instruction.operands
  if instruction.opcode == "dynamic-update-slice":
    operands = operands[1:2]
  return [(computation, operand) for operand in operands]


def _callers(module) -> dict[str, list[tuple[str, hlo.Instruction]]]:
  """By the name of a computation, the instructions that call it, and where."""
  found = {}
  for place, instructions in module.computations.items():
    for caller in instructions.values():
      called = caller.attribute("calls")
      if called:
        found.setdefault(called, []).append((place, caller))
  return found


def _group(text: str, num_devices: int) -> tuple[int, ...]:
  """The first device's group, from any of the ways to write groups."""
  pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", text)
  if pairs:
    return _component(_numbers(pairs[1]))
  listed = re.search(r"replica_groups=\{\{([\d,]+)\}", text)
  if listed:
    return tuple(map(int, listed[1].split(",")))
  # [groups,size]<=[a,b]T(1,0): numbers counted along a x b, transposed.
  iota = re.search(
    r"replica_groups=\[\d+,(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text
  )
  if iota:
    sizes = tuple(map(int, iota[2].split(",")))
    numbers = np.arange(math.prod(sizes)).reshape(sizes)
    if iota[3]:
      numbers = numbers.transpose(tuple(map(int, iota[3].split(","))))
    return tuple(numbers.reshape(-1)[: int(iota[1])].tolist())
  mesh = re.search(r"replica_groups=mesh\[([^\]]+)\](.*)", text)
  if mesh:
    return _mesh_group(mesh[1], mesh[2])
  # No groups: all devices.
  return tuple(range(num_devices))


def _numbers(text: str) -> list[list[int]]:
  return [
    list(map(int, pair.split(","))) for pair in re.findall(r"\d+,\d+", text)
  ]


def _mesh_group(axes: str, rest: str) -> tuple[int, ...]:
  """Of `mesh['a'=4,'b'=16] {'a'}`, or with other device ids behind a comma.

  Device ids are written `device_ids=([4,16]T(1,0))`.
  """
  sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", axes)}
  order = re.match(r",\s*device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\)", rest)
  numbers = np.arange(math.prod(sizes.values()))
  if order:
    rest = rest[order.end() :]
    numbers = numbers.reshape(tuple(map(int, order[1].split(","))))
    if order[2]:
      numbers = numbers.transpose(tuple(map(int, order[2].split(","))))
  along = re.match(r"\s*\{([^}]*)\}", rest)
  # A part of an axis is written 'a':(2)4, four behind an outer two.
  parts = {
    name: (int(outer or 1), int(size or sizes[name]))
    for name, outer, size in re.findall(
      r"'([^']+)'(?::\((\d+)\)(\d+))?", along[1] if along else ""
    )
  }
  shape, place = [], []
  for name, size in sizes.items():
    outer, inner = parts.get(name, (1, 1))
    shape += [outer, inner, size // (outer * inner)]
    place += [0, slice(None), 0]
  return tuple(numbers.reshape(shape)[tuple(place)].reshape(-1).tolist())


def _component(pairs: list[list[int]]) -> tuple[int, ...]:
  """The devices that the first one is connected with, over any hops."""
  if not pairs:
    return (0,)
  reached = set(pairs[0])
  grown = True
  while grown:
    new = {n for pair in pairs if reached & set(pair) for n in pair}
    grown = not new <= reached
    reached |= new
  return tuple(sorted(reached))
