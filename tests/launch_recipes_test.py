"""launch/slurm.sbatch and launch/jobset.yaml, as far as can be without them."""

import os
import pathlib
import subprocess

import pytest
import yaml

ROOT = pathlib.Path(__file__).parent.parent
FAKE = """#!/bin/sh
echo "$(basename "$0") $@" >> {folder}/calls
[ "$(basename "$0")" != srun ] || exit {code}
"""


@pytest.mark.parametrize(
  ("code", "restarts", "is_requeued"),
  [(0, 0, False), (1, 0, False), (75, 3, True), (143, 3, True),
   (143, 100, False)],
)  # fmt: skip
def test_a_slurm_job_gets_in_line_again_when_it_was_interrupted(
  tmp_path, code, restarts, is_requeued
):
  for name in ("srun", "scontrol"):
    (tmp_path / name).write_text(FAKE.format(folder=tmp_path, code=code))
    (tmp_path / name).chmod(0o755)
  done = subprocess.run(
    ["bash", ROOT / "launch" / "slurm.sbatch", "python", "-m", "train", "a b"],
    env={
      "PATH": f"{tmp_path}:{os.environ['PATH']}",
      "SLURM_JOB_ID": "7",
      "SLURM_RESTART_COUNT": str(restarts),
    },
    timeout=60,
  )
  assert done.returncode == code
  calls = (tmp_path / "calls").read_text().splitlines()
  assert calls[0].endswith("python -m train a b")
  assert (calls[1:] == ["scontrol requeue 7"]) == is_requeued


def test_all_ways_start_the_same_command():
  folder = ROOT / "launch"
  jobset = yaml.safe_load((folder / "jobset.yaml").read_text())
  (job,) = jobset["spec"]["replicatedJobs"]
  (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
  printed = subprocess.run(
    ["bash", "-c", 'source "$0"; printf "%s\\n" "${COMMAND[@]}"',
     folder / "settings.example.env"],
    capture_output=True, text=True, check=True,
  )  # fmt: skip
  assert printed.stdout.splitlines() == container["command"]
  # Of the 16 chips of a 4x4, 4 are on each host.
  assert job["template"]["spec"]["parallelism"] * 4 == 16
  policy = job["template"]["spec"]["podFailurePolicy"]["rules"][0]
  assert policy["onExitCodes"]["containerName"] == container["name"]
