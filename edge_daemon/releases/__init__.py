"""Releases from the hub: whom to believe, how to fetch, and how to swap. Nothing here starts by itself."""
