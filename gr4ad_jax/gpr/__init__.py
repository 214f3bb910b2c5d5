"""GPR: one generative model instead of retrieval, pre-ranking and ranking."""
