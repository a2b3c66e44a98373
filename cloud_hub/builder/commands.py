"""`cloud-hub build`: its options are the keys of a recipe; what is typed outranks what the file says."""

# ruff: noqa: T201 - what a command prints is its result

from __future__ import annotations

import argparse
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from cloud_hub.builder.extra import build_extra
from cloud_hub.builder.request import BuildRequest, make_request, read_recipe

INTERRUPTED: Final = 130

_DESCRIPTION: Final = """\
Turn a trained classifier and data into a bundle for the boards: a small network with early exits (yours with
--edge, else one that is trained here), quantised, with thresholds whose cost in accuracy is certified. Writes
DIR/bundle for the boards, DIR/full.onnx for the hub, DIR/card.html and card.md to read, DIR/report.json.
"""

_SAMPLES: Final = """\
The full model is given (x * scale - mean) / std. A list that begins with a minus sign needs an equals sign:
--mean=-1.5,2. With --rebase all this is the bundle's; what is typed must be the same.
"""

_NETWORK: Final = """\
With --rebase nothing is trained: what a recipe says of its network is left out, what is typed is refused.
"""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "build", help="turn a trained classifier and data into a certified bundle", description=_DESCRIPTION
    )
    parser.set_defaults(run=_build)
    parser.add_argument(
        "recipe",
        nargs="?",
        type=Path,
        metavar="RECIPE",
        help="a TOML file with these options as keys",
    )
    _add_inputs(parser)
    _add_promise(parser)
    _add_samples(parser)
    _add_network(parser)
    parser.add_argument("--json", action="store_true", help="print the report as JSON, and nothing else")


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("inputs and result")
    _add(group, "--full", metavar="FILE", help="the trained classifier, ONNX (required)")
    _add(
        group,
        "--data",
        metavar="PATH",
        help=".npz with x and y or x_train, ..., .npy, or a folder per class (required)",
    )
    _add(group, "--edge", metavar="FILE", help="a smaller classifier of your own, ONNX: it gets exits")
    _add(group, "--out", metavar="DIR", help="the directory to write (required)")
    _add(
        group,
        "--rebase",
        metavar="BUNDLE",
        help="keep this build's or shipped model's network, certify it anew for --full",
    )
    _add(
        group,
        "--calibration-is-fresh",
        action=argparse.BooleanOptionalAction,
        help="the network of --edge or --rebase has seen none of the data, though it is in one piece",
    )
    _add(
        group,
        "--model",
        metavar="NAME",
        help="the model's name (default: that of --rebase, or the last part of --out)",
    )
    _add(group, "--version", metavar="TEXT", help="the bundle's version (default: 1.0.0)")
    _add(group, "--seed", type=int, metavar="N", help="seed of splits and training (default: 0)")
    _add(group, "--max-bytes", type=int, metavar="N", help="memory that the data may take (default: 2 GiB)")
    for role, text, usual in (
        ("x", "samples", " (default: x)"),
        ("y", "labels", " (default: y)"),
        ("groups", "recording, machine or subject of each sample", " (default: groups)"),
        ("labels", "names of the labels", " (default: labels or classes)"),
    ):
        _add(group, f"--{role}-key", metavar="NAME", help=f"the array that holds the {text}{usual}")


def _add_promise(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the promise")
    _add(
        group,
        "--epsilon",
        type=float,
        metavar="SHARE",
        help="share of samples that may be lost: answered wrongly on the board, rightly by --full "
        "(default: 0.005)",
    )
    _add(group, "--delta", type=float, metavar="SHARE", help="1 - confidence of the promise (default: 0.05)")
    _add(
        group,
        "--disagreement-epsilon",
        type=float,
        metavar="SHARE",
        help="bound on answers that differ from the full model's (default: from the data)",
    )
    _add(
        group,
        "--max-upload",
        type=float,
        metavar="SHARE",
        help="refuse a bundle that sends more samples to the hub",
    )
    _add(group, "--plans", type=_words, metavar="NAME,...", help="int8, int8-fp32, fp32 (default: all three)")
    _add(
        group,
        "--uncertified",
        action=argparse.BooleanOptionalAction,
        help="fit thresholds and promise nothing, for too little data",
    )


def _add_samples(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what a sample is", _SAMPLES)
    _add(group, "--scale", type=float, metavar="NUMBER", help="default: 1")
    _add(group, "--mean", type=_numbers, metavar="NUMBER,...", help="one value or one a channel (default: 0)")
    _add(group, "--std", type=_numbers, metavar="NUMBER,...", help="one value or one a channel (default: 1)")
    _add(
        group,
        "--layout",
        choices=("channels_first", "channels_last"),
        help="which axis of a sample holds the channels (default: channels_first)",
    )
    _add(
        group,
        "--encoding",
        choices=("auto", "float32", "int8", "uint8"),
        help="how samples travel to the hub (default: uint8 for data of that type, else int8)",
    )
    _add(
        group,
        "--wire-scale",
        type=float,
        metavar="NUMBER",
        help="a step of int8 or uint8 (default: 1 for uint8 data, else by sample)",
    )
    _add(group, "--window", type=int, metavar="N", help="samples are windows of N values of a stream")
    _add(
        group,
        "--hop",
        type=int,
        metavar="N",
        help="values between windows on the board (default: window)",
    )
    _add(group, "--window-overlap", type=int, metavar="N", help="values that neighbours in the data share")


def _add_network(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the board's network", _NETWORK)
    _add(
        group,
        "--exits",
        type=_numbers,
        metavar="SHARE,...",
        help="where exits go in --edge, by cost (0.2,0.5)",
    )
    _add(group, "--cuts", type=_words, metavar="VALUE,...", help="where exits go in --edge, by name")
    _add(
        group,
        "--fine-tune",
        action=argparse.BooleanOptionalAction,
        help="train all of --edge from --full, not its exits alone; needs no torch",
    )
    _add(
        group,
        "--learning-rate",
        type=float,
        metavar="RATE",
        help="of --fine-tune, at its highest (default: 0.003)",
    )
    _add(
        group,
        "--size",
        choices=("auto", "small", "medium", "large"),
        help="of the network that is trained (default: medium, or the largest in budget)",
    )
    _add(group, "--budget-ms", type=float, metavar="MS", help="time that all its stages may take together")
    _add(
        group,
        "--budget-kb",
        type=float,
        metavar="KB",
        help="size of its weights, both precisions together",
    )
    _add(group, "--profile", metavar="FILE", help="what `edge-daemon profile` measured on the board")
    _add(group, "--epochs", type=int, metavar="N", help="passes over the training data (default: 15)")
    _add(group, "--batch", type=int, metavar="N", help="samples in a step (default: 128)")
    _add(group, "--distillation", type=float, metavar="SHARE", help="the full model's say (default: 0.5)")
    _add(
        group,
        "--litert",
        action=argparse.BooleanOptionalAction,
        help="write its stages for LiteRT as well",
    )


def _add(group: argparse._ArgumentGroup, name: str, **options: Any) -> None:
    # Absent from the result unless typed, so that a recipe's value or the default stands.
    group.add_argument(name, default=argparse.SUPPRESS, **options)


def _words(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 0.2,0.5") from error


def request_of(args: argparse.Namespace) -> BuildRequest:
    """The request of a parsed command line."""
    given = {name: value for name, value in vars(args).items() if name in BuildRequest.__struct_fields__}
    return make_request(given) if args.recipe is None else read_recipe(args.recipe, given)


def _build(args: argparse.Namespace) -> int:
    request = request_of(args)
    with build_extra():
        from cloud_hub.builder.build import build
        from cloud_hub.builder.reports.summary import print_summary

    console = Console(stderr=True)
    try:
        # Whatever reports on the way, only the result goes to stdout.
        with redirect_stdout(sys.stderr):
            built = build(request, console)
    except KeyboardInterrupt:
        print("cloud-hub: interrupted; the same command goes on where this one stopped", file=sys.stderr)
        return INTERRUPTED
    if args.json:
        print((built.out / "report.json").read_text(encoding="utf-8"), end="")
    else:
        print_summary(built)
    return 0
