"""What every test relies on: eight simulated CPU devices, a compile cache, the shared real data."""

import gc
import os
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# JAX reads these once, at its first import.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
_FLAGS = [
  os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8",
  "--xla_cpu_parallel_codegen_split_count=1",
]
if version("jaxlib").startswith("0.10."):  # the older emitters compile in half the time
  _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join(_FLAGS).strip()
# Tests are mostly compile time, so that programs of any size are worth keeping.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Compilation in half the time; programs are slower and mean the same.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Arrays of different rank meet only where the code says how: a row is never a column by accident.
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
os.environ.setdefault("GR4AD_KEEP_MEMORY", "0")  # it makes steps fast and compilation slow


# Tracing makes and keeps millions of objects; looking through them again and again for cycles takes
# a tenth of the time.
gc.set_threshold(100_000, 20, 20)


def pytest_collection_finish():
  """What is imported by now stays."""
  gc.freeze()


def pytest_collection_modifyitems(items):
  """Folders of long tests first, so that no worker is left with one when the others are done."""
  long = ("experiments", "serving", "training", "tests", "gr4ad", "cli", "machine")
  items.sort(key=lambda item: item.path.parent.name not in long)


@pytest.fixture(scope="session")
def shared_data() -> Path:
  """The folder of real benchmark files beside the checkout; skips the test where it is absent."""
  folder = ROOT.parent / "shared" / "data"
  if not folder.is_dir():
    pytest.skip("the benchmark files (../shared/data) are not beside this checkout")
  return folder


@pytest.fixture(scope="session")
def tiny_logs():
  """Sixty users, forty ads of eight advertisers, seventy days: users keep to two categories."""
  import numpy as np
  import pandas as pd

  from gr4ad_jax.data.tables import build_logs

  rng = np.random.default_rng(0)
  category = np.repeat(["food > snack", "food > drink", "home > clean", "home > care"], 10)
  ads = pd.DataFrame({
    "ad_id": [f"ad{i}" for i in range(40)],
    "advertiser_id": [f"brand{i % 8}" for i in range(40)],
    "category": category,
    "text": [f"{c.replace(' > ', ' ')} product number {i}" for i, c in enumerate(category)],
    "price": np.linspace(1, 9, 40),
    "conversion_type": "purchase",
  })
  contents = pd.DataFrame({
    "content_id": [f"c{i}" for i in range(30)],
    "ad_id": [f"ad{i}" if i < 20 else None for i in range(30)],
    "category": "shelf",
    "text": [f"shelf item {i}" if i < 28 else "" for i in range(30)],
  })
  rows = []
  for user in range(60):
    liked = rng.permutation(4)[:2]
    for visit, day in enumerate(np.sort(rng.choice(70, 12, replace=False))):
      time_s = 1_500_000_000 + int(day) * 86400 + int(rng.integers(0, 3600))
      for _ in range(int(rng.integers(1, 7))):
        ad = int(rng.choice(liked)) * 10 + int(rng.geometric(0.3) - 1) % 10
        rows.append((f"u{user}", time_s, f"ad{ad}", None, f"{user}-{visit}", 1 + ad % 5))
      organic = int(rng.integers(0, 30))
      rows.append((f"u{user}", time_s + 5, None, f"c{organic}", f"{user}-{visit}", 2))
  events = pd.DataFrame(
    rows, columns=["user_id", "time", "ad_id", "content_id", "request_id", "value"]
  )
  events["action"] = "conversion"
  events["feature_scene"] = np.where(np.arange(len(events)) % 2, "feed", "search")
  users = pd.DataFrame({
    "user_id": [f"u{i}" for i in range(60)], "city": [f"city{i % 3}" for i in range(60)]
  })
  return build_logs(
    ads=ads, events=events, users=users, contents=contents, source="synthetic test logs",
    currency="EUR",
  )


@pytest.fixture(scope="session")
def tiny_data(tiny_logs, tmp_path_factory) -> Path:
  """A folder as `gr4ad prepare` and `gr4ad tokenize` leave it."""
  from gr4ad_jax.data.examples import prepare_examples
  from gr4ad_jax.data.log_folder import LogParts, write_logs
  from gr4ad_jax.data.splits import time_split
  from gr4ad_jax.tokenizer.config import TokenizerConfig
  from gr4ad_jax.tokenizer.stage import tokenize

  folder = tmp_path_factory.mktemp("tiny") / "data"
  write_logs(tiny_logs, folder / "logs")
  config = time_split(tiny_logs, validation_days=10, test_days=10)
  prepare_examples(LogParts(folder / "logs"), folder / "examples", config)
  tokenize(folder, folder / "sids", TokenizerConfig(codebook_sizes=(8, 4, 8)))
  return folder
