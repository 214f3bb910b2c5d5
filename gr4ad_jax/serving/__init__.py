"""Online serving: HTTP API, dynamic batches and beams, realtime index, user events."""
