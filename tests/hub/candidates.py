"""A certified model with an untrained trunk, and a store full of cases from boards that run it."""

from functools import cache

import numpy as np

from cloud_hub.candidates.base import load_base
from cloud_hub.config import Config, HubSection, ModelSection
from cloud_hub.full_model import FullModelWorker
from cloud_hub.store.verdicts import label_case
from edge_cascade.manifest import Wire
from edge_cascade.messages import Reason, Use
from edge_cascade.packing import pack_probabilities
from edge_cascade.tensors import encode_tensor
from edge_cascade.training import Schedule
from tests.builder.models import CLASSES, built, images
from tests.hub.fleet import a_delivery, a_new_case

MODEL = "digit-like"
QUICK = Schedule(epochs=15, batch_size=32, learning_rate=0.01, momentum=0.9)


def config_of(state_dir, bundle=None):
    return Config(
        hub=HubSection(state_dir=str(state_dir)),
        models=(ModelSection(bundle=str(bundle or built() / "bundle")),),
    )


@cache
def the_base():
    return load_base(config_of("/nowhere"), MODEL)


def send(store, count, seed, *, first=0, use=Use.TRAIN, audited=None, x=None):
    """Commit cases of images; holdout cases are audits."""
    audited = use is Use.HOLDOUT if audited is None else audited
    more = {"audit_ppm": 9, "escalated": False, "reason": Reason.AUDIT} if audited else {}
    shown = images(count, seed).x if x is None else x
    cases = [
        a_new_case(
            first + index,
            device=f"press-{seed}",
            model=MODEL,
            use=use,
            tensor=encode_tensor(each.astype(np.float32), Wire("uint8", 1.0)),
            **more,
        )
        for index, each in enumerate(shown)
    ]
    for start in range(0, count, 500):
        store.commit([a_delivery(*cases[start : start + 500], device=f"press-{seed}")], now_ms=1)


def answer(store, base=None):
    base = base or the_base()
    worker = FullModelWorker(store, {MODEL: base.model})
    while worker.answer_some(base.model):
        pass


def label(store, labels):
    """Let a person label cases, by id, in one transaction."""

    def speak(connection):
        for case_id, to in labels.items():
            label_case(
                connection,
                case_id,
                to,
                probabilities=pack_probabilities([float(index == to) for index in range(CLASSES)]),
                full_model=the_base().model.full_model,
                labelled_by="ada",
                now_ms=2,
            )

    store.database.run(speak)
