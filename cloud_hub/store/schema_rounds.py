"""The tables of series and rounds of learning; `schema` gives them out with all the others."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
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
)

from cloud_hub.store.schema_base import RowId, metadata

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
    sqlite_where=updates.c.noted == false(),
    postgresql_where=updates.c.noted == false(),
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
