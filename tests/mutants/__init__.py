"""Wrong lines that tests must notice, room by room; `make mutants` tries them.

A mutant is one line of the core changed into what it must not be: not any change, but one that a
tired reader could make or let pass. Whoever writes a line of which much depends, and of which no
test would tell, writes the mutant first and then the test that kills it.
"""

from tests.mutants import (
  advertiser,
  data,
  evaluation,
  gpr,
  learning,
  market,
  model,
  ranker,
  search,
  sequential,
  tokenizer,
  train,
)
from tests.mutants.mutant import Mutant, mutated

MUTANTS: tuple[Mutant, ...] = (
  *learning.MUTANTS, *model.MUTANTS, *search.MUTANTS, *data.MUTANTS, *train.MUTANTS,
  *evaluation.MUTANTS, *ranker.MUTANTS, *market.MUTANTS, *tokenizer.MUTANTS,
  *sequential.MUTANTS, *gpr.MUTANTS, *advertiser.MUTANTS,
)

__all__ = ["MUTANTS", "Mutant", "mutated"]
