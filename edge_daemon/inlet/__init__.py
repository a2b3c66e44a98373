"""From topics and payloads to samples."""
