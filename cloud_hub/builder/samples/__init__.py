"""Reads a user's data, checks it, and divides it into what trains, what chooses and what certifies."""
