"""From embeddings to semantic IDs: residual codes, feature hash, health."""
