"""The hub's tables, and the one place that creates them. SQL that SQLite and PostgreSQL both take.

Times are wall-clock milliseconds since 1970, for people and filters; nothing is ordered by them. Digests and
boot ids are bytes. Whether a case still needs an answer, and a verdict still needs to be sent, is a column of
its row: a restart finds the work where it was left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Connection,
    ForeignKey,
    Identity,
    Index,
    Integer,
    LargeBinary,
    String,
    Table,
    Text,
    UniqueConstraint,
    false,
    inspect,
    literal,
    select,
    update,
)
from sqlalchemy.dialects import sqlite

from cloud_hub.errors import StoreVersionError
from cloud_hub.store import schema_base, schema_releases, schema_rounds

if TYPE_CHECKING:
    from sqlalchemy.dialects import postgresql

SCHEMA_VERSION: Final = 3
_GAINED_TABLES_SINCE: Final = frozenset({"2"})

RowId = schema_base.RowId
metadata = schema_base.metadata

# Rounds of learning.
updates = schema_rounds.updates
series = schema_rounds.series
rounds = schema_rounds.rounds
round_members = schema_rounds.round_members
training_bases = schema_rounds.training_bases
standings = schema_rounds.standings

# Releases on their way through the fleet.
device_labels = schema_releases.device_labels
rollouts = schema_releases.rollouts
rollout_orders = schema_releases.rollout_orders
desired = schema_releases.desired
swap_reports = schema_releases.swap_reports
shadow_reports = schema_releases.shadow_reports
vitals = schema_releases.vitals
acts = schema_releases.acts


class CaseState(IntEnum):
    """Where a case stands with the full model."""

    PENDING = 0
    ANSWERED = 1
    FAILED = 2


# Written out in the SQL: a partial index serves only a condition that the planner can see.
PENDING: Final = literal(CaseState.PENDING.value, literal_execute=True)
NO: Final = false()

meta = Table(
    "meta",
    metadata,
    Column("key", String(64), primary_key=True),
    Column("value", String(256), nullable=False),
)

devices = Table(
    "devices",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("first_seen_ms", BigInteger, nullable=False),
    Column("last_seen_ms", BigInteger, nullable=False),
    Column("online", Boolean, nullable=False, default=False),
    Column("boot", LargeBinary(8)),
    Column("daemon_version", String(128)),
    # A JSON array of the models that the board says it runs.
    Column("models", Text, nullable=False, default="[]"),
    # The last report's id, its own time, and its counters as a JSON object.
    Column("report_boot", LargeBinary(8)),
    Column("report_seq", BigInteger),
    Column("report_at_ms", BigInteger),
    Column("counters", Text, nullable=False, default="{}"),
)

blobs = Table(
    "blobs",
    metadata,
    Column("name", String(80), primary_key=True),
    Column("size_bytes", BigInteger, nullable=False),
    Column("created_at_ms", BigInteger, nullable=False),
)

cases = Table(
    "cases",
    metadata,
    Column("id", RowId, Identity(), primary_key=True),
    Column("device", String(64), nullable=False),
    Column("boot", LargeBinary(8), nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("model", String(64), nullable=False),
    Column("bundle", LargeBinary(32), nullable=False),
    Column("plan", String(128), nullable=False),
    Column("point", Integer, nullable=False),
    Column("sensor", String(128), nullable=False),
    Column("taken_at_ms", BigInteger, nullable=False),
    Column("received_at_ms", BigInteger, nullable=False),
    # As `packing.pack_exits` wrote them.
    Column("exits", LargeBinary, nullable=False),
    # The label that the board answered with; null when no stage gave one.
    Column("device_label", Integer),
    Column("escalated", Boolean, nullable=False),
    Column("audit_ppm", Integer, nullable=False),
    Column("reason", Integer, nullable=False),
    Column("deferred", Boolean, nullable=False),
    Column("uncertified", Boolean, nullable=False),
    Column("use", Integer, nullable=False),
    # The encoded tensor: `blob_length` bytes at `blob_offset`; deflated if that is less than `tensor_bytes`.
    Column("blob", String(80), ForeignKey("blobs.name"), nullable=False),
    Column("blob_offset", BigInteger, nullable=False),
    Column("blob_length", BigInteger, nullable=False),
    Column("tensor_bytes", BigInteger, nullable=False),
    Column("state", Integer, nullable=False, default=CaseState.PENDING),
    # Why the full model could not answer.
    Column("failure", Text),
    UniqueConstraint("device", "boot", "seq", name="cases_device_boot_seq"),
)
Index(
    "cases_pending",
    cases.c.model,
    cases.c.id,
    sqlite_where=cases.c.state == PENDING,
    postgresql_where=cases.c.state == PENDING,
)
Index("cases_device_id", cases.c.device, cases.c.id)
Index("cases_use", cases.c.model, cases.c.use, cases.c.id)

verdicts = Table(
    "verdicts",
    metadata,
    Column("case_id", RowId, ForeignKey("cases.id"), primary_key=True, autoincrement=False),
    Column("device", String(64), nullable=False),
    Column("label", Integer, nullable=False),
    # As `packing.pack_probabilities` wrote them.
    Column("probabilities", LargeBinary, nullable=False),
    Column("full_model", LargeBinary(32), nullable=False),
    # What the full model said; stays when a person says otherwise, null when a person was first.
    Column("model_label", Integer),
    Column("source", Integer, nullable=False),
    Column("revision", BigInteger, nullable=False),
    Column("created_at_ms", BigInteger, nullable=False),
    Column("confirmed_revision", BigInteger, nullable=False, default=0),
    # How often this revision was sent, and when it is sent next on the monotonic clock of this run (the
    # outbox starts every run with 0).
    Column("sends", Integer, nullable=False, default=0),
    Column("next_send_ms", BigInteger, nullable=False, default=0),
)
Index(
    "verdicts_unconfirmed",
    verdicts.c.device,
    verdicts.c.next_send_ms,
    sqlite_where=verdicts.c.revision > verdicts.c.confirmed_revision,
    postgresql_where=verdicts.c.revision > verdicts.c.confirmed_revision,
)

labels = Table(
    "labels",
    metadata,
    Column("id", RowId, Identity(), primary_key=True),
    Column("case_id", RowId, ForeignKey("cases.id"), nullable=False, index=True),
    Column("label", Integer, nullable=False),
    Column("revision", BigInteger, nullable=False),
    # The token that spoke.
    Column("labelled_by", String(128), nullable=False),
    Column("created_at_ms", BigInteger, nullable=False),
)

releases = Table(
    "releases",
    metadata,
    Column("id", RowId, Identity(), primary_key=True),
    Column("model", String(64), nullable=False),
    # The bundle's id, and the digests of its parts.
    Column("bundle", LargeBinary(32), nullable=False, unique=True),
    Column("graph", LargeBinary(32), nullable=False),
    Column("weights", LargeBinary(32), nullable=False),
    # See `core.rollout.events.ReleaseState`.
    Column("state", String(16), nullable=False),
    # The series of rounds that it was made by, null where boards took no part.
    Column("series", RowId, unique=True),
    # JSON, see `candidates.outcome.Lineage` and `candidates.outcome.Figures`.
    Column("lineage", Text, nullable=False),
    Column("figures", Text, nullable=False),
    Column("created_at_ms", BigInteger, nullable=False),
    Column("created_by", String(128), nullable=False),
)

holdout_marks = Table(
    "holdout_marks",
    metadata,
    Column("model", String(64), primary_key=True),
    # The highest id of a holdout case that a guard or a certificate may have looked at.
    Column("looked_at", BigInteger, nullable=False),
)

counters = Table(
    "counters",
    metadata,
    Column("name", String(256), primary_key=True),
    Column("value", BigInteger, nullable=False),
)

accounts = Table(
    "accounts",
    metadata,
    # The broker's user name, or the common name of the certificate.
    Column("name", String(64), primary_key=True),
    # 'device', 'sensor' or 'hub'.
    Column("role", String(16), nullable=False),
    # For a sensor: the device that it feeds. For a device: its own name.
    Column("device", String(64)),
    # In the broker's own notation.
    Column("password_hash", String(256)),
    # SHA-256 of the certificate (DER), lower-case hexadecimal.
    Column("certificate_fingerprint", String(64)),
    Column("created_at_ms", BigInteger, nullable=False),
    Column("revoked_at_ms", BigInteger),
)

tokens = Table(
    "tokens",
    metadata,
    # The public part of the token; the secret part exists as its SHA-256 only.
    Column("id", String(16), primary_key=True),
    Column("name", String(128), nullable=False),
    Column("sha256", LargeBinary(32), nullable=False),
    # Blank-separated: read, label, fetch, admin.
    Column("scopes", String(64), nullable=False),
    Column("created_at_ms", BigInteger, nullable=False),
    Column("expires_at_ms", BigInteger),
    Column("last_used_ms", BigInteger),
    Column("revoked_at_ms", BigInteger),
)


def create_or_check(connection: Connection) -> None:
    """Create the tables in an empty database, or see that this version can read what is there.

    Raises:
        StoreVersionError: naming both versions, when the database was written by another one.
    """
    if not inspect(connection).has_table(meta.name):
        metadata.create_all(connection)
        insert_if_absent(connection, meta, [{"key": "schema_version", "value": str(SCHEMA_VERSION)}])
        return
    found = connection.execute(select(meta.c.value).where(meta.c.key == "schema_version")).scalar()
    if found in _GAINED_TABLES_SINCE:
        # Nothing that was there has changed: what is missing is created.
        metadata.create_all(connection)
        connection.execute(
            update(meta).where(meta.c.key == "schema_version").values(value=str(SCHEMA_VERSION))
        )
        return
    if found != str(SCHEMA_VERSION):
        raise StoreVersionError(str(found), SCHEMA_VERSION)


def insert_if_absent(connection: Connection, table: Table, rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert rows; those whose key is there already are left as they are."""
    if rows:
        connection.execute(_insert(connection, table).on_conflict_do_nothing(), [dict(row) for row in rows])


def add_to_counters(connection: Connection, amounts: Mapping[str, int]) -> None:
    """Add to named counters, creating those that are new."""
    if not amounts:
        return
    statement = _insert(connection, counters)
    statement = statement.on_conflict_do_update(
        index_elements=[counters.c.name], set_={"value": counters.c.value + statement.excluded.value}
    )
    # Sorted: two writers that lock rows in one order cannot wait for each other.
    connection.execute(
        statement, [{"name": name, "value": amount} for name, amount in sorted(amounts.items())]
    )


def upsert(
    connection: Connection, table: Table, rows: Sequence[Mapping[str, Any]], *, update: Sequence[str]
) -> None:
    """Insert rows; where the primary key is there already, overwrite the columns named in `update`."""
    if not rows:
        return
    statement = _insert(connection, table)
    statement = statement.on_conflict_do_update(
        index_elements=list(table.primary_key.columns),
        set_={name: statement.excluded[name] for name in update},
    )
    connection.execute(statement, [dict(row) for row in rows])


def _insert(connection: Connection, table: Table) -> sqlite.Insert | postgresql.Insert:
    # The two dialects spell the same clause and share no base class that says so.
    if connection.dialect.name == "postgresql":
        from sqlalchemy.dialects import postgresql

        return postgresql.insert(table)
    return sqlite.insert(table)
