"""`gr4ad COMMAND`: parses, calls, prints."""
