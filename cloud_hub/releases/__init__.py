"""Releases as they leave the hub: signed, named by their digests."""
