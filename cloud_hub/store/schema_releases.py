"""The tables of releases on their way through the fleet; `schema` gives them out with all the others."""

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

device_labels = Table(
    "device_labels",
    metadata,
    Column("device", String(64), primary_key=True),
    Column("key", String(64), primary_key=True),
    Column("value", String(128), nullable=False),
)

rollouts = Table(
    "rollouts",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("model", String(64), nullable=False),
    Column("release", RowId, ForeignKey("releases.id"), nullable=False),
    # `core.rollout.state.Phase`, and the whole `RolloutState` as JSON.
    Column("phase", String(16), nullable=False),
    Column("state", Text, nullable=False),
    # Cases and scenes up to these ids were there before it began.
    Column("cases_after", BigInteger, nullable=False),
    Column("scenes_after", BigInteger, nullable=False),
    Column("created_by", String(128), nullable=False),
    Column("created_at_ms", BigInteger, nullable=False),
    Column("is_closed", Boolean, nullable=False, default=False),
)

rollout_orders = Table(
    "rollout_orders",
    metadata,
    Column("id", RowId, Identity(), primary_key=True),
    Column("rollout", String(64), ForeignKey("rollouts.id"), nullable=False),
    # 'approve', 'pause', 'resume', 'halt' or 'kill'.
    Column("kind", String(16), nullable=False),
    Column("wave", Integer),
    Column("reason", Text, nullable=False, default=""),
    Column("ordered_by", String(128), nullable=False),
    Column("created_at_ms", BigInteger, nullable=False),
    Column("noted", Boolean, nullable=False, default=False),
)

desired = Table(
    "desired",
    metadata,
    Column("device", String(64), primary_key=True),
    Column("model", String(64), primary_key=True),
    # A release's number, or `messages.SHIPPED`.
    Column("release", String(128), nullable=False),
    Column("audit_ppm", Integer, nullable=False, default=0),
    Column("shadow_ppm", Integer, nullable=False, default=0),
    Column("scene_s", Integer, nullable=False, default=300),
    # Grows with every change of any of the device's rows.
    Column("revision", BigInteger, nullable=False),
)

swap_reports = Table(
    "swap_reports",
    metadata,
    Column("id", RowId, Identity(), primary_key=True),
    Column("device", String(64), nullable=False),
    Column("boot", LargeBinary(8), nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("model", String(64), nullable=False),
    Column("release", String(128), nullable=False),
    Column("bundle", LargeBinary(32), nullable=False),
    Column("serving", LargeBinary(32), nullable=False),
    # Empty where it committed.
    Column("failure", Text, nullable=False),
    Column("detail", Text, nullable=False),
    Column("taken_at_ms", BigInteger, nullable=False),
    Column("received_at_ms", BigInteger, nullable=False),
    # Whether the rollouts have heard of it.
    Column("noted", Boolean, nullable=False, default=False),
    UniqueConstraint("device", "boot", "seq", name="swap_reports_device_boot_seq"),
)
Index(
    "swap_reports_not_noted",
    swap_reports.c.id,
    sqlite_where=swap_reports.c.noted == false(),
    postgresql_where=swap_reports.c.noted == false(),
)

shadow_reports = Table(
    "shadow_reports",
    metadata,
    Column("id", RowId, Identity(), primary_key=True),
    Column("device", String(64), nullable=False),
    Column("boot", LargeBinary(8), nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("model", String(64), nullable=False),
    Column("bundle", LargeBinary(32), nullable=False),
    Column("other", LargeBinary(32), nullable=False),
    # A msgpack array of `messages.ShadowScene`.
    Column("scenes", LargeBinary, nullable=False),
    Column("received_at_ms", BigInteger, nullable=False),
    UniqueConstraint("device", "boot", "seq", name="shadow_reports_device_boot_seq"),
)

vitals = Table(
    "vitals",
    metadata,
    Column("id", RowId, Identity(), primary_key=True),
    Column("device", String(64), nullable=False),
    Column("boot", LargeBinary(8), nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("received_at_ms", BigInteger, nullable=False),
    # The counters of a report that health is judged by, as a JSON object; see `core.rollout.windows`.
    Column("counters", Text, nullable=False),
    UniqueConstraint("device", "boot", "seq", name="vitals_device_boot_seq"),
)
Index("vitals_device_received", vitals.c.device, vitals.c.received_at_ms)

acts = Table(
    "acts",
    metadata,
    Column("id", RowId, Identity(), primary_key=True),
    Column("at_ms", BigInteger, nullable=False),
    Column("act_by", String(128), nullable=False),
    # For example 'rollout.start', and what it was done to.
    Column("act", String(64), nullable=False),
    Column("subject", String(128), nullable=False),
    Column("detail", Text, nullable=False, default=""),
)
