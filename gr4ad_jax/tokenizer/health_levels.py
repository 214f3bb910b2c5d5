"""Verdicts on one level of the SIDs: are its codes used, and does the tree branch where it should.

A quantised level, a hash and a suffix are judged differently: only the first one's codes mean
something, a hash ought to be even, and a suffix cannot be.
"""

from __future__ import annotations

import math

from gr4ad_jax.tokenizer.health_line import (
  BALANCE,
  CHILDREN_MAX,
  CHILDREN_MEAN,
  GAIN,
  LARGEST,
  LIFT,
  NO_RELATION,
  RECALL,
  USED,
  USED_OF_HASH,
  Lines,
  gain,
  grade,
)


def add_level(lines: Lines, level: int, *, beam_width: int) -> None:
  """Adds the lines of one level.

  Args:
    lines: take them.
    level: from 1.
    beam_width: beams that the search keeps after it.
  """
  m, key = lines.metrics, f"level{level}/"
  kind = "quantised" if level <= m["num_quantised"] else lines.made.last_level
  group = f"Level {level}, {kind}"
  size = round(m[key + "perplexity"] / m[key + "balance"])
  match kind:
    case "suffix":
      _add_suffix_use(lines, key, group, size)
    case "hash":
      _add_hash_use(lines, key, group, size)
    case _:
      _add_quantised_use(lines, key, group, size)
  _add_width(lines, level, group, beam_width)
  if kind == "quantised":
    _add_meaning(lines, level, group)


def _add_quantised_use(lines: Lines, key: str, group: str, size: int) -> None:
  m, num_ads = lines.metrics, lines.metrics["num_ads"]
  if size > m.get("distinct_embedding_share", 1.0) * num_ads:
    remedy = "There are fewer different embeddings than codes: smaller --codebook-sizes."
  else:
    remedy = f"{_spread(lines)}, or smaller --codebook-sizes."
  lines.add(
    key + "used_share", group, "Codes in use", "share", grade(m[key + "used_share"], USED),
    ("Hardly a dead code.",
     f"Dead codes are wasted, and the ads crowd on the others. {remedy}"),
  )  # fmt: skip
  varied = _varied(lines, key, size)
  lines.add(
    key + "balance", group, "Evenness: perplexity / codes", "share",
    grade(m[key + "perplexity"] / min(size, num_ads), BALANCE),
    (varied, f"{varied} Some codes hold far more ads than others. {remedy}",
     f"{varied} The codebook has collapsed onto few codes. {remedy}"),
  )  # fmt: skip
  largest = f"{_spread(lines)}."
  if m.get("max_ads_per_embedding", 0) >= m[key + "max_share"] * num_ads / 2:
    largest = "Half of its ads or more have one embedding: richer texts would part them."
  _add_largest(lines, key, group, size, largest)


def _spread(lines: Lines) -> str:
  if lines.made.quantizer == "balanced_kmeans":
    return "Another --seed or --encoder"
  return "--quantizer balanced_kmeans spreads them"


def _add_hash_use(lines: Lines, key: str, group: str, size: int) -> None:
  m = lines.metrics
  expected = -math.expm1(m["num_ads"] * math.log1p(-1 / size)) if size > 1 else 1.0
  even = f"An even hash of all ads would use {expected:.1%}"
  if "ad_id" in lines.made.hash_columns:
    remedy = "try another --seed, or a smaller last codebook size"
  else:
    remedy = "use --hash-columns ad_id, or a smaller last codebook size"
  lines.add(
    key + "used_share", group, "Codes in use", "share",
    grade(m[key + "used_share"] / expected, USED_OF_HASH),
    (f"{even}.", f"{even}: the hashed columns have few values; {remedy}."),
  )  # fmt: skip
  varied = _varied(lines, key, size)
  lines.add(
    key + "balance", group, "Evenness: perplexity / codes", "share",
    grade(m[key + "perplexity"] / min(size, m["num_ads"]), BALANCE),
    (varied,
     f"{varied} A few values of the hashed columns hold most ads, so the level parts little;"
     f" {remedy}."),
  )  # fmt: skip
  _add_largest(lines, key, group, size, f"The hash is uneven; {remedy}.")


def _add_suffix_use(lines: Lines, key: str, group: str, size: int) -> None:
  m = lines.metrics
  full = m[key + "children_max"] >= size and m["sid_collision_rate"] > 0
  lines.add(
    key + "used_share", group, "Codes in use", "share", "look" if full else "fine",
    ("A suffix counts the ads of a prefix: low codes lead, and uneven use is no fault.",
     f"A prefix holds more ads than the suffix has codes ({size:,}), and the rest collide: enlarge"
     " the last codebook size, or the first ones."),
  )  # fmt: skip


def _varied(lines: Lines, key: str, size: int) -> str:
  perplexity, bits = lines.metrics[key + "perplexity"], lines.metrics[key + "entropy_bits"]
  return (
    f"As varied as {perplexity:,.1f} equally frequent codes of {size:,} ({bits:.2f} of"
    f" {math.log2(size):.2f} bits)."
  )


def _add_largest(lines: Lines, key: str, group: str, size: int, remedy: str) -> None:
  m = lines.metrics
  times = m[key + "max_share"] * min(size, m["num_ads"])
  lines.add(
    key + "max_share", group, "Ads on the largest code", "share", grade(times, LARGEST),
    (f"{times:.1f} times an even share.",
     f"{times:,.1f} times an even share: its ads are found by the other levels alone. {remedy}"),
  )  # fmt: skip


def _add_width(lines: Lines, level: int, group: str, beam_width: int) -> None:
  m, name = lines.metrics, f"level{level}/children_max"
  label = "Most next codes after one prefix"
  if level == 1:
    reason = "The first step scores all codes in use."
    lines.add(name, group, "First codes to choose from", "count", "fine", reason)
    return
  if level == m["num_levels"]:
    loss = "so the last code decides which ads of that prefix a list can show"
  else:
    loss = "so ads under that prefix get lost in the search"
  lines.add(
    name, group, label, "count", grade(m[name] / beam_width, CHILDREN_MAX),
    (f"They fit into a beam of {beam_width:,}.",
     f"A beam of {beam_width:,} cannot hold them all, {loss}: wider search.widths, or larger"
     " --codebook-sizes of the levels before."),
  )  # fmt: skip


def _add_meaning(lines: Lines, level: int, group: str) -> None:
  """Does a prefix stand for ads that are alike, and does this level add to the one before."""
  m, key, what = lines.metrics, f"level{level}/", lines.label_name
  codes = "same first code" if level == 1 else f"same first {level} codes"
  if level > 1:
    verdict = grade(m[key + "children_mean"], CHILDREN_MEAN)
    lines.add(
      key + "children_mean", group, "Next codes after a prefix, mean", "number",
      "fine" if verdict == "fine" else "look",
      ("The level adds to what the ones before said.",
       "Most prefixes have a single next code, so this level tells little: smaller"
       " --codebook-sizes before it."),
    )  # fmt: skip
  if key + "pas" in m:
    chance, above = f"{m['pas_chance']:.2f}", gain(m[key + "pas"], m["pas_chance"])
    remedy = "larger --codebook-sizes."
    if above < NO_RELATION:
      remedy = "check that row by row these codes belong to these embeddings."
    lines.add(
      key + "pas", group, f"Cosine, {codes}", "number",
      grade(above, GAIN),
      (f"Ads with these codes are alike; any two have {chance}.",
       f"Ads with these codes are little more alike than any two ({chance}), so the model cannot"
       f" share what it learns among them: {remedy}"),
    )  # fmt: skip
  if key + "label_lift" in m:
    share, chance = m[key + "label_pair_share"], m["label_pair_chance"]
    verdict = grade(m[key + "label_lift"], LIFT)
    if gain(share, chance) >= GAIN[0]:
      verdict = "fine"  # few labels: chance is so high that the lift cannot be
    remedy = "richer texts" if lines.made.encoder == "uae" else "--encoder uae, or richer texts"
    name = "retrieval/embedding_r@1"
    if name in m and grade(gain(m[name], m["retrieval/chance_r@1"]), RECALL[1]) == "fine":
      remedy = "larger --codebook-sizes, for the embedding does"  # the fault is not its own
    lines.add(
      key + "label_lift", group, f"Same {what} over chance, {codes}", "number", verdict,
      (f"{share:.1%} of such pairs of ads, {chance:.1%} of all pairs.",
       f"{share:.1%} of such pairs of ads, {chance:.1%} of all pairs: the codes hardly follow the"
       f" {what}: try {remedy}."),
    )  # fmt: skip
