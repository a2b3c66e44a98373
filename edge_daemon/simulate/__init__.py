"""A virtual fleet around the real device, a real broker and the real hub."""
