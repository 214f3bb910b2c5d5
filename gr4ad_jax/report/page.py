"""HTML for the report: escaped by construction, numbers rounded for people, one style for all.

A page needs nothing but itself: no script, no font, no image from elsewhere, and a content policy
that would refuse them.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from gr4ad_jax.machine import atomic

MISSING = "–"

_VOID = frozenset({"meta", "br"})


class Html(str):
  """Text that is HTML already; `tag` escapes every other string."""


def tag(name: str, *children: object, **attributes: object) -> Html:
  """One element.

  Args:
    name: of the element.
    *children: `Html` as it is, anything else as escaped text; None is left out.
    **attributes: `class_` writes class, `font_size` writes font-size; None is left out, True writes
      the bare name.
  """
  parts = [f"<{name}"]
  for key, value in attributes.items():
    if value is not None and value is not False:
      key = key.rstrip("_").replace("_", "-")
      parts.append(f" {key}" if value is True else f' {key}="{html.escape(str(value))}"')
  parts.append(">")
  if name in _VOID:
    return Html("".join(parts))
  return Html("".join(parts) + join(children) + f"</{name}>")


def join(children: Iterable[object]) -> Html:
  """The children one after the other, escaped as `tag` does."""
  return Html(
    "".join(c if isinstance(c, Html) else html.escape(str(c)) for c in children if c is not None)
  )


def table(
  head: Sequence[object], rows: Iterable[Sequence[object]], *, class_: str | None = None
) -> Html:
  """A table that scrolls sideways on its own where the screen is narrow.

  Args:
    head: names of the columns; empty = no header.
    rows: cells as text or `Html`; a cell made with `tag("td", ...)` is taken as it is. The first
      cell of each row is its header.
    class_: of the table.
  """
  body = []
  for first, *cells in rows:
    cells = [c if str(c).startswith("<td") and isinstance(c, Html) else tag("td", c) for c in cells]
    body.append(tag("tr", tag("th", first, scope="row"), *cells))
  names = tag("tr", *(tag("th", name, scope="col") for name in head))
  header = tag("thead", names) if head else None
  content = tag("table", header, tag("tbody", *body), class_=class_)
  return tag("div", content, class_="scroll")


def numeric(*children: object) -> Html:
  """A cell of a table that holds a number: to the right, on one line."""
  return tag("td", *children, class_="num")


def details(summary: object, *children: object, open_: bool = False) -> Html:
  """A block that opens on a click."""
  return tag("details", tag("summary", summary), *children, open=open_)


def section(name: str, title: str, *children: object) -> Html:
  """A part of the page that the navigation can point at."""
  return tag("section", tag("h2", title), *children, id=name)


def page(title: str, sections: Sequence[object], *, navigation: dict[str, str]) -> str:
  """The whole document.

  Args:
    title: of the browser's tab.
    sections: what stands on the page.
    navigation: section name -> its title.
  """
  links = (tag("a", label, href=f"#{name}") for name, label in navigation.items())
  policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
  head = tag(
    "head",
    tag("meta", charset="utf-8"),
    tag("meta", http_equiv="Content-Security-Policy", content=policy),
    tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
    tag("title", title),
    tag("style", Html(_STYLE)),
  )
  body = tag("body", tag("nav", *links), tag("main", *sections))
  return "<!doctype html>\n" + tag("html", head, body, lang="en") + "\n"


def write_page(path: Path, text: str) -> Path:
  """Writes a page in one piece: a reader sees the old file or the new one."""
  atomic.write_text(path, text)
  return path


def _known(value: float | None) -> bool:
  return value is not None and math.isfinite(value)


def integer(value: float | None) -> str:
  """1,234,567."""
  return f"{value:,.0f}" if _known(value) else MISSING


def compact(value: float | None) -> str:
  """Large counts in millions or billions: 98,304, 2.43M, 1.20B."""
  if not _known(value) or value < 1e6:
    return integer(value)
  return f"{number(value / 1e6)}M" if value < 1e9 else f"{number(value / 1e9)}B"


def number(value: float | None, digits: int = 3) -> str:
  """Three significant digits, thousands separated: 0.0175, 12.3, 1,523."""
  if not _known(value):
    return MISSING
  if value == 0:
    return "0"
  decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
  if decimals > 6:
    return f"{value:.{digits - 1}e}"
  return f"{value:,.{decimals}f}"


def percent(value: float | None) -> str:
  """A share as 34.8%; small ones keep two digits, and only an exact 0 is written as 0%."""
  if not _known(value):
    return MISSING
  if value == 0:
    return "0%"
  size = abs(100 * value)
  if value == 1:
    return "100%"
  if size < 0.0001:
    return "<0.0001%"
  return f"{100 * value:.1f}%" if size >= 0.95 else f"{number(100 * value, 2)}%"


def amount(value: float | None, currency: str) -> str:
  """Money: USD 3.42."""
  return f"{currency} {value:,.2f}".strip() if _known(value) else MISSING


def duration(seconds: float) -> str:
  """A span in its largest fitting unit: 30 min, 5 h, 3 days, 26 weeks."""
  for size, one, many in (
    (56 * 86_400, "week", "weeks"), (86_400, "day", "days"), (3600, "h", "h"), (60, "min", "min")
  ):
    if seconds >= size:
      count = round(seconds / (7 * 86_400 if one == "week" else size))
      return f"{count} {one if count == 1 else many}"
  return "0 min" if seconds < 1 else f"{seconds:.0f} s"


def listing(names: Sequence[str]) -> str:
  """a, b and c."""
  return " and ".join(filter(None, (", ".join(names[:-1]), names[-1]))) if names else ""


_STYLE = """
:root{color-scheme:light dark;--ink:#1b1f23;--soft:#59636e;--line:#d5dade;--paper:#fff;
  --tint:#f3f5f7;--ours:#1a5fb4;--other:#6b7580;--second:#b85000;--good:#17713a;--fair:#805b00;
  --poor:#b3261e}
@media (prefers-color-scheme:dark){:root{--ink:#e3e6e9;--soft:#9ba5ae;--line:#384047;
  --paper:#15181b;--tint:#1f2429;--ours:#7db1f0;--other:#98a2ac;--second:#f0a35c;--good:#70cf90;
  --fair:#e0b64c;--poor:#f48c84}}
*{box-sizing:border-box}
html{scroll-padding-top:3.2rem;-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,-apple-system,
  "Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;overflow-wrap:anywhere}
nav{position:sticky;top:0;z-index:2;background:var(--paper);border-bottom:1px solid var(--line);
  padding:.5rem max(1rem,calc(50% - 33rem));display:flex;gap:.9rem;overflow-x:auto;
  white-space:nowrap;font-size:.9rem}
a{color:var(--ours);text-decoration:none}
a:hover{text-decoration:underline}
main{max-width:68rem;margin:0 auto;padding:1rem}
h1{font-size:1.6rem;line-height:1.25;margin:.6rem 0 .2rem}
h2{font-size:1.25rem;margin:2.6rem 0 .5rem;padding-top:.9rem;border-top:1px solid var(--line)}
h3{font-size:1rem;margin:1.3rem 0 .3rem}
p{margin:.4rem 0 .7rem;max-width:46rem}
.soft,small,figcaption{color:var(--soft)}
small,figcaption{font-size:.84rem}
.verdict{border-left:4px solid var(--other);background:var(--tint);padding:.7rem 1rem;
  max-width:none;font-size:1.08rem;margin:1rem 0}
.good{color:var(--good)}
.fair{color:var(--fair)}
.poor{color:var(--poor)}
.verdict.good,.verdict.fair,.verdict.poor{border-color:currentColor}
.verdict span{color:var(--ink)}
.verdict small{display:block;margin-top:.3rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(11rem,44%),1fr));
  gap:.6rem;margin:1rem 0}
.tiles div{background:var(--tint);border-radius:6px;padding:.5rem .7rem}
.tiles b{display:block;font-size:1.2rem;font-variant-numeric:tabular-nums}
.tiles span{color:var(--soft);font-size:.84rem}
.scroll{overflow-x:auto;margin:.6rem 0}
table{border-collapse:collapse;font-size:.92rem;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:.36rem .9rem .36rem 0;border-bottom:1px solid var(--line);
  vertical-align:top;font-weight:400}
thead th{color:var(--soft);font-size:.84rem;vertical-align:bottom}
td small{display:block}
.num{text-align:right;white-space:nowrap;padding-right:.4rem}
th small{display:block}
.metrics td,.metrics th{white-space:nowrap}
.metrics thead th{white-space:normal;min-width:4.6rem;overflow-wrap:normal}
.metrics th[scope=row],.metrics thead th:first-child{position:sticky;left:0;
  background:var(--paper);padding-right:.8rem}
.ours tbody tr:first-child th{color:var(--ours);font-weight:600}
.best{font-weight:700}
.best small{font-weight:400}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr));
  gap:1rem 1.6rem;margin:.8rem 0}
figure{margin:0;max-width:30rem}
figcaption b{color:var(--ink)}
svg{display:block;width:100%;height:auto;font:12px system-ui,-apple-system,
  "Segoe UI",Roboto,Arial,sans-serif}
svg text{fill:var(--soft)}
svg .name{fill:var(--ink)}
.grid{stroke:var(--line)}
.mark{stroke:var(--soft);stroke-dasharray:3 3}
.first{color:var(--ours)}
.second{color:var(--second)}
.other{color:var(--other)}
.key{display:inline-flex;align-items:center;gap:.35rem;margin-right:1.1rem}
.key svg{width:1.6rem;height:.8rem}
details{border:1px solid var(--line);border-radius:6px;padding:.5rem .8rem;margin:.6rem 0}
summary{cursor:pointer;font-weight:600}
details[open]>summary{margin-bottom:.4rem}
dl{margin:.4rem 0}
dt{font-weight:600}
dd{margin:0}
ul{padding-left:1.2rem;max-width:48rem}
.chips span{display:inline-block;background:var(--tint);border-radius:4px;padding:0 .45rem;
  margin:0 .35rem .3rem 0;font-size:.84rem}
.chips i{color:var(--soft);font-style:normal}
.columns{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,18rem),1fr));
  gap:.4rem 1.8rem}
.samples{grid-template-columns:repeat(auto-fit,minmax(min(100%,16rem),1fr))}
@media (min-width:60rem){.samples{grid-template-columns:1fr 1.3fr .9fr}}
.items{list-style:none;padding:0;margin:.3rem 0;font-size:.92rem}
.items li{padding:.32rem .3rem .32rem 1.9rem;border-bottom:1px solid var(--line);position:relative;
  line-height:1.35;unicode-bidi:isolate}
.items small{display:block}
.items .place{position:absolute;left:.3rem;color:var(--soft);font-variant-numeric:tabular-nums}
.items li.hit{background:color-mix(in srgb,var(--good) 12%,transparent)}
.items li.hit .place{color:var(--good);font-weight:700}
.items.plain li{padding-left:0}
.columns h3{margin-top:.4rem}
code{font:.9em ui-monospace,Menlo,Consolas,monospace;background:var(--tint);border-radius:3px;
  padding:0 .25em}
@media print{nav{display:none}}
"""
