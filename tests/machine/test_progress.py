import functools
import io
import re

import pytest

from gr4ad_jax.machine import progress
from gr4ad_jax.machine.progress import track
from gr4ad_jax.machine.terminal import Terminal


@pytest.fixture
def every_line(monkeypatch):
  monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)


def test_without_a_terminal_there_are_lines(every_line, capsys):
  """The last batch has a unit less; ETA and rate appear when there is something to tell."""
  assert list(track("abc", "rows", 5, step=2)) == ["a", "b", "c"]
  first, *_, last = capsys.readouterr().err.splitlines()
  assert re.fullmatch(r"rows: 2/5 (\S+/s )?0 s( ETA \d+ s)?", first)
  assert re.fullmatch(r"rows: 5/5 \S+/s 0 s", last)


def test_the_length_is_the_total_where_none_is_given(capsys):
  list(track(range(3), "a", step=4, completed=8))
  list(track(iter(range(3)), "b"))
  a, b = capsys.readouterr().err.splitlines()
  assert a.startswith("a: 20/20 ") and b.startswith("b: 3 ")


def test_steps_of_minutes_have_a_rate(every_line, capsys, monkeypatch):
  clock = iter(range(0, 10**6, 60))
  monkeypatch.setattr(
    progress, "Progress", functools.partial(progress.Progress, get_time=lambda: next(clock))
  )
  for _ in track(range(3), "runs"):
    pass
  assert re.search(r"runs: 2/3 0\.0\d+/s \d+ s ETA \d+ s", capsys.readouterr().err)


def test_on_a_terminal_there_is_a_bar(monkeypatch):
  terminal = io.StringIO()
  terminal.isatty = lambda: True
  monkeypatch.setattr("sys.stderr", terminal)
  monkeypatch.setattr(progress, "console", Terminal(stderr=True))
  monkeypatch.setenv("COLUMNS", "100")
  list(track(range(1500), "steps"))
  assert re.search(r"steps .*━.* 1,500/1,500 \S+/s 0 s", terminal.getvalue())


def test_a_process_that_is_to_be_quiet_says_nothing(every_line, monkeypatch, capsys):
  monkeypatch.setattr(progress, "console", Terminal(stderr=True))
  progress.be_quiet()
  assert list(track(range(3), "steps")) == [0, 1, 2]
  assert capsys.readouterr().err == ""
