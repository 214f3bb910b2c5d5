"""Numbers as pages to look at."""
