"""How the simulated market's log compares with Complete Journey's, in figures and one picture.

    python -m experiments.run market_calibration

The fitted market of Table 1 beside the household log that it was fitted to: concentration of
engagement on ads, activity of users, engagements in a visit. What Complete Journey does not hold
(impressions, clicks, bids) is shown for the market alone.

Expected (docs/market.md, with what is not realistic): the top 1% of ads have 51% of the market's
engagements and 20% of Complete Journey's, the top 1% of users 12% and 6%. Run time on two CPU
cores: two minutes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from experiments._figures import plain
from gr4ad_jax.config import override_all
from gr4ad_jax.data.completejourney import read_completejourney
from gr4ad_jax.data.engagements import engaged_with_ad
from gr4ad_jax.data.records import DAY_S, Action, Logs
from gr4ad_jax.market.log import arrivals, market_logs
from gr4ad_jax.market.world import MarketConfig, truth
from gr4ad_jax.market.worlds import build_market

QUANTILES = (0.1, 0.5, 0.9)
_CURVE = np.linspace(0.005, 1, 200)  # share of ads or users, most active first


@dataclasses.dataclass(frozen=True)
class Options:
  """Everything that --set may change."""

  market: MarketConfig = MarketConfig()


def run(workdir: Path, *, size: str, overrides: Mapping[str, str]) -> dict[str, float]:
  """market/... and journey/...: shares, quantiles, and the points of the curves."""
  del workdir, size
  options = override_all(Options(), overrides)
  market = build_market(options.market)
  logs = market_logs(market)
  found = {f"market/{name}": x for name, x in _shape(logs).items()}
  found |= {
    f"journey/{name}": x for name, x in _shape(read_completejourney()).items()
  }
  events = logs.events
  shown_E = events.ad >= 0
  clicked_E, bought_E = (shown_E & (events.action >= a) for a in (Action.CLICK, Action.CONVERSION))
  found["market/ctr"] = float(clicked_E.sum() / shown_E.sum())
  found["market/cvr"] = float(bought_E.sum() / clicked_E.sum())
  num_ads = len(logs.ads.ad_id)
  shown_A, clicked_A, bought_A = (
    np.bincount(events.ad[rows], minlength=num_ads) for rows in (shown_E, clicked_E, bought_E)
  )
  found |= _quantiles("market/ctr_of_ads", clicked_A[shown_A >= 100] / shown_A[shown_A >= 100])
  found |= _quantiles("market/cvr_of_ads", bought_A[clicked_A >= 50] / clicked_A[clicked_A >= 50])
  requests = arrivals(market, options.market.days - 1)
  rng = np.random.default_rng(0)
  ads = rng.integers(market.num_ads, size=(len(requests.user_R), 20), dtype=np.int32)
  ecpm = truth(market, requests, ads).ecpm
  found |= _quantiles("market/ecpm_of_random_ads", ecpm[ecpm > 0])
  found |= _quantiles("market/ecpm_shown", events.ecpm[shown_E & np.isfinite(events.ecpm)])
  return found


def _shape(logs: Logs) -> dict[str, float]:
  """What both logs have: engagements with ads, by ad, by user and by visit."""
  events = logs.events
  rows = engaged_with_ad(events)
  days = (events.time_s.max() - events.time_s.min()) / DAY_S
  of_ad = np.bincount(events.ad[rows], minlength=len(logs.ads.ad_id))
  of_user = np.bincount(events.user[rows], minlength=len(logs.users.user_id))
  visit = events.user[rows].astype(np.int64) * 100_000 + events.time_s[rows] // DAY_S
  of_visit = np.unique(visit, return_counts=True)[1]
  found = {"users": len(of_user), "ads": len(of_ad), "engagements": int(rows.sum())}
  for name, counts in (("ads", of_ad), ("users", of_user)):
    share = np.append(0, np.cumsum(np.sort(counts)[::-1]) / counts.sum())
    at = np.interp(_CURVE, np.linspace(0, 1, len(share)), share)
    found |= {f"share_of_top_{name}/{x:.3f}": float(y) for x, y in zip(_CURVE, at, strict=True)}
  found |= _quantiles("engagements_of_a_user_a_week", of_user / days * 7)
  found |= _quantiles("engagements_of_a_user_a_day", of_visit)
  found |= {
    f"engagements_of_a_user_a_day/is_{n}": float((of_visit == n).mean()) for n in range(1, 16)
  }
  return found


def _quantiles(name: str, values: np.ndarray) -> dict[str, float]:
  return {f"{name}/{q:.0%}": float(np.quantile(values, q)) for q in QUANTILES}


def table(results: Mapping[str, float]) -> str:
  """Both logs side by side; 10%, 50% and 90% quantiles."""
  def triple(name: str) -> str:
    if f"{name}/10%" not in results:
      return "not in the log"
    return " / ".join(f"{results[f'{name}/{q:.0%}']:.3g}" for q in QUANTILES)

  def both(name: str) -> str:
    return f"{triple(f'market/{name}')} | {triple(f'journey/{name}')}"

  def top(side: str, what: str, share: float) -> str:
    at = _CURVE[np.argmin(np.abs(_CURVE - share))]
    return f"{results[f'{side}/share_of_top_{what}/{at:.3f}']:.0%}"

  lines = ["| | market | Complete Journey |", "|---|---:|---:|"]
  for name in ("users", "ads", "engagements"):
    lines.append(f"| {name} | {results[f'market/{name}']:,} | {results[f'journey/{name}']:,} |")
  for what in ("ads", "users"):
    for share in (0.01, 0.1):
      lines.append(
        f"| share of engagements with the top {share:.0%} of {what} | "
        f"{top('market', what, share)} | {top('journey', what, share)} |"
      )
  for name in ("engagements_of_a_user_a_week", "engagements_of_a_user_a_day"):
    lines.append(f"| {name.replace('_', ' ')} | {both(name)} |")
  lines.append(f"| CTR, CVR | {results['market/ctr']:.3f}, {results['market/cvr']:.3f} | "
               "not in the log |")
  for name in ("ctr_of_ads", "cvr_of_ads", "ecpm_shown", "ecpm_of_random_ads"):
    lines.append(f"| {name.replace('_', ' ').replace('ecpm', 'eCPM')} | {both(name)} |")
  return "\n".join(lines)


def plots(results: Mapping[str, float]) -> dict[str, Figure]:
  """Curves of concentration, engagements a day, and the market's rates."""
  figure = Figure(figsize=(9.5, 4.4), layout="constrained")
  (ads, users, visits), (ctr, cvr, ecpm) = figure.subplots(2, 3, height_ratios=(2.5, 1))
  sides = {"market": ("#2f6f9f", "market"), "journey": ("#b0553a", "Complete Journey")}
  for ax, what in ((ads, "ads"), (users, "users")):
    for side, (colour, label) in sides.items():
      ax.plot(_CURVE, [results[f"{side}/share_of_top_{what}/{x:.3f}"] for x in _CURVE],
              color=colour, label=label)
    ax.set_title(f"Share of engagements\nwith the top ... of {what}", loc="left", fontsize=10)
    ax.set_ylim(0, 1.02)
  counts = np.arange(1, 16)
  for side, (colour, label) in sides.items():
    name = f"{side}/engagements_of_a_user_a_day"
    visits.plot(counts, [results[f"{name}/is_{n}"] for n in counts], "o-", color=colour,
                label=label, markersize=3)
  visits.set_title("Engagements of a user\non a day with any", loc="left", fontsize=10)
  visits.legend(frameon=False, fontsize=9)
  for ax, name, title in (
    (ctr, "ctr_of_ads", "CTR of ads (market)"), (cvr, "cvr_of_ads", "CVR of ads (market)"),
  ):
    _bars(ax, {"": name}, results, title)
  _bars(ecpm, {"shown": "ecpm_shown", "random ads": "ecpm_of_random_ads"}, results,
        "eCPM (market), log scale")
  ecpm.set_xscale("log")
  plain(ads, users, visits, ctr, cvr, ecpm)
  return {"market_calibration": figure}


def _bars(ax, names: Mapping[str, str], results: Mapping[str, float], title: str) -> None:
  """A line from the 10% to the 90% quantile with a point at the median."""
  for row, (label, name) in enumerate(names.items()):
    low, middle, high = (results[f"market/{name}/{q:.0%}"] for q in QUANTILES)
    ax.plot([low, high], [row, row], color="#2f6f9f", lw=3)
    ax.plot([middle], [row], "o", color="#123")
    ax.annotate(label, (middle, row), xytext=(0, 5), textcoords="offset points", ha="center",
                fontsize=8)
  ax.set_yticks([])
  ax.set_ylim(-0.7, len(names) - 0.3)
  ax.set_title(f"{title}\n10%, 50%, 90% quantile", loc="left", fontsize=10)
