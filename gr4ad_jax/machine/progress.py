"""Progress of long steps on the terminal: a bar with rate and ETA, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import (
  BarColumn,
  MofNCompleteColumn,
  Progress,
  ProgressColumn,
  Task,
  TextColumn,
  TimeElapsedColumn,
  TimeRemainingColumn,
)
from rich.text import Text

ItemT = TypeVar("ItemT")

# Progress goes to stderr, so that a command's result on stdout can be piped.
console = Console(stderr=True)
_SECONDS_BETWEEN_LINES = 10.0


def be_quiet() -> None:
  """This process says nothing of its progress any more: another one does."""
  console.quiet = True


class _RateColumn(ProgressColumn):
  """Items per second since the bar started."""

  def render(self, task: Task) -> Text:
    speed = task.finished_speed or task.speed
    return Text("" if speed is None else f"{_format_rate(speed)}/s", style="cyan")


def _format_rate(rate: float) -> str:
  return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def track(
  items: Iterable[ItemT],
  description: str,
  total: int | None = None,
  *,
  step: int = 1,
  completed: int = 0,
) -> Iterator[ItemT]:
  """Yields `items` while showing how far, how fast and how long still.

  Args:
    items: what to go through.
    description: a few words shown beside the bar.
    total: units in all; taken from len(items) * step where that is known.
    step: units that one item stands for (for example the rows of a batch).
    completed: units done before (a resumed run).
  """
  if total is None and hasattr(items, "__len__"):
    total = len(items) * step + completed
  if console.quiet:
    yield from items
  elif sys.stderr.isatty():
    yield from _track_bar(items, description, total, step, completed)
  else:
    yield from _track_lines(items, description, total, step, completed)


def _track_bar(items, description, total, step, completed):
  columns = (
    TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _RateColumn(),
    TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn(),
  )
  with Progress(*columns, console=console) as progress:
    task = progress.add_task(description, total=total, completed=completed)
    for item in items:
      yield item
      progress.advance(task, step)


def _track_lines(items, description, total, step, completed):
  """The same for logs and pipes: a line now and then instead of a moving bar."""
  start = last = time.monotonic()
  done = 0
  for item in items:
    yield item
    done = min(done + step, total - completed) if total is not None else done + step
    now = time.monotonic()
    if now - last >= _SECONDS_BETWEEN_LINES:
      last = now
      print(_line(description, done, completed, total, now - start), file=sys.stderr, flush=True)
  seconds = time.monotonic() - start
  print(_line(description, done, completed, total, seconds), file=sys.stderr, flush=True)


def _line(description: str, done: int, completed: int, total: int | None, seconds: float) -> str:
  rate = done / max(seconds, 1e-9)
  line = f"{description}: {done + completed:,}"
  if total is not None:
    line += f"/{total:,}"
  line += f" {_format_rate(rate)}/s {seconds:.0f} s"
  if total is not None and rate > 0 and done + completed < total:
    line += f" ETA {(total - done - completed) / rate:.0f} s"
  return line
