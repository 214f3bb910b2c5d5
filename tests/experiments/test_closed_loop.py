"""experiments.closed_loop at a tiny size: the loop closes."""

from experiments.run import Settings, run_experiment

SMALL = (
  "market.num_users=60", "market.num_ads=120", "market.num_contents=60", "market.days=8",
  "market.num_advertisers=15", "market.num_categories=8", "settings.first_days=6",
  "settings.segment_s=1", "settings.publish_every=1", "model.width=16", "model.num_layers=2",
  "model.num_lazy_layers=1", "train.batch_size=8", "train.eval_batches=1", "settings.epochs=0.2",
  "search.widths=8,8,8", "train.data_parallel=1",
)


def test_the_server_follows_what_its_own_log_teaches(tmp_path):
  results = run_experiment(Settings("closed_loop", overrides=SMALL), tmp_path)
  assert results["learner_steps/day_7"] > results["learner_steps/day_6"] > 0
  assert results["parameters_taken_over"] >= 1 and results["events"] > 100
  for arm in ("online", "frozen"):
    assert results[f"{arm}/day_6"] > 0 and results[f"{arm}/day_7"] > 0
  assert (tmp_path / "closed_loop.png").exists()
