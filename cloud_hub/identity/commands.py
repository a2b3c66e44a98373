"""`cloud-hub device|sensor|broker`: each command says what it wrote and what to type next."""

# ruff: noqa: T201 - what a command prints is its result

from __future__ import annotations

import argparse
import datetime
import getpass
import os
import pwd
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cloud_hub.config import add_config_argument, load_config
from cloud_hub.identity.accounts import HUB_NAME, Account, IdentityError, Role

if TYPE_CHECKING:
    from cloud_hub.identity.authority import Authority
    from cloud_hub.identity.broker_files import BrokerSettings, Security
    from cloud_hub.identity.issue import Handed, Issuer
    from cloud_hub.identity.roster import Roster

PLAIN_PORT: Final = 1883
TLS_PORT: Final = 8883
EXPIRES_SOON: Final = datetime.timedelta(days=30)
DEBIAN_USER: Final = "mosquitto"
AUTHORITY_DIRECTORY: Final = "authority"


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the three commands."""
    _register_accounts(subparsers, "device", "boards that may speak to the hub")
    _register_accounts(subparsers, "sensor", "sensors and local readers of one board")
    broker = subparsers.add_parser("broker", help="the configuration that mosquitto runs with")
    verbs = broker.add_subparsers(dest="verb", required=True, metavar="VERB")

    parser = _add_verb(verbs, "config", "write mosquitto.conf, passwords and access rules", _broker_config)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the broker's folder")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: loopback)")
    parser.add_argument("--port", type=_port, help=f"default: {PLAIN_PORT}, with TLS {TLS_PORT}")
    security = parser.add_mutually_exclusive_group()
    security.add_argument("--tls", action="store_true", help="encrypted, clients have passwords")
    security.add_argument("--mutual-tls", action="store_true", help="encrypted, clients have certificates")
    _add_user(parser)
    parser.add_argument("--new-hub-credential", action="store_true", help="replace the hub's own credential")

    parser = _add_verb(verbs, "accounts", "rewrite passwords and access rules only", _broker_accounts)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the broker's folder")
    _add_user(parser)

    parser = _add_verb(verbs, "certificate", "make the broker's certificate", _broker_certificate)
    parser.add_argument(
        "--host", nargs="+", required=True, metavar="NAME", help="every name and address that clients use"
    )


def _register_accounts(
    subparsers: argparse._SubParsersAction[argparse.ArgumentParser], role: Role, help_text: str
) -> None:
    verbs = subparsers.add_parser(role, help=help_text).add_subparsers(
        dest="verb", required=True, metavar="VERB"
    )
    parser = _add_verb(verbs, "add", f"issue a {role}'s credential", _add_account)
    parser.set_defaults(role=role)
    parser.add_argument("name", metavar="NAME")
    if role == "sensor":
        parser.add_argument("--device", required=True, help="the board that it feeds and reads from")
    parser.add_argument("--certificate", action="store_true", help="a key and certificate, not a password")
    parser.add_argument("--renew", action="store_true", help="in place of the credential that it has")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the files (default: print once)")
    parser = _add_verb(verbs, "list", f"every {role} that is or was", _list_accounts)
    parser.set_defaults(role=role)
    parser = _add_verb(verbs, "revoke", f"end a {role}'s credential", _revoke_account)
    parser.set_defaults(role=role)
    parser.add_argument("name", metavar="NAME")


def _add_account(args: argparse.Namespace) -> int:
    from cloud_hub.identity.issue import Applicant

    role: Role = args.role
    name: str = args.name
    device = name if role == "device" else args.device
    applicant = Applicant(name, role, device, is_known=args.renew)
    if args.certificate and args.out is None:
        raise IdentityError("--certificate needs --out DIR for the key")
    with _desk(args) as desk:
        desk.issuer.check(applicant)
        if args.certificate:
            handed = desk.issuer.give_certificate(applicant, out=args.out, now=now())
        else:
            handed = desk.issuer.give_password(applicant, out=args.out, now=now())
        has_hub = desk.roster.find(HUB_NAME) is not None
    _say_handed(role, name, handed)
    if has_hub and role == "device" and args.certificate and not args.renew:
        print(f"next: bring these files to {name}; a broker with --mutual-tls needs nothing for it")
    else:
        _say_next(args, is_configured=has_hub)
    return 0


def _list_accounts(args: argparse.Namespace) -> int:
    with _desk(args) as desk:
        accounts = [account for account in desk.roster.list_all() if account.role == args.role]
        rows = [_row(account, desk.authority) for account in accounts]
    if not rows:
        print(f"no {args.role}s yet: cloud-hub {args.role} add NAME")
        return 0
    heads = ("NAME", "DEVICE", "STATE", "CREATED", "CREDENTIAL")
    widths = [max(len(row[column]) for row in (heads, *rows)) for column in range(len(heads))]
    for row in (heads, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _revoke_account(args: argparse.Namespace) -> int:
    with _desk(args) as desk:
        was_active = desk.issuer.revoke(args.name, args.role, now=now())
        left = [
            account.name
            for account in desk.roster.list_all()
            if account.role == "sensor" and account.device == args.name and account.is_active
        ]
    print(f"{args.role} {args.name}: {'revoked' if was_active else 'was revoked before'}")
    if left:
        print(f"still active, because they feed {args.name}: sensor {', '.join(left)}")
    _say_next(args, is_configured=True)
    return 0


def _broker_config(args: argparse.Namespace) -> int:
    from cloud_hub.identity.broker_directory import BrokerDirectory
    from cloud_hub.identity.broker_files import BrokerSettings

    security: Security = "mutual-tls" if args.mutual_tls else "tls" if args.tls else "plain"
    out = _absolute(args.out)
    settings = BrokerSettings(
        out, args.port or (PLAIN_PORT if security == "plain" else TLS_PORT), args.host, security, _user(args)
    )
    is_new = not (out / "mosquitto.conf").exists()
    with _desk(args) as desk:
        if security != "plain":
            _check_server_certificate(desk, args.config)
        folder = BrokerDirectory(out, settings.user)
        folder.prepare()
        _provide_hub(desk, settings, replace=args.new_hub_credential)
        accounts = desk.roster.list_all()
        folder.write_accounts(desk.prefix, accounts, desk.authority)
        folder.write_configuration(settings, desk.authority)
    print(f"wrote mosquitto.conf, passwords and acl in {out}")
    _say_warnings(settings, accounts)
    if is_new:
        print(f"next: mosquitto -c {out}/mosquitto.conf")
    else:
        print(
            "next: kill -HUP the mosquitto process for accounts; restart it if port, address or TLS changed"
        )
    return 0


def _broker_accounts(args: argparse.Namespace) -> int:
    from cloud_hub.identity.broker_directory import BrokerDirectory

    out = _absolute(args.out)
    if not (out / "mosquitto.conf").exists():
        raise IdentityError(
            f"no mosquitto.conf in {str(out)!r}: run `cloud-hub broker config --out {out}` first"
        )
    folder = BrokerDirectory(out, _user(args))
    folder.prepare()
    with _desk(args) as desk:
        folder.write_accounts(desk.prefix, desk.roster.list_all(), desk.authority)
    print(f"wrote passwords and acl in {out}")
    print("next: kill -HUP the mosquitto process (systemctl reload mosquitto)")
    return 0


def _broker_certificate(args: argparse.Namespace) -> int:
    with _desk(args) as desk:
        issued = desk.authority.issue_server(args.host, now=now())
        path = desk.authority.server_certificate_file
    print(f"wrote {path} for {', '.join(args.host)}, valid until {issued.not_after:%Y-%m-%d}")
    print(f"next: cloud-hub broker config --out DIR --tls --config {args.config}   (or --mutual-tls)")
    return 0


@dataclass(frozen=True, slots=True)
class _Desk:
    """What every command works with."""

    roster: Roster
    authority: Authority
    issuer: Issuer
    prefix: str


@contextmanager
def _desk(args: argparse.Namespace) -> Iterator[_Desk]:
    # Imported here: `cloud-hub run` registers these commands too, and should not pay for cryptography.
    from cloud_hub.identity.authority import Authority
    from cloud_hub.identity.issue import Issuer
    from cloud_hub.identity.roster import Roster
    from cloud_hub.store.database import Database
    from cloud_hub.store.store import database_url

    config = load_config(args.config)
    authority = Authority(config.state_dir / AUTHORITY_DIRECTORY)
    with Database(database_url(config.state_dir, config.store.url)) as database:
        roster = Roster(database)
        yield _Desk(roster, authority, Issuer(roster, authority), config.hub.prefix)


def _provide_hub(desk: _Desk, settings: BrokerSettings, *, replace: bool) -> None:
    """The hub's own credential, of the kind that the listener asks for; kept when there is one."""
    from cloud_hub.identity.issue import Applicant

    out = settings.directory
    found = desk.roster.find(HUB_NAME)
    applicant = Applicant(HUB_NAME, "hub", None, is_known=found is not None)
    if settings.security == "mutual-tls":
        has_one = found is not None and found.certificate_fingerprint is not None
        named = f'certificate_file = "{out}/hub.pem", key_file = "{out}/hub.key"'
        expected = out / "hub.key"
    else:
        has_one = found is not None and found.password_hash is not None
        named = f'username = "{HUB_NAME}", password_file = "{out}/hub.password"'
        expected = out / "hub.password"
    if has_one and not replace:
        if not expected.exists():
            print(f"the hub keeps the credential it was given before; --new-hub-credential writes {expected}")
        return
    if settings.security == "mutual-tls":
        handed = desk.issuer.give_certificate(applicant, out=out, now=now())
    else:
        handed = desk.issuer.give_password(applicant, out=out, now=now())
    _say_handed("hub", HUB_NAME, handed)
    trust = "" if settings.security == "plain" else f', ca_file = "{out}/ca.pem"'
    print(f"for the hub's [broker] table: {named}{trust}")


def _check_server_certificate(desk: _Desk, config: Path) -> None:
    from cloud_hub.identity.authority import certificate_expiry

    ends = certificate_expiry(desk.authority.server_certificate_file)
    fix = f"cloud-hub broker certificate --host NAME... --config {config}"
    if ends is None:
        raise IdentityError(f"the broker has no certificate yet: {fix}")
    if ends < now() + EXPIRES_SOON:
        print(f"the broker's certificate ends on {ends:%Y-%m-%d}: {fix}")


def _say_warnings(settings: BrokerSettings, accounts: Sequence[Account]) -> None:
    from cloud_hub.identity.broker_files import LOOPBACK

    if settings.security == "mutual-tls":
        kind, flag = "certificate", " --certificate"
        without = [a.name for a in accounts if a.is_active and a.certificate_fingerprint is None]
    else:
        kind, flag = "password", ""
        without = [a.name for a in accounts if a.is_active and a.password_hash is None]
    if without:
        print(f"without a {kind}, so unable to log in here: {', '.join(without)}  (add NAME --renew{flag})")
    if settings.security == "plain" and settings.host not in LOOPBACK:
        print(f"warning: on {settings.host} passwords and samples cross the network in clear text: use --tls")


def _row(account: Account, authority: Authority) -> tuple[str, ...]:
    state = "active" if account.is_active else f"revoked {_date(account.revoked_at_ms)}"
    credential = "-"
    if account.certificate_fingerprint is not None:
        ends = authority.expiry_of(account.name)
        until = "" if ends is None else f" until {ends:%Y-%m-%d}"
        credential = f"certificate {account.certificate_fingerprint[:16]}{until}"
    elif account.password_hash is not None:
        credential = "password"
    return account.name, account.device or "-", state, _date(account.created_at_ms), credential


def _say_handed(role: Role, name: str, handed: Handed) -> None:
    for path in handed.files:
        print(f"wrote {path}")
    if handed.password is not None:
        print(f"password of {role} {name}, shown this once and kept only as a hash: {handed.password}")


def _say_next(args: argparse.Namespace, *, is_configured: bool) -> None:
    verb = "accounts" if is_configured else "config"
    reload = ", then kill -HUP the mosquitto process" if is_configured else ""
    print(f"next: cloud-hub broker {verb} --out DIR --config {args.config}{reload}")


def _add_verb(
    verbs: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    help_text: str,
    run: Callable[[argparse.Namespace], int],
) -> argparse.ArgumentParser:
    parser = verbs.add_parser(name, help=help_text, description=help_text)
    add_config_argument(parser)
    parser.set_defaults(run=run)
    return parser


def _add_user(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--user", help=f"whom mosquitto becomes when root starts it (default, as root: {DEBIAN_USER})"
    )


def _user(args: argparse.Namespace) -> str | None:
    if args.user is not None or os.geteuid() != 0:
        return str(args.user) if args.user else None
    try:
        return pwd.getpwnam(DEBIAN_USER).pw_name
    except KeyError:
        return getpass.getuser()


def _absolute(path: Path) -> Path:
    path = path.absolute()
    if not str(path).isprintable():
        raise IdentityError(f"--out {str(path)!r} has characters that mosquitto.conf cannot name")
    return path


def _port(text: str) -> int:
    if text.isascii() and text.isdecimal() and 0 < int(text) < 65536:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no port (1 to 65535)")


def _date(at_ms: int | None) -> str:
    if at_ms is None:
        return "-"
    return f"{datetime.datetime.fromtimestamp(at_ms / 1000, tz=datetime.UTC):%Y-%m-%d}"


def now() -> datetime.datetime:
    """This moment, in UTC."""
    return datetime.datetime.now(tz=datetime.UTC)
