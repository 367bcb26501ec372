"""Checkpoints of a run: saved in the background, restored onto any mesh.

The states of a run lie in its workdir as

  checkpoints/
    1000/               one folder per saved step, there only once complete
      params/           the parameters
      training/         the step and the optimizer state

so that whoever wants the parameters reads nothing else. A state is a NamedTuple
or a dataclass with the fields `step`, `params` and `opt_state`, each a pytree
of `jax.Array`. All functions are called by all processes alike.
"""

import contextlib
import dataclasses
import logging
import signal
from typing import Any

import jax
from absl import logging as absl_logging
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from dpop_jax import name_lists, paths

PyTree = Any  # Of jax.Array, or of jax.ShapeDtypeStruct where it is abstract.
Notes = dict[str, Any]  # As JSON has it.

FOLDER = "checkpoints"
PARAMS, TRAINING = "params", "training"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
  """When to save, and how much to keep.

  Attributes:
    save_every_steps: Steps between two saves; None saves only at the end of the
      run and when it is asked to stop.
    keep: How many of the newest checkpoints stay on disk.
  """

  save_every_steps: int | None = None
  keep: int = 2

  def __post_init__(self):
    if self.save_every_steps is not None and self.save_every_steps < 1:
      raise ValueError(
        "checkpoints.save_every_steps must be at least 1, got "
        f"{self.save_every_steps}; set it to None to save only at the end."
      )
    if self.keep < 1:
      raise ValueError(
        f"checkpoints.keep must be at least 1, got {self.keep}: without a "
        "checkpoint a run can neither be resumed nor exported."
      )


class Checkpoints:
  """The checkpoints of one run; a context manager.

  Opening removes what a killed process left half-written, so only the process
  group that trains in a workdir opens it; everybody else uses `load_params`.
  """

  def __init__(self, workdir: str, config: CheckpointConfig):
    """Opens `workdir`/checkpoints, which is made if it is not there.

    Raises:
      OSError: It is in a bucket that refuses.
    """
    _quiet_orbax()
    self._save_every_steps = config.save_every_steps
    policies = ocp.training.preservation_policies
    context = ocp.Context()
    # In the background a folder that cannot be made costs five minutes.
    context.asynchronous.create_directories_asynchronously = False
    with paths.explained(workdir):
      self._checkpointer = ocp.training.Checkpointer(
        paths.absolute(workdir) / FOLDER,
        context=context,
        preservation_policy=policies.LatestN(config.keep),
        cleanup_tmp_directories=True,
      )
    self._under_way: ocp.AsyncResponse[bool] | None = None

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def latest_step(self) -> int | None:
    """The newest complete checkpoint's step; waits for a save under way."""
    self.wait()
    latest = self._checkpointer.latest
    return None if latest is None else latest.step

  def is_due(self, step: int) -> bool:
    """Whether `save_every_steps` asks for a save after `step` updates."""
    every = self._save_every_steps
    return every is not None and step > 0 and step % every == 0

  def save(self, step: int, state: PyTree, notes: Notes | None = None) -> None:
    """Saves in the background; older checkpoints beyond `keep` go afterwards.

    Returns once the arrays are copied to the host, so the caller may donate
    them to the next train step at once. Waits for the previous save if that is
    still being written. A step that is already saved is left as it is.

    Args:
      step: Updates made.
      state: What they led to.
      notes: What else a continued run needs, see `notes`.

    Raises:
      ValueError: A later step is already saved.
      Exception: Whatever made the previous save fail.
    """
    latest = self.latest_step()
    if step == latest:
      return
    if latest is not None and step < latest:
      raise ValueError(
        f"Step {step} cannot be saved in {self._checkpointer.directory}, which "
        f"already holds step {latest}; resume from that or use another workdir."
      )
    self._under_way = self._checkpointer.save_checkpointables_async(
      step, _split(state), force=True, custom_metadata=notes
    )

  def notes(self) -> Notes:
    """What was noted beside the newest checkpoint; empty if nothing was."""
    step = self.latest_step()
    if step is None:
      return {}
    saved = self._checkpointer.checkpointables_metadata(step)
    return saved.custom_metadata or {}

  def restore(self, abstract_state: PyTree) -> PyTree:
    """The newest checkpoint, bit for bit, born sharded as asked.

    Args:
      abstract_state: The state with a `jax.ShapeDtypeStruct` that has a
        sharding in place of each array; its mesh may differ from the one that
        saved.

    Raises:
      ValueError: There is no checkpoint, or names, shapes or dtypes differ.
    """
    step = self.latest_step()
    directory = self._checkpointer.directory
    if step is None:
      raise ValueError(f"There is no complete checkpoint in {directory} yet.")
    abstract = _split(abstract_state)
    for item, tree in abstract.items():
      _check_fits(directory / str(step), item, tree, may_cast=False)
    restored = self._checkpointer.load_checkpointables(step, abstract)
    return _join(abstract_state, restored)

  def wait(self) -> None:
    """Until the save under way is complete. Raises what made it fail."""
    response, self._under_way = self._under_way, None
    try:
      self._checkpointer.wait()
    finally:
      if response is not None:
        # Only asking ends the thread (and the three open files) behind it. Its
        # error, if any, is the one that was raised a line above.
        with contextlib.suppress(Exception):
          response.result()

  def close(self) -> None:
    """Waits, then ends all threads. Raises what made the last save fail."""
    try:
      self.wait()
    finally:
      self._checkpointer.close()


def newest(path: str) -> str | None:
  """The folder of one step that `path` means, see `load_params`, or None.

  It is absolute if `path` is. Folders of saves that were never finished do not
  count.
  """
  root = paths.of(path)
  if (root / PARAMS).exists():
    return path
  folder = root / FOLDER if (root / FOLDER).exists() else root
  if not folder.exists():
    return None
  with paths.explained(path):
    steps = list(ocp.path.step.standard_name_format().find_all(folder))
  if not steps:
    return None
  return str(max(steps, key=lambda found: found.step).path)


def load_params(path: str, abstract_params: PyTree) -> PyTree:
  """The parameters of a checkpoint, and nothing else of it.

  Args:
    path: A run's workdir or its checkpoints folder, for the newest checkpoint;
      or the folder of one step.
    abstract_params: A pytree of `jax.ShapeDtypeStruct` with shardings. Each
      array is cast to the dtype asked for here if it was saved in another.

  Raises:
    ValueError: There is no checkpoint, or the names or shapes differ.
  """
  _quiet_orbax()
  folder = newest(path)
  if folder is None:
    raise ValueError(
      f"There is no complete checkpoint in {path}; expected a workdir, its "
      f"{FOLDER} folder or the folder of one step."
    )
  directory = paths.absolute(folder)
  _check_fits(directory, PARAMS, abstract_params, may_cast=True)
  return ocp.load_checkpointables(directory, {PARAMS: abstract_params})[PARAMS]


def save_params(workdir: str, params: PyTree) -> None:
  """Saves parameters alone, as step 0 of a folder that holds no steps yet."""
  _quiet_orbax()
  with paths.explained(workdir):
    ocp.save_checkpointables(
      paths.absolute(workdir) / FOLDER / "0", {PARAMS: params}
    )


class Preemption:
  """Notices that the run is asked to stop (SIGTERM), without stopping it.

    with Preemption() as preemption:
      for step in steps:
        ...
        if preemption.requested():
          break

  With several processes it is JAX's preemption service that listens, which
  `jax.distributed.initialize` starts, and that agrees on the question to which
  all processes get the answer yes: one that none of them has come to yet. One
  process catches the signal itself, in its main thread.
  """

  def __init__(self):
    self._is_signalled = False
    self._num_questions = 0
    self._previous = None

  def __enter__(self) -> "Preemption":
    # With several processes a handler of ours would displace the service's.
    if jax.process_count() == 1:
      self._previous = signal.signal(signal.SIGTERM, self._on_signal)
    return self

  def __exit__(self, *_) -> None:
    if self._previous is not None:
      signal.signal(signal.SIGTERM, self._previous)
      self._previous = None

  def requested(self) -> bool:
    """Whether to save and stop now; all processes ask equally often.

    Raises:
      RuntimeError: Several processes, and JAX's preemption service is off.
    """
    self._num_questions += 1
    if jax.process_count() > 1:
      # Questions are numbered here: steps would begin anew where something
      # else has been asked about before.
      return multihost_utils.reached_preemption_sync_point(self._num_questions)
    return self._is_signalled

  def _on_signal(self, *_) -> None:
    self._is_signalled = True


def _split(state: PyTree) -> dict[str, PyTree]:
  training = {"step": state.step, "opt_state": state.opt_state}
  return {PARAMS: state.params, TRAINING: training}


def _join(like: PyTree, items: dict[str, PyTree]) -> PyTree:
  fields = {PARAMS: items[PARAMS], **items[TRAINING]}
  if dataclasses.is_dataclass(like):
    return dataclasses.replace(like, **fields)
  return like._replace(**fields)


def _named_leaves(tree: PyTree) -> dict[str, Any]:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in leaves
  }


def _check_fits(
  directory: epath.Path, item: str, abstract: PyTree, *, may_cast: bool
) -> None:
  """Raises ValueError unless names and shapes are those that are saved."""
  saved = _named_leaves(
    ocp.metadata(directory, checkpointable_name=item).metadata
  )
  wanted = _named_leaves(abstract)
  homeless = [name for name, leaf in wanted.items() if leaf.sharding is None]
  if homeless:
    raise ValueError(
      f"To load {item} of {directory}, each array asked for needs a sharding; "
      f"there is none for {name_lists.listed(homeless)}."
    )
  common = [name for name in wanted if name in saved]
  differences = {
    "missing in the checkpoint": (n for n in wanted if n not in saved),
    "only in the checkpoint": (n for n in saved if n not in wanted),
    "of another shape": (
      f"{n} {list(saved[n].shape)} instead of {list(wanted[n].shape)}"
      for n in common
      if tuple(saved[n].shape) != tuple(wanted[n].shape)
    ),
    "of another dtype": (
      f"{n} {saved[n].dtype} instead of {wanted[n].dtype}"
      for n in common
      if not may_cast and saved[n].dtype != wanted[n].dtype
    ),
  }
  found = {kind: list(names) for kind, names in differences.items()}
  told = [
    f"{kind}: {name_lists.listed(names)}"
    for kind, names in found.items()
    if names
  ]
  if told:
    raise ValueError(
      f"The {item} saved in {directory} are not those of this config; "
      f"{'; '.join(told)}. Use the config they were saved with, or another "
      "checkpoint."
    )


def _is_worth_showing(record: logging.LogRecord) -> bool:
  is_orbax = "/orbax/" in record.pathname.replace("\\", "/")
  return record.levelno >= logging.WARNING or not is_orbax


def _quiet_orbax() -> None:
  """Drops Orbax's dozens of informational lines per save, not its warnings."""
  # Adding a filter that is already there does nothing.
  absl_logging.get_absl_logger().addFilter(_is_worth_showing)
