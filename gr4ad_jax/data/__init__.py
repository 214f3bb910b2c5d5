"""Ad logs: what they are, the readers that fill them, and the files they are stored in."""
