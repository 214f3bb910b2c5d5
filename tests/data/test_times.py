"""Times in every way logs write them, and rows whose time cannot be right."""

import datetime
import decimal

import numpy as np
import pandas as pd
import pytest

from gr4ad_jax.data.config import Parquet, PrepareConfig
from gr4ad_jax.data.log_folder import read_logs
from gr4ad_jax.data.parquet_logs import store_parquet_logs
from gr4ad_jax.data.prepare import prepare_logs
from gr4ad_jax.data.times import time_column
from gr4ad_jax.data.validation import LogError

DAY_S = 86_400
SUMMER_S = 1_750_000_000  # 2025-06-15
ADS = pd.DataFrame({"ad_id": [1, 2], "advertiser_id": "x", "category": "c", "text": "t"})
MOMENTS = [
  datetime.datetime(2026, 1, 31, 18, 5, tzinfo=datetime.UTC),
  datetime.datetime(2024, 2, 29, 0, 0, tzinfo=datetime.UTC),
  datetime.datetime(1999, 12, 31, 23, 59, tzinfo=datetime.UTC),
]
SECONDS = [1_769_882_700, 1_709_164_800, 946_684_740]
MIDNIGHTS = [1_769_817_600, 1_709_164_800, 946_598_400]
WRITTEN = {
  "seconds": (SECONDS, SECONDS),
  "milliseconds": ([1000 * s + 999 for s in SECONDS], SECONDS),
  "microseconds": ([10**6 * s for s in SECONDS], SECONDS),
  "nanoseconds": ([10**9 * s for s in SECONDS], SECONDS),
  "dates": ([20260131, 20240229, 19991231], MIDNIGHTS),
  "minutes": ([202601311805, 202402290000, 199912312359], SECONDS),
  "clocks": ([20260131180500, 20240229000000, 19991231235900], SECONDS),
}


@pytest.mark.parametrize("kind", [
  int, float, str, decimal.Decimal, lambda n: f"{n}.0", np.uint64,
], ids=["int", "float", "text", "decimal", "text of floats", "uint64"])
@pytest.mark.parametrize(("given", "expected"), WRITTEN.values(), ids=WRITTEN.keys())
def test_numbers_mean_what_their_size_says(given, expected, kind):
  time_s_E, unreadable_E = time_column(pd.Series([kind(n) for n in given]), "f")
  assert time_s_E.tolist() == expected and not unreadable_E.any()


@pytest.mark.parametrize("given", [
  [m.isoformat() for m in MOMENTS],
  [m.astimezone(datetime.timezone(datetime.timedelta(hours=9))).isoformat() for m in MOMENTS],
  MOMENTS, pd.to_datetime(MOMENTS).as_unit("ms"), [MOMENTS[0].isoformat(), *SECONDS[1:]],
], ids=["ISO 8601", "zones", "datetime", "timestamps", "text and numbers"])
def test_timestamps_are_read_beside_numbers(given):
  time_s_E, unreadable_E = time_column(pd.Series(given), "f")
  assert time_s_E.tolist() == SECONDS and not unreadable_E.any()


def test_a_number_that_is_no_date_among_dates_is_unreadable():
  given = pd.Series([20260131, 20260230, 20261301, 20260201, 20260202, 7, 20260203])
  assert time_column(given, "f")[1].tolist() == [False, True, True, False, False, True, False]


def write_log(folder, times, **columns):
  """Rows of one user and ad in the order of `times`, in CSV, so that any cell can stand there."""
  log = pd.DataFrame({
    "user_id": np.arange(len(times)) % 7, "time": times, "ad_id": 1, "action": "click"
  })
  log.assign(**columns).to_csv(folder / "events.csv", index=False)
  ADS.to_csv(folder / "ads.csv", index=False)
  return Parquet(folder / "ads.csv", folder / "events.csv")


def sixty_days(begin_s=SUMMER_S, rows=480):
  """Eight rows a day, the last one at the very end."""
  return [begin_s + 60 * DAY_S * n // rows for n in range(1, rows + 1)]


AHEAD, APART = "more than a day ahead of the present", "more than 7 days apart from all others"
STRAYS = {
  "2099": (4_070_908_800, AHEAD, " (2099-01-01 00:00:00)"),
  "2099 in words": ("2099-01-01T00:00:00Z", AHEAD, " (2099-01-01 00:00:00)"),
  "the end of time": ("9999-12-31 23:59:59", AHEAD, ""),
  "1970": (0, APART, " (1970-01-01 00:00:00)"),
  "before 1970": (-5, APART, ""),
  "1970 in words": ("1970-01-01T00:00:01Z", APART, " (1970-01-01 00:00:01)"),
  "milliseconds": (SUMMER_S * 1000, AHEAD, ""),
  "microseconds": (SUMMER_S * 10**6, AHEAD, ""),
  "a date": (20260131, APART, " (1970-08-23 11:48:51)"),
  "ten years before": (SUMMER_S - 3650 * DAY_S, APART, " (2015-06-18 15:06:40)"),
  "weeks before": (SUMMER_S - 20 * DAY_S, APART, " (2025-05-26 15:06:40)"),
  "weeks behind": (SUMMER_S + 80 * DAY_S, APART, " (2025-09-03 15:06:40)"),
}


@pytest.mark.parametrize(("value", "why", "when"), STRAYS.values(), ids=STRAYS.keys())
def test_a_stray_row_moves_no_split_and_is_named(tmp_path, capsys, value, why, when):
  """At any place of the file; the other rows are prepared as if it were not there."""
  times = sixty_days()
  expected = prepare_logs(write_log(tmp_path, times), PrepareConfig(check=True))
  capsys.readouterr()
  found = prepare_logs(
    write_log(tmp_path, [*times[:100], value, *times[100:]]), PrepareConfig(check=True)
  )
  said = f"events.csv: row 100, column 'time', value '{value}'{when}: left out, {why}\n"
  assert said in capsys.readouterr().err
  rule = f"events: left out, time: {why}"
  assert found.pop(rule) == 1 and expected.pop(rule) == 0
  assert found == expected


def test_seconds_in_a_log_of_milliseconds_are_stray_too(tmp_path):
  times = [1000 * s for s in sixty_days()]
  source = write_log(tmp_path, [*times, SUMMER_S + 30 * DAY_S])
  (line,) = store_parquet_logs(source, tmp_path / "logs")
  assert line.endswith(f"row 480, column 'time', value '{SUMMER_S + 30 * DAY_S}' "
                       f"(1970-01-21 06:49:52): left out, {APART}")


@pytest.mark.parametrize("unit", [1, 1000], ids=["seconds", "milliseconds"])
def test_a_tenth_of_the_rows_may_lie_decades_away(tmp_path, unit):
  """A missing time is often written as 0."""
  times = [0 if n % 12 == 5 else unit * s for n, s in enumerate(sixty_days())]
  lines = store_parquet_logs(write_log(tmp_path, times), tmp_path / "logs")
  assert len(lines) == 5 and lines[-1].endswith(f"{APART} (35 more such rows)")
  assert len(read_logs(tmp_path / "logs").events.user) == 440


@pytest.mark.parametrize("other", [1000, 1e-3], ids=["some milliseconds", "some seconds"])
def test_two_units_in_one_column_are_refused(tmp_path, other):
  times = sixty_days()
  times = [int(1000 * s) for s in times] if other < 1 else times
  source = write_log(tmp_path, [int(other * s) if n % 3 == 0 else s for n, s in enumerate(times)])
  with pytest.raises(LogError, match=r"320 rows are .*seconds, 160 are .*seconds: the numbers of"):
    store_parquet_logs(source, tmp_path / "logs")


def test_a_request_keeps_its_other_rows(tmp_path):
  times = sixty_days()
  times[200] = 4_070_908_800
  source = write_log(tmp_path, times, request_id=np.arange(480) // 480)
  source = Parquet(source.ads, source.events)
  log = pd.read_csv(source.events).assign(user_id=1)
  log.to_csv(source.events, index=False)
  store_parquet_logs(source, tmp_path / "logs")
  events = read_logs(tmp_path / "logs").events
  assert len(events.user) == 479 and events.request.max() == 0


@pytest.mark.parametrize("times", [
  sixty_days(rows=12) + [SUMMER_S + 300 * DAY_S],  # twelve rows do not tell what is usual
  [SUMMER_S + 14 * DAY_S * (n // 40) for n in range(400)],  # forty rows every other week
  sixty_days()[:240] + [t + 100 * DAY_S for t in sixty_days()[240:]],  # a long pause in the middle
  [SUMMER_S + 5 * DAY_S * n * n // 100 for n in range(60)],  # rarer and rarer
], ids=["few rows", "every other week", "a long pause", "rarer and rarer"])
def test_logs_with_pauses_keep_every_row(tmp_path, times):
  assert store_parquet_logs(write_log(tmp_path, times), tmp_path / "logs") == []
  assert len(read_logs(tmp_path / "logs").events.user) == len(times)


def test_many_rows_ahead_of_the_present_stop_the_command(tmp_path):
  source = write_log(tmp_path, sixty_days(begin_s=4_070_908_800))
  with pytest.raises(LogError, match=r"events.csv: column 'time' \(numbers are read as unix sec"
                     r"onds\): 480 of 480 rows lie more than a day ahead of the present"):
    store_parquet_logs(source, tmp_path / "logs")
  times = sixty_days()[:-40] + [4_070_908_800 + n for n in range(40)]
  lines = store_parquet_logs(write_log(tmp_path, times), tmp_path / "logs")
  assert len(lines) == 5 and lines[-1].endswith("ahead of the present (35 more such rows)")
  tomorrow = datetime.datetime.now(datetime.UTC).timestamp() + DAY_S / 2
  times = [*sixty_days(begin_s=tomorrow - 60 * DAY_S)]
  assert store_parquet_logs(write_log(tmp_path, [int(t) for t in times]), tmp_path / "logs") == []
