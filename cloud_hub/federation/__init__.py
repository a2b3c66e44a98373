"""Rounds of federated averaging: the shell around `cloud_hub.core.federation`."""
