import os
import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource
import numpy as np
from gr4ad_jax.memory import keep_freed_memory

print(keep_freed_memory())
def faults():
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  np.ones(2**24)  # 128 MiB, 32,768 pages of 4 KiB
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
print(faults())
"""


def outcome(**variables):
  environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_T"))}
  run = subprocess.run(
    [sys.executable, "-c", SCRIPT], env=environment | variables, capture_output=True, text=True,
    check=True,
  )
  done, faults = run.stdout.split()
  return done == "True", int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_used_again():
  done, faults = outcome()
  assert done
  assert faults < 100


def test_variables_of_the_user_come_first():
  done, faults = outcome(MALLOC_ARENA_MAX="4")
  assert not done
  assert faults > 100 or platform.libc_ver()[0] != "glibc"
