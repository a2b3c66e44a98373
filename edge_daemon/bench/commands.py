"""`edge-daemon profile` and `edge-daemon bench`: arguments, a progress bar, tables and files."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final, get_args

from edge_daemon.arguments import between
from edge_daemon.config import Runtime
from edge_daemon.errors import EXIT_CONFIG, EXIT_MODEL, EXIT_OK, EdgeError, ModelError

if TYPE_CHECKING:
    from rich.console import Console

    from edge_daemon.bench.report import BenchReport

STDOUT: Final = Path("-")


class OutputError(EdgeError):
    """A file that was asked for and cannot be written."""

    exit_code = EXIT_CONFIG


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the two commands."""
    profile = commands.add_parser(
        "profile",
        help="measure what the stages of networks cost on this board",
        description="Measure every stage of the shipped models, and of the bundles named, at every "
        "precision. The file tells `cloud-hub build` what this board is like.",
    )
    profile.add_argument("bundles", nargs="*", default=[], metavar="BUNDLE", help="bundles of your own")
    profile.add_argument("--out", type=Path, metavar="FILE", help="write the profile there")
    profile.add_argument("--json", action="store_true", help="print the profile as JSON, the table to stderr")
    _add_common(profile, seconds=30.0)
    profile.set_defaults(run=_profile)

    bench = commands.add_parser(
        "bench",
        help="measure a bundle on this board",
        description="Measure one bundle on this board: golden outputs, time of every rung and of the whole "
        "ladder, int8 against fp32, which plan to run, start, memory, watts and temperatures.",
    )
    bench.add_argument(
        "bundle", metavar="BUNDLE", help="a shipped model's name, a bundle, or the directory of a build"
    )
    bench.add_argument("--plan", metavar="NAME", help="a plan of the bundle (default: its own)")
    bench.add_argument("--point", type=int, metavar="N", help="an operating point (default: the chosen one)")
    bench.add_argument(
        "--data", type=Path, metavar="FILE", help="samples as `x` or `x_test` (n, ...) in an .npz file"
    )
    bench.add_argument(
        "--rate", type=_rate, default=50.0, metavar="HZ", help="of the paced samples (default: 50)"
    )
    bench.add_argument(
        "--json", type=Path, metavar="FILE", help="write the report there (-: stdout), the tables to stderr"
    )
    _add_common(bench, seconds=20.0)
    bench.set_defaults(run=_bench)


def _add_common(parser: argparse.ArgumentParser, *, seconds: float) -> None:
    parser.add_argument(
        "--seconds",
        type=_seconds,
        default=seconds,
        metavar="S",
        help=f"about how long (default: {seconds:g})",
    )
    parser.add_argument(
        "--runtime",
        choices=get_args(Runtime),
        default="onnxruntime",
        help="what runs the stages (default: onnxruntime)",
    )


def _profile(options: argparse.Namespace) -> int:
    from rich.console import Console

    from edge_cascade.bundle import load_bundle
    from edge_cascade.errors import CascadeError
    from edge_cascade.profile import ProfileError, encode_profile, write_profile
    from edge_cascade.shipped import find_bundle, shipped_models
    from edge_cascade.stage_timing import runnable_stages
    from edge_daemon.bench.run import Setting, profile_bundles
    from edge_daemon.bench.tables import print_profile
    from edge_daemon.models import OPENERS

    _check_output("--out", options.out)
    bundles = {}
    for name in (*shipped_models(), *options.bundles):
        try:
            bundle = load_bundle(find_bundle(name))
        except CascadeError as error:
            raise ModelError(f"bundle {name!r}: {error}") from error
        if runnable_stages(bundle, options.runtime):
            bundles[bundle.bundle_id] = bundle
    if not bundles:
        raise ModelError(
            f"profile: no bundle has files for {options.runtime}; name one that was built with them"
        )
    try:
        with _progress("measuring stages", options.seconds) as advance:
            setting = Setting(options.seconds, options.runtime, OPENERS[options.runtime], advance=advance)
            profile = profile_bundles(list(bundles.values()), setting)
    except CascadeError as error:
        raise ModelError(f"profile: {error}") from error
    if options.json:
        sys.stdout.write(encode_profile(profile).decode())
    print_profile(_console(to_stderr=options.json), profile)
    stderr = Console(stderr=True, highlight=False)
    if options.out is None:
        stderr.print("--out FILE keeps the profile for `cloud-hub build`")
    else:
        try:
            write_profile(options.out, profile)
        except ProfileError as error:
            raise OutputError(f"--out {error}") from error
        stderr.print(f"written: {options.out}")
    return EXIT_OK


def _bench(options: argparse.Namespace) -> int:
    from edge_cascade.errors import CascadeError
    from edge_cascade.shipped import find_bundle
    from edge_daemon.bench.run import Setting, bench_bundle
    from edge_daemon.bench.samples import default_samples, load_samples
    from edge_daemon.bench.tables import print_report
    from edge_daemon.models import OPENERS

    _check_output("--json", options.json)
    try:
        directory = find_bundle(options.bundle)
        with _progress(f"measuring {options.bundle}", options.seconds) as advance:
            setting = Setting(
                options.seconds, options.runtime, OPENERS[options.runtime], options.rate, advance
            )
            report = bench_bundle(
                directory,
                setting,
                plan=options.plan,
                point=options.point,
                samples_of=lambda bundle: (
                    default_samples(options.bundle, bundle)
                    if options.data is None
                    else load_samples(options.data, bundle)
                ),
            )
    except CascadeError as error:
        raise ModelError(f"bundle {options.bundle!r}: {error}") from error
    print_report(_console(to_stderr=options.json is not None), report)
    if options.json is not None:
        _write_report(options.json, report)
    if not report.golden_passes:
        sys.stderr.write(
            f"edge-daemon: bundle {options.bundle!r}: this board computes something else than the builder "
            "did; what was calibrated may not hold here\n"
        )
        return EXIT_MODEL
    return EXIT_OK


def _check_output(option: str, path: Path | None) -> None:
    """Say now what would otherwise be said after the measurement."""
    if path is None or path == STDOUT:
        return
    if not path.parent.is_dir():
        raise OutputError(f"{option} {path}: the directory {path.parent} does not exist; make it first")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise OutputError(f"{option} {path}: cannot be written; name a file in a directory of yours")


def _write_report(path: Path, report: BenchReport) -> None:
    from edge_cascade.durable import write_durably
    from edge_daemon.bench.report import encode_report

    if path == STDOUT:
        sys.stdout.write(encode_report(report).decode())
        return
    try:
        write_durably(path, encode_report(report))
    except OSError as error:
        raise OutputError(f"--json {path}: {error.strerror}") from error


@contextmanager
def _progress(what: str, seconds: float) -> Iterator[Callable[[float], None]]:
    """A bar that is drawn between calls alone: a drawing thread would be measured with them."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(
        *columns, console=console, auto_refresh=False, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(what, total=seconds)
        drawn_s = 0.0

        def advance(passed_s: float) -> None:
            nonlocal drawn_s
            bar.advance(task, passed_s)
            drawn_s += passed_s
            if drawn_s >= 0.5:
                drawn_s = 0.0
                bar.refresh()

        yield advance


def _console(*, to_stderr: bool) -> Console:
    from rich.console import Console

    console = Console(stderr=to_stderr)
    # A pipe has no width; the default of 80 would break the tables.
    return console if console.is_terminal else Console(stderr=to_stderr, width=140)


def _rate(text: str) -> float:
    return between(text, 0.1, 10_000.0, "a rate from 0.1 to 10000")


def _seconds(text: str) -> float:
    return between(text, 1.0, 3600.0, "a number of seconds from 1 to 3600")
