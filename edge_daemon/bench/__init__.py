"""`edge-daemon profile` and `edge-daemon bench`: what stages and bundles cost on this board."""
