"""Flax modules: context processor, LazyAR and the ordinary autoregressive decoder."""
