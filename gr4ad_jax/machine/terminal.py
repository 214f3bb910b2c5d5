"""The one kind of console: what it prints is text, whoever wrote it.

Ids, texts and file names come from other people's logs. To a console of rich's own "[sale]" is a
style, ":cat:" a picture, and an escape character whatever a terminal makes of it.
"""

from __future__ import annotations

import contextlib
import re
import sys
from typing import Any

from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.segment import Segment, Segments
from rich.text import Text

# Control characters but tab and line feed, halves of surrogate pairs, and what turns the direction
# of writing.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")
_WITHOUT_END = 100_000  # columns of a file or pipe


def plain(text: str) -> str:
  """The text with escapes, as Python spells them, for what would not be printed but obeyed."""
  return _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)


def one_line(text: object) -> str:
  """`plain`, in one line."""
  return plain(" ".join(str(text).split()))


class Terminal(Console):
  """A console without markup, pictures and highlighting; lines are broken by who shows them."""

  def __init__(self, *, stderr: bool = False):
    """On standard output, or on standard error."""
    super().__init__(stderr=stderr, markup=False, emoji=False, highlight=False, soft_wrap=True)
    self._beside = stderr

  def print(self, *objects: Any, **options: Any) -> None:
    """As rich's; what is said beside the work must not end it where a disk is full."""
    with contextlib.suppress(*[OSError] * self._beside):
      super().print(*objects, **options)

  def render_str(self, text: str, **options: Any) -> Text:
    """All strings come through here, those in the cells of tables too."""
    return super().render_str(plain(text), **options)

  def print_whole(self, renderable: RenderableType) -> None:
    """Prints as wide as it takes: where nobody looks, a column is never cut to fit a screen."""
    wide = self.options.update(max_width=_WITHOUT_END)
    wide = wide.update(width=Measurement.get(self, wide, renderable).maximum)
    lines = self.render_lines(renderable, wide, pad=False)
    for line in lines:
      self.print(Segments([*line, Segment.line()]), end="")

  def show(self, renderable: RenderableType) -> None:
    """As wide as this terminal, or, in a file or pipe, as it takes."""
    if self.file.isatty():  # whatever FORCE_COLOR says
      self.print(renderable, soft_wrap=False)
    else:
      self.print_whole(renderable)


def never_fail() -> None:
  """What this process's output cannot encode (LANG=C) is written as escapes instead of failing."""
  for stream in (sys.stdout, sys.stderr):
    if hasattr(stream, "reconfigure"):  # a test's or a notebook's own need not have it
      stream.reconfigure(errors="backslashreplace")
