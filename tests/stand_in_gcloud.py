#!/usr/bin/env python3
"""A `gcloud compute tpus` of this machine: a host is a folder of its own.

Not a test itself. As a program it takes what launch/tpu.sh gives to gcloud, and
refuses any other flag. `--command` runs on the hosts of a slice at once, each
time as a local process in the host's home. What the metadata of a real slice
tells JAX, variables tell the processes here. STAND_IN is the folder of it all,
STAND_IN_HOSTS how many hosts a slice has.
"""

import argparse
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys

# Instead of the installation of the package, this machine's.
_UV = """#!/bin/sh
echo "$@" >> "$HOME/uv.log"
[ "$1" = venv ] || exit 0
while [ "$#" -gt 1 ]; do shift; done
mkdir -p "$1/bin"
cat > "$1/bin/python" <<END
#!/bin/sh
PYTHONPATH="$HOME/dpop_jax/source" exec {python} "\\$@"
END
chmod +x "$1/bin/python"
"""


class Cloud:
  """What there is, in `folder`: state.json, calls.log and hosts/."""

  def __init__(self, folder: str, num_hosts: int):
    self.folder, self.num_hosts = pathlib.Path(folder), num_hosts

  def load(self) -> dict:
    """Nodes and queued resources by `KIND/NAME`."""
    path = self.folder / "state.json"
    return json.loads(path.read_text()) if path.exists() else {}

  def save(self, things: dict) -> None:
    (self.folder / "state.json").write_text(json.dumps(things))

  def hosts(self, node: str) -> list[pathlib.Path]:
    names = [f"{node}-w-{i}" for i in range(self.num_hosts)]
    return [self.folder / "hosts" / name for name in names]

  def make_node(self, name: str) -> dict:
    for host in self.hosts(name):
      (host / "bin").mkdir(parents=True)
      uv, hostname = host / "bin" / "uv", host / "bin" / "hostname"
      uv.write_text(_UV.replace("{python}", sys.executable))
      hostname.write_text(f"#!/bin/sh\necho {host.name}\n")
      uv.chmod(0o755)
      hostname.chmod(0o755)
    return {"state": "READY"}

  def kill_processes(self, node: str) -> None:
    homes = [f"HOME={host}".encode() for host in self.hosts(node)]
    for entry in pathlib.Path("/proc").glob("[0-9]*/environ"):
      try:
        if set(homes) & set(entry.read_bytes().split(b"\0")):
          os.kill(int(entry.parent.name), signal.SIGKILL)
      except OSError:
        continue  # It has just ended, or is somebody else's.

  def remove_node(self, name: str) -> None:
    self.kill_processes(name)
    for host in self.hosts(name):
      shutil.rmtree(host)

  def preempt(self, node: str) -> None:
    """Takes a node away without notice, as Cloud TPU may with a spot VM."""
    things = self.load()
    things[f"tpu-vm/{node}"]["state"] = "PREEMPTED"
    for thing in things.values():
      if node in thing.get("nodes", []):
        thing["state"] = "SUSPENDED"
    self.save(things)
    self.kill_processes(node)


def _parse(arguments):
  parser = argparse.ArgumentParser(allow_abbrev=False)
  parser.add_argument("kind", choices=["tpu-vm", "queued-resources"])
  parser.add_argument("verb")
  parser.add_argument("names", nargs="+")
  verbs = {
    "create": ["accelerator-type", "labels"],
    "describe": ["format"],
    "delete": [],
    "ssh": ["worker", "command"],
    "scp": ["worker"],
  }
  kind, verb = arguments[:2]
  flags = ["project", "zone", *verbs[verb]]
  switches = {"create": ["spot", "reserved"], "delete": ["quiet"]}.get(verb, [])
  if kind == "tpu-vm" and verb == "create":
    flags += ["version"]
  if kind == "queued-resources":
    if verb == "create":
      flags += ["runtime-version"]
      parser.add_argument("--node-id")
      parser.add_argument("--node-count", type=int)
      parser.add_argument("--node-prefix")
    elif verb in ("ssh", "scp"):
      flags += ["node"]
    elif verb == "delete":
      switches = [*switches, "force"]
  for flag in flags:
    parser.add_argument(f"--{flag}", required=True)
  for switch in switches:
    parser.add_argument(f"--{switch}", action="store_true")
  return parser.parse_args(arguments)


def _fail(message):
  sys.exit(f"ERROR: (gcloud.compute.tpus) {message}")


def _value(thing, expression):
  path = expression.removeprefix("value(").removesuffix(")")
  if path in ("state", "state.state"):
    return thing["state"]
  assert path.endswith("labels.created-by"), path
  return thing["labels"].get("created-by", "")


def _create(cloud, things, options, name):
  if f"{options.kind}/{name}" in things:
    _fail(f"ALREADY_EXISTS: Resource {name} already exists")
  refusals = cloud.folder / "refusals"
  if refusals.exists() and int(refusals.read_text()):
    refusals.write_text(str(int(refusals.read_text()) - 1))
    _fail("There is no more capacity in the zone")
  labels = dict(pair.split("=") for pair in options.labels.split(","))
  nodes = [name]
  if options.kind == "queued-resources":
    if options.node_count:
      count = range(options.node_count)
      nodes = [f"{options.node_prefix}-{i}" for i in count]
    things[f"{options.kind}/{name}"] = {
      "state": "ACTIVE", "labels": labels, "nodes": nodes
    }  # fmt: skip
  for node in nodes:
    things[f"tpu-vm/{node}"] = cloud.make_node(node) | {"labels": labels}
  # Free a moment ago, which is what a real slice promises as well.
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  for node in nodes:
    things[f"tpu-vm/{node}"]["port"] = port


def _on_hosts(cloud, nodes, things, options):
  """The chosen hosts with what a process on each of them finds."""
  states = {things[f"tpu-vm/{node}"]["state"] for node in nodes}
  if states != {"READY"}:
    _fail(f"This TPU has terminated state {states}, so cannot be used.")
  hosts = [host for node in nodes for host in cloud.hosts(node)]
  chosen = hosts if options.worker == "all" else hosts[:1]
  for index, host in enumerate(chosen):
    yield (
      host,
      {
        "HOME": str(host),
        "PATH": f"{host}/bin:/usr/bin:/bin",
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "DPOP_COORDINATOR": f"127.0.0.1:{things[f'tpu-vm/{nodes[0]}']['port']}",
        "DPOP_NUM_PROCESSES": str(len(hosts)),
        "DPOP_PROCESS_ID": str(index),
      },
    )


def main() -> int:
  cloud = Cloud(os.environ["STAND_IN"], int(os.environ["STAND_IN_HOSTS"]))
  arguments = sys.argv[1:]
  with (cloud.folder / "calls.log").open("a") as file:
    print(json.dumps(arguments), file=file)
  assert arguments[:2] == ["compute", "tpus"], arguments
  options = _parse(arguments[2:])
  things = cloud.load()
  *sources, name = options.names
  target = name
  if options.verb == "scp":
    name, target = name.split(":")
  if options.verb == "create":
    _create(cloud, things, options, name)
    cloud.save(things)
    return 0
  key = f"{options.kind}/{name}"
  if key not in things:
    _fail(f"NOT_FOUND: Resource '{key}' was not found")
  nodes = things[key].get("nodes", [name])
  if options.verb == "describe":
    print(_value(things[key], options.format))
  elif options.verb == "delete":
    for node in nodes:
      cloud.remove_node(node)
    gone = {key, *(f"tpu-vm/{node}" for node in nodes)}
    cloud.save({k: v for k, v in things.items() if k not in gone})
  elif options.verb == "scp":
    for host, _ in _on_hosts(cloud, nodes, things, options):
      shutil.copy(*sources, host / target)
  else:
    running = [
      subprocess.Popen(["bash", "-c", options.command], cwd=host, env=env)
      for host, env in _on_hosts(cloud, nodes, things, options)
    ]
    return next(filter(None, [process.wait() for process in running]), 0)
  return 0


if __name__ == "__main__":
  sys.exit(main())
