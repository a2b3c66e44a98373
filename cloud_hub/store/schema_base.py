"""What every table of the hub is made with. No table of its own."""

from __future__ import annotations

from typing import Final

from sqlalchemy import BigInteger, Integer, MetaData

# SQLite numbers rows by itself only where the type is spelt INTEGER.
RowId: Final = BigInteger().with_variant(Integer, "sqlite")

metadata: Final = MetaData()
