"""`cloud-hub evaluate|ablate`: what a bundle does on data, and what each of its parts contributes."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cloud_hub.builder.extra import build_extra
from cloud_hub.errors import BuildError

if TYPE_CHECKING:
    import msgspec

    from cloud_hub.builder.reports.ablate import Promise
    from cloud_hub.builder.reports.traffic import PlanRun, Sender
    from cloud_hub.builder.samples.load import Keys

DEFAULT_EPSILON: Final = 0.005
DEFAULT_DELTA: Final = 0.05
DEFAULT_SPLITS: Final = 5


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the two commands."""
    help_text = "accuracy, uploads, bytes and work of a bundle on data; its certificates held against them"
    parser = subparsers.add_parser("evaluate", help=help_text, description=help_text)
    _add_common(parser)
    parser.add_argument("--point", type=int, metavar="N", help="operating point (default: the plan's own)")
    parser.set_defaults(run=_evaluate)

    help_text = "switch off one part of a bundle's cascade at a time, at the same guarantee"
    parser = subparsers.add_parser("ablate", help=help_text, description=help_text)
    _add_common(parser)
    parser.add_argument(
        "--epsilon", type=float, help=f"default: the bundle's certificate, else {DEFAULT_EPSILON:g}"
    )
    parser.add_argument(
        "--delta", type=float, help=f"default: the bundle's certificate, else {DEFAULT_DELTA:g}"
    )
    parser.add_argument(
        "--variant",
        type=_variant,
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="another build with the same full model, e.g. one with --distillation 0",
    )
    parser.add_argument(
        "--splits",
        type=int,
        default=DEFAULT_SPLITS,
        metavar="N",
        help="draws of halves (default: %(default)s)",
    )
    parser.set_defaults(run=_ablate)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "bundle", metavar="BUNDLE", help="a build's folder, a bundle, or a shipped model's name"
    )
    parser.add_argument(
        "--data", type=Path, required=True, metavar="FILE", help=".npz (x_test or x), .npy, or a folder"
    )
    parser.add_argument(
        "--full", type=Path, metavar="FILE", help="the full model (default: full.onnx beside the bundle)"
    )
    for role, default in (("x", "x"), ("y", None), ("groups", None), ("labels", None)):
        parser.add_argument(
            f"--{role}-key", default=default, metavar="NAME", help=f"as for cloud-hub build (default: {role})"
        )
    parser.add_argument("--plan", metavar="NAME", help="default: the bundle's own")
    parser.add_argument(
        "--rate", type=float, metavar="HZ", help="samples a second of one board (default: batches are full)"
    )
    parser.add_argument("--json", action="store_true", help="write JSON and nothing else")


def _evaluate(args: argparse.Namespace) -> int:
    with build_extra():
        # Only here: `cloud-hub run` registers these commands too, and should not pay for what they import.
        from cloud_hub.builder.reports.evaluate import evaluate
        from cloud_hub.builder.reports.inputs import read_inputs
        from cloud_hub.builder.reports.tables import print_evaluation

    sender = _sender(args)
    run = read_inputs(args.bundle, args.data, args.full, _keys(args)).run(args.plan)
    evaluation = evaluate(run, run.plan.chosen if args.point is None else args.point, sender)
    if args.json:
        _write_json(evaluation)
    else:
        print_evaluation(evaluation)
    return 0


def _ablate(args: argparse.Namespace) -> int:
    with build_extra():
        from cloud_hub.builder.reports.ablate import ablate, standard_variants
        from cloud_hub.builder.reports.inputs import read_inputs
        from cloud_hub.builder.reports.tables import print_ablation

    sender = _sender(args)
    inputs = read_inputs(args.bundle, args.data, args.full, _keys(args))
    run = inputs.run(args.plan)
    promise = _promise(args, run)
    variants = standard_variants(
        run,
        other_plans=inputs.other_plans(run.plan.name),
        uncalibrated=inputs.uncalibrated(run.plan.rungs),
        variants={name: inputs.outcomes_of(path, run.plan) for name, path in args.variant},
    )
    ablation = ablate(run, variants, promise, sender)
    if args.json:
        _write_json(ablation)
    else:
        print_ablation(ablation)
    return 0


def _variant(text: str) -> tuple[str, str]:
    name, _, path = text.partition("=")
    if not name or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=DIR, such as 'no distillation=other'")
    return name, path


def _keys(args: argparse.Namespace) -> Keys:
    from cloud_hub.builder.samples.load import Keys

    return Keys(args.x_key, args.y_key, args.groups_key, args.labels_key)


def _sender(args: argparse.Namespace) -> Sender:
    from cloud_hub.builder.reports.traffic import Sender

    if args.rate is not None and not 0 < args.rate < math.inf:
        raise BuildError(f"--rate {args.rate} is no number of samples a second")
    return Sender(samples_per_s=args.rate)


def _promise(args: argparse.Namespace, run: PlanRun) -> Promise:
    """What the bundle promises, unless told otherwise."""
    from cloud_hub.builder.reports.ablate import Promise

    kind = "disagreement" if run.outcomes.labels is None else "loss"
    certificate = next(
        (
            each
            for each in run.bundle.weights.certificates
            if each.plan == run.plan.name and each.kind == kind
        ),
        None,
    )
    epsilon, delta = args.epsilon, args.delta
    if epsilon is None:
        epsilon = DEFAULT_EPSILON if certificate is None else certificate.epsilon
    if delta is None:
        delta = DEFAULT_DELTA if certificate is None else certificate.delta
    for name, share in (("epsilon", epsilon), ("delta", delta)):
        if not 0 < share < 1:
            raise BuildError(f"--{name} {share} is not between 0 and 1: give a share such as 0.005 for 0.5 %")
    if not 1 <= args.splits <= 100:
        raise BuildError(f"--splits {args.splits}: 1 to 100 draws")
    return Promise(epsilon, delta, args.splits)


def _write_json(result: msgspec.Struct) -> None:
    import msgspec

    encoded = msgspec.json.format(msgspec.json.encode(result), indent=2)
    sys.stdout.write(encoded.decode() + "\n")
