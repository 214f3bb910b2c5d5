"""`python -m gr4ad_jax`, the same as the `gr4ad` command."""

import sys

from gr4ad_jax.cli.main import main

if __name__ == "__main__":
  sys.exit(main())
