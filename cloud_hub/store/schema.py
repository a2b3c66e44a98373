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
from cloud_hub.store import schema_base, schema_releases

if TYPE_CHECKING:
    from sqlalchemy.dialects import postgresql

SCHEMA_VERSION: Final = 3
_GAINED_TABLES_SINCE: Final = frozenset({"2"})

RowId = schema_base.RowId
metadata = schema_base.metadata

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
    # As `messages.pack_exits` wrote them.
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
    # As `messages.pack_probabilities` wrote them.
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

updates = Table(
    "updates",
    metadata,
    Column("id", RowId, Identity(), primary_key=True),
    Column("round_id", String(128), nullable=False),
    Column("device", String(64), nullable=False),
    Column("boot", LargeBinary(8), nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("model", String(64), nullable=False),
    Column("training_base", LargeBinary(32), nullable=False),
    Column("num_examples", BigInteger, nullable=False),
    Column("encoding", String(16), nullable=False),
    Column("received_at_ms", BigInteger, nullable=False),
    Column("blob", String(80), ForeignKey("blobs.name"), nullable=False),
    Column("blob_offset", BigInteger, nullable=False),
    Column("blob_length", BigInteger, nullable=False),
    # Whether the coordinator has seen it, and the round that it is a vote in, if any.
    Column("noted", Boolean, nullable=False, default=False),
    Column("counted_in", String(64), index=True),
    UniqueConstraint("round_id", "device", name="updates_round_device"),
)
Index(
    "updates_not_noted",
    updates.c.id,
    sqlite_where=updates.c.noted == NO,
    postgresql_where=updates.c.noted == NO,
)

series = Table(
    "series",
    metadata,
    Column("id", RowId, Identity(), primary_key=True),
    Column("model", String(64), nullable=False),
    # A JSON object, see `federation.settings.SeriesSettings`.
    Column("settings", Text, nullable=False),
    # 'asked' until the coordinator has seen it, then `core.federation.series.SeriesPhase`.
    Column("phase", String(16), nullable=False),
    # The state machine's `SeriesState` as JSON; null while only asked for.
    Column("machine", Text),
    Column("created_by", String(128), nullable=False),
    Column("created_at_ms", BigInteger, nullable=False),
    Column("ended_at_ms", BigInteger),
    # Why it ended, or what it waits for.
    Column("why", Text, nullable=False, default=""),
    # Set by whoever wants it to end; the coordinator ends it.
    Column("abort_reason", Text),
    # The graph part whose parameters are trained.
    Column("graph", LargeBinary(32), nullable=False),
    # The base that its first round started from, and the one that its next round starts from.
    Column("first_base", LargeBinary(32)),
    Column("base", LargeBinary(32)),
    # The guard sees holdout cases up to this id; later ones are kept for the certificate.
    Column("window_start", BigInteger, nullable=False),
    # The draft that became of its weights.
    Column("release", String(128)),
)
Index(
    "series_open",
    series.c.model,
    unique=True,
    sqlite_where=series.c.ended_at_ms.is_(None),
    postgresql_where=series.c.ended_at_ms.is_(None),
)

rounds = Table(
    "rounds",
    metadata,
    # Random, so that nobody guesses the next one.
    Column("id", String(64), primary_key=True),
    Column("series", RowId, ForeignKey("series.id"), nullable=False),
    # Counted over all series of the model: quarantines are counted in it.
    Column("number", BigInteger, nullable=False),
    Column("base", LargeBinary(32), nullable=False),
    # The state machine's `RoundState` as JSON.
    Column("state", Text, nullable=False),
    Column("opened_at_ms", BigInteger, nullable=False),
    Column("closed_at_ms", BigInteger),
    # 'committed', 'rolled_back' or 'aborted'; null while it is open.
    Column("outcome", String(16)),
    Column("why", Text, nullable=False, default=""),
    # The base that was made of its votes, kept or not.
    Column("result", LargeBinary(32)),
    # The server rule's state after it: a float32 delta of its vectors; null where the rule has none.
    Column("rule_blob", String(80), ForeignKey("blobs.name")),
    Column("rule_offset", BigInteger),
    Column("rule_length", BigInteger),
    # What the guard said, as JSON; see `core.federation.guard.GuardFigures`.
    Column("guard", Text),
    UniqueConstraint("series", "number", name="rounds_series_number"),
)
Index(
    "rounds_open",
    rounds.c.series,
    unique=True,
    sqlite_where=rounds.c.outcome.is_(None),
    postgresql_where=rounds.c.outcome.is_(None),
)

round_members = Table(
    "round_members",
    metadata,
    Column("round_id", String(64), ForeignKey("rounds.id"), primary_key=True),
    Column("device", String(64), primary_key=True),
    # See `store.members.MemberState`.
    Column("state", String(16), nullable=False),
    # Why it does not count: a counter's name, and a line for people.
    Column("reason", String(32)),
    Column("detail", Text),
    Column("num_examples", BigInteger),
    # Deltas up; offers and training bases down.
    Column("bytes_up", BigInteger, nullable=False, default=0),
    Column("bytes_down", BigInteger, nullable=False, default=0),
)

training_bases = Table(
    "training_bases",
    metadata,
    Column("digest", LargeBinary(32), primary_key=True),
    Column("model", String(64), nullable=False),
    Column("graph", LargeBinary(32), nullable=False),
    # Where its step begins; 32 zero bytes for a base that no other leads to.
    Column("origin", LargeBinary(32), nullable=False),
    # Two places in one pack: the coded delta from there, and the whole as a float32 delta from zeros.
    Column("blob", String(80), ForeignKey("blobs.name"), nullable=False),
    Column("step_offset", BigInteger, nullable=False),
    Column("step_length", BigInteger, nullable=False),
    Column("whole_offset", BigInteger, nullable=False),
    Column("whole_length", BigInteger, nullable=False),
    # As float32, not packed.
    Column("size_bytes", BigInteger, nullable=False),
    Column("created_at_ms", BigInteger, nullable=False),
)

standings = Table(
    "standings",
    metadata,
    Column("device", String(64), primary_key=True),
    Column("model", String(64), primary_key=True),
    Column("points", Integer, nullable=False, default=0),
    Column("quarantines", Integer, nullable=False, default=0),
    # By `rounds.number`: the first that it may take part in again, and the last that it was asked in.
    Column("barred_until", BigInteger, nullable=False, default=0),
    Column("last_round", BigInteger, nullable=False, default=-1),
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
