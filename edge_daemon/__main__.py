"""`edge-daemon`: run the device, check its configuration, or simulate a fleet."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from edge_cascade.commands import run_command
from edge_cascade.errors import CascadeError
from edge_cascade.logs import start_logging
from edge_cascade.mqtt import BrokerConfigError
from edge_daemon import __version__
from edge_daemon.bench.commands import register as register_bench
from edge_daemon.commands_releases import register as register_releases
from edge_daemon.config import Config
from edge_daemon.config_file import load_config, warnings_about
from edge_daemon.errors import EXIT_CONFIG, EXIT_DEFECT, EXIT_OK, EdgeError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit codes are listed in `edge_daemon.errors`."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return run_command("edge-daemon", lambda: _run_given(given))


def _run_given(arguments: list[str]) -> int:
    try:
        if arguments and arguments[0] == "--simulate":
            from edge_daemon.simulate.commands import simulate

            return simulate(arguments[1:])
        options = _parser().parse_args(arguments)
        run: int = options.run(options)
        return run
    except EdgeError as error:
        print(f"edge-daemon: {error}", file=sys.stderr)
        return error.exit_code
    except CascadeError as error:
        print(f"edge-daemon: {error}", file=sys.stderr)
        return EXIT_CONFIG if isinstance(error, BrokerConfigError) else EXIT_DEFECT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="edge-daemon",
        description="Classify sensor data on this board and send only the uncertain cases to a hub.",
        epilog="edge-daemon --simulate --help: a virtual fleet with a real broker and a real hub.",
    )
    parser.add_argument("--version", action="version", version=f"edge-daemon {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="serve until SIGTERM")
    run.add_argument("--config", type=Path, required=True, metavar="FILE", help="the TOML configuration")
    run.set_defaults(run=_run)
    check = commands.add_parser("check-config", help="say whether a configuration would start")
    check.add_argument("--config", type=Path, required=True, metavar="FILE", help="the TOML configuration")
    check.set_defaults(run=_check_config)
    register_bench(commands)
    register_releases(commands)
    return parser


def _run(options: argparse.Namespace) -> int:
    config = _load(options.config)
    start_logging(config.log.level)
    # Not at the top: the runtime takes a while to load and a wrong configuration should not wait for it.
    from edge_daemon.daemon import Daemon
    from edge_daemon.memory import favour_answers
    from edge_daemon.service import serve

    if config.releases.enabled:
        from edge_daemon.releases.wiring import count_start

        count_start(config)
    daemon = Daemon(config)
    favour_answers()
    asyncio.run(serve(config, daemon))
    return EXIT_OK


def _check_config(options: argparse.Namespace) -> int:
    config = _load(options.config)
    from edge_daemon.daemon import Daemon

    # Reads and opens the bundles as `run` would, and starts nothing.
    daemon = Daemon(config)
    for model in daemon.running_models():
        print(
            f"model {model.model}: bundle {model.bundle.hex()[:12]}, plan {model.plan}, point {model.point}"
        )
    for name in daemon.learning_models():
        print(f"model {name}: joins rounds that {config.training.hub_key} has signed")
    print(f"{options.config}: ok")
    return EXIT_OK


def _load(path: Path) -> Config:
    config = load_config(path, os.environ)
    for warning in warnings_about(config):
        print(f"edge-daemon: warning: {warning}", file=sys.stderr)
    return config


if __name__ == "__main__":
    sys.exit(main())
