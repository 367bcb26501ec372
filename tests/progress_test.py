"""Progress: a bar in a terminal, few plain lines elsewhere."""

import io

from dpop_jax import progress


class Terminal(io.StringIO):
  def isatty(self):
    return True


def test_without_a_terminal_a_line_comes_every_ten_seconds_and_at_the_end():
  stream = io.StringIO()
  now = [0.0]
  with progress.Progress(
    "train", num_steps=20, stream=stream, clock=lambda: now[0]
  ) as bar:
    # Compiling takes 30 s and each step 4 s; the rate leaves compilation out.
    for step in range(1, 21):
      now[0] = 30.0 + 4.0 * (step - 1)
      bar.update(step, {"loss": 1 / step})
  lines = stream.getvalue().splitlines()
  # Seconds 30, 42, 54, 66, 78, 90, 102 are steps 1, 4, 7, ... 19, then the end.
  assert lines[0] == "train  1/20  loss 1"
  assert lines[1] == "train  4/20  4 s/step, 01:04 left  loss 0.25"
  assert lines[-1] == "train  20/20  4 s/step, 00:00 left  loss 0.05"
  assert len(lines) == 8


def test_a_resumed_run_counts_from_where_it_was():
  stream = io.StringIO()
  now = [0.0]
  bar = progress.Progress(
    "train", num_steps=10, first_step=6, stream=stream, clock=lambda: now[0]
  )
  for step in (7, 8, 9):
    now[0] += 10.0
    bar.update(step)
  assert stream.getvalue().splitlines() == [
    "train  7/10",
    "train  8/10  10 s/step, 00:20 left",
    "train  9/10  10 s/step, 00:10 left",
  ]


def test_in_a_terminal_there_is_a_bar_and_messages_stay_above_it():
  stream = Terminal()
  with progress.Progress("train", num_steps=4, stream=stream) as bar:
    bar.update(1, {"loss": 0.6931})
    bar.print("step 1 saved")
    bar.update(4)
  text = stream.getvalue()
  assert "\rstep 1 saved\n" in text
  last = text.rstrip().split("\r")[-1]
  assert last.startswith("train: 100%") and "4/4" in last
  assert "loss 0.6931" in last  # The newest numbers stay until there are newer.


def test_other_processes_show_nothing():
  stream = io.StringIO()
  bar = progress.Progress("train", num_steps=1, is_shown=False, stream=stream)
  bar.update(1, {"loss": 1.0})
  bar.print("hello")
  bar.close()
  assert stream.getvalue() == ""
