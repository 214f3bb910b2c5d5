"""The command as tests call it: in this process, and as two processes that train one model."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from gr4ad_jax.cli.main import main

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = (
  "--preset", "tiny", "--model.width", "32", "--model.num-layers", "2", "--model.num-lazy-layers",
  "1", "--train.num-steps", "8", "--train.batch-size", "16", "--train.log-every", "1",
  "--train.eval-every", "4", "--train.eval-batches", "2", "--train.checkpoint-every", "2",
  "--train.data-parallel", "2", "--train.fsdp", "2",
)


def run(*argv: object) -> int:
  """The exit code of a command."""
  try:
    main([str(a) for a in argv])
  except SystemExit as stop:
    return int(stop.code or 0)
  return 0


def train_arguments(data: Path, workdir: Path | str, *more: str) -> list[str]:
  """A tiny training on four devices, two of them a process where two train it."""
  return ["train", "--data", str(data), "--workdir", str(workdir), *SETTINGS, *more]


def by_two_processes(
  *arguments: str, before: Sequence[str] = (), **variables: str
) -> subprocess.CompletedProcess:
  """`gr4ad` as two processes of two devices each, by a command `before` it where there is one."""
  flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"  # the last counts
  result = subprocess.run(
    ["bash", "launch_tpu.sh", "--local", "2", "--", *before, sys.executable, "-m", "gr4ad_jax",
     *arguments],
    cwd=ROOT, env={**os.environ, "XLA_FLAGS": flags, **variables}, capture_output=True,
    text=True, timeout=900,
  )
  assert result.returncode == 0, result.stderr
  return result
