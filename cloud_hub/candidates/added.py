"""A bundle that was built elsewhere becomes a draft release. It is judged where that costs nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from cloud_hub.builder.collect import stages_of_bundle
from cloud_hub.candidates.judge import labels_as_shipped
from cloud_hub.candidates.outcome import Figures, Lineage
from cloud_hub.config import Config
from cloud_hub.core.federation.guard import GuardFigures, GuardRules, decide_better, figures_of
from cloud_hub.errors import BuildError
from cloud_hub.examples import CaseStore, read_examples
from cloud_hub.models import HubModel, find_model, load_model
from cloud_hub.registry import Release, register_bundle
from cloud_hub.store.acts import note_act
from cloud_hub.store.releases import looked_at
from edge_cascade.bundle import Bundle, load_bundle
from edge_cascade.errors import BackendError, BundleError
from edge_cascade.messages import Use

MOST_CASES: Final = 5_000
"""Of the holdout, the newest that somebody has looked at."""


def add_bundle(config: Config, store: CaseStore, directory: Path, *, by: str, now_ms: int) -> Release:
    """Register the bundle in a directory as a draft; the release that there is where it is registered.

    It is held against the bundle that its model was installed with, on holdout cases that a guard has looked
    at before: so no case is spent, and there may be none.

    Raises:
        BuildError: when it is no bundle, or boards or the hub could not take it in place of theirs.
        ConfigError, ModelError: when the hub has no such model, or cannot use it.
        StoreError: when the store cannot be read or written now.
    """
    try:
        bundle = load_bundle(directory)
    except (BundleError, OSError) as error:
        raise BuildError(str(error)) from error
    section, _ = find_model(config.models, bundle.graph.model)
    model = load_model(section.bundle, section.full)
    base = model.bundle
    if base is None:
        raise BuildError(f"the hub has no bundle of {model.name!r} to hold this one against")
    _check_exchangeable(bundle, base)
    release = register_bundle(
        store.database,
        config.state_dir,
        directory,
        _lineage(bundle, base),
        _figures(bundle, base, _judge(store, model, bundle, base)),
        created_by=by,
        now_ms=now_ms,
    )
    store.database.run(
        lambda c: note_act(
            c, by, "release.add", f"release {release.id}", f"bundle {bundle.bundle_id[:12]}", now_ms=now_ms
        )
    )
    return release


def _check_exchangeable(bundle: Bundle, base: Bundle) -> None:
    """Boards refuse another model under the same name; verdicts are only of use from the same full model."""
    for what, new, old in (
        ("labels", bundle.graph.labels, base.graph.labels),
        ("input shape", bundle.graph.input_shape, base.graph.input_shape),
        ("window", bundle.graph.window, base.graph.window),
        ("full model", bundle.graph.full_model_sha256, base.graph.full_model_sha256),
    ):
        if new != old:
            raise BuildError(
                f"its {what} is not that of the hub's {base.graph.model!r}: build it under another name, or "
                "have the hub's configuration name the model that it was built with"
            )


def _judge(store: CaseStore, model: HubModel, bundle: Bundle, base: Bundle) -> GuardFigures:
    upto_id = store.database.run(lambda c: looked_at(c, model.name))
    seen = read_examples(store, model, Use.HOLDOUT, upto_id=upto_id, limit=MOST_CASES)
    if not len(seen):
        return GuardFigures(
            judgement="cannot_judge", says="no holdout case has been looked at yet", samples=0
        )
    try:
        before, after = (
            labels_as_shipped(each, stages_of_bundle(each), each.plan().rungs, seen.x)[-1:]
            for each in (base, bundle)
        )
    except BackendError as error:
        raise BuildError(f"the runtime refuses it: {error}") from error
    return figures_of(decide_better(before, after, seen.labels, GuardRules()), len(seen))


def _lineage(bundle: Bundle, base: Bundle) -> Lineage:
    return Lineage(parent=base.bundle_id, weights=bundle.weights_sha256, trained="elsewhere")


def _figures(bundle: Bundle, base: Bundle, guard: GuardFigures) -> Figures:
    plan, before = bundle.plan(), base.plan()
    is_same_graph = bundle.graph_sha256 == base.graph_sha256
    graph_bytes = sum(len(stage.model) for stage in bundle.stage_models.values())
    return Figures(
        guard=guard,
        certificates=bundle.weights.certificates,
        default_plan=plan.name,
        upload_share=plan.points[plan.chosen].upload_share,
        base_upload_share=before.points[before.chosen].upload_share,
        thresholds_from="what it was built on",
        unseen=0,
        graph_bytes=graph_bytes + (0 if bundle.train_step is None else len(bundle.train_step.model)),
        weights_bytes=sum(
            array.nbytes for stage in bundle.stage_models.values() for array in stage.weights.values()
        ),
        whole_release="" if is_same_graph else "its graph is another one",
    )
