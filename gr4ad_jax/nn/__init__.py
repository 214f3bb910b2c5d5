"""Layers that every model is built from."""
