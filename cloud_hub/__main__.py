"""The `cloud-hub` program: each area registers its own commands, which return the exit code."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import logging
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Final

from cloud_hub.config import add_config_argument, load_config, warnings_about
from cloud_hub.errors import HubError
from edge_cascade.commands import run_command
from edge_cascade.errors import CascadeError
from edge_cascade.logs import start_logging

AREAS: Final = (
    "cloud_hub.admin.commands",
    "cloud_hub.identity.commands",
    "cloud_hub.builder.commands",
    "cloud_hub.builder.commands_report",
    "cloud_hub.candidates.commands",
    "cloud_hub.federation.commands",
    "cloud_hub.releases.commands",
    "cloud_hub.rollouts.commands",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; its exit code (see `cloud_hub.errors`)."""
    args = build_parser().parse_args(argv)

    def command() -> int:
        try:
            return int(args.run(args))
        except (HubError, CascadeError) as error:
            print(f"cloud-hub: {error}", file=sys.stderr)
            return error.exit_code if isinstance(error, HubError) else 1

    return run_command("cloud-hub", command)


def build_parser() -> argparse.ArgumentParser:
    """The commands of every area."""
    parser = argparse.ArgumentParser(
        prog="cloud-hub",
        description="Take the fleet's uncertain cases, answer them with the full model, keep them all.",
    )
    parser.add_argument("--version", action="version", version=f"cloud-hub {version('edge-daemon')}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = subparsers.add_parser("run", help="run the hub until SIGTERM")
    run.set_defaults(run=_run)
    check = subparsers.add_parser("check-config", help="check the configuration and the models that it names")
    check.set_defaults(run=_check_config)
    for command in (run, check):
        add_config_argument(command)
    for area in AREAS:
        importlib.import_module(area).register(subparsers)
    return parser


def _run(args: argparse.Namespace) -> int:
    config = load_config(args.config)
    start_logging(config.log.level)
    for warning in warnings_about(config):
        logging.getLogger("cloud_hub").warning("%s", warning)
    # Only here: the other commands need neither aiohttp nor a runtime for models.
    from cloud_hub.hub import run

    asyncio.run(run(config))
    return 0


def _check_config(args: argparse.Namespace) -> int:
    config = load_config(args.config)
    for warning in warnings_about(config):
        print(f"warning: {warning}", file=sys.stderr)
    from cloud_hub.admin.named_files import check_files
    from cloud_hub.hub import load_models

    for unseen in check_files(config):
        print(f"warning: {unseen}", file=sys.stderr)
    models = load_models(config)
    print(f"{args.config}: ok, models: {', '.join(models) or 'none'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
