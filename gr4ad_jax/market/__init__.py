"""A simulated ad market whose truth is known."""
