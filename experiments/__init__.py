"""One file = one table or figure of a paper; `python -m experiments.run NAME` runs it."""
