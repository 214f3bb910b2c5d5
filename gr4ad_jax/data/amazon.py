"""Public review sequences (Amazon product data 2014, 5-core) -> logs in which every item is an ad.

A folder holds `interactions.parquet` (user_id, position with 0 = oldest, item_id) and
`items.parquet` (item_id, brand, categories). Ids are names: nothing is read from their order, and
the ASIN is never a feature, because both leak the order of the reviews.

Source: J. McAuley's Amazon product data (2014); protocol of TIGER, arXiv 2305.05065.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from gr4ad_jax.data.records import DAY_S, Logs
from gr4ad_jax.data.tables import build_logs
from gr4ad_jax.data.validation import LogError, RowChecks, read_columns

UNKNOWN_BRAND = "unknown"

CAVEATS = (
  "Reviews, not ads: every item counts as an ad with its brand as the advertiser, every review as "
  "a conversion of value 1.",
  "Times hold only the order: a user's event number n stands at day n after 1970-01-01.",
  "Text is brand and categories; titles and prices are not in these files, so it is weaker than "
  "the text of published models.",
)


def read_amazon(folder: Path, *, max_users: int | None = None) -> Logs:
  """Reads one data set of review sequences.

  Args:
    folder: holds interactions.parquet and items.parquet.
    max_users: keep only the users with the lowest numbers; every item stays.

  Returns:
    The logs: an ad per item, each review a request of its own, `time_s` = position * 86,400.

  Raises:
    LogError: a file is not readable or breaks a rule.
    ValueError: max_users is below 1.
  """
  if max_users is not None and max_users < 1:
    raise ValueError(f"max_users {max_users}: must be >= 1")
  folder = Path(folder)
  items_file, interactions_file = folder / "items.parquet", folder / "interactions.parquet"
  items = read_columns(items_file, ("item_id", "brand", "categories"))
  interactions = read_columns(interactions_file, ("user_id", "position", "item_id"))
  _check_positions(interactions, str(interactions_file))
  if max_users is not None:
    kept = np.unique(interactions["user_id"].to_numpy())[:max_users]
    interactions = interactions[interactions["user_id"].isin(kept)].reset_index(drop=True)
  brand = items["brand"].astype(object).where(items["brand"].notna(), "")
  categories = items["categories"].astype(object).where(items["categories"].notna(), "")
  separator = np.where((brand != "") & (categories != ""), ", ", "")
  ads = pd.DataFrame({
    "ad_id": items["item_id"],
    "advertiser_id": brand.where(brand != "", UNKNOWN_BRAND),
    "category": categories,
    "text": brand + separator + categories,
    "conversion_type": "review",
  })
  events = pd.DataFrame({
    "user_id": interactions["user_id"],
    "time": interactions["position"].astype(np.int64) * DAY_S,
    "ad_id": interactions["item_id"],
    "action": pd.Categorical.from_codes(np.zeros(len(interactions), np.int8), ["conversion"]),
    "value": 1.0,
  })
  return build_logs(
    ads=ads,
    events=events,
    files={
      "ads": f"{items_file} (item_id as ad_id)",
      "events": f"{interactions_file} (item_id as ad_id)",
    },
    source=f"Amazon reviews 2014, {folder.name}",
    currency="interactions",
    caveats=CAVEATS,
    cleaning={"items: brand missing, advertiser 'unknown'": int((brand == "").sum())},
  )


def _check_positions(interactions: pd.DataFrame, file: str) -> None:
  position_E = interactions["position"]
  if not pd.api.types.is_integer_dtype(position_E.dtype):
    raise LogError(f"{file}: column 'position' has dtype {position_E.dtype}: must be integers")
  checks = RowChecks(file, interactions)
  checks.reject((position_E < 0).to_numpy(), "position", "must be >= 0")
  repeated_E = interactions.duplicated(["user_id", "position"]).to_numpy()
  checks.reject(repeated_E, "position", "must differ within a user")
