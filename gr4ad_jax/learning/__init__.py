"""Losses on candidate lists, on plain arrays; they know no model."""
