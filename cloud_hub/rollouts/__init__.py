"""Carries out what `core.rollout` decides: its events from the store, its effects to the boards."""
