"""A cloud on this machine, and settings that launch/tpu.sh uses it with.

Not a test itself.
"""

import json
import os
import pathlib
import shlex
import subprocess
import sys
import time

import stand_in_gcloud

ROOT = pathlib.Path(__file__).parent.parent
SCRIPT = ROOT / "launch" / "tpu.sh"
SETTINGS = {
  "PROJECT": "some-project",
  "ZONE": "some-zone",
  "NAME": "tiny",
  "ACCELERATOR_TYPE": "v5litepod-8",
  "RUNTIME_VERSION": "v2-alpha-tpuv5-lite",
  "CAPACITY": "spot",
  "POLL_SECONDS": "1",
}


class Place:
  """A cloud of its own in a folder, and settings for launch/tpu.sh."""

  def __init__(self, folder, num_hosts=2):
    self.folder = folder
    self.cloud = stand_in_gcloud.Cloud(folder / "cloud", num_hosts)
    (folder / "cloud").mkdir(parents=True)
    (folder / "bin").mkdir()
    program = folder / "bin" / "gcloud"
    program.write_text(
      f'#!/bin/sh\nexec {sys.executable} {stand_in_gcloud.__file__} "$@"\n'
    )
    program.chmod(0o755)
    self.environment = {
      "PATH": f"{folder}/bin:{os.environ['PATH']}",
      "HOME": str(folder),
      "STAND_IN": str(folder / "cloud"),
      "STAND_IN_HOSTS": str(num_hosts),
    }

  def write_settings(self, command=("true",), **settings):
    lines = [f"{name}={value}" for name, value in (SETTINGS | settings).items()]
    words = command if isinstance(command, str) else shlex.join(command)
    path = self.folder / "settings.env"
    path.write_text("\n".join([*lines, f"COMMAND=({words})", ""]))

  def start(self, verb, *flags):
    return subprocess.Popen(
      [SCRIPT, verb, self.folder / "settings.env", *flags],
      env=self.environment,
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  def run(self, verb, *flags):
    process = self.start(verb, *flags)
    try:
      stdout, stderr = process.communicate(timeout=120)
    finally:
      process.kill()
    return subprocess.CompletedProcess(
      process.args, process.returncode, stdout, stderr
    )

  def succeed(self, verb, *flags):
    done = self.run(verb, *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    return done

  def calls(self):
    """Kind and verb of what was asked of gcloud, without questions."""
    lines = (self.folder / "cloud" / "calls.log").read_text().splitlines()
    calls = [json.loads(line) for line in lines]
    return [c for c in calls if c[3] != "describe"]

  def verbs(self):
    return [call[3] for call in self.calls()]


def wait_for(condition, seconds=120):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.05)
