"""What a mutant is, and how it is put into a copy of the code."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Mutant:
  """A line that could be wrong, and the tests that have to notice.

  Attributes:
    intent: what the right line does, in a sentence.
    file: below gr4ad_jax/.
    code: the line, or the part of it, as it stands; once in the file.
    wrong: what stands there instead.
    tests: the nearest tests, as pytest names them, below tests/.
  """

  intent: str
  file: str
  code: str
  wrong: str
  tests: tuple[str, ...]


def mutated(mutant: Mutant, package: Path) -> str:
  """The text of the mutant's file with the wrong line.

  Args:
    mutant: what to change.
    package: the folder gr4ad_jax.

  Raises:
    ValueError: the line does not stand there once, or what comes out is no Python.
  """
  path = package / mutant.file
  text = path.read_text() if path.exists() else ""
  if (count := text.count(mutant.code)) != 1:
    raise ValueError(
      f"{mutant.file}: {mutant.code!r} stands there {count} times, has to be once; "
      f"bring the mutant up to date ({mutant.intent})"
    )
  text = text.replace(mutant.code, mutant.wrong)
  try:
    ast.parse(text)
  except SyntaxError as error:
    raise ValueError(f"{mutant.file}: {mutant.wrong!r} is no Python here ({error})") from None
  return text
