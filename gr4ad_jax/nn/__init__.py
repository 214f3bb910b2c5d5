"""Layers that every model is built from."""

NEG_INF = -1e30  # for scores and log-probabilities: finite, so that no gradient is NaN
