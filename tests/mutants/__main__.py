"""Tries the mutants: `python -m tests.mutants [WORDS]`, or `make mutants ARGS="WORDS"`.

The package and its tests are copied to a temporary folder; there one mutant after another takes the
place of the right line, and its nearest tests run. A mutant is killed where one of them fails, and
survives where all pass. WORDS keep the mutants whose file or intent holds one of them. First all
nearest tests run on the code as it is, so that a failure says something. The exit code is 0 where
at least MUST_DIE of the mutants were killed.

About ten seconds a mutant on a free core, mostly the start of Python and compilation.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.mutants import MUTANTS, Mutant, mutated

ROOT = Path(__file__).resolve().parents[2]
MUST_DIE = 0.95
TOO_LONG_S = 600  # a test that hangs has noticed


def run_tests(
  copy: Path, tests: Sequence[str], *, limit_s: float | None = None
) -> tuple[str, str]:
  """How tests end in a copy: all "passed", one "failed", or they did "not run"; what they print."""
  command = [
    sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", "--no-header",
    *(f"tests/{test}" for test in tests),
  ]
  environment = os.environ | {"PYTHONPATH": str(copy), "JAX_PLATFORMS": "cpu"}
  environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
  try:
    done = subprocess.run(
      command, cwd=copy, env=environment, timeout=limit_s, text=True, stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
    )
  except subprocess.TimeoutExpired:
    return "failed", f"over {limit_s} s"
  # Whatever ends Python with a traceback has the exit code of a test that failed.
  last = done.stdout.rstrip().rpartition("\n")[2]
  ends = {0: "passed", 1: "failed" if re.search(r"\d (failed|error)", last) else "not run"}
  return ends.get(done.returncode, "not run"), done.stdout


def chosen(words: Sequence[str]) -> list[Mutant]:
  """The mutants that one of the words speaks of; all where there is none."""
  return [
    mutant for mutant in MUTANTS
    if not words or any(word in f"{mutant.file} {mutant.intent}" for word in words)
  ]


def try_all(mutants: Sequence[Mutant], copy: Path) -> dict[Mutant, str]:
  """How each mutant ended."""
  ends, second = {}, itertools.count(1)
  for number, mutant in enumerate(mutants, 1):
    path, began = copy / "gr4ad_jax" / mutant.file, time.monotonic()
    right, wrong = path.read_text(), mutated(mutant, copy / "gr4ad_jax")
    _write(path, wrong, next(second))
    end, printed = run_tests(copy, mutant.tests, limit_s=TOO_LONG_S)
    _write(path, right, next(second))
    ends[mutant] = {"passed": "survived", "failed": "killed"}.get(end, end)
    print(
      f"{number:3d}/{len(mutants)} {ends[mutant]:8s} {time.monotonic() - began:5.0f} s  "
      f"{mutant.file}: {mutant.intent}", flush=True,
    )
    if end == "not run":
      print(printed)
  return ends


def _write(path: Path, text: str, time_s: int) -> None:
  """Writes a text of its own time: Python knows what it has compiled by time and length."""
  path.write_text(text)
  os.utime(path, (time_s, time_s))


def table(ends: dict[Mutant, str]) -> str:
  """Mutants and killed ones of each room, the survivors, and the share."""
  lines = ["", f"{'room':12s} mutants  killed"]
  by_room = itertools.groupby(sorted(ends, key=lambda m: m.file), lambda m: m.file.split("/")[0])
  for room, group in by_room:
    members = list(group)
    lines.append(f"{room:12s} {len(members):7d} {sum(ends[m] == 'killed' for m in members):7d}")
  killed = sum(end == "killed" for end in ends.values())
  lines.append(f"{'all':12s} {len(ends):7d} {killed:7d}   {killed / len(ends):.1%}")
  lines += [f"{end}: {m.file}: {m.intent}" for m, end in ends.items() if end != "killed"]
  return "\n".join(lines)


def main(words: Sequence[str]) -> int:
  """The exit code."""
  mutants = chosen(words)
  if not mutants:
    print(f"no mutant speaks of {' or '.join(words)}")
    return 2
  with tempfile.TemporaryDirectory() as folder:
    copy = Path(folder) / "checkout"
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("gr4ad_jax", "tests", "experiments"):
      shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", copy)
    try:
      for mutant in mutants:
        mutated(mutant, copy / "gr4ad_jax")
    except ValueError as error:
      print(error)
      return 2
    nearest = sorted({test for mutant in mutants for test in mutant.tests})
    print(f"{len(mutants)} mutants; first their {len(nearest)} nearest tests on the code as it is")
    end, printed = run_tests(copy, nearest)
    if end != "passed":
      print(printed, "the nearest tests fail on the code as it is", sep="\n")
      return 2
    ends = try_all(mutants, copy)
  print(table(ends))
  return int(sum(end == "killed" for end in ends.values()) < MUST_DIE * len(ends))


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
