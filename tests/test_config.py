"""Settings: round trip, overrides, clear errors."""

import dataclasses

import pytest

from gr4ad_jax.config import ConfigError, from_dict, override, read_json, to_json
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
    ("search.widths", "0,1", "positive width"),
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
