import dataclasses
import random
from itertools import count

import msgspec
import numpy as np
import pytest

from edge_cascade.backends.onnx import OnnxStage
from edge_cascade.errors import BackendError
from edge_cascade.ladder import Ladder
from edge_cascade.messages import Reason
from edge_cascade.packing import unpack_exits
from edge_cascade.policy import ACCEPT_ALL, ACCEPT_NONE, Certificate, OperatingPoint
from edge_cascade.tensors import decode_tensor, through_wire
from edge_daemon.audit import AuditCoin
from edge_daemon.pipeline import Pipeline, Sample

BOOT = bytes(range(8))
X = np.linspace(-3, 5, 128, dtype=np.float32).reshape(1, 128)
SAMPLE = Sample("bearing", X, received_s=10.0, taken_at_ms=123)


class Coin:
    """Falls as told."""

    def __init__(self, *falls):
        self.falls = list(falls)

    def throw(self, *, now_s):
        return self.falls.pop(0)


def make(bundle, limit, *falls, open_stage=OnnxStage):
    plan = bundle.plan("fp32")
    plan = msgspec.structs.replace(plan, points=(OperatingPoint((limit,) * 3, 0, 0, 0),), chosen=0)
    ladder = Ladder(bundle, plan, open_stage)
    return Pipeline(bundle, ladder, Coin(*falls), boot=BOOT, next_seq=count(7).__next__, now_s=lambda: 10.002)


def test_an_accepted_sample_is_answered_and_goes_nowhere(tiny_bundle):
    outcome = make(tiny_bundle, ACCEPT_ALL, 0.0).process(SAMPLE)
    answer = outcome.answer
    assert outcome.case is None
    assert (answer.id, answer.sensor, answer.model) == ("0001020304050607-7", "bearing", "tiny")
    assert (answer.exit, answer.stage, answer.precision, answer.plan, answer.point) == (
        0,
        0,
        "fp32",
        "fp32",
        0,
    )
    assert (answer.escalated, answer.audited, answer.deferred) == (False, False, False)
    assert (answer.latency_us, answer.taken_at_ms, answer.bundle) == (2000, 123, tiny_bundle.bundle_id)
    assert answer.label in tiny_bundle.graph.labels


def test_an_unsure_sample_is_answered_at_once_and_becomes_a_case(tiny_bundle):
    outcome = make(tiny_bundle, ACCEPT_NONE, 0.0).process(SAMPLE)
    case = outcome.case
    assert (outcome.answer.escalated, outcome.answer.deferred, outcome.answer.id) == (
        True,
        True,
        "0001020304050607-7",
    )
    assert (case.seq, case.sensor, case.reason, case.escalated, case.audited) == (
        7,
        "bearing",
        Reason.UNSURE,
        True,
        False,
    )
    assert [exit_.rung for exit_ in unpack_exits(case.exits)] == [0, 1, 2]
    assert np.array_equal(decode_tensor(case.tensor), through_wire(X, tiny_bundle.graph.wire))


def test_an_audited_sample_is_sent_with_its_probability_though_the_gate_accepted(tiny_bundle):
    case = make(tiny_bundle, ACCEPT_ALL, 0.01).process(SAMPLE).case
    assert (case.audit_ppm, case.reason, case.escalated, case.deferred) == (
        10_000,
        Reason.AUDIT,
        False,
        False,
    )


def test_an_unsure_audited_sample_is_one_case_with_both_reasons(tiny_bundle):
    case = make(tiny_bundle, ACCEPT_NONE, 0.5).process(SAMPLE).case
    assert (case.audit_ppm, case.reason, case.escalated) == (500_000, Reason.UNSURE_AND_AUDIT, True)


def test_a_batch_gives_what_its_samples_give_alone(tiny_bundle):
    samples = [Sample(f"s{n}", X * n, 10.0, 123) for n in range(6)]
    falls = [0.0, 0.5, 0.0, 0.5, 0.0, 0.0]
    together = make(tiny_bundle, ACCEPT_NONE, *falls).process_batch(samples)
    pipeline = make(tiny_bundle, ACCEPT_NONE, *falls)
    for one, other in zip(together, [pipeline.process(sample) for sample in samples], strict=True):
        assert (one.answer.id, one.answer.label, one.case.reason) == (
            other.answer.id,
            other.answer.label,
            other.case.reason,
        )
        assert one.case.tensor == other.case.tensor


class Broken:
    def __init__(self, *_):
        self.features = self.head = np.zeros((1, 5), dtype=np.float32)

    def bind(self, *_):
        return self

    def run(self):
        raise BackendError("gone")

    def run_batch(self, *_):
        raise BackendError("gone")


def test_without_a_first_rung_the_hub_is_asked_alone(tiny_bundle):
    outcome = make(tiny_bundle, ACCEPT_ALL, 0.0, open_stage=Broken).process(SAMPLE)
    assert (outcome.answer, outcome.case.reason, outcome.case.exits) == (None, Reason.FAILED, b"")
    (outcome,) = make(tiny_bundle, ACCEPT_ALL, 0.0, open_stage=Broken).process_batch([SAMPLE])
    assert (outcome.answer, outcome.case.reason) == (None, Reason.FAILED)


def test_samples_without_an_answer_are_one_line_in_the_log(tiny_bundle, caplog):
    pipeline = make(tiny_bundle, ACCEPT_ALL, *[0.0] * 20, open_stage=Broken)
    for _ in range(20):
        pipeline.process(SAMPLE)
    assert caplog.text.count("no answer sensor=") == 1


def test_a_nan_that_got_through_is_answered_as_nothing_known(tiny_bundle):
    x = np.full_like(X, np.nan)
    outcome = make(tiny_bundle, ACCEPT_ALL, 0.0).process(Sample("s", np.nan_to_num(x, nan=3.4e38), 10.0, 1))
    assert 0.0 <= outcome.answer.probability <= 1.0
    assert 0.0 <= outcome.answer.score <= 1.0


def test_answers_are_uncertified_without_a_certificate_and_beyond_its_last_point(tiny_bundle):
    assert make(tiny_bundle, ACCEPT_ALL, 0.0).process(SAMPLE).answer.uncertified
    plan = tiny_bundle.plan("fp32")
    weights = msgspec.structs.replace(
        tiny_bundle.weights,
        certificates=(
            Certificate("loss", "fp32", 0.01, 0.05, 500, 500, "binomial", "0" * 64, 3, 0.1, 1e3),
            Certificate("loss", "int8", 0.01, 0.05, 500, 500, "binomial", "0" * 64, 9, 0.1, 1e3),
        ),
    )
    bundle = dataclasses.replace(tiny_bundle, weights=weights)
    assert bundle.certified_point(plan) == 3
    assert tiny_bundle.certified_point(plan) == -1


class TestAuditCoin:
    def test_it_falls_at_its_rate(self):
        coin = AuditCoin(0.1, 1e9, random.Random(1))
        falls = sum(coin.throw(now_s=0.0) > 0 for _ in range(20_000))
        assert 1850 < falls < 2150

    def test_it_names_the_probability_with_which_it_fell(self):
        coin = AuditCoin(1.0, 5, random.Random(1))
        assert coin.throw(now_s=0.0) == 1.0

    def test_at_the_cap_no_coin_is_thrown_and_time_refills_it(self):
        coin = AuditCoin(1.0, 2, random.Random(1))
        assert [coin.throw(now_s=0.0) for _ in range(4)] == [1.0, 1.0, 0.0, 0.0]
        assert coin.throw(now_s=1799.0) == 0.0
        assert coin.throw(now_s=1801.0) == 1.0
        assert coin.throw(now_s=1802.0) == 0.0

    def test_a_cap_below_one_an_hour_lets_one_fall_in_so_many_hours(self):
        coin = AuditCoin(1.0, 0.5, random.Random(1))
        assert [coin.throw(now_s=3600.0 * hour) for hour in range(6)] == [0.0, 1.0, 0.0, 1.0, 0.0, 1.0]

    @pytest.mark.parametrize(("rate", "cap"), [(0.0, 100), (0.5, 0)])
    def test_a_rate_or_cap_of_zero_audits_nothing(self, rate, cap):
        coin = AuditCoin(rate, cap, random.Random(1))
        assert not any(coin.throw(now_s=float(second)) for second in range(10_000))
