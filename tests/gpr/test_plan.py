"""What GPR's plan says of a run, against the program itself."""

import jax
import pytest

from gr4ad_jax.gpr.config import PRESETS
from gr4ad_jax.gpr.model import Gpr
from gr4ad_jax.gpr.mtp import mtp_task
from gr4ad_jax.gpr.plan import full_row, plan_run, usual_vocabulary
from gr4ad_jax.machine.peaks import Device
from tests.commands import run

ONE = Device(1e12, 1e9, float("inf"))


def test_flops_are_those_that_the_compiler_counts():
  config, vocabulary = PRESETS["gpr-tiny"], usual_vocabulary((256, 64, 64))
  planned = plan_run(config, vocabulary, ONE, 1)
  task, row = mtp_task(Gpr(config.model, vocabulary), config.loss), full_row(config, vocabulary)
  key = jax.random.key(0)
  params = jax.eval_shape(task.init, key)
  gradient = jax.jit(jax.grad(lambda params, batch: task.loss(params, batch, key)["loss"][0]))
  measured = gradient.lower(params, row).cost_analysis()["flops"]
  # The compiler counts element-wise work, too.
  assert planned.flops_per_example == pytest.approx(measured, rel=0.1)
  assert planned.flops_per_example < measured
  assert planned.num_params == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_a_full_row_is_shaped_as_batches_are(tiny_data):
  from gr4ad_jax.gpr.run import RunFile, open_inputs
  from gr4ad_jax.machine import storage

  places = storage.absolute(storage.place(str(tiny_data))), str(tiny_data / "sids")
  config = PRESETS["gpr-tiny"]
  inputs = open_inputs(RunFile(*places, config))
  batch = inputs.make_batch([inputs.rows("train")[0]])
  row = full_row(config, inputs.make_batch.vocabulary)
  shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), rows) for rows in (batch, row)]
  assert shapes[0] == shapes[1]


def test_the_command_plans_with_and_without_data(tiny_data, capsys):
  plan = ("plan", "--system", "gpr", "--preset", "gpr-tiny", "--devices", "h100-1")
  assert run(*plan) == 0
  planned = capsys.readouterr().out
  assert run(*plan, "--data", tiny_data) == 0
  assert "FLOPs of an example" in planned and planned != capsys.readouterr().out
  assert run(*plan, "--data", tiny_data, "--codebook-sizes", 8, 4) == 2
  assert "leave out --codebook-sizes" in capsys.readouterr().err
