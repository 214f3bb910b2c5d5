"""The report's sample users: what they did, what was generated for them, what they did next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gr4ad_jax.report.page import Html, amount, details, duration, integer, section, tag


def samples_section(samples: Sequence[Mapping[str, Any]], currency: str) -> Html:
  """Users with what they did, what was generated for them, and what they did next.

  Args:
    samples: as `evaluate` writes them.
    currency: of the values.
  """
  blocks = [_sample(sample, currency, open_=i < 2) for i, sample in enumerate(samples)]
  return section(
    "samples", "Samples",
    tag("p", "A few users, spread evenly over the user table, not picked by result. An ad marked ✓ "
        "is one that the user then engaged with. Counts and ages in a history are the lower ends "
        "of the ranges that the model sees. Of a generated ad: its semantic ID, the log of its "
        "probability, and the value expected of it where the user engages."),
    *blocks,
  )  # fmt: skip


def _sample(sample: Mapping[str, Any], currency: str, *, open_: bool) -> Html:
  targets = sample["targets"]
  found = sum(t["rank"] is not None for t in targets)
  summary = f"User {sample['user_id']}: {found} of {len(targets)} next ads found in the top 50"
  features = tag(
    "p", *(tag("span", tag("i", f"{n.replace('_', ' ')} "), v)
           for n, v in sample["features"].items()), class_="chips",
  )  # fmt: skip
  history = [_history_item(item) for item in sample["history"]]
  generated = [_generated_item(item, currency) for item in sample["generated"]]
  then = [_target_item(item, currency) for item in targets]
  columns = tag(
    "div",
    tag("div", tag("h3", "History, newest first"), tag("ul", *history, class_="items plain")
        if history else tag("p", "None: a new user.", class_="soft")),
    tag("div", tag("h3", "Generated ads"), tag("ol", *generated, class_="items")),
    tag("div", tag("h3", "Engaged with next"), tag("ul", *then, class_="items")),
    class_="columns samples",
  )  # fmt: skip
  return details(summary, features if sample["features"] else None, columns, open_=open_)


def _history_item(item: Mapping[str, Any]) -> Html:
  kind = f"ad {item['id']}" if item["kind"] == "ad" else f"organic {item['id']}"
  advertiser = f"advertiser {item['advertiser']}" if item["advertiser"] else None
  count = f"{integer(item['count'])}×" if item["count"] > 1 else None
  seconds = 86_400 * item["age_days"]
  age = f"{duration(seconds)} ago" if seconds >= 3600 else "just before"
  return tag("li", item["text"] or "(no text)", _small(kind, advertiser, count, age))


def _generated_item(item: Mapping[str, Any], currency: str) -> Html:
  place = "✓" if item["hit"] else item["rank"]
  marks = _small(
    f"ad {item['ad_id']}", f"advertiser {item['advertiser_id']}",
    "in the history" if item["in_history"] else None,
  )  # fmt: skip
  logp = f"{item['logp']:.2f}".replace("-", "−")
  numbers = _small(
    f"ID {'-'.join(str(code) for code in item['sid'])}", f"log p {logp}",
    f"worth {amount(item['expected_value'], currency)}",
  )  # fmt: skip
  return tag(
    "li", tag("span", place, class_="place"), item["text"] or item["category"] or "(no text)",
    marks, numbers, class_="hit" if item["hit"] else None,
  )  # fmt: skip


def _target_item(item: Mapping[str, Any], currency: str) -> Html:
  rank = item["rank"]
  place = f"found at rank {rank}" if rank is not None else "not in the top 50"
  return tag(
    "li", tag("span", "–" if rank is None else "✓", class_="place"), item["text"] or "(no text)",
    _small(f"ad {item['ad_id']}", f"advertiser {item['advertiser']}",
           amount(item["value"], currency)),
    _small(place, "new to the user" if item["new"] else "engaged with before"),
    class_="hit" if rank is not None else None,
  )  # fmt: skip


def _small(*facts: str | None) -> Html:
  return tag("small", " · ".join(fact for fact in facts if fact))
