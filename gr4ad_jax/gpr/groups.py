"""One user's past -> groups of a stream: requests in time order, with what lay between them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from gr4ad_jax.data.pipeline import pad
from gr4ad_jax.data.records import DAY_S
from gr4ad_jax.data.sequences import Past, count_bucket
from gr4ad_jax.gpr.batch import NUM_GAP_BUCKETS, NUM_HOURS, NUM_WEEKDAYS

_MONDAY = 3  # days from a Monday to 1970-01-01, a Thursday


class Requests(NamedTuple):
  """The requests in which one user engaged with ads, in time order.

  Attributes:
    number: as `Past.ad_request` has them.
    time_s: unix seconds of each one's first event.
    feature_RF: int32 request features, 0 = unknown.
    rows: of each, the rows of `Past.ads`, in time order.
  """

  number: np.ndarray
  time_s: np.ndarray
  feature_RF: np.ndarray
  rows: list[np.ndarray]


class Groups(NamedTuple):
  """G groups of one stream, oldest first; G as it comes. Fields as in `batch.Context`.

  Items are numbers of ads and contents, not codes: new semantic IDs need no new groups.
  """

  request_GF: np.ndarray
  count_G: np.ndarray
  gap_G: np.ndarray
  time_s_G: np.ndarray  # int64 unix seconds
  ad_time_s_G: np.ndarray  # int64, of the last engagement, -1 = none
  ad_GI: np.ndarray
  action_GI: np.ndarray
  organic_GJ: np.ndarray


def requests_of(past: Past) -> Requests:
  """Engagements by request; requests that showed ads in vain are none."""
  number, first, inverse = np.unique(past.ad_request, return_index=True, return_inverse=True)
  order = np.lexsort((first, past.ad_request_s[first]))
  by_request = np.argsort(inverse, kind="stable")
  parts = np.split(by_request, np.cumsum(np.bincount(inverse, minlength=len(number)))[:-1])
  first = first[order]
  return Requests(
    number[order], past.ad_request_s[first], past.ad_feature[first],
    [parts[at] for at in order] if len(number) else [],
  )


def groups_of(
  past: Past, requests: Requests, *, last: int, most: int, bundle: int
) -> Groups:
  """The groups of requests up to one of them.

  Args:
    past: everything that the user did.
    requests: from `requests_of`, or with others that engaged with nothing.
    last: row of the last request that becomes a group.
    most: groups; of more, the newest stay.
    bundle: ads, or contents, of one token; of more, the newest stay.
  """
  kept = np.arange(max(0, last + 1 - most), last + 1)
  time_s, rows = requests.time_s[kept], [requests.rows[at][-bundle:] for at in kept]
  before_s = np.append(np.iinfo(np.int64).min, requests.time_s)[kept]  # of the request before
  since, until = (np.searchsorted(past.organic_time_s, at_s) for at_s in (before_s, time_s))
  return Groups(
    np.column_stack([
      requests.feature_RF[kept], time_s // 3600 % NUM_HOURS,
      (time_s // DAY_S + _MONDAY) % NUM_WEEKDAYS,
    ]).astype(np.int32),
    count_bucket(1 + np.searchsorted(past.ad_time_s, time_s)).astype(np.int32),
    np.where(kept == 0, -1, gap_bucket(time_s - np.where(kept == 0, 0, before_s))),
    time_s,
    np.array([past.ad_time_s[row].max() if len(row) else -1 for row in rows], np.int64),
    pad([past.ads[row] for row in rows], bundle),
    pad([past.ad_action[row] for row in rows], bundle),
    pad([past.organics[max(low, high - bundle) : high]
         for low, high in zip(since, until, strict=True)], bundle),
  )


def gap_bucket(gap_s: np.ndarray) -> np.ndarray:
  """Octave of 1 + seconds -> int32 in 0..31."""
  _, exponent = np.frexp(1.0 + np.maximum(gap_s, 0))  # exact, as a logarithm need not be
  return np.minimum(exponent - 1, NUM_GAP_BUCKETS - 1).astype(np.int32)
