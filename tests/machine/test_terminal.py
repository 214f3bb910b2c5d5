"""What is printed is text, whoever wrote it: no style, no picture, no command to the terminal."""

import ast
import io
import sys
from pathlib import Path

import pytest
from rich.table import Table

from gr4ad_jax.machine import terminal
from gr4ad_jax.machine.progress import track
from gr4ad_jax.machine.terminal import Terminal
from tests.commands import ROOT

TEXTS = ("[sale] shoes", "shoes [/b]", "[/]", "sku[/0]", "[bold red]", "\\[x]", ":cat: food",
         "[link=http://x]y[/link]", "{task} %s")


@pytest.mark.parametrize("text", TEXTS)
def test_a_log_s_text_comes_out_as_it_is(text, capsys):
  console, table = Terminal(), Table(title=text)
  table.add_column(text)
  table.add_row(text)
  console.print(f"ad {text} is left out")
  console.show(table)
  console.print(table, soft_wrap=False)
  assert capsys.readouterr().out.count(text) == 7


@pytest.mark.parametrize("on_terminal", [True, False])
@pytest.mark.parametrize("text", TEXTS)
def test_progress_names_things_as_they_are_called(text, on_terminal, monkeypatch):
  screen = io.StringIO()
  screen.isatty = lambda: on_terminal
  monkeypatch.setattr("sys.stderr", screen)
  monkeypatch.setenv("COLUMNS", "200")
  assert list(track(range(2), text)) == [0, 1]
  assert text in screen.getvalue()


def test_no_text_commands_the_terminal(capsys):
  Terminal().print("a\x1b[2Jb\x07c\r\x9bd\u202ee\ud800 é")
  assert capsys.readouterr().out == "a\\x1b[2Jb\\x07c\\r\\x9bd\\u202ee\\ud800 é\n"


def test_a_file_gets_columns_in_full_width(capsys, monkeypatch):
  monkeypatch.setenv("COLUMNS", "40")
  monkeypatch.setenv("FORCE_COLOR", "1")  # as CI sets it, where nobody looks either
  table = Table()
  for name in ("ad", "text"):
    table.add_column(name)
  table.add_row("7f0c2e01-51aa-4d3b-9c1e-0a1b2c3d4e01", "word " * 30)
  Terminal().show(table)
  row = next(line for line in capsys.readouterr().out.splitlines() if "7f0c" in line)
  assert "7f0c2e01-51aa-4d3b-9c1e-0a1b2c3d4e01" in row and row.count("word") == 30


def test_a_long_line_is_one_line(capsys, monkeypatch):
  """A path that is printed can be copied."""
  monkeypatch.setenv("COLUMNS", "40")
  Terminal().print("report: " + "/folder with spaces" * 9)
  assert capsys.readouterr().out.count("\n") == 1


def test_what_the_encoding_lacks_is_escaped(monkeypatch):
  raw = io.BytesIO()
  monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
  terminal.never_fail()
  table = Table()
  table.add_row("café ☕")
  Terminal().show(table)
  sys.stdout.flush()
  assert "caf\\xe9 \\u2615" in raw.getvalue().decode("ascii")


def test_files_are_read_as_utf_8_in_every_locale():
  wrong = [
    f"{path}:{node.lineno}" for path in FILES if "experiments" not in path.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "read_text"
    and not node.args and not node.keywords
  ]
  assert wrong == []


def _wrong(tree: ast.AST) -> list[str]:
  """Where a file could print markup: consoles, prints and columns of rich's own."""
  found = []
  for node in ast.walk(tree):
    match node:
      case ast.ImportFrom(module=str(module), names=names) if module.split(".")[0] == "rich":
        found += [n.name for n in names if n.name in
                  ("Console", "print", "get_console", "inspect", "console", "Prompt", "Confirm",
                   "TextColumn", "RichHandler", "SpinnerColumn", "install")]
      case ast.Import(names=names):
        found += [n.name for n in names if n.name.split(".")[0] == "rich"]
      case ast.Attribute(attr="from_markup" | "render_markup" | "from_ansi" as name):
        found.append(name)
      case ast.keyword(arg="markup" | "emoji" as name, value=ast.Constant(value=True)):
        found.append(name)
  return found


FILES = [p for room in ("gr4ad_jax", "experiments") for p in sorted((ROOT / room).rglob("*.py"))]


def test_no_file_has_a_console_of_its_own():
  assert len(FILES) > 100
  wrong = {str(path): found for path in FILES
           if (found := _wrong(ast.parse(path.read_text(encoding="utf-8"))))}
  assert wrong == {str(Path(terminal.__file__)): ["Console"]}


def test_a_full_disk_ends_no_work_that_only_tells_of_itself():
  class Full(io.StringIO):
    def write(self, text):
      raise OSError(28, "No space left on device")

  beside, result = Terminal(stderr=True), Terminal()
  beside.file = result.file = Full()
  beside.print("still at it")
  with pytest.raises(OSError, match="No space"):  # a result that is lost has to be told
    result.print("a table")
