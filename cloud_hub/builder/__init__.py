"""`cloud-hub build`: from a trained classifier and data to a certified bundle. See docs/build.md."""
