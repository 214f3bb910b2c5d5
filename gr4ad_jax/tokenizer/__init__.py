"""From ads to semantic IDs: text embeddings, residual codes, feature hash, SID index."""
