"""Processes that are one run: how they find each other, and how they end.

Whoever starts a run on several hosts starts the same command on each of them.
On Cloud TPU VMs, in Slurm and in a JobSet for TPUs on Kubernetes, JAX knows the
others by itself. Anywhere else three variables of the environment name them:

  DPOP_COORDINATOR=10.0.0.2:8482   host of process 0, and a port free on it
  DPOP_NUM_PROCESSES=4
  DPOP_PROCESS_ID=0                0, 1, 2 and 3, each of one of them

They win where they are set; DPOP_NUM_PROCESSES=1 alone says that there are no
others. All processes have to come within DPOP_START_SECONDS (300 if that is not
set). One that dies ends the others: at once if a collective notices, else when
it has been silent for DPOP_SILENCE_SECONDS (100). Started again, a run
continues.
"""

import faulthandler
import importlib.util
import os
import pathlib
import sys
import threading
from collections.abc import Mapping
from typing import Any

COORDINATOR = "DPOP_COORDINATOR"
NUM_PROCESSES = "DPOP_NUM_PROCESSES"
PROCESS_ID = "DPOP_PROCESS_ID"
START_SECONDS = "DPOP_START_SECONDS"
SILENCE_SECONDS = "DPOP_SILENCE_SECONDS"
_DEFAULT_SECONDS = {START_SECONDS: 300, SILENCE_SECONDS: 100}
# So that our limit is the one that is reached.
_MORE_SECONDS = 60
# What a process returns that has lost another one: sysexits' EX_TEMPFAIL, the
# user is invited to try again.
EXIT_LOST_ANOTHER = 75
# What XLA's errors begin with, or contain, if it is not this process's doing.
_SIGNS_OF_LOSS = ("UNAVAILABLE", "ABORTED", "CANCELLED", "DEADLINE_EXCEEDED")
_COLLECTIVES_OF_CPUS = "Gloo"
# A mistake that all make alike is told by all, if they are given this time.
_LEAVE_SECONDS = 10


def initialize(environment: Mapping[str, str] = os.environ) -> None:
  """Connects the processes of a run; does nothing where there is only one.

  To be called once, before anything asks JAX for its devices. Returns when all
  processes have come. If they do not come in time, which JAX would answer with
  an abort, the process ends with one sentence and exit code 1.

  Args:
    environment: Variables, those of this process if not given.

  Raises:
    ValueError: A variable is missing, or says what cannot be, or JAX does not
      find the others.
    RuntimeError: JAX could not connect them.
  """
  seconds, silence = (
    _whole_number(environment, name, least=1, default=default)
    for name, default in _DEFAULT_SECONDS.items()
  )
  arguments = _named(environment)
  if arguments is None:
    if not _is_cluster(environment):
      return
    arguments, where = {}, "each other"
  elif arguments["num_processes"] == 1:
    return
  else:
    where = f"process 0 at {arguments['coordinator_address']}"
  import jax  # Slow, and a mistake above should be told at once.

  limit = threading.Timer(seconds, _give_up, (where, seconds))
  limit.daemon = True
  limit.start()
  try:
    jax.distributed.initialize(
      **arguments,
      initialization_timeout=seconds + _MORE_SECONDS,
      heartbeat_timeout_seconds=silence,
    )
  except ValueError as error:
    raise ValueError(
      "The other processes of this run are not to be found, although there "
      f"seem to be some ({error}) Set {COORDINATOR}, {NUM_PROCESSES} and "
      f"{PROCESS_ID}; {NUM_PROCESSES}=1 alone for a single one."
    ) from error
  finally:
    limit.cancel()
  # JAX aborts a process that has lost another one, and says so. What follows
  # should not hide that behind the stacks of all threads.
  if faulthandler.is_enabled():
    faulthandler.enable(all_threads=False)


def are_connected() -> bool:
  """Whether there are several, and `initialize` has connected them."""
  if "jax" not in sys.modules:
    return False
  import jax

  return jax.distributed.is_initialized()


def is_first() -> bool:
  """Whether this process is the one that speaks for all."""
  import jax

  return jax.process_index() == 0


def has_lost_another(error: BaseException) -> bool:
  """Whether an error says that another process has ended."""
  if not are_connected():
    return False
  link: BaseException | None = error
  while link is not None:
    # JAX raises XLA's errors as its own or as ValueError, so only the text says
    # where one is from; those of TensorStore begin alike.
    text = str(link)
    is_sign = text.startswith(_SIGNS_OF_LOSS) and "tensorstore" not in text
    if is_sign or _COLLECTIVES_OF_CPUS in text:
      return True
    link = link.__cause__ or link.__context__
  return False


def leave(code: int) -> None:
  """Ends this process after an error; returns if it is the only one.

  An ordinary exit would wait minutes for processes that in turn wait for this
  one, and then abort.

  Args:
    code: What the process returns.
  """
  if not are_connected():
    return
  import jax

  if code != EXIT_LOST_ANOTHER:
    goodbye = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    goodbye.start()
    goodbye.join(_LEAVE_SECONDS)
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


def _give_up(where, seconds):
  print(
    f"Error: The processes of this run did not all reach {where} within "
    f"{seconds} s ({START_SECONDS}). Start the command on every host, and let "
    "the hosts reach each other's ports.",
    file=sys.stderr,
    flush=True,
  )
  os._exit(1)


def _named(environment) -> dict[str, Any] | None:
  """Arguments for JAX from our variables, or None if there are none."""
  if environment.get(NUM_PROCESSES) == "1":
    return {"num_processes": 1}
  names = (COORDINATOR, NUM_PROCESSES, PROCESS_ID)
  missing = [name for name in names if not environment.get(name)]
  if len(missing) == len(names):
    return None
  if missing:
    raise ValueError(
      f"{', '.join(names)} belong together; {' and '.join(missing)} not set."
    )
  address = environment[COORDINATOR]
  host, _, port = address.rpartition(":")
  if not host or not port.isdecimal():
    raise ValueError(f"{COORDINATOR} should be HOST:PORT, got {address!r}.")
  count = _whole_number(environment, NUM_PROCESSES, least=1)
  index = _whole_number(environment, PROCESS_ID, least=0)
  if index >= count:
    raise ValueError(
      f"{PROCESS_ID} must be less than {NUM_PROCESSES} ({count}), got {index}."
    )
  return {
    "coordinator_address": address,
    "num_processes": count,
    "process_id": index,
    # Slurm, say, would give each process one of the devices of its host.
    "cluster_detection_method": "deactivate",
  }


def _is_cluster(environment) -> bool:
  """Whether JAX will find other processes by itself.

  JAX has no such question, only an error where it finds nothing.
  """
  if int(environment.get("SLURM_NTASKS") or 1) > 1:
    # Not in a batch script itself, nor in a shell of salloc.
    return "SLURM_STEP_NODELIST" in environment
  platforms = environment.get("JAX_PLATFORMS") or "tpu"
  if "tpu" not in platforms or importlib.util.find_spec("libtpu") is None:
    return False
  # What a Kubernetes node pool of TPUs sets.
  hosts = environment.get("TPU_WORKER_HOSTNAMES")
  if hosts is not None:
    slices = environment.get("MEGASCALE_NUM_SLICES") or 1
    return len(hosts.split(",")) * int(slices) > 1
  # Of a Cloud TPU VM only its metadata server knows how many there are; JAX
  # asks it, and a single one is a run of one process.
  return any(
    any(pathlib.Path("/dev").glob(pattern))
    for pattern in ("accel[0-9]*", "vfio/[0-9]*")
  )


def _whole_number(environment, name, *, least, default=None):
  text = environment.get(name)
  if not text and default is not None:
    return default
  if not text.isdecimal() or int(text) < least:
    raise ValueError(
      f"{name} must be a whole number of at least {least}, got {text!r}."
    )
  return int(text)
