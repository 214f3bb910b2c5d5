"""Progress of long steps on the terminal: a bar with rate and ETA, plain lines elsewhere."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from rich.progress import BarColumn, Progress, ProgressColumn, Task
from rich.text import Text

from gr4ad_jax.machine.terminal import Terminal, plain

ItemT = TypeVar("ItemT")

# Progress goes to stderr, so that a command's result on stdout can be piped.
console = Terminal(stderr=True)
_SECONDS_BETWEEN_LINES = 10.0


def be_quiet() -> None:
  """This process says nothing of its progress any more: another one does."""
  console.quiet = True


def track(
  items: Iterable[ItemT],
  description: str,
  total: int | None = None,
  *,
  step: int = 1,
  completed: int = 0,
  note: Callable[[], str] | None = None,
) -> Iterator[ItemT]:
  """Yields `items` while showing how far, how fast and how long still.

  Args:
    items: what to go through.
    description: a few words shown beside the bar.
    total: units in all; taken from len(items) * step where that is known.
    step: units that one item stands for (for example the rows of a batch).
    completed: units done before (a resumed run).
    note: says what stands behind the numbers now, such as a loss.
  """
  if total is None and hasattr(items, "__len__"):
    total = len(items) * step + completed
  if console.quiet:
    yield from items
    return
  is_bar = sys.stderr.isatty()
  columns = _Description(), BarColumn(), _Numbers()
  # Rates are of the last 1,000 items, however long they take.
  with Progress(
    *columns, console=console, disable=not is_bar, speed_estimate_period=math.inf
  ) as progress:
    # Where no bar is drawn, `progress` only counts, and a line now and then says how far it is.
    name = progress.add_task(description, total=total, completed=completed, note=note)
    (task,) = progress.tasks
    said_s = 0.0
    for item in items:
      yield item
      progress.advance(name, step)
      if not is_bar and task.elapsed - said_s >= _SECONDS_BETWEEN_LINES:
        said_s = task.elapsed
        _say(task)
    if not is_bar:
      _say(task)


class _Description(ProgressColumn):
  """What goes on; rich's own column would read it as markup."""

  def render(self, task: Task) -> Text:
    return Text(plain(task.description))


class _Numbers(ProgressColumn):
  """The same numbers beside a bar as in a line."""

  def render(self, task: Task) -> Text:
    return Text(_numbers(task))


def _say(task: Task) -> None:
  print(f"{plain(task.description)}: {_numbers(task)}", file=sys.stderr, flush=True)


def _numbers(task: Task) -> str:
  """How far, how fast, how long already and how long still."""
  if task.total is None:
    text = f"{task.completed:,.0f}"
  else:  # the last batch may be smaller than the others
    text = f"{min(task.completed, task.total):,.0f}/{task.total:,.0f}"
  speed = task.finished_speed or task.speed
  if speed:
    text += f" {speed:,.0f}/s" if speed >= 100 else f" {speed:.3g}/s"
  text += f" {task.elapsed:.0f} s"
  if task.time_remaining:
    text += f" ETA {task.time_remaining:.0f} s"
  note = task.fields["note"]
  return f"{text}, {said}" if note and (said := note()) else text
