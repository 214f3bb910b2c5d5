"""How good ranked lists of ads are, and the baselines any model has to beat."""
