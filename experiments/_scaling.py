"""Loss against size: L(N) = floor + scale N^-exponent, its fit, its table, its plot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import scipy.optimize
from matplotlib.axes import Axes


class PowerLaw(NamedTuple):
  """L(N) = floor + scale N^-exponent."""

  floor: float
  scale: float
  exponent: float

  def __call__(self, size: np.ndarray | float) -> np.ndarray | float:
    return self.floor + self.scale * np.asarray(size, float) ** -self.exponent


def fit_power_law(size_M: np.ndarray, loss_M: np.ndarray) -> PowerLaw:
  """Least squares, with floor >= 0 and exponent > 0.

  For a given exponent the rest is linear, so only the exponent is searched.

  Raises:
    ValueError: fewer than three sizes.
  """
  if len(size_M) < 3:
    raise ValueError(f"settings.widths: {len(size_M)} sizes; a power law needs three")

  def linear(exponent: float) -> tuple[float, float, float]:
    columns = np.stack([np.ones(len(size_M)), np.asarray(size_M, float) ** -exponent], axis=1)
    weights, _ = scipy.optimize.nnls(columns, loss_M)
    return (*weights, float(np.sum((columns @ weights - loss_M) ** 2)))

  grid = np.geomspace(0.01, 2.0, 80)
  best = int(np.argmin([linear(exponent)[2] for exponent in grid]))
  low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
  found = scipy.optimize.minimize_scalar(
    lambda exponent: linear(exponent)[2], bounds=(low, high), method="bounded"
  )
  floor, scale, _ = linear(found.x)
  return PowerLaw(float(floor), float(scale), float(found.x))


def fitted(size_M: np.ndarray, loss_M: np.ndarray) -> dict[str, float]:
  """exponent, floor, scale, r2, and the error of the largest model's loss from the others."""
  loss_M = np.asarray(loss_M, float)
  law = fit_power_law(size_M, loss_M)
  residual = np.sum((law(size_M) - loss_M) ** 2) / np.sum((loss_M - loss_M.mean()) ** 2)
  predicted = float(fit_power_law(size_M[:-1], loss_M[:-1])(size_M[-1]))
  return {
    "exponent": law.exponent, "floor": law.floor, "scale": law.scale, "r2": 1 - float(residual),
    "predicted_loss": predicted, "predicted_loss_error": float(abs(predicted / loss_M[-1] - 1)),
  }


def fits(
  free_params_M: np.ndarray, num_params_M: np.ndarray, loss_MSR: np.ndarray, user_R: np.ndarray,
  *, bootstrap: int,
) -> dict[str, float]:
  """The fit to the means, and bootstrap intervals over users and seeds.

  Args:
    free_params_M: parameters without tables of M sizes, smallest first.
    num_params_M: all parameters.
    loss_MSR: nats, of S seeds and R held-out questions.
    user_R: whose each question is; a user who is drawn brings all of them.
    bootstrap: resamples.
  """
  results = fitted(free_params_M, loss_MSR.mean(axis=(1, 2)))
  results |= {
    f"{name}/all_params": value
    for name, value in fitted(num_params_M, loss_MSR.mean(axis=(1, 2))).items()
  }
  users, row_of = np.unique(user_R, return_inverse=True)
  count_U = np.bincount(row_of)
  num_sizes, num_seeds, _ = loss_MSR.shape
  sum_MSU = np.stack([
    [np.bincount(row_of, weights=loss_R) for loss_R in loss_SR] for loss_SR in loss_MSR
  ])
  rng, draws = np.random.default_rng(0), []
  for _ in range(bootstrap):
    user = rng.integers(0, len(users), len(users))
    seed_MS = rng.integers(0, num_seeds, (num_sizes, num_seeds))
    loss_MS = sum_MSU[:, :, user].sum(axis=-1) / count_U[user].sum()
    draws.append(fitted(free_params_M, np.take_along_axis(loss_MS, seed_MS, axis=1).mean(axis=1)))
  for name in ("exponent", "floor", "r2", "predicted_loss_error"):
    low, high = np.quantile([draw[name] for draw in draws], (0.025, 0.975))
    results |= {f"{name}_ci_low": float(low), f"{name}_ci_high": float(high)}
  return results


def sizes_of(
  free_params_M: np.ndarray, num_params_M: np.ndarray, loss_MSR: np.ndarray
) -> dict[str, float]:
  """sizeI/params, /free_params, /loss and /loss/seedN."""
  results = {}
  for row, (free, total, loss_SR) in enumerate(
    zip(free_params_M, num_params_M, loss_MSR, strict=True)
  ):
    results |= {
      f"size{row}/params": float(total), f"size{row}/free_params": float(free),
      f"size{row}/loss": float(loss_SR.mean()),
    }
    results |= {
      f"size{row}/loss/seed{seed}": float(loss) for seed, loss in enumerate(loss_SR.mean(axis=-1))
    }
  return results


def rows_of(results: Mapping[str, float], prefix: str) -> list[dict[str, float]]:
  """What PREFIX0/NAME, PREFIX1/NAME, ... say, a record of names each."""
  rows = []
  while any(name.startswith(f"{prefix}{len(rows)}/") for name in results):
    start = f"{prefix}{len(rows)}/"
    rows.append({n.removeprefix(start): v for n, v in results.items() if n.startswith(start)})
  return rows


def fit_lines(results: Mapping[str, float]) -> list[str]:
  """The fit in words."""

  def interval(name: str) -> str:
    return f"{results[f'{name}_ci_low']:.4g} to {results[f'{name}_ci_high']:.4g}"

  return [
    f"L(N) = {results['floor']:.3f} + {results['scale']:.3g} N^-{results['exponent']:.3f}, N "
    f"without tables; exponent 95% {interval('exponent')}, floor {interval('floor')}; R^2 "
    f"{results['r2']:.4f}.",
    "",
    f"The largest model's loss from the others: {results['predicted_loss']:.4f}, off by "
    f"{results['predicted_loss_error']:.2%} (95% up to "
    f"{results['predicted_loss_error_ci_high']:.2%}). With N = all parameters: exponent "
    f"{results['exponent/all_params']:.3f}, R^2 {results['r2/all_params']:.4f}, off by "
    f"{results['predicted_loss_error/all_params']:.2%}.",
  ]


def draw_fit(ax: Axes, results: Mapping[str, float]) -> None:
  """Loss over parameters, the fit, and what it says of the largest size from the others."""
  sizes = rows_of(results, "size")
  free = np.array([row["free_params"] for row in sizes])
  law = PowerLaw(results["floor"], results["scale"], results["exponent"])
  smooth = np.geomspace(free[0], free[-1])
  ax.plot(smooth, law(smooth), color="#8db4d9", label="fit")
  for row in sizes:
    seeds = [value for name, value in row.items() if name.startswith("loss/seed")]
    ax.plot([row["free_params"]] * len(seeds), seeds, ".", color="#2f5f8f", ms=4)
  ax.plot(free, [row["loss"] for row in sizes], "o", color="#2f5f8f", label="mean of seeds")
  ax.plot(free[-1], results["predicted_loss"], "x", color="#b03a2e", ms=9,
          label="predicted from the others")
  ax.set_title("Test SID loss (nats)", loc="left")
  ax.set_xlabel("parameters without tables")
  ax.legend(frameon=False, fontsize=8)
