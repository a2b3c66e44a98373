"""The broker's three files as text: mosquitto.conf, passwords, acl. No I/O.

The access rules are patterns over %u, the user name (with client certificates: their common name), never
over %c, which a client chooses itself. A pattern holds for every user; what it would give to the hub and to a
sensor under their own names is taken back by `deny` lines, which mosquitto reads first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from cloud_hub.identity.accounts import Account, check_tree
from edge_cascade.topics import VERSION_LEVEL, check_prefix

Security = Literal["plain", "tls", "mutual-tls"]

MARK: Final = "# Written by `cloud-hub broker"
# A payload of ours has at most 100 KiB (above it travels in chunks), and so have the larger cloud brokers.
MAX_PACKET_BYTES: Final = 128 * 1024
MAX_IN_FLIGHT: Final = 100
MAX_QUEUED_MESSAGES: Final = 20_000
MAX_QUEUED_BYTES: Final = 64 * 2**20
LOOPBACK: Final = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True, slots=True)
class BrokerSettings:
    """What a broker configuration is made from. `directory` is absolute; `user` is whom root becomes."""

    directory: Path
    port: int
    host: str
    security: Security
    user: str | None


def render_configuration(settings: BrokerSettings) -> str:
    """`mosquitto.conf` for mosquitto 2.0."""
    directory = settings.directory
    lines = [
        f"{MARK} config` for mosquitto 2.0: run it again instead of editing, it overwrites this file.",
        f"# Start it with: mosquitto -c {directory}/mosquitto.conf",
        "# After a change of accounts: kill -HUP its process.",
        "",
    ]
    if settings.user is not None:
        lines += [f"user {settings.user}", ""]
    lines += [f"listener {settings.port} {settings.host}"]
    lines += _who_may_log_in(settings)
    lines += [
        f"acl_file {directory}/acl",
        "",
        "# Without it an acknowledgement waits for the peer's delayed TCP acknowledgement, up to 40 ms.",
        "set_tcp_nodelay true",
        "",
        "# Payloads have at most 100 KiB, what is larger travels in chunks; this leaves room for the topic.",
        f"max_packet_size {MAX_PACKET_BYTES}",
        "# The default of 20 held one client to 620 messages/s over a link of 10 ms; 100 to 4,300.",
        f"max_inflight_messages {MAX_IN_FLIGHT}",
        "# What waits for one slow or absent client. The default of 1,000 messages is a fraction of a second",
        "# of a busy sensor, and what is above it is dropped without a word to the sender. Boards send a",
        "# case again until the hub has committed it, so there a drop costs time and no case; between sensor",
        "# and board it costs samples. The bytes bound the memory; whichever limit is reached first holds.",
        f"max_queued_messages {MAX_QUEUED_MESSAGES}",
        f"max_queued_bytes {MAX_QUEUED_BYTES}",
        "",
        "# `status`, `desired` and `round` are retained messages.",
        "retain_available true",
        "# Retained messages and waiting sessions survive a restart. No promise of delivery: what came since",
        "# the last save is lost in a power cut, and sent again by the boards.",
        "persistence true",
        f"persistence_location {directory}/persistence/",
        "autosave_interval 60",
        "# Sessions whose client never came back.",
        "persistent_client_expiration 14d",
    ]
    return "\n".join(lines) + "\n"


def render_passwords(accounts: Sequence[Account]) -> str:
    """The password file: active accounts that have a password."""
    lines = [f"{MARK}`: made from the hub's database, run it again instead of editing."]
    lines += [
        f"{account.name}:{account.password_hash}"
        for account in sorted(accounts, key=lambda account: account.name)
        if account.is_active and account.password_hash is not None
    ]
    return "\n".join(lines) + "\n"


def render_acl(prefix: str, accounts: Sequence[Account]) -> str:
    """The access rules for the tree under `prefix`.

    Raises:
        ProtocolError: for a prefix that can start no topic.
        IdentityError: for a prefix that the sensors' rules would reach into.
    """
    root = f"{check_tree(check_prefix(prefix))}/{VERSION_LEVEL}"
    lines = [
        f"{MARK}`: made from the hub's database, run it again instead of editing.",
        "",
        "# A board: its own half of the tree, and the sensors and readers that are its own.",
        f"pattern write {root}/%u/up/#",
        f"pattern read {root}/%u/down/#",
        "pattern read sensors/%u/#",
        "pattern read labels/%u/#",
        "pattern write results/%u/#",
    ]
    for account in sorted(accounts, key=lambda account: account.name):
        if rules := _rules_of(root, account):
            lines += ["", f"user {account.name}", *rules]
    return "\n".join(lines) + "\n"


def _rules_of(root: str, account: Account) -> list[str]:
    if not account.is_active:
        # A session that is open at the reload, and a certificate that the list does not name, end here.
        return ["topic deny #"]
    name = account.name
    not_a_board = [
        f"topic deny {root}/{name}/#",
        f"topic deny sensors/{name}/#",
        f"topic deny labels/{name}/#",
        f"topic deny results/{name}/#",
    ]
    match account.role:
        case "device":
            return []
        case "hub":
            return [*not_a_board, f"topic read {root}/+/up/#", f"topic write {root}/+/down/#"]
        case "sensor":
            return [
                *not_a_board,
                f"topic write sensors/{account.device}/#",
                f"topic write labels/{account.device}/#",
                f"topic read results/{account.device}/#",
            ]


def _who_may_log_in(settings: BrokerSettings) -> list[str]:
    directory = settings.directory
    lines = ["allow_anonymous false"]
    if settings.security != "plain":
        lines += [
            "tls_version tlsv1.2",
            f"cafile {directory}/ca.pem",
            f"certfile {directory}/server.pem",
            f"keyfile {directory}/server.key",
        ]
    if settings.security == "mutual-tls":
        lines += [
            "# The common name of the client's certificate is its user name; there are no passwords.",
            "require_certificate true",
            "use_identity_as_username true",
            f"crlfile {directory}/crl.pem",
        ]
    else:
        lines += [f"password_file {directory}/passwords"]
        if settings.security == "plain" and settings.host not in LOOPBACK:
            lines += ["# Passwords and samples cross the network in clear text here: use --tls."]
    return lines
