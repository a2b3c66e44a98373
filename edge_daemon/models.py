"""From the configuration's models to pipelines: bundles read, checked and opened on this board's runtime."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from edge_cascade.bundle import Bundle, StageModel, load_bundle
from edge_cascade.errors import CascadeError
from edge_cascade.golden import golden_errors
from edge_cascade.ladder import Ladder, OpenStage, StageRunner
from edge_cascade.pauses import Pause, no_pause
from edge_cascade.shipped import find_bundle
from edge_daemon import __version__
from edge_daemon.audit import AuditCoin
from edge_daemon.config import AuditConfig, ModelConfig, Runtime, SourceConfig
from edge_daemon.errors import ModelError
from edge_daemon.inlet.decode import make_decoder
from edge_daemon.inlet.mqtt import Source
from edge_daemon.inlet.window import Windower
from edge_daemon.pipeline import Pipeline

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Numbering:
    """What makes a case's id: this start of the daemon, and a counter that all pipelines share."""

    boot: bytes
    next_seq: Callable[[], int]


def open_stage(stage: StageModel, feature_shape: tuple[int, ...] | None) -> StageRunner:
    """A stage on onnxruntime with one thread: more of them spin between paced samples."""
    from edge_cascade.backends.onnx import OnnxStage

    return OnnxStage(stage, feature_shape)


def open_litert_stage(stage: StageModel, feature_shape: tuple[int, ...] | None) -> StageRunner:
    """A stage on LiteRT; onnxruntime is then never loaded."""
    from edge_cascade.backends.litert import LitertStage

    return LitertStage(stage, feature_shape)


OPENERS: Final[Mapping[Runtime, OpenStage]] = {"onnxruntime": open_stage, "litert": open_litert_stage}


def open_pipelines(
    models: Sequence[ModelConfig],
    audit: AuditConfig,
    numbering: Numbering,
    *,
    rng: random.Random,
    now_s: Callable[[], float],
    in_place_of: Callable[[Bundle], Bundle | None] = lambda _: None,
) -> dict[str, Pipeline]:
    """A pipeline per configured model, by the model's name.

    `in_place_of` may give another bundle than the installed one; where it does not run, the installed one
    does.

    Raises:
        ModelError: naming the bundle and what is wrong with it.
    """
    pipelines: dict[str, Pipeline] = {}
    for model in models:
        coin = AuditCoin(
            audit.rate,
            audit.max_per_hour,
            random.Random(rng.random()),  # noqa: S311 - no secret
            audit.max_raised_per_hour,
        )
        try:
            installed = load_bundle(find_bundle(model.bundle))
            pipeline = _open_other(in_place_of(installed), model, coin, numbering, now_s)
            if pipeline is None:
                pipeline = _open_first(installed, model, coin, numbering, now_s)
        except CascadeError as error:
            raise ModelError(f"models: bundle {model.bundle!r}: {error}") from error
        name = pipeline.bundle.graph.model
        if name in pipelines:
            raise ModelError(f"models: two bundles are called {name!r}; a model is served once, remove one")
        pipelines[name] = pipeline
    return pipelines


def open_pipeline(
    bundle: Bundle,
    model: ModelConfig,
    coin: AuditCoin,
    numbering: Numbering,
    *,
    now_s: Callable[[], float],
    pause: Pause = no_pause,
) -> Pipeline:
    """One bundle at work as `model` says, on this board's runtime. What it computes was compared before.

    `pause`: see `open_ladder`.

    Raises:
        CascadeError: when the runtime refuses a stage, or there is no such plan or point.
        ModelError: when it needs a newer daemon.
    """
    _check_version(bundle)
    ladder = open_ladder(bundle, model, pause=pause)
    log.info(
        "serving model=%s bundle=%s plan=%s point=%d runtime=%s",
        bundle.graph.model,
        bundle.bundle_id[:12],
        ladder.plan.name,
        ladder.point,
        model.runtime,
    )
    return Pipeline(bundle, ladder, coin, boot=numbering.boot, next_seq=numbering.next_seq, now_s=now_s)


def open_ladder(bundle: Bundle, model: ModelConfig, *, pause: Pause = no_pause) -> Ladder:
    """The bundle's stages on the runtime, plan and point that `model` names. `pause` is called before each.

    Raises:
        CascadeError: when the runtime refuses a stage, or there is no such plan or point.
    """

    def open_next(stage: StageModel, feature_shape: tuple[int, ...] | None) -> StageRunner:
        pause()
        return OPENERS[model.runtime](stage, feature_shape)

    return Ladder(bundle, bundle.plan(model.plan), open_next, point=model.point)


def _open_first(
    bundle: Bundle,
    model: ModelConfig,
    coin: AuditCoin,
    numbering: Numbering,
    now_s: Callable[[], float],
) -> Pipeline:
    """As a start does it: nobody has tried it on this board, and no answer waits for the processor."""
    pipeline = open_pipeline(bundle, model, coin, numbering, now_s=now_s)
    _compare_golden(bundle, pipeline.ladder, model.runtime)
    return pipeline


def _open_other(
    bundle: Bundle | None,
    model: ModelConfig,
    coin: AuditCoin,
    numbering: Numbering,
    now_s: Callable[[], float],
) -> Pipeline | None:
    if bundle is None:
        return None
    try:
        return _open_first(bundle, model, coin, numbering, now_s)
    except (CascadeError, ModelError) as error:
        log.error("serving the installed bundle: %s does not run: %s", bundle.bundle_id[:12], error)
        return None


def open_sources(sources: Sequence[SourceConfig], bundles: dict[str, Bundle]) -> list[Source]:
    """The inlet's sources, each with the model that answers it.

    Raises:
        ModelError: when a source names a model that is not served, or asks for windows that it has none of.
    """
    opened = []
    for index, source in enumerate(sources):
        where = f"inlet.sources[{index}]"
        name = source.model or next(iter(bundles))
        if name not in bundles:
            raise ModelError(f"{where}.model = {name!r}: not served; there are: {', '.join(sorted(bundles))}")
        graph = bundles[name].graph
        if source.window is not None and graph.window is None:
            raise ModelError(f"{where}.window: the bundle of {name!r} declares no window; remove the key")
        windower = (
            Windower(graph.window, graph.input_shape) if source.window is not None and graph.window else None
        )
        decode = make_decoder(source.format, source.field)
        opened.append(Source(source.topic, name, graph.input_shape, decode, windower))
    return opened


def _check_version(bundle: Bundle) -> None:
    needed = bundle.graph.min_daemon
    if _numbers(needed) > _numbers(__version__):
        raise ModelError(f"{bundle.graph.model!r} needs edge-daemon {needed} or newer, this is {__version__}")


def _numbers(version: str) -> tuple[int, ...]:
    parts = version.split(".")
    if not all(part.isdecimal() for part in parts):
        raise ModelError(f"min_daemon {version!r} is no version such as 0.1.0")
    return tuple(int(part) for part in parts)


def _compare_golden(bundle: Bundle, ladder: Ladder, runtime: Runtime) -> None:
    for precision, error in golden_errors(bundle, ladder.plan, OPENERS[runtime]).items():
        tolerance = bundle.weights.tolerance.get(precision, 0.0)
        if error > tolerance:
            log.warning(
                "this board computes something else than the builder did model=%s runtime=%s precision=%s "
                "deviation=%.4f tolerance=%.4f: what was calibrated may not hold here",
                bundle.graph.model, runtime, precision, error, tolerance,
            )  # fmt: skip
