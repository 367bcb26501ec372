"""How far a run is: a bar in a terminal, plain lines where there is none."""

import io
import sys
import time
from collections.abc import Callable, Mapping

import tqdm


class Progress:
  """Shows steps done, time left and a few numbers; a context manager.

  In a terminal it is one bar that redraws itself. In a file or a pipe it is at
  most one line every `seconds_between_lines`, and one for the last step:

    train  120/500  1.8 s/step, 11:24 left  loss 0.6612, reward_margin 0.0711
  """

  def __init__(
    self,
    name: str,
    *,
    num_steps: int,
    first_step: int = 0,
    is_shown: bool = True,
    stream: io.TextIOBase | None = None,
    seconds_between_lines: float = 10.0,
    clock: Callable[[], float] = time.monotonic,
  ):
    """Starts at `first_step` of `num_steps`.

    Args:
      name: What is being done, in a word.
      num_steps: Steps of the whole run.
      first_step: Those of them that an earlier process has done.
      is_shown: Whether this process shows anything, `jax.process_index() == 0`.
      stream: Where to show it; None is standard error.
      seconds_between_lines: Fewest seconds between two plain lines.
      clock: Seconds from any fixed moment.
    """
    self._name = name
    self._num_steps = num_steps
    self._step = first_step
    self._is_shown = is_shown
    self._stream = sys.stderr if stream is None else stream
    self._seconds_between_lines = seconds_between_lines
    self._clock = clock
    self._last_line_time = clock()
    # When the first update came: before it lies compilation, which says nothing
    # about the steps to come.
    self._rate_start: tuple[int, float] | None = None
    self._bar = None
    if is_shown and self._stream.isatty():
      self._bar = tqdm.tqdm(
        desc=name,
        total=num_steps,
        initial=first_step,
        file=self._stream,
        unit="step",
        dynamic_ncols=True,
      )

  def __enter__(self) -> "Progress":
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def update(
    self, step: int, numbers: Mapping[str, float] | None = None
  ) -> None:
    """Moves to `step`, with the newest numbers if there are new ones."""
    done = step - self._step
    self._step = step
    if self._bar is not None:
      if numbers is not None:
        self._bar.set_postfix_str(_text_of(numbers), refresh=False)
      self._bar.update(done)
    elif self._is_shown:
      self._maybe_print_line(numbers or {})

  def print(self, message: str) -> None:
    """Shows a line of its own, above the bar where there is one."""
    if self._bar is not None:
      self._bar.write(message, file=self._stream)
    elif self._is_shown:
      print(message, file=self._stream, flush=True)

  def close(self) -> None:
    """Leaves the bar as it stands."""
    if self._bar is not None:
      self._bar.close()

  def _maybe_print_line(self, numbers: Mapping[str, float]) -> None:
    now = self._clock()
    if self._rate_start is None:
      self._rate_start = self._step, now
    is_last = self._step >= self._num_steps
    if now - self._last_line_time < self._seconds_between_lines and not is_last:
      return
    self._last_line_time = now
    parts = [f"{self._name}  {self._step}/{self._num_steps}"]
    start_step, start_time = self._rate_start
    if self._step > start_step:
      seconds = (now - start_time) / (self._step - start_step)
      left = tqdm.tqdm.format_interval(seconds * (self._num_steps - self._step))
      parts.append(f"{seconds:.3g} s/step, {left} left")
    if numbers:
      parts.append(_text_of(numbers))
    print("  ".join(parts), file=self._stream, flush=True)


def _text_of(numbers: Mapping[str, float]) -> str:
  return ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())


class Transfer:
  """Shows how much has been read or written; call it with each new bytes.

  In a terminal it is one line that redraws itself, elsewhere a line every
  `seconds_between_lines`:

    weights  12.4 GB, 1.9 GB/s
  """

  def __init__(
    self,
    name: str,
    *,
    is_shown: bool = True,
    stream: io.TextIOBase | None = None,
    seconds_between_lines: float = 10.0,
    clock: Callable[[], float] = time.monotonic,
  ):
    """Starts at nothing; the arguments are those of `Progress`."""
    self._name = name
    self._stream = sys.stderr if stream is None else stream
    self._is_shown = is_shown
    self._is_terminal = self._stream.isatty()
    self._interval = 0.2 if self._is_terminal else seconds_between_lines
    self._clock = clock
    self._start = self._last_line_time = clock()
    self._num_bytes = 0

  def __enter__(self) -> "Transfer":
    return self

  def __exit__(self, *_) -> None:
    if self._num_bytes:
      self._show(end="\n")

  def __call__(self, num_bytes: int) -> None:
    self._num_bytes += num_bytes
    if self._clock() - self._last_line_time >= self._interval:
      self._show(end="" if self._is_terminal else "\n")

  def _show(self, end):
    self._last_line_time = self._clock()
    if not self._is_shown:
      return
    rate = self._num_bytes / max(self._last_line_time - self._start, 1e-3)
    start = "\r" if self._is_terminal else ""
    text = f"{self._name}  {_size(self._num_bytes)}, {_size(rate)}/s"
    print(
      f"{start}{text:40s}".rstrip(" "), end=end, file=self._stream, flush=True
    )


def _size(num_bytes: float | int) -> str:
  for unit, factor in (("GB", 1e9), ("MB", 1e6)):
    if num_bytes >= factor:
      return f"{num_bytes / factor:.3g} {unit}"
  return f"{num_bytes / 1e3:.3g} kB"
