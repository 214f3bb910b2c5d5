"""Generative ad recommendation in JAX, after GR4AD.

Ad logs become semantic IDs; a lazy autoregressive decoder learns them with value-weighted losses;
a constrained beam search turns a user's history into the ads to show, scored and ranked.
"""

__version__ = "0.1.0"
