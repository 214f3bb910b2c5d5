"""The training log is JSON, whatever was measured."""

import json
import math

import pytest

from gr4ad_jax.training.metric_log import MetricLog, read_log


def reject(name):
  raise AssertionError(f"{name} is not JSON")


def test_a_number_that_is_not_finite_is_left_out_and_said_once(tmp_path, capsys):
  log = MetricLog(tmp_path, first_step=0)
  for step, number in enumerate((math.nan, math.inf, -math.inf, 2.0), start=1):
    log.write(step, "train", {"loss": 1.0, "list_loss": number})
  log.close()
  lines = (tmp_path / "train_log.jsonl").read_text().splitlines()
  rows = [json.loads(line, parse_constant=reject) for line in lines]
  assert [row.get("list_loss") for row in rows] == [None, None, None, 2.0]
  assert [row["loss"] for row in rows] == [1.0] * 4 and read_log(tmp_path) == rows
  assert capsys.readouterr().err.count("list_loss") == 1


def test_what_earlier_versions_wrote_is_read_as_numbers_alone(tmp_path):
  (tmp_path / "train_log.jsonl").write_text(
    '{"step": 1, "kind": "train", "loss": 2.5, "list_loss": NaN}\n{"step": 2, "kind": "tr'
  )
  assert read_log(tmp_path) == [{"step": 1, "kind": "train", "loss": pytest.approx(2.5)}]
