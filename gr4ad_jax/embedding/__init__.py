"""Ads and contents as vectors: text encoders, fine-tuning on the logs, a cache."""
