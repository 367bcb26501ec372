"""What the processes of a run tell each other, outside the compiled steps.

All functions are called by all processes alike. With one process nothing is
sent.
"""

import functools
import hashlib
import importlib.metadata
import itertools
import json
import pathlib
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from dpop_jax import paths

Result = TypeVar("Result")

# Libraries that decide what is computed and how it is stored.
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
# An error about two configs should still be one sentence.
_MAX_NAMES_IN_ERROR = 4
# The first process may have a large data set to tokenise.
_WAIT_SECONDS = 24 * 60 * 60
# Where a file system tells other hosts of new files only after a while.
_APPEARS_SECONDS = 30
_POLL_SECONDS = 5
_num_calls = itertools.count()


def gather(text: str) -> list[str]:
  """What each process has to say, in the order of the processes."""
  if jax.process_count() == 1:
    return [text]
  content = np.frombuffer(text.encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.int32(len(content)))
  padded = np.zeros(int(sizes.max()), np.uint8)
  padded[: len(content)] = content
  rows = multihost_utils.process_allgather(padded)
  return [
    row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)
  ]


def share(
  function: Callable[[Any], Result], items: Iterable[Any]
) -> list[Result]:
  """`[function(item) for item in items]`, of which each process does a part.

  Args:
    function: Gives what JSON can say, as JSON has it: lists, no tuples.
    items: The same in all processes.
  """
  items = list(items)
  count = jax.process_count()
  own = [function(item) for item in items[jax.process_index() :: count]]
  if count == 1:
    return own
  parts = [json.loads(text) for text in gather(json.dumps(own))]
  return [parts[i % count][i // count] for i in range(len(items))]


def after_first(function: Callable[[], Result]) -> Result:
  """Calls a function in the first process, and then in all the others.

  So they find the files that it has made, if they see the same ones.

  Args:
    function: What to call.

  Raises:
    ValueError: It has raised one, or an OSError, in the first process.
    RuntimeError: It has raised something else there, or takes a day.
  """
  if jax.process_count() == 1:
    return function()
  # Not with a collective: some networks of accelerators give up in minutes.
  from orbax.checkpoint import multihost

  client = multihost.get_jax_distributed_client()
  key = f"dpop_jax/after_first/{next(_num_calls)}"
  if jax.process_index() == 0:
    outcome: dict[str, str | None] = {"mistake": None, "failure": None}
    try:
      return function()
    except (ValueError, OSError) as error:
      outcome["mistake"] = str(error)
      raise
    except BaseException as error:
      outcome["failure"] = repr(error)
      raise
    finally:
      client.key_value_set(key, json.dumps(outcome))
  outcome = json.loads(_wait_for(client, key))
  if outcome["mistake"] is not None:
    raise ValueError(outcome["mistake"])
  if outcome["failure"] is not None:
    raise RuntimeError(f"The first process has failed: {outcome['failure']}")
  return function()


def _wait_for(client, key):
  """A value that another process sets; a dead one ends this one meanwhile."""
  deadline = time.monotonic() + _WAIT_SECONDS
  while True:
    try:
      return client.blocking_key_value_get(key, _POLL_SECONDS * 1000)
    except jax.errors.JaxRuntimeError as error:
      if not str(error).startswith("DEADLINE_EXCEEDED"):
        raise
    if time.monotonic() > deadline:
      raise RuntimeError(
        f"The first process is still not ready after {_WAIT_SECONDS} s."
      )


def check_equal(values: Mapping[str, Any]) -> None:
  """Checks that all processes have the same values, code and libraries.

  Args:
    values: What JSON can say, by names that a user knows.

  Raises:
    ValueError: One differs, in all processes alike.
  """
  if jax.process_count() == 1:
    return
  own = {"host": socket.gethostname(), "values": {**values, **_code()}}
  first, *others = (json.loads(text) for text in gather(json.dumps(own)))
  differences = {
    index: [
      f"{name} is {_shown(other, name)} instead of {_shown(first, name)}"
      for name in {**first["values"], **other["values"]}
      if other["values"].get(name) != first["values"].get(name)
    ]
    for index, other in enumerate(others, start=1)
  }
  differing = [index for index, found in differences.items() if found]
  if not differing:
    return
  found = differences[differing[0]]
  more = len(found) - _MAX_NAMES_IN_ERROR
  listed = "; ".join(found[:_MAX_NAMES_IN_ERROR])
  listed += f"; and {more} more" if more > 0 else ""
  also = ", ".join(map(str, differing[1:]))
  raise ValueError(
    f"All processes of a run have to be started alike, but in process "
    f"{differing[0]} (on {others[differing[0] - 1]['host']}) {listed}, which "
    f"is what process 0 (on {first['host']}) has"
    + (f"; processes that differ as well: {also}." if also else ".")
  )


def _shown(process, name):
  return repr(process["values"].get(name))


@functools.cache
def _code() -> dict[str, str]:
  digest = hashlib.sha256()
  root = pathlib.Path(__file__).parent
  for file in sorted(root.rglob("*.py")):
    digest.update(file.relative_to(root).as_posix().encode())
    digest.update(file.read_bytes())
  versions = {
    f"the version of {name}": importlib.metadata.version(name)
    for name in _PACKAGES
  }
  return {"the code of dpop_jax": digest.hexdigest()[:8], **versions}


def check_shared(folder: epath.PathLike) -> None:
  """Checks that a folder is one and the same for all processes.

  Args:
    folder: The folder; with several processes it is made if it is not there.

  Raises:
    ValueError: Some processes do not see what the first one writes.
  """
  if jax.process_count() == 1 or paths.is_remote(folder):
    return
  own = {"host": socket.gethostname(), "probe": f".probe-{uuid.uuid4().hex}"}
  first, *_ = (json.loads(text) for text in gather(json.dumps(own)))
  probe = paths.of(folder) / first["probe"]
  if jax.process_index() == 0:
    probe.parent.mkdir(parents=True, exist_ok=True)
    probe.touch()
  gather("")  # It is written.
  deadline = time.monotonic() + _APPEARS_SECONDS
  while not (is_seen := probe.exists()) and time.monotonic() < deadline:
    time.sleep(0.5)
  own["is_seen"] = is_seen
  found = [json.loads(text) for text in gather(json.dumps(own))]
  if jax.process_index() == 0:
    probe.unlink()
  blind = [
    f"process {index} (on {process['host']})"
    for index, process in enumerate(found)
    if not process["is_seen"]
  ]
  if blind:
    raise ValueError(
      f"{folder} must be one folder for all processes, but what process 0 "
      f"(on {first['host']}) writes there is not seen by "
      f"{', '.join(blind[:_MAX_NAMES_IN_ERROR])}; use gs://BUCKET/NAME or a "
      "shared file system."
    )
