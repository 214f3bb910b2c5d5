"""GR4AD: LazyAR, value-aware learning, list-wise preference optimisation, online learning."""
