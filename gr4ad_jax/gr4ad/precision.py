"""A trained decoder in another number type, for search.

bfloat16 needs nothing else; int8 (weights alone) and fp8 (weights and activations, e4m3) are done
by qwix (`pip install -e '.[quantize]'`). Embedding tables, norms, softmax and log-probs keep
their type. Source: paper 4.2 (FP8 inference).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gr4ad_jax.gr4ad.build import Decoder, build_decoder, init_params
from gr4ad_jax.machine import extras

_QWIX_RULES = {
  "int8": {"weight_qtype": "int8"},
  "fp8": {"weight_qtype": "float8_e4m3fn", "act_qtype": "float8_e4m3fn"},
}
_QUANTISED = "(?!tables|output/copy)(context_processor|lazy_layers|layers|modules|fuse|output).*"


def at_precision(decoder: Decoder, precision: str) -> tuple[Decoder, Callable[[Any], Any]]:
  """The decoder at another precision, and what makes its parameters of the trained ones.

  Args:
    decoder: as it was trained.
    precision: "trained" (no change), "bfloat16", "int8" or "fp8".

  Returns:
    A decoder with the same `start` and `step`, not to be trained on; float32 parameters -> its own.

  Raises:
    ValueError: an unknown precision, or one that needs qwix where it is not installed.
  """
  if precision == "trained":
    return decoder, lambda params: params
  if precision == "bfloat16":
    config = dataclasses.replace(decoder.config, compute_dtype="bfloat16")
    # Vectors (norms, biases) are few, and are used in float32.
    return build_decoder(config, decoder.vocabulary), lambda params: jax.tree.map(
      lambda x: x.astype(jnp.bfloat16) if x.ndim > 1 else x, params
    )
  if precision not in _QWIX_RULES:
    raise ValueError(
      f"precision={precision!r}: one of trained, bfloat16, {', '.join(_QWIX_RULES)}"
    )
  try:
    import qwix
  except ImportError:
    raise ValueError(
      f"precision={precision!r}: needs qwix; {extras.install('quantize')}"
    ) from None
  rule = qwix.QtRule(module_path=_QUANTISED, **_QWIX_RULES[precision])
  quantised = qwix.quantize_model(
    decoder, qwix.PtqProvider([rule]), methods=("__call__", "start", "step")
  )
  abstract = jax.eval_shape(lambda: init_params(quantised, jax.random.key(0)))
  return quantised, lambda params: qwix.quantize_params(params, abstract)


def num_bytes(params: Any) -> int:
  """Bytes of all parameters."""
  return sum(leaf.nbytes for leaf in jax.tree.leaves(params))
