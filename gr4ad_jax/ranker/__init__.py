"""The ranking system beside the generators: reward model, two-tower retrieval, cascade."""
