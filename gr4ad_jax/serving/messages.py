"""What crosses the HTTP border, with limits: pydantic models that FastAPI documents."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from gr4ad_jax.data.records import AD_TYPES
from gr4ad_jax.data.times import MAX_UNIX_SECONDS

Id = Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[^\x00-\x1f]+$")]
Word = Annotated[str, Field(max_length=1024, pattern=r"^[^\x00]*$")]
Money = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]
Time = Annotated[float, Field(ge=0, lt=MAX_UNIX_SECONDS, allow_inf_nan=False)]
ActionName = Literal["impression", "click", "conversion"]
MAX_EVENTS = 1_000  # of one call
MAX_ADS = 1_000
MAX_HISTORY = 10_000  # of any server; `serving.max_history` may be less


class _Message(BaseModel):
  model_config = ConfigDict(extra="forbid")


class HistoryItem(_Message):
  """One thing that a user did."""

  ad_id: Id | None = None
  content_id: Id | None = None
  action: ActionName = "click"
  time: Time | None = Field(None, description="Unix seconds; default now.")
  value: Money = Field(0.0, description="Currency.")

  @model_validator(mode="after")
  def _one_item(self):
    if (self.ad_id is None) == (self.content_id is None):
      raise ValueError("exactly one of ad_id and content_id is needed")
    return self


class UserEvent(HistoryItem):
  """One thing that a user did, to be remembered."""

  user_id: Id
  event_id: Id | None = Field(
    None, description="A name of your own among the user's events; sent again, it counts once."
  )
  request_id: Id | None = Field(None, description="Of the request that showed the ad.")
  ecpm: Money | None = Field(
    None, description="The log's own estimate, currency for 1,000 impressions."
  )
  features: dict[Id, Word] = Field(
    {}, description="Of the request, by the log's names; others are refused.", max_length=64
  )


class EventsRequest(_Message):
  """Behaviour, in the order in which it happened."""

  model_config = ConfigDict(json_schema_extra={"examples": [
    {"events": [{"user_id": "1", "ad_id": "1082185", "action": "click"}]}
  ]})
  events: list[UserEvent] = Field(min_length=1, max_length=MAX_EVENTS)


class EventsReply(_Message):
  """Events are on disk."""

  accepted: int
  repeated: int = Field(description="Known already by their event_id, and not counted again.")
  unknown_contents: int = Field(
    description="Of contents that the log does not have: no model can use these."
  )
  last_event: int = Field(description="Number of the last one.")


class RecommendRequest(_Message):
  """Who asks, and for what."""

  model_config = ConfigDict(json_schema_extra={"examples": [
    {"user_id": "1", "k": 5},
    {"history": [{"ad_id": "1082185", "action": "click"}], "k": 5},
  ]})
  user_id: Id | None = Field(None, description="Their history is read from the store.")
  k: int = Field(10, ge=1, description="Ads wanted.")
  features: dict[Id, Word] = Field({}, description="Of user and request, by name.", max_length=64)
  history: list[HistoryItem] | None = Field(
    None, max_length=MAX_HISTORY, description="Replaces what the store knows of the user."
  )
  where: list[Word] = Field(
    [], max_length=8, description="Only ads that meet all of these, COLUMN=VALUE.",
  )
  exclude_seen: bool | None = Field(
    None, description="Prospecting: no ad whose product the user has engaged with before the "
    "request, as an ad or as a content; default as the run is set.",
  )
  time: Time | None = Field(None, description="Unix seconds of the request; default now.")
  beam_factor: float | None = Field(
    None, description="One of the server's beam factors; default as traffic allows."
  )
  explain: bool = Field(False, description="Also say how the beams were narrowed.")


class RecommendedAd(_Message):
  """One ad."""

  ad_id: str
  advertiser_id: str
  category: str
  text: str
  sid: list[int] = Field(description="The codes that were generated.")
  probability: float = Field(description="p(SID | context).")
  level_probability: list[float] = Field(description="Of each code, given the ones before.")
  expected_value: float = Field(
    description="Currency, of showing the ad once where the log has eCPM (eCPM / 1000), else of "
    "one engagement with it."
  )


class Schedule(_Message):
  """Which beams served the request."""

  factor: float
  widths: list[int]


class Level(_Message):
  """Prefixes of one length."""

  kept: int = Field(description="Beams after this level.")
  surviving: int = Field(description="Of them, those that lead to an SID that was found.")
  best: list[list[float]] = Field(
    description="Code, parent's place in the level before, log-probability; the most probable."
  )


class RecommendReply(_Message):
  """Ads, best first."""

  request_id: str
  ads: list[RecommendedAd]
  schedule: Schedule
  step: int = Field(description="Of the parameters.")
  index_version: int
  cached: bool
  known_user: bool
  unknown_items: int = Field(description="Of the history, unknown to the model and left out.")
  degraded: list[str] = Field(description="What the answer had to do without.")
  currency: str
  latency_ms: dict[str, float] = Field(description="Server side, by part.")
  levels: list[Level] | None = None


class AdFields(_Message):
  """A new ad, or new columns of a known one."""

  ad_id: Id
  advertiser_id: Id
  category: Word = ""
  text: Word = ""
  price: Money | None = None
  conversion_type: Word = ""
  ad_type: Literal[AD_TYPES] = "product"  # type: ignore[valid-type]
  account_id: Word = ""
  campaign_id: Word = ""
  bid: Money | None = None
  embedding: list[Annotated[float, Field(allow_inf_nan=False, ge=-1e30, le=1e30)]] | None = Field(
    None, min_length=1, max_length=8192,
    description="Only for semantic IDs that were made of given embeddings.",
  )


class AdsRequest(_Message):
  """Ads to add or to change."""

  model_config = ConfigDict(json_schema_extra={"examples": [
    {"ads": [{"ad_id": "new-1", "advertiser_id": "acme", "category": "Food > Snacks",
              "text": "Roasted salted nuts"}]}
  ]})
  ads: list[AdFields] = Field(min_length=1, max_length=MAX_ADS)


class RefusedAd(_Message):
  """An ad that is as it was before the call."""

  ad_id: str
  reason: str


class AdsReply(_Message):
  """What became of the ads."""

  sids: dict[str, list[int]] = Field(description="Of ads that can be recommended from now on.")
  refused: list[RefusedAd] = Field(description="The others.")
  index_version: int


class RemovedReply(_Message):
  """An ad that is no longer recommended."""

  ad_id: str
  index_version: int


class ReloadReply(_Message):
  """Parameters that requests are answered with."""

  step: int
  changed: bool
