"""Pairs as files: shards of JSON lines, and a manifest of what made them."""

import contextlib
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from dpop_jax import atomic_files, paths
from dpop_jax.data import jsonl, sources
from dpop_jax.data.pair_tasks import Task

NAME = "pairs"
_SHARD = re.compile(rf"{NAME}(-\d{{5}}-of-\d{{5}})?\.jsonl")


def shard_names(num_shards: int) -> list[str]:
  """pairs.jsonl, or pairs-00000-of-00004.jsonl and so on."""
  if num_shards == 1:
    return [f"{NAME}.jsonl"]
  return [
    f"{NAME}-{shard:05}-of-{num_shards:05}.jsonl" for shard in range(num_shards)
  ]


def write(
  folder: str,
  tasks: Sequence[Task],
  render: Callable[[Task], Iterable[dict[str, Any]]],
  *,
  num_shards: int,
  manifest: Callable[[dict[str, Any]], dict[str, Any]],
) -> dict[str, Any]:
  """Writes the pairs of tasks and the manifest, all of them or nothing.

  Pairs of one row are in one shard. What an earlier call has left in the folder
  is replaced.

  Args:
    folder: Where to; made if it is not there.
    tasks: In the order in which they are written.
    render: The rows that a task gives.
    num_shards: Files to spread them over.
    manifest: What was written (`num_pairs`, and of each file its name, pairs
      and SHA-256) to all that the manifest is to say.

  Raises:
    ValueError: There are fewer tasks than shards.
  """
  if len(tasks) < num_shards:
    raise ValueError(
      f"num_shards={num_shards} is more than the {len(tasks)} rows that give "
      f"pairs in {folder}; ask for fewer."
    )
  out, names = paths.of(folder), shard_names(num_shards)
  old, is_new = set(), not out.exists()
  if not is_new:
    old = {path.name for path in out.iterdir() if _SHARD.fullmatch(path.name)}
  files = []
  with contextlib.ExitStack() as stack:
    if is_new and not paths.is_remote(out):
      stack.push(functools.partial(_remove_after_error, out))
    for shard, name in enumerate(names):
      temporary = stack.enter_context(atomic_files.replacing(out / name))
      first, end = (len(tasks) * i // num_shards for i in (shard, shard + 1))
      digest, num_pairs = hashlib.sha256(), 0
      with temporary.open("wb") as file:
        for task in tasks[first:end]:
          rows = list(render(task))
          text = jsonl.dumps(rows).encode()
          file.write(text)
          digest.update(text)
          num_pairs += len(rows)
      files.append(
        {"file": name, "num_pairs": num_pairs, "sha256": digest.hexdigest()}
      )
    whole = manifest(
      {"num_pairs": sum(f["num_pairs"] for f in files), "files": files}
    )
  for name in old.difference(names):
    (out / name).unlink()
  atomic_files.write_text(
    out / sources.MANIFEST, json.dumps(whole, indent=2) + "\n"
  )
  return whole


def _remove_after_error(folder, error_type, *_):
  """Of a folder that was made for files which are not there then."""
  if error_type is not None:
    with contextlib.suppress(OSError):
      folder.rmdir()
