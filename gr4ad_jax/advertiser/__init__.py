"""The third system: a language model that predicts the next advertiser."""
