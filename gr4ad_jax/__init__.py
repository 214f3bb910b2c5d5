"""Generative ad recommendation in JAX, after GR4AD.

Ad logs become semantic IDs; a lazy autoregressive decoder learns them with value-weighted losses;
a constrained beam search turns a user's history into the ads to show, scored and ranked.

    import gr4ad_jax as gr

    gr.prepare(gr.Parquet(ads="ads.parquet", events="events.parquet"), "data/mine")
    gr.tokenize("data/mine")
    run = gr.train("data/mine", "runs/mine", preset="demo")
    print(gr.recommend(run, "u7", k=10))

What stands in `__all__` is the public API; every other name may change.
"""

# ruff: noqa: F405

from typing import TYPE_CHECKING

from gr4ad_jax.version import __version__ as __version__

__all__ = [
  "PRESETS", "Amazon", "CompleteJourney", "Opened", "Parquet", "evaluate", "export", "open_run",
  "prepare", "recommend", "recommend_many", "tokenize", "train",
]

if TYPE_CHECKING:
  from gr4ad_jax.api import *  # noqa: F403  (types of the names above)


def __getattr__(name: str):
  """Imports the API when it is first used: the package itself is imported in no time."""
  if name not in __all__:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  from gr4ad_jax import api

  return getattr(api, name)
