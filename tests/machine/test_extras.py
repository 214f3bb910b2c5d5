"""Advice to install is a command that works: this package is on no index."""

import tomllib
from importlib import metadata

import pytest

from gr4ad_jax.machine import extras
from tests.commands import ROOT

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
  "optional-dependencies"
]


@pytest.mark.parametrize("name", ["search", "trees", "beam", "redis", "quantize", "gcs", "s3"])
def test_an_extra_is_advised_by_what_it_holds(name):
  (package,) = EXTRAS[name]
  words = extras.install(name)
  assert words.startswith("pip install ") and "gr4ad" not in words
  assert words.removeprefix("pip install ").strip("'").startswith(package.split(">=")[0])


def test_a_checkout_that_is_not_installed_advises_itself(monkeypatch):
  def none(name):
    raise metadata.PackageNotFoundError(name)

  monkeypatch.setattr(metadata, "requires", none)
  assert extras.install("gcs") == "pip install -e '.[gcs]' in the checkout of gr4ad_jax"


def test_nothing_advises_this_package_from_an_index():
  wrong = [
    str(path) for room in ("gr4ad_jax", "experiments", "docs")
    for path in sorted((ROOT / room).rglob("*")) if path.suffix in (".py", ".md", ".html")
    if "pip install 'gr4ad" in path.read_text(encoding="utf-8")
  ]
  assert wrong == []
