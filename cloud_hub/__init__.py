"""The hub: takes the fleet's uncertain cases, answers them with the full model, keeps them all."""
