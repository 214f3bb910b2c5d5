"""Pages from the templates beside this file: text is escaped, numbers are rounded for people."""

from __future__ import annotations

import math
from collections.abc import Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

MISSING = "–"


def render(template: str, **values: object) -> Markup:
  """A template filled in; every value that is not `Markup` itself is escaped.

  Args:
    template: a file of `templates/`.
    **values: what it shows. The functions of this module are filters in it.
  """
  return Markup(_TEMPLATES.get_template(template).render(values))


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
  if value in (0, 1):
    return f"{int(value):.0%}"
  size = abs(100 * value)
  if size < 0.0001:
    return "<0.0001%"
  return f"{100 * value:.1f}%" if size >= 0.95 else f"{number(100 * value, 2)}%"


def points(difference: float) -> str:
  """A difference of shares in percentage points: +2.1, −0.3, 0.0."""
  text = signed(100 * difference, "+.1f")
  return "0.0" if text[1:] == "0.0" else text


def signed(value: float, spec: str = ".2f") -> str:
  """A number with a true minus sign."""
  return format(value, spec).replace("-", "−")


def amount(value: float | None, currency: str) -> str:
  """Money: USD 3.42; below one, three digits of it: USD 0.00342."""
  if not _known(value):
    return MISSING
  text = f"{value:,.2f}" if abs(value) >= 1 or value == 0 else number(value)
  return f"{currency} {text}".strip()


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


# A name that a template does not find is an error, not an empty place on the page.
_TEMPLATES = Environment(
  loader=PackageLoader("gr4ad_jax.report"), autoescape=True, undefined=StrictUndefined,
  trim_blocks=True, lstrip_blocks=True,
)  # fmt: skip
_TEMPLATES.filters |= {
  function.__name__: function
  for function in (integer, compact, number, percent, points, signed, amount, duration)
}
_TEMPLATES.globals["parts"] = _TEMPLATES.get_template("parts.html").module
