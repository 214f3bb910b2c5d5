"""What reads, changes, checks and stores settings; each room has its own as frozen dataclasses."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import json
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from annotated_types import Interval

ConfigT = TypeVar("ConfigT")

Count = Annotated[int, Interval(ge=1)]
CountOrZero = Annotated[int, Interval(ge=0)]
Positive = Annotated[float, Interval(gt=0, lt=math.inf)]
NotNegative = Annotated[float, Interval(ge=0, lt=math.inf)]
Share = Annotated[float, Interval(ge=0, le=1)]
ShareBelowOne = Annotated[float, Interval(ge=0, lt=1)]
Seed = Annotated[int, Interval(ge=0, lt=2**31)]


class ConfigError(ValueError):
  """A setting that cannot work; the message names the field, the value and the rule."""


def require(ok: bool, field: str, value: Any, rule: str) -> None:
  """Raises ConfigError naming the field, its value and the rule, unless `ok`."""
  if not ok:
    raise ConfigError(f"{field}={value!r}: {rule}")


class Bounded:
  """Base of a frozen dataclass of settings; the bounds of a field stand in its type, as `Count`.

  A subclass whose fields depend on each other checks that in `_check`, which runs once each field
  keeps its bounds. `section` stands before the names in errors: class A(Bounded, section="train").
  """

  _section: ClassVar[str] = ""

  def __init_subclass__(cls, *, section: str | None = None):
    super().__init_subclass__()
    if section is not None:
      cls._section = f"{section}."

  def __post_init__(self):
    """Raises ConfigError where a field, or an element of one, lies out of its bounds."""
    for name, hint in _hints(type(self)):
      if (rule := _broken(hint, getattr(self, name))):
        raise ConfigError(f"{self._section}{name}={getattr(self, name)!r}: {rule}")
    self._check()

  def _check(self) -> None:
    """Raises ConfigError where fields do not go together."""


@functools.cache
def _hints(kind: type) -> tuple[tuple[str, Any], ...]:
  """The types of a dataclass's fields, with their bounds.

  Those of its bases, too: a new default in a subclass, with a plain type, takes no bound away.
  """
  names = {field.name for field in dataclasses.fields(kind)}
  return tuple(
    (name, hint) for base in kind.__mro__
    for name, hint in inspect.get_annotations(base, eval_str=True).items() if name in names
  )


def _broken(hint: Any, value: Any) -> str:
  """The first rule of a type that a value breaks; "" = none."""
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if origin is tuple and isinstance(value, tuple):
    kinds = (args[0],) * len(value) if args[-1] is Ellipsis else args
    rules = (_broken(kind, part) for kind, part in zip(kinds, value, strict=False))
    return next((f"each {rule}" for rule in rules if rule), "")
  if origin in (typing.Union, types.UnionType) and value is not None:
    return next((rule for kind in args if (rule := _broken(kind, value))), "")
  if origin is Annotated:
    bounds = [bound for bound in args[1:] if isinstance(bound, Interval)]
    return next((_rule(bound) for bound in bounds if not _within(bound, value)), "")
  return ""


def _within(bound: Interval, value: Any) -> bool:
  """Whether a number keeps a bound; NaN keeps none."""
  return (
    (bound.ge is None or value >= bound.ge) and (bound.gt is None or value > bound.gt)
    and (bound.le is None or value <= bound.le) and (bound.lt is None or value < bound.lt)
  )  # fmt: skip


def _rule(bound: Interval) -> str:
  """A bound in words."""
  low = f"[{bound.ge}" if bound.ge is not None else f"({bound.gt}"
  if bound.le is None and bound.lt in (None, math.inf):
    finite = "" if bound.lt is None else " and finite"
    return f"must be {f'>= {bound.ge}' if bound.ge is not None else f'> {bound.gt}'}{finite}"
  return f"must lie in {low}, {f'{bound.le}]' if bound.le is not None else f'{bound.lt})'}"


def nearest(name: str, options: typing.Iterable[str]) -> str:
  """A hint for a name that is not among `options`: the closest one, or all of them."""
  options = list(options)
  close = difflib.get_close_matches(name, options, n=1, cutoff=0.4)
  return f"did you mean {close[0]!r}?" if close else f"one of {', '.join(options)}"


def override(config: ConfigT, path: str, value: Any) -> ConfigT:
  """A copy of `config` with the field at one dotted path replaced, as `override_all`."""
  return override_all(config, {path: value})


def override_all(config: ConfigT, overrides: Mapping[str, Any]) -> ConfigT:
  """A copy of `config` with fields replaced, all at once: rules between them see the new values.

  Args:
    config: any nested frozen dataclass.
    overrides: dotted path, such as "model.width" -> a value, or its text as typed on a command
      line.

  Raises:
    ConfigError: no such path (the nearest valid one is named), or a value of the wrong type.
  """
  valid = [path for path, _ in _leaves(config)]
  changes: dict[str, Any] = {}
  for path, value in overrides.items():
    if path not in valid:
      raise ConfigError(f"unknown setting {path!r}; {nearest(path, valid)}")
    *parts, name = path.split(".")
    inner = changes
    for part in parts:
      inner = inner.setdefault(part, {})
    inner[name] = value
  return from_dict(type(config), changes, base=config)


def _leaves(config: Any, prefix: str = "") -> list[tuple[str, Any]]:
  leaves = []
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      leaves += _leaves(value, f"{prefix}{field.name}.")
    else:
      leaves.append((prefix + field.name, value))
  return leaves


def _parse(hint: Any, value: Any, path: str) -> Any:
  """`value` as the type `hint`; text is read the way a command line writes it."""
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  try:
    if origin is Literal:
      if value not in args:
        raise ValueError
      return value
    if origin in (typing.Union, types.UnionType):
      if value is None or value == "None":
        return None
      return _parse(next(a for a in args if a is not type(None)), value, path)
    if origin is tuple:
      parts = value.strip("()").split(",") if isinstance(value, str) else value
      parts = [p for p in parts if p != ""]
      kinds = [args[0]] * len(parts) if len(args) == 2 and args[1] is Ellipsis else args
      if len(kinds) != len(parts):
        raise ValueError
      return tuple(_parse(k, p, path) for k, p in zip(kinds, parts, strict=True))
    if hint is bool:  # bool("false") is True
      return {"true": True, "false": False, "1": True, "0": False}[str(value).lower()]
    if hint is int and isinstance(value, float):  # int(6.5) is 6
      raise ValueError
    return hint(value)
  except (ValueError, KeyError, TypeError):
    kind = getattr(hint, "__name__", str(hint)).replace("typing.", "")
    raise ConfigError(f"{path}={value!r}: must be {kind if not args else hint}") from None


def differences(old: ConfigT, new: ConfigT) -> list[str]:
  """Settings in which two configs differ, as "path: old -> new"."""
  before = dict(_leaves(old))
  return [f"{path}: {before.get(path)} -> {value}" for path, value in _leaves(new)
          if before.get(path) != value]


def to_json(config: Any) -> str:
  """The config as indented JSON text.

  Raises:
    ConfigError: a number that is not finite, which JSON cannot hold.
  """
  for path, value in _leaves(config):
    parts = value if isinstance(value, tuple) else (value,)
    require(all(not isinstance(x, float) or math.isfinite(x) for x in parts), path, value,
            "must be finite")
  return json.dumps(dataclasses.asdict(config), indent=2, allow_nan=False) + "\n"


def from_dict(
  kind: type[ConfigT], values: dict[str, Any], prefix: str = "", *, base: ConfigT | None = None
) -> ConfigT:
  """A dataclass of type `kind` from plain JSON values.

  Args:
    kind: its fields are dataclasses or values.
    values: name -> value; missing ones are those of `base`, or the defaults.
    prefix: stands before the names in errors.
    base: a config of this type.

  Raises:
    ConfigError: an unknown field, or a value of the wrong type.
  """
  hints = typing.get_type_hints(kind)
  fields = {}
  for name, value in values.items():
    if name not in hints:
      raise ConfigError(f"unknown setting {prefix + name!r}; {nearest(name, hints)}")
    if dataclasses.is_dataclass(hints[name]):
      inner = None if base is None else getattr(base, name)
      fields[name] = from_dict(hints[name], value, f"{prefix}{name}.", base=inner)
    else:
      fields[name] = _parse(hints[name], value, prefix + name)
  return kind(**fields) if base is None else dataclasses.replace(base, **fields)


def take_out(values: dict[str, Any], paths: typing.Iterable[str]) -> list[tuple[str, Any]]:
  """Takes fields out of plain JSON values; returns those that were there, with their values.

  Args:
    values: nested objects; they are changed.
    paths: dotted ones.
  """
  taken = []
  for path in paths:
    *parts, name = path.split(".")
    inner: Any = values
    for part in parts:
      inner = inner.get(part) if isinstance(inner, dict) else None
    if isinstance(inner, dict) and name in inner:
      taken.append((path, inner.pop(name)))
  return taken


def read_json(kind: type[ConfigT], path: Path) -> ConfigT:
  """The config stored at `path`.

  Raises:
    ConfigError: no such file, or its content is not a valid config.
  """
  return from_dict(kind, read_values(path))


def read_values(path: Path, kind: type = dict) -> Any:
  """What a JSON file holds: an object, or another `kind` of value.

  Raises:
    ConfigError: no such file, or it is damaged; the message names it.
  """
  try:
    values = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise ConfigError(f"{path}: no such file") from None
  except ValueError as error:  # no JSON, or no text
    raise ConfigError(f"{path}: not JSON ({error})") from None
  if not isinstance(values, kind):
    raise ConfigError(f"{path}: holds a {type(values).__name__}, must be a {kind.__name__}")
  return values
