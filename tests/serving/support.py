"""A server in the test's process, and one request to it."""

import dataclasses

from gr4ad_jax.api import open_run
from gr4ad_jax.serving.config import ServingConfig
from gr4ad_jax.serving.service import Service

SERVING = ServingConfig(
  batch_sizes=(1, 4), beam_factors=(1.0, 1.6), segment_s=3600, max_queue=8, max_history=50,
  deadline_ms=60_000,  # so that a machine that is busy with other things answers, too
)
ONE = dataclasses.replace(SERVING, batch_sizes=(1,), beam_factors=(1.0,))  # little to compile


def make(run, folder, **options) -> Service:
  options = {"config": SERVING, "clock": "log"} | options
  return Service(open_run(run), store=folder / "store", segments=folder / "segments", **options)


def ask(client, **body) -> dict:
  reply = client.post("/v1/recommend", json=body)
  assert reply.status_code == 200, reply.text
  return reply.json()
