"""Plans as people and as programs read them."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from dpop_jax.planning import plan as plan_lib


def to_dict(plan: plan_lib.Plan) -> dict[str, Any]:
  """Numbers, strings, lists and dicts; bytes and seconds."""
  memory, bound = plan.memory, plan.bound
  totals: dict[str, float] = {}
  for moved in plan.moved:
    totals[moved.kind] = totals.get(moved.kind, 0.0) + moved.num_bytes
  return {
    "fits": plan.fits,
    "topology": plan.slices.topology,
    "num_slices": plan.slices.num_slices,
    "num_chips": plan.slices.num_chips,
    "mesh": plan.mesh,
    "remat": plan.remat,
    "rows_per_microbatch": plan.rows_per_microbatch,
    "num_microbatches": plan.num_microbatches,
    "batch_size": plan.batch_size,
    "batches": plan.batch_source,
    "hbm_bytes_per_chip": {
      "parameters": memory.params,
      "optimizer": memory.optimizer,
      "reference": memory.reference,
      "batch": memory.batch,
      "padding": memory.padding,
      "temporaries": memory.temporaries,
      "code": memory.code,
      "needed": plan.needed_bytes,
      "capacity": plan.slices.chip.hbm_bytes,
    },
    "host_bytes_per_chip": memory.host,
    "scoring_bytes_per_chip": plan.scoring_bytes,
    "flops_per_step": {
      "forward": plan.flops.forward,
      "backward": plan.flops.backward,
      "recomputation": plan.flops.recomputation,
      "reference": plan.flops.reference,
      "total": plan.flops.total,
    },
    "sent_bytes_per_chip": totals,
    "sent_bytes_to_other_slices_per_chip": bound and bound.dcn_bytes,
    "collectives": [
      {
        "kind": moved.kind,
        "mesh_axes": list(moved.axes),
        "devices": moved.group_size,
        "times": moved.count,
        "bytes_per_chip": moved.num_bytes,
        "purpose": moved.purpose or None,
        "op_name": moved.op_name,
      }
      for moved in plan.moved
    ],
    "least_step_seconds": bound
    and {
      "step": bound.seconds,
      "limit": bound.limit,
      "compute": bound.compute,
      "hbm": bound.hbm,
      "ici": bound.ici,
      "dcn": bound.dcn,
    },
    "compile_seconds": plan.compile_seconds,
  }


def describe(plan: plan_lib.Plan) -> str:
  """A page about one plan."""
  slices, capacity = plan.slices, plan.slices.chip.hbm_bytes
  several = "" if slices.num_slices == 1 else f"{slices.num_slices} slices of "
  lines = [
    f"{several}{slices.topology}, {slices.num_chips} chips, mesh "
    f"{_mesh(plan)}; model.remat={plan.remat}",
    f"Batches {plan.batch_source}; {plan.rows_per_microbatch} rows at once, "
    f"{_count(plan.num_microbatches, 'microbatch', 'microbatches')}.",
    "",
    _verdict(plan, capacity),
    "",
    *_memory(plan.memory, capacity),
    *_scoring(plan, capacity),
    "",
    *_flops(plan),
  ]
  if plan.moved:
    lines += ["", *_moved(plan)]
  if plan.bound is not None:
    lines += ["", *_bound(plan)]
  lines += ["", f"Compiled in {plan.compile_seconds:.0f} s."]
  return "\n".join(lines)


def row(plan: plan_lib.Plan) -> str:
  """A line of `table`."""
  start = (
    f"{_mesh(plan):>13} {plan.remat:>5} {plan.rows_per_microbatch:>5} "
    f"{plan.num_microbatches:>6}"
  )
  if not plan.fits or plan.bound is None:
    return (
      f"{start} {plan.needed_bytes / 1e9:>7.1f}  does not fit: needs "
      f"{plan.needed_bytes / 1e9:.1f} GB of "
      f"{plan.slices.chip.hbm_bytes / 1e9:.1f}"
    )
  seconds = plan.bound.seconds
  return (
    f"{start} {plan.needed_bytes / 1e9:>7.1f} {seconds:>9.3f} "
    f"{seconds / plan.batch_size:>8.4f}  {plan.bound.limit:<7} "
    f"{plan.compile_seconds:>6.0f}"
  )


HEADER = (
  "         mesh remat  rows micro-   GB of   least s  least s  limited "
  "compile\n"
  " data,fsdp,te       once batches    HBM   of a step of a pair by        s"
)


def table(plans: Sequence[plan_lib.Plan]) -> str:
  """Plans in their order, a line each."""
  return "\n".join([HEADER, *map(row, plans)])


def _mesh(plan) -> str:
  return "x".join(str(size) for size in plan.mesh.values())


def _count(count, one, many) -> str:
  return f"{count} {one if count == 1 else many}"


def _verdict(plan, capacity) -> str:
  verdict = "Fits" if plan.fits else "Does not fit"
  return (
    f"{verdict}: needs {plan.needed_bytes / 1e9:.2f} of the "
    f"{capacity / 1e9:.2f} GB that a program may use of a chip's HBM."
  )


def _memory(memory, capacity) -> list[str]:
  lines = ["HBM of a chip                GB  share"]
  for name, value in (
    ("parameters", memory.params),
    ("optimizer", memory.optimizer),
    ("reference", memory.reference),
    ("batch", memory.batch),
    ("padding of these", memory.padding),
    ("temporaries", memory.temporaries),
    ("program", memory.code),
  ):
    if value is None:
      lines.append(f"  {name:<20} not known: it was not compiled to the end")
    else:
      share = value / capacity
      lines.append(f"  {name:<20} {value / 1e9:>8.3f} {share:>6.1%}")
  if memory.host:
    lines.append(
      f"  on its host, not here {memory.host / 1e9:>7.3f}  fetched in a step"
    )
  return lines


def _scoring(plan, capacity) -> list[str]:
  if plan.scoring_bytes is None:
    return []
  value = plan.scoring_bytes
  return [
    f"  before the first step{value / 1e9:>8.3f} {value / capacity:>6.1%}  "
    "to score the reference"
  ]


def _flops(plan) -> list[str]:
  flops = plan.flops
  lines = ["Operations of a step       PFLOP  share"]
  for name in ("forward", "backward", "recomputation", "reference"):
    value = getattr(flops, name)
    share = value / flops.total
    lines.append(f"  {name:<20} {value / 1e15:>8.3f} {share:>6.1%}")
  lines.append(f"  {'all':<20} {flops.total / 1e15:>8.3f}")
  return lines


def _moved(plan) -> list[str]:
  lines = ["Each chip sends in a step    GB   times  over"]
  small = Counter()
  for moved in plan.moved:
    purpose = moved.purpose or f"NOT CALLED FOR: {moved.op_name}"
    if moved.num_bytes < 5e5 and moved.purpose:
      small[moved.kind] += 1
      continue
    axes = ", ".join(moved.axes)
    lines.append(
      f"  {moved.kind:<18} {moved.num_bytes / 1e9:>10.3f} {moved.count:>7.0f}  "
      f"{axes} ({moved.group_size}): {purpose}"
    )
  for kind, count in small.items():
    lines.append(f"  {kind:<18}     < 0.001          {count} more, for sums")
  return lines


def _bound(plan) -> list[str]:
  bound, lines = plan.bound, []
  parts = [f"compute {bound.compute:.3f}", f"HBM {bound.hbm:.3f}"]
  parts.append(f"links {bound.ici:.3f}")
  if plan.slices.num_slices > 1:
    dcn = "not published" if bound.dcn is None else f"{bound.dcn:.3f}"
    parts.append(f"between slices {dcn}")
    sent = f"{bound.dcn_bytes / 1e9:.3f} GB"
    lines += [f"Each chip sends {sent} of that to other slices.", ""]
  return [
    *lines,
    f"A step takes at least {bound.seconds:.3f} s, "
    f"{bound.seconds / plan.batch_size:.4f} s a pair, if all of this overlaps "
    "and runs at",
    f"published rates ({', '.join(parts)}).",
  ]
