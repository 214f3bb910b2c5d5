"""Objectives: pure losses with one number per row."""
