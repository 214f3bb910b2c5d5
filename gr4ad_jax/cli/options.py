"""What the options of several commands have in common."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import NoneType
from typing import Annotated, Literal, TypeVar, get_args

import tyro

from gr4ad_jax.gr4ad.config import PRESETS
from gr4ad_jax.machine import storage

RecordT = TypeVar("RecordT")

Flat = Annotated[RecordT, tyro.conf.arg(name="")]
"""A record whose fields are options without its own name before them."""
Preset = Literal[tuple(PRESETS)]  # type: ignore[valid-type]
# Options that take words, and may stand several times: the parser alone would keep the last.
LISTS = ("--map", "--ignore-columns", "--actions", "--beam-options", "--where", "--baseline-run")
registry = tyro.constructors.ConstructorRegistry()


@registry.primitive_rule
def _places(
  field: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec | None:
  """Reads a field of type `Place`, which may be in a bucket, or `Path`, which may not."""
  kinds = get_args(field.type) or (field.type,)
  if Path not in kinds or not {*kinds} <= {Path, storage.Url, NoneType}:
    return None
  make = storage.place if storage.Url in kinds else storage.local_path
  optional = NoneType in kinds
  return tyro.constructors.PrimitiveConstructorSpec(
    nargs=1, metavar="{None}|PATH" if optional else "PATH",
    instance_from_str=lambda words: None if optional and words == ["None"] else make(words[0]),
    is_instance=lambda value: isinstance(value, kinds),
    str_from_instance=lambda value: [str(value)],
  )


def joined(argv: Sequence[str]) -> list[str]:
  """A command line in which the words of every `--map` (and other LISTS) follow the first one."""
  into: list[str] = []
  parts, lists = [into], {}
  for word in argv:
    name, equals, value = word.partition("=")
    name = name.replace("_", "-")
    if name in LISTS:
      if name not in lists:
        parts.append(lists.setdefault(name, [name]))
      into = lists[name]
      into += [value] if equals else []
    elif word.startswith("--"):
      into = [word]
      parts.append(into)
    else:
      into.append(word)
  return [word for part in parts for word in part]
