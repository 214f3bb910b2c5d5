"""experiments.bench_serving at a tiny size: every number is there, and what must hold holds."""

from experiments.run import Settings, run_experiment

SMALL = (
  "settings.widths=4,6,8", "settings.factors=1.0,2.0", "settings.batch_sizes=1", "settings.k=5",
  "settings.rates=4", "settings.rate_s=2", "settings.rate_requests=8", "settings.day_s=6",
  "settings.overload_s=1",
  "settings.fuzz_requests=60", "settings.leak_requests=200",
  "settings.p99_ms=60000", "settings.deadline_ms=60000",  # so that any machine holds the rate
)
ASKED_FOR = {
  "sustained_qps", "p50_ms", "p99_ms", "errors", "fuzz_requests", "fuzz_5xx",
  "off_peak_value_ratio", "cache_hit_rate", "new_ad_seconds", "events_lost", "rss_growth_mb",
}


def test_every_number_is_there(served_run, tmp_path):
  overrides = (f"settings.run={served_run}", *SMALL)
  results = run_experiment(Settings("bench_serving", overrides=overrides), tmp_path)
  assert results.keys() >= ASKED_FOR
  assert results["fuzz_requests"] == 60 and results["fuzz_5xx"] == 0
  assert results["events_lost"] == 0 and results["new_ad_seconds"] > 0
  assert (tmp_path / "dynamic" / "load.png").exists() and (tmp_path / "rates.png").exists()
