"""`cloud-hub train` and `cloud-hub release list|show|add`: beside a hub at work, or with it stopped."""

# ruff: noqa: T201 - what a command prints is its result

from __future__ import annotations

import argparse
import getpass
import os
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rich.console import Console
from rich.progress import Progress

from cloud_hub.commands import database_of, print_json, shown_time
from cloud_hub.config import add_config_argument, load_config
from cloud_hub.errors import BuildError, CertificateError, StoreError
from cloud_hub.releases.release_commands import register as register_signing
from cloud_hub.rollouts.release_commands import register as register_service
from cloud_hub.store.beside import open_beside
from cloud_hub.store.releases import get_release, list_releases

if TYPE_CHECKING:
    from cloud_hub.candidates.hub_training import Trained
    from cloud_hub.candidates.outcome import Figures
    from cloud_hub.registry import Release
    from edge_cascade.policy import Certificate

_TRAIN: Final = """\
Fine-tune a model on the cases that boards have sent and that have a verdict, without any board: the baseline
that rounds of federated averaging are compared with. Judged on the holdout like a round, quantised and
certified anew, and registered as a draft.
"""


_ADD: Final = """\
Copy a bundle into the registry as a draft of its model. It is held against the installed bundle on holdout
cases that a guard has looked at before, which spends none of them.
"""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands to the program's."""
    train = subparsers.add_parser(
        "train", help="fine-tune a model in the hub on uploaded cases", description=_TRAIN
    )
    train.add_argument("model", help="the model's name")
    train.add_argument("--epochs", type=_count, default=10, metavar="N", help="default: 10")
    train.add_argument("--batch-size", type=_count, default=32, metavar="N", help="default: 32")
    train.add_argument(
        "--learning-rate", type=_positive, default=0.001, metavar="RATE", help="default: 0.001"
    )
    train.add_argument("--momentum", type=_momentum, default=0.9, metavar="SHARE", help="default: 0.9")
    train.add_argument(
        "--prox-mu",
        type=_not_negative,
        default=0.0,
        metavar="NUMBER",
        help="pull towards the release in the fleet (default: 0)",
    )
    train.add_argument(
        "--soft-share",
        type=_share,
        default=0.0,
        metavar="SHARE",
        help="of a target, the share of the full model's probabilities (default: 0)",
    )
    train.add_argument(
        "--max-examples", type=_count, metavar="N", help="the newest are taken (default: 20000)"
    )
    train.add_argument("--seed", type=int, default=0, metavar="N", help="of the order (default: 0)")
    train.add_argument(
        "--if-not-worse",
        action="store_true",
        help="register what is not worse than the release in the fleet, better or not",
    )
    train.set_defaults(run=_run_train)

    release = subparsers.add_parser("release", help="the releases of the registry")
    actions = release.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="show all, the newest first")
    listing.add_argument("--model", help="only this model's")
    listing.set_defaults(run=_list)
    show = actions.add_parser("show", help="where one comes from and what was measured of it")
    show.add_argument("id", type=_count, help="its number")
    show.set_defaults(run=_show)

    add = actions.add_parser("add", help="register a bundle that was built elsewhere", description=_ADD)
    add.add_argument("bundle", type=Path, help="its directory, as `cloud-hub build` writes it")
    add.set_defaults(run=_add)

    register_signing(actions)
    register_service(actions)

    for command in (train, listing, show, add):
        command.add_argument("--json", action="store_true", help="print JSON, and nothing else")
        add_config_argument(command)


def _run_train(args: argparse.Namespace) -> int:
    from cloud_hub.candidates.hub_training import HubTraining, train_in_hub
    from cloud_hub.candidates.outcome import Refused, Waiting
    from edge_cascade.training import Schedule

    config = load_config(args.config)
    training = HubTraining(
        schedule=Schedule(args.epochs, args.batch_size, args.learning_rate, args.momentum, args.prox_mu),
        soft_share=args.soft_share,
        max_examples=args.max_examples,
        seed=args.seed,
        must_be_better=not args.if_not_worse,
        threads=len(os.sched_getaffinity(0)),
    )
    console = Console(stderr=True)
    # Whatever reports on the way, only the result goes to stdout.
    with (
        redirect_stdout(sys.stderr),
        open_beside(config.state_dir, config.store.url) as store,
        Progress(console=console, transient=True, disable=not console.is_terminal) as progress,
    ):
        task = progress.add_task("training", total=None)
        trained = train_in_hub(
            config,
            store,
            args.model,
            training,
            say=lambda line: console.print(line, markup=False, highlight=False),
            on_batch=lambda done, total: progress.update(task, completed=done, total=total),
            now_ms=time.time_ns() // 1_000_000,
        )
    match trained.outcome:
        case Waiting() as waiting:
            _print_no_release(args, trained, "waiting")
            raise CertificateError(str(waiting))
        case Refused(why):
            _print_no_release(args, trained, "refused")
            raise BuildError(why)
        case release:
            if args.json:
                print_json({"outcome": "draft", "release": release, "training": trained.figures})
            else:
                _print_release(release)
    return 0


def _print_no_release(args: argparse.Namespace, trained: Trained, outcome: str) -> None:
    if args.json:
        print_json({"outcome": outcome, "why": str(trained.outcome), "training": trained.figures})


def _add(args: argparse.Namespace) -> int:
    from cloud_hub.candidates.added import add_bundle

    config = load_config(args.config)
    with open_beside(config.state_dir, config.store.url) as store:
        release = add_bundle(
            config, store, args.bundle, by=getpass.getuser(), now_ms=time.time_ns() // 1_000_000
        )
    if args.json:
        print_json(release)
    else:
        _print_release(release)
    return 0


def _list(args: argparse.Namespace) -> int:
    from cloud_hub.registry import release_of, releases_of

    with database_of(load_config(args.config)) as database:
        rows = database.run(lambda c: list_releases(c, model=args.model))
    if args.json:
        releases, unreadable = releases_of(rows)
        print_json(releases)
        for each in unreadable:
            print(f"cloud-hub: {each.why}", file=sys.stderr)
        return 0
    print(
        f"{'id':<6}{'model':<20}{'state':<12}{'bundle':<14}{'trained':<11}{'accuracy':<18}{'upload':<10}created"
    )
    for row in rows:
        print(f"{row['id']:<6}{row['model']:<20}{row['state']:<12}{row['bundle'].hex()[:12]:<14}", end="")
        try:
            print(_measured(release_of(row)))
        except StoreError:
            print("what is kept of it cannot be read")
    return 0


def _measured(release: Release) -> str:
    guard, figures = release.figures.guard, release.figures
    accuracy = f"{_percent(guard.before)} -> {_percent(guard.after)} %"
    upload = f"{100 * figures.upload_share:.1f} %"
    created = shown_time(release.created_at_ms)
    return f"{release.lineage.trained:<11}{accuracy:<18}{upload:<10}{created}"


def _show(args: argparse.Namespace) -> int:
    from cloud_hub.registry import release_of

    with database_of(load_config(args.config)) as database:
        release = release_of(database.run(lambda c: get_release(c, args.id)))
    if args.json:
        print_json(release)
    else:
        _print_release(release)
    return 0


def _print_release(release: Release) -> None:
    lineage, figures = release.lineage, release.figures
    made = {
        "series": lineage.series,
        "rounds": lineage.rounds,
        "strategy": lineage.strategy,
        "examples": lineage.examples,
        "schedule": lineage.schedule,
    }
    said = ", ".join(f"{name} {value}" for name, value in made.items() if value is not None)
    size = f"weights only, {figures.weights_bytes:,} bytes"
    if figures.whole_release:
        size = (
            f"whole release of {figures.graph_bytes + figures.weights_bytes:,} bytes: {figures.whole_release}"
        )
    lines = [
        ("release", f"{release.id} of {release.model}, {release.state}"),
        ("bundle", release.bundle),
        ("parent", lineage.parent),
        ("trained", f"{lineage.trained}: {said}"),
        ("holdout", f"{figures.guard.says} ({figures.guard.samples} cases)"),
        ("thresholds", f"chosen on {figures.thresholds_from}"),
        *(("certificate", _certificate(each)) for each in figures.certificates),
        *([] if figures.certificates else [("certificate", "none, as its parent")]),
        ("upload", _upload(figures)),
        ("size", size),
        ("created", f"{shown_time(release.created_at_ms)} by {release.created_by}"),
    ]
    for name, text in lines:
        print(f"{name:<13}{text}")


def _certificate(each: Certificate) -> str:
    return (
        f"{each.plan}: {each.kind} at most {100 * each.epsilon:g} % with confidence "
        f"{100 * (1 - each.delta):g} %, on {each.samples} fresh cases"
    )


def _upload(figures: Figures) -> str:
    return (
        f"{100 * figures.upload_share:.1f} % expected with plan {figures.default_plan}; its parent said "
        f"{100 * figures.base_upload_share:.1f} %, for its own promise and on its own data"
    )


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def _number(text: str, low: float, high: float, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
    return value


def _positive(text: str) -> float:
    return _number(text, 1e-9, 1e3, "a number above 0, at most 1000")


def _not_negative(text: str) -> float:
    return _number(text, 0.0, 1e3, "a number from 0 to 1000")


def _momentum(text: str) -> float:
    return _number(text, 0.0, 0.999, "a share from 0 to 0.999")


def _share(text: str) -> float:
    return _number(text, 0.0, 1.0, "a share from 0 to 1")
