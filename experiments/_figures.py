"""How the experiments' figures and tables look."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.axes import Axes

from gr4ad_jax.report.verdict import interval_of


def plain(*axes: Axes, grid: str = "both") -> None:
  """A light grid (both, x, y) and no frame above and on the right."""
  for ax in axes:
    ax.grid(axis=grid, alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)


def cell(
  results: Mapping[str, float], key: str, *, digits: int = 3, sign: str = "", between: str = "-"
) -> str:
  """The number with its interval, where there are such."""
  estimate = interval_of(results, key)
  if estimate is None:
    return "-"
  form = f"{sign}.{digits}f"
  if estimate.low is None or estimate.high is None:
    return f"{estimate.value:{form}}"
  return f"{estimate.value:{form}} ({estimate.low:{form}}{between}{estimate.high:{form}})"


def dot(
  ax: Axes, results: Mapping[str, float], key: str, place: float, colour: str, marker: str = "o",
  label: str | None = None,
) -> None:
  """Draws the number at this height, its interval as a line; nothing where there is none."""
  estimate = interval_of(results, key)
  if estimate is None:
    return
  ax.plot(estimate.value, place, marker, color=colour, label=label)
  if estimate.low is not None and estimate.high is not None:
    ax.hlines(place, estimate.low, estimate.high, colors=colour)


def revenue_by_day(
  ax: Axes, results: Mapping[str, float], system: str, style: str, **looks: str | float
) -> None:
  """Draws SYSTEM/day_N of the results."""
  days = sorted(int(name.split("_")[-1]) for name in results if name.startswith(f"{system}/day_"))
  ax.plot(days, [results[f"{system}/day_{day}"] for day in days], style, label=system, **looks)
  ax.set_xlabel("day of the market")
  ax.locator_params(axis="x", integer=True)
  ax.set_ylim(bottom=0)
  ax.set_title("Expected revenue of the first four ads, currency a request", loc="left")
  ax.legend(frameon=False)


def change(mean: float, low: float, high: float, digits: int = 1) -> str:
  """A relative change with its interval, in percent."""
  return f"{mean:+.{digits}%} ({low:+.{digits}%} to {high:+.{digits}%})"
