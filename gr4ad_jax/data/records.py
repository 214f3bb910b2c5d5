"""What an ad log is: ads, organic contents, users and events as plain numpy records."""

import enum
from dataclasses import dataclass

import numpy as np

DAY_S = 86_400
# Kinds of ads, one for each instruction template of GR4AD (arXiv 2602.22732, UA-SID).
AD_TYPES = (
  "product",  # structured text of goods, services, entertainment
  "livestream",
  "image_sequence",
  "virtual",  # goods and contents without a body: short drama, game, app
  "lead_in_video",  # leads into a livestream, or sells directly
  "product_video",  # of a physical product
)
DEFAULT_AD_TYPE = "product"


class Action(enum.IntEnum):
  """What a user did with an ad or a content; a stronger action has a larger number."""

  IMPRESSION = 0
  CLICK = 1
  CONVERSION = 2


@dataclass(frozen=True)
class AdTable:
  """The ad catalogue; the row number is the ad index used everywhere else.

  Attributes:
    ad_id: [A] str objects, unique.
    advertiser_id: [A] str objects.
    category: [A] str objects, a path such as "Food > Snacks"; "" = unknown.
    text: [A] str objects, the creative in words; "" = unknown.
    price: [A] float32, currency units; NaN = unknown.
    conversion_type: [A] str objects, what a conversion of this ad is; "" = unknown.
    ad_type: [A] str objects, each one of AD_TYPES.
    account_id: [A] str objects, the account that runs the ad; "" = unknown.
    campaign_id: [A] str objects; "" = unknown.
    bid: [A] float32, currency units that the advertiser pays per conversion; NaN = unknown.
    embedding_AD: [A, D] float32 given by the log's owner, or None.
  """

  ad_id: np.ndarray
  advertiser_id: np.ndarray
  category: np.ndarray
  text: np.ndarray
  price: np.ndarray
  conversion_type: np.ndarray
  ad_type: np.ndarray
  account_id: np.ndarray
  campaign_id: np.ndarray
  bid: np.ndarray
  embedding_AD: np.ndarray | None


@dataclass(frozen=True)
class ContentTable:
  """Organic contents (products, videos, posts) that events refer to.

  Attributes:
    content_id: [O] str objects, unique.
    ad: [O] int32, index of the ad that promotes the same product; -1 = none.
    category: [O] str objects, "" = unknown.
    text: [O] str objects, "" = unknown.
  """

  content_id: np.ndarray
  ad: np.ndarray
  category: np.ndarray
  text: np.ndarray


@dataclass(frozen=True)
class UserTable:
  """Users with categorical features.

  Attributes:
    user_id: [U] str objects, unique.
    features: name -> [U] str objects, "" = unknown.
  """

  user_id: np.ndarray
  features: dict[str, np.ndarray]


@dataclass(frozen=True)
class EventTable:
  """What users did, sorted by user and time; equal times keep the order of the input.

  Attributes:
    user: [E] int32, row of the user table.
    time_s: [E] int64, unix seconds.
    ad: [E] int32, row of the ad table; -1 = an organic event.
    content: [E] int32, row of the content table; -1 = an ad event.
    request: [E] int32, numbered by first appearance in this order.
    action: [E] int8, an Action.
    value: [E] float32, currency units, >= 0.
    ecpm: [E] float32, the log's own eCPM estimate in currency units; NaN = none.
    features: name -> [E] str objects, request features, "" = unknown.
  """

  user: np.ndarray
  time_s: np.ndarray
  ad: np.ndarray
  content: np.ndarray
  request: np.ndarray
  action: np.ndarray
  value: np.ndarray
  ecpm: np.ndarray
  features: dict[str, np.ndarray]

  def rows(self, rows: np.ndarray | slice) -> "EventTable":
    """Some rows."""
    features = {name: column_E[rows] for name, column_E in self.features.items()}
    return EventTable(features=features, **{
      name: column_E[rows] for name, column_E in vars(self).items() if name != "features"
    })


@dataclass(frozen=True)
class Naming:
  """What a log calls columns and actions; segments of it are read in the same way.

  Attributes:
    map: `OURS=YOURS` or `TABLE.OURS=YOURS`, columns by other names.
    ignore_columns: names, patterns such as `utm_*`, or `all` for every unknown one; `TABLE.NAME`
      is of that table alone.
    actions: `ACTION=WORD,WORD`, other words for an action.
  """

  map: tuple[str, ...] = ()
  ignore_columns: tuple[str, ...] = ()
  actions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Logs:
  """One data set.

  Attributes:
    ads, contents, users, events: the tables.
    source: where the logs come from, a few words.
    currency: unit of price, value and eCPM.
    caveats: what a reader of results must know about the data.
    cleaning: rule -> rows it touched; every rule that was applied is here, zero counts too.
    naming: how its files were read.
  """

  ads: AdTable
  contents: ContentTable
  users: UserTable
  events: EventTable
  source: str
  currency: str
  caveats: tuple[str, ...]
  cleaning: dict[str, int]
  naming: Naming = Naming()
