"""The hub's pure decisions."""

import random

import pytest

from cloud_hub.core.admission import RejectedError, Shape, admit_batch, device_label
from cloud_hub.core.failures import FailureLimit
from cloud_hub.core.holdout import decide_use
from cloud_hub.core.outbox import (
    FIRST_RETRY_MS,
    LONGEST_RETRY_MS,
    OFFLINE_RETRY_MS,
    DueVerdict,
    next_send_ms,
    select_frames,
    select_turn,
)
from edge_cascade.codec import encode
from edge_cascade.gate import Exit
from edge_cascade.manifest import Wire
from edge_cascade.messages import Reason, Use
from edge_cascade.tensors import encode_tensor
from tests.hub.fleet import BOOT, a_batch, a_case, a_delivery, sample

KNOWN = {"pump": Shape((2, 4), 3)}


def admitted(*cases, known=KNOWN, **batch):
    delivery = a_delivery()
    admit_batch(a_batch(*cases, **batch), delivery, known=known, holdout_share=0.3, max_bytes=2**20)
    return delivery


def test_only_audits_ever_go_to_the_holdout():
    uses = {decide_use("d", BOOT, seq, audited=False, holdout_share=1.0) for seq in range(100)}
    assert uses == {Use.TRAIN}


def test_the_holdout_takes_its_share_of_audits():
    held = [
        decide_use("d", BOOT, seq, audited=True, holdout_share=0.3) is Use.HOLDOUT for seq in range(10_000)
    ]
    assert 0.28 < sum(held) / len(held) < 0.32


@pytest.mark.parametrize(("share", "use"), [(0.0, Use.TRAIN), (1.0, Use.HOLDOUT)])
def test_a_share_of_none_or_all_is_exact(share, use):
    assert {decide_use("d", BOOT, s, audited=True, holdout_share=share) for s in range(200)} == {use}


def test_the_use_of_a_case_never_changes():
    assert decide_use("d", BOOT, 7, audited=True, holdout_share=0.5) is decide_use(
        "d", BOOT, 7, audited=True, holdout_share=0.5
    )


def test_a_good_case_is_admitted_whole():
    (case,) = admitted(a_case(4, audit_ppm=10_000, reason=Reason.UNSURE_AND_AUDIT)).cases
    assert (case.item, case.device_label, case.escalated, case.audit_ppm) == (
        ("press-1", BOOT, 4),
        1,
        True,
        10_000,
    )


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        (a_case(1, tensor=b"\x09\x01"), "tensor"),
        (a_case(1, tensor=encode_tensor(sample(float("nan")), Wire("float32"))), "tensor"),
        (a_case(1, x=sample()[:1]), "shape"),
        (a_case(1, exits=[Exit(0, 3, 0.5, 0.5)]), "label"),
        (a_case(1, exits=[]), "exits"),
        (a_case(1, sensor="a\0b"), "name"),
    ],
)
def test_a_bad_case_is_rejected_with_its_reason_and_its_neighbours_are_not(case, kind):
    delivery = admitted(a_case(0), case, a_case(2))
    assert [good.seq for good in delivery.cases] == [0, 2]
    assert [seq for seq, _ in delivery.rejected] == [1]
    assert delivery.counts == {f"rejected/{kind}": 1}


def test_a_case_of_an_unknown_model_is_admitted_whatever_its_shape():
    delivery = admitted(a_case(1, x=sample()[:1], exits=[Exit(0, 900, 0.5, 0.5)]), known={})
    assert len(delivery.cases) == 1


def test_a_failed_case_needs_no_exit():
    (case,) = admitted(a_case(1, exits=[], reason=Reason.FAILED)).cases
    assert case.device_label is None


@pytest.mark.parametrize("name", ["", "a/b", "x" * 65, "\0", "-a"])
def test_a_model_name_that_no_bundle_can_have_is_rejected(name):
    with pytest.raises(RejectedError) as caught:
        admitted(a_case(1), model=name)
    assert caught.value.kind == "name"


def test_the_accepted_exit_is_the_last_one_and_an_escalated_case_answers_with_the_surest():
    exits = (Exit(0, 2, 0.9, 0.1), Exit(1, 1, 0.6, 0.4))
    assert device_label(exits, a_case(1, escalated=False)) == 1
    assert device_label(exits, a_case(1, escalated=True)) == 2


def test_repetitions_wait_longer_and_longer_but_never_for_ever():
    waits = [next_send_ms(sends, online=True, now_ms=0, jitter=1.0) for sends in range(1, 40)]
    assert waits[0] == FIRST_RETRY_MS
    assert waits == sorted(waits)
    assert waits[-1] == LONGEST_RETRY_MS
    assert next_send_ms(1, online=True, now_ms=100, jitter=0.0) == 100 + FIRST_RETRY_MS // 2


def test_a_device_that_seems_offline_is_tried_slowly():
    assert next_send_ms(1, online=False, now_ms=0, jitter=1.0) == OFFLINE_RETRY_MS


def test_who_waits_comes_before_who_joins_and_nobody_comes_twice():
    assert select_turn(["b", "a"], ["a", "c", "d"], limit=3) == ["b", "a", "c"]


def due(seq, *, model="pump", full=b"\1" * 32, classes=3):
    return DueVerdict(seq, model, full, BOOT, seq, "s", 1, bytes(2 * classes), 1, 1, 1, 0)


def test_a_frame_holds_one_model_and_one_full_model_only():
    verdicts = [due(1), due(2, model="fan"), due(3, full=b"\2" * 32), due(4)]
    frames = select_frames(verdicts, max_bytes=10_000)
    assert [(f.model, f.full_model[:1], [v.seq for v in f.verdicts]) for f, _ in frames] == [
        ("pump", b"\1", [1, 4]),
        ("fan", b"\1", [2]),
        ("pump", b"\2", [3]),
    ]


def test_frames_stay_within_their_bytes_and_lose_nothing():
    rng = random.Random(5)
    verdicts = [due(seq, classes=rng.randrange(2, 400)) for seq in range(300)]
    for verdict in verdicts:
        object.__setattr__(verdict, "probabilities", rng.randbytes(len(verdict.probabilities)))
    frames = select_frames(verdicts, max_bytes=8_000)
    assert [v.seq for f, _ in frames for v in f.verdicts] == list(range(300))
    assert max(len(encode(frame)) for frame, _ in frames) <= 8_000


def test_a_verdict_larger_than_a_frame_still_goes_out_alone():
    frames = select_frames([due(1, classes=4000), due(2, classes=4000)], max_bytes=100)
    assert [[v.seq for v in contents] for _, contents in frames] == [[1], [2]]


def test_ten_wrong_tokens_are_free_and_the_eleventh_waits():
    limit = FailureLimit(burst=10, refill_per_s=0.5)
    for _ in range(10):
        assert limit.wait_s("a", now_s=0.0) == 0
        limit.note_failure("a", now_s=0.0)
    assert limit.wait_s("a", now_s=0.0) == 2
    assert limit.wait_s("a", now_s=2.0) == 0
    assert limit.wait_s("b", now_s=0.0) == 0


def test_the_limit_remembers_a_bounded_number_of_addresses():
    limit = FailureLimit(burst=1, max_addresses=2)
    for address in ("a", "b", "c"):
        limit.note_failure(address, now_s=0.0)
    assert limit.wait_s("a", now_s=0.0) == 0
    assert limit.wait_s("c", now_s=0.0) > 0
