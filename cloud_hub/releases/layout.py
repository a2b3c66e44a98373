"""Where the signed metadata lie; apart from what signs them, so that serving them loads no cryptography."""

from __future__ import annotations

from typing import Final

METADATA: Final = "metadata"
"""In the repository's directory: what boards fetch."""
BLOBS: Final = "blobs"
"""Beside it: contents that are signed by their digest alone, the policy's."""
