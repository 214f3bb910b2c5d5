"""How good ranked lists of ads are, and the simple baselines any model has to beat."""
