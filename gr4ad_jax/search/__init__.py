"""Beam search over semantic IDs, constrained to those that exist."""
