"""Many numbers told by a few."""

import math
from typing import Any

import numpy as np

_QUANTILES = {"p10": 0.1, "median": 0.5, "p90": 0.9}


def distribution(values: np.ndarray) -> dict[str, Any]:
  """Count, mean, least, greatest, median, and the 10 % and 90 % quantiles.

  Quantiles are numbers that occur (the nearest one), so they may be infinite
  where some values are. JSON has no such numbers: what is not finite is None.

  Args:
    values: Any number of numbers, without nan.
  """
  values = np.asarray(values, np.float64).ravel()
  if not values.size:
    return {"count": 0}
  found = {"mean": values.mean(), "min": values.min(), "max": values.max()}
  for name, share in _QUANTILES.items():
    found[name] = np.quantile(values, share, method="nearest")
  return {"count": int(values.size)} | {k: finite(v) for k, v in found.items()}


def share(flags: np.ndarray) -> float | None:
  """Share of the flags that are set; None if there are none."""
  return float(np.mean(flags)) if np.size(flags) else None


def ratio(
  part: float | int | np.number, whole: float | int | np.number
) -> float | None:
  """part / whole; None where there is nothing to divide by."""
  return float(part / whole) if whole else None


def finite(value: float | np.floating) -> float | None:
  """The number for JSON; None if it is not finite."""
  return float(value) if math.isfinite(value) else None
