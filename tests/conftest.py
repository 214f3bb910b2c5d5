"""What every test relies on: eight simulated CPU devices, a compile cache, the shared real data."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# JAX reads these once, at its first import.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()
# Tests are mostly compile time, so that programs of any size are worth keeping.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


@pytest.fixture(scope="session")
def shared_data() -> Path:
  """The folder of real benchmark files beside the checkout; skips the test where it is absent."""
  folder = ROOT.parent / "shared" / "data"
  if not folder.is_dir():
    pytest.skip("the benchmark files (../shared/data) are not beside this checkout")
  return folder
