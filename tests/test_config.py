"""Settings: round trip, overrides, clear errors."""

import dataclasses
import importlib
import math
import pkgutil
import typing

import pytest
from annotated_types import Interval

import gr4ad_jax
from gr4ad_jax.config import (
  Bounded,
  ConfigError,
  Count,
  CountOrZero,
  NotNegative,
  Positive,
  Seed,
  Share,
  ShareBelowOne,
  from_dict,
  override,
  read_json,
  to_json,
)
from gr4ad_jax.gr4ad.config import PRESETS, Config, ModelConfig, preset


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_survive_json(name, tmp_path):
  path = tmp_path / "config.json"
  path.write_text(to_json(preset(name)))
  again = read_json(Config, path)
  assert again == preset(name) and hash(again) == hash(preset(name))


@pytest.mark.parametrize(
  ("path", "text", "value"),
  [
    ("model.width", "64", 64),
    ("train.learning_rate", "3e-4", 3e-4),
    ("model.copy_path", "true", True),
    ("search.widths", "8,16,32", (8, 16, 32)),
    ("loss.user_weight_range", "(0.1, 3)", (0.1, 3.0)),
    ("model.decoder", "autoregressive", "autoregressive"),
  ],
)
def test_override_reads_what_people_type(path, text, value):
  changed = override(Config(), path, text)
  section, field = path.split(".")
  assert getattr(getattr(changed, section), field) == value
  assert dataclasses.replace(changed, **{section: getattr(Config(), section)}) == Config()


@pytest.mark.parametrize(
  ("path", "value", "message"),
  [
    ("model.widht", "64", "did you mean 'model.width'"),
    ("model", "64", "unknown setting"),
    ("model.width", "wide", "must be int"),
    ("model.width", 6.5, "must be int"),
    ("model.copy_path", "perhaps", "must be bool"),
    ("model.decoder", "lasy", "must be"),
    ("model.num_heads", "3", "must divide model.width"),
    ("loss.user_weight_range", "1", "must be"),
    ("search.widths", "0,1", "each must be >= 1"),
  ],
)
def test_wrong_overrides_name_field_value_and_rule(path, value, message):
  with pytest.raises(ConfigError, match=message):
    override(Config(), path, value)


def test_unknown_names_are_refused():
  with pytest.raises(ConfigError, match="did you mean 'small'"):
    preset("smal")
  with pytest.raises(ConfigError, match="model.depth"):
    from_dict(Config, {"model": {"depth": 3}})
  with pytest.raises(ConfigError, match="num_lazy_layers"):
    ModelConfig(num_layers=3, num_lazy_layers=3)


class Section(Bounded, section="bounds"):
  """Where the settings of these tests stand."""


def settings_of(kind: object, default: object, bases: tuple[type, ...] = (Section,)) -> type:
  """Settings with one field, `x`."""
  field = ("x", kind, dataclasses.field(default=default))
  return dataclasses.make_dataclass("Settings", [field], bases=bases, frozen=True)


@pytest.mark.parametrize(
  ("kind", "good", "bad", "rule"),
  [
    (Count, 1, 0, "must be >= 1"),
    (CountOrZero, 0, -1, "must be >= 0"),
    (Positive, 1e-9, 0.0, "must be > 0 and finite"),
    (Positive, 1e9, math.inf, "must be > 0 and finite"),
    (NotNegative, 0.0, -1e-9, "must be >= 0 and finite"),
    (NotNegative, 1e9, math.nan, "must be >= 0 and finite"),
    (Share, 1.0, 1.1, r"must lie in \[0, 1\]"),
    (Share, 0.0, -0.1, r"must lie in \[0, 1\]"),
    (ShareBelowOne, 0.99, 1.0, r"must lie in \[0, 1\)"),
    (Seed, 2**31 - 1, 2**31, r"must lie in \[0, 2147483648\)"),
    (tuple[Count, ...], (1, 2), (1, 0), "each must be >= 1"),
    (tuple[Share, Positive], (1.0, 2.0), (1.0, 0.0), "each must be > 0"),
    (tuple[Share, Positive], (1.0, 2.0), (2.0, 1.0), "each must lie in"),
    (Count | None, None, 0, "must be >= 1"),
  ],
)
def test_a_bound_in_a_type_is_kept(kind, good, bad, rule):
  settings = settings_of(kind, good)
  assert settings().x == good
  with pytest.raises(ConfigError, match=rf"^bounds\.x=.*: {rule}"):
    settings(x=bad)


def test_a_new_default_takes_no_bound_away():
  below = settings_of(int, 7, bases=(settings_of(Count, 1),))
  assert below().x == 7
  with pytest.raises(ConfigError, match="bounds.x=0"):
    below(x=0)


def _bounded() -> list[type]:
  for module in pkgutil.walk_packages(gr4ad_jax.__path__, "gr4ad_jax."):
    if not module.name.endswith("__main__"):
      importlib.import_module(module.name)
  kinds, waiting = [], [Bounded]
  while waiting:
    below = waiting.pop().__subclasses__()
    kinds += [kind for kind in below if kind.__module__.startswith("gr4ad_jax")]
    waiting += below
  return kinds


def test_no_settings_leave_their_bounds_unchecked():
  """A `__post_init__` of their own would switch them all off."""
  kinds = _bounded()
  assert len(kinds) >= 20
  for kind in kinds:
    needed = {field.name: 2 for field in dataclasses.fields(kind) if not has_default(field)}
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
      for bound in getattr(hint, "__metadata__", ()):
        assert isinstance(bound, Interval)
        with pytest.raises(ConfigError, match=rf"\b{name}=-1"):
          kind(**needed | {name: -1})


def has_default(field: dataclasses.Field) -> bool:
  return dataclasses.MISSING is not field.default or (
    dataclasses.MISSING is not field.default_factory
  )


def test_unreadable_files_are_named(tmp_path):
  (tmp_path / "cut.json").write_text("{")
  (tmp_path / "bytes.json").write_bytes(b"\xff\xfe")
  (tmp_path / "list.json").write_text("[]")
  for name, rule in (
    ("cut.json", "not JSON"), ("bytes.json", "not JSON"),
    ("list.json", "holds a list, must be a dict"), ("none.json", "no such file"),
  ):
    with pytest.raises(ConfigError, match=f"{name}: {rule}"):
      read_json(Config, tmp_path / name)
