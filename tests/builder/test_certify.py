from dataclasses import replace

import msgspec
import numpy as np
import pytest

from benchmarks.cascade.draws import Trial, run_draws
from cloud_hub.builder.calibration import certify as module
from cloud_hub.builder.calibration.certify import Certified, MeasuredLadder, Targets, certify
from cloud_hub.builder.calibration.outcomes import disagreements, losses, walk
from cloud_hub.builder.calibration.p_values import GroupLosses, SampleLosses
from cloud_hub.errors import BuildError, CertificateError
from edge_cascade.policy import check_plan
from tests.builder.measured import heads_of, ladder_of, outcomes_of, pool_of

DIGEST = "ab" * 32
TARGETS = Targets(epsilon=0.005, delta=0.05)
STRENGTHS = (1.6, 2.4, 3.0)


def measured(name="int8", precision="int8", *, optimise=1_500, test=3_000, seed=0, **kind):
    return MeasuredLadder(
        name,
        ladder_of(STRENGTHS, precision=precision),
        outcomes_of(optimise, STRENGTHS, seed=seed, **kind),
        outcomes_of(test, STRENGTHS, seed=seed + 1_000, **kind),
    )


def at(certified: Certified, kind, name=None):
    wanted = name or certified.default_plan
    return next(each for each in certified.certificates if (each.kind, each.plan) == (kind, wanted))


def risk_at(ladder, certified, certificate, count=losses):
    plan = next(plan for plan in certified.plans if plan.name == certificate.plan)
    limits = plan.points[certificate.last_point].max_score
    return count(ladder.test, walk(ladder.test, plan.rungs, plan.score, limits))


@pytest.fixture(scope="module")
def ladder():
    return measured()


@pytest.fixture(scope="module")
def certified(ladder):
    return certify([ladder], TARGETS, data_sha256=DIGEST)


def test_a_certificate_says_what_was_tested_and_what_it_costs(ladder, certified):
    certificate, plan = at(certified, "loss"), certified.plan
    point = plan.points[certificate.last_point]
    assert (certificate.epsilon, certificate.delta, certificate.method) == (0.005, 0.05, "binomial")
    assert (certificate.samples, certificate.groups, certificate.data_sha256) == (3_000, 3_000, DIGEST)
    assert (certificate.upload_share, certificate.mult_adds) == (point.upload_share, point.mult_adds)
    assert (plan.method, plan.chosen, certified.kind) == ("certified", certificate.last_point, "loss")
    assert 0.0 < point.upload_share < 0.5
    assert certified.saves
    check_plan(plan, stages=3)


def test_every_point_up_to_the_certified_one_passes_and_the_next_does_not(ladder, certified):
    for certificate, count in (
        (at(certified, "loss"), losses),
        (at(certified, "disagreement"), disagreements),
    ):
        lost = [
            float(risk_at(ladder, certified, replace_point(certificate, point), count).sum())
            for point in range(certificate.last_point + 2)
        ]
        p_values = SampleLosses(np.array(lost), 3_000).p_values(certificate.epsilon)
        assert (p_values[:-1] <= 0.05).all()
        assert p_values[-1] > 0.05


def replace_point(certificate, point):
    return msgspec.structs.replace(certificate, last_point=point)


def test_the_points_figures_are_those_of_the_samples_that_tested_them(ladder, certified):
    plan = certified.plan
    for point in plan.points[:: len(plan.points) // 5]:
        walked = walk(ladder.test, plan.rungs, plan.score, point.max_score)
        assert point.upload_share == pytest.approx(walked.escalated.mean(), abs=1e-6)
        assert point.accuracy == pytest.approx((walked.label == ladder.test.labels).mean(), abs=1e-6)


def test_the_chain_does_not_depend_on_the_samples_that_test_it(ladder, certified):
    other = replace(ladder, test=outcomes_of(3_000, STRENGTHS, seed=77))
    again = certify([other], TARGETS, data_sha256=DIGEST)
    assert [p.max_score for p in again.plan.points] == [p.max_score for p in certified.plan.points]
    assert again.outlooks == certified.outlooks
    assert at(again, "disagreement").epsilon == at(certified, "disagreement").epsilon


def test_the_disagreement_epsilon_that_d_opt_sets_reaches_about_as_far_as_the_loss(certified):
    certificate = at(certified, "disagreement")
    assert certificate.epsilon >= 0.005
    assert (certificate.epsilon / 0.005) == pytest.approx(round(certificate.epsilon / 0.005))
    assert certificate.upload_share < 2 * at(certified, "loss").upload_share


def test_a_disagreement_epsilon_that_is_given_is_the_one_tested(ladder):
    targets = replace(TARGETS, disagreement_epsilon=0.0123)
    assert at(certify([ladder], targets, data_sha256=DIGEST), "disagreement").epsilon == 0.0123


def test_without_true_labels_the_disagreement_is_certified_at_epsilon_and_alone():
    ladder = measured(labelled=False)
    certified = certify([ladder], replace(TARGETS, epsilon=0.01), data_sha256=DIGEST)
    (certificate,) = certified.certificates
    assert (certificate.kind, certificate.epsilon, certified.kind) == ("disagreement", 0.01, "disagreement")
    assert certified.plan.chosen == certificate.last_point > 0
    assert risk_at(ladder, certified, certificate, disagreements).mean() <= 0.01


def test_plans_share_delta(monkeypatch, ladder):
    """With ladders all alike each of K is tested at delta / K, as one alone at that delta."""
    both = [ladder, replace(ladder, name="fp32", rungs=ladder_of(STRENGTHS, precision="fp32"))]
    levels = []
    monkeypatch.setattr(module, "last_passed", lambda p, level: levels.append(level) or 0)
    certified = certify(both, replace(TARGETS, delta=0.04), data_sha256=DIGEST)
    assert [plan.name for plan in certified.plans] == ["int8", "fp32"]
    assert levels == [0.02] * 4
    assert {certificate.delta for certificate in certified.certificates} == {0.04}


def test_a_mixed_ladder_that_saves_nothing_on_d_opt_costs_no_delta(ladder, certified):
    mixed = (*ladder.rungs, msgspec.structs.replace(ladder.rungs[-1], precision="fp32"))
    parts = []
    for part in (ladder.optimise, ladder.test):
        clueless = heads_of(np.full((1, len(part)), -1), np.full((1, len(part)), 1.0))
        parts.append(replace(part, heads=np.concatenate([part.heads, clueless])))
    useless = MeasuredLadder("int8-fp32", mixed, *parts)
    assert certify([ladder, useless], TARGETS, data_sha256=DIGEST) == certified


def test_a_ladder_that_uploads_much_less_becomes_the_default():
    weak = measured(optimise=1_500)
    strong = replace(weak, name="fp32", rungs=ladder_of(STRENGTHS, precision="fp32"))
    poor = [
        replace(part, heads=part.heads[[0, 0, 1]])  # the last rung never gets to say anything
        for part in (weak.optimise, weak.test)
    ]
    certified = certify([replace(weak, optimise=poor[0], test=poor[1]), strong], TARGETS, data_sha256=DIGEST)
    assert certified.default_plan == "fp32"
    assert certified.outlook.plan == "fp32"


def test_groups_are_tested_by_betting_and_promise_less_than_samples_would():
    ladder = measured(optimise=1_000, test=4_000, group_size=4)
    targets = replace(TARGETS, epsilon=0.01)
    certified = certify([ladder_with_own_groups(ladder)], targets, data_sha256=DIGEST)
    certificate = at(certified, "loss")
    assert (certificate.method, certificate.samples, certificate.groups) == ("betting", 4_000, 1_000)
    lost = risk_at(ladder, certified, certificate).astype(float)
    by_group = lost.reshape(-1, 4).sum(axis=1)[None]
    assert GroupLosses(by_group, np.full(1_000, 4.0)).p_values(0.01)[0] <= 0.05
    ungrouped = MeasuredLadder(
        ladder.name,
        ladder.rungs,
        replace(ladder.optimise, groups=None),
        replace(ladder.test, groups=None),
    )
    alone = certify([ungrouped], targets, data_sha256=DIGEST)
    assert certificate.last_point > 0
    assert certificate.upload_share > at(alone, "loss").upload_share


def ladder_with_own_groups(ladder):
    return replace(ladder, test=replace(ladder.test, groups=ladder.test.groups + 1_000_000))


def test_groups_of_one_sample_each_are_independent_samples(ladder, certified):
    parts = [
        replace(part, groups=np.arange(len(part)) + start)
        for part, start in ((ladder.optimise, 0), (ladder.test, 10_000))
    ]
    again = certify([replace(ladder, optimise=parts[0], test=parts[1])], TARGETS, data_sha256=DIGEST)
    assert again.certificates == certified.certificates


def test_a_group_in_both_parts_is_refused():
    with pytest.raises(BuildError, match=r"300 groups \(the first: 0\) are in both parts"):
        certify([measured(group_size=5)], replace(TARGETS, epsilon=0.02), data_sha256=DIGEST)


@pytest.mark.parametrize(
    ("targets", "name"),
    [
        (replace(TARGETS, epsilon=0.0), "epsilon"),
        (replace(TARGETS, delta=1.0), "delta"),
        (replace(TARGETS, disagreement_epsilon=5), "dis"),
    ],
)
def test_a_promise_out_of_range_is_refused(ladder, targets, name):
    with pytest.raises(BuildError, match=f"^{name}.* is not between 0 and 1"):
        certify([ladder], targets, data_sha256=DIGEST)


def test_labels_in_one_part_alone_are_refused(ladder):
    half = replace(ladder, test=replace(ladder.test, labels=None))
    with pytest.raises(BuildError, match="one part of the calibration data has labels"):
        certify([half], TARGETS, data_sha256=DIGEST)


def test_too_few_samples_are_refused_with_what_is_needed():
    with pytest.raises(CertificateError) as raised:
        certify([measured(test=400)], TARGETS, data_sha256=DIGEST)
    assert str(raised.value) == (
        "too little calibration data: epsilon 0.005 at delta 0.05 for 1 plan needs at least 598 samples without a "
        "loss, there are 400: give more data, a larger delta, or an epsilon above 0.0075"
    )
    assert raised.value.exit_code == 11


def test_the_epsilon_that_the_refusal_names_is_enough():
    assert certify([measured(test=400)], replace(TARGETS, epsilon=0.0075), data_sha256=DIGEST).plans


def test_just_enough_samples_are_not_refused():
    assert certify([measured(test=598)], TARGETS, data_sha256=DIGEST).plans


def test_too_few_groups_are_refused_whatever_the_number_of_samples():
    ladder = ladder_with_own_groups(measured(test=4_000, group_size=40))
    with pytest.raises(
        CertificateError, match=r"436 groups of one size .* there are 100 groups, as good as 100 "
    ):
        certify([ladder], replace(TARGETS, epsilon=0.01), data_sha256=DIGEST)


def test_that_only_escalate_all_passes_is_told_with_what_it_would_take(ladder):
    wrong = []
    for part in (ladder.optimise, ladder.test):
        heads = part.heads.copy()
        heads[:, ::10, 0] = (part.labels[::10] + 1) % 10
        heads[:, ::10, 1:] = [1.0, 0.0, 0.0, 0.0]
        wrong.append(replace(part, heads=heads))
    certified = certify([replace(ladder, optimise=wrong[0], test=wrong[1])], TARGETS, data_sha256=DIGEST)
    assert not certified.saves
    assert (certified.plan.chosen, at(certified, "loss").last_point) == (0, 0)
    assert certified.outlook.at(0.005).upload_share == 1.0
    needed = certified.outlook.epsilon_for_upload(0.5)
    assert 0.05 < needed < 0.3
    assert certified.outlook.at(needed).upload_share <= 0.5


def test_the_outlook_trades_a_larger_epsilon_for_fewer_uploads(certified):
    trades = certified.outlook.trades(0.007)
    assert [trade.epsilon for trade in trades] == [0.001, 0.002, 0.005, 0.007, 0.01, 0.02, 0.05]
    uploads = [trade.upload_share for trade in trades]
    assert uploads == sorted(uploads, reverse=True)
    assert uploads[0] == 1.0
    assert trades[2].upload_share == pytest.approx(at(certified, "loss").upload_share, abs=0.05)
    for share in (0.3, 0.05, 0.0):
        assert certified.outlook.at(certified.outlook.epsilon_for_upload(share)).upload_share <= share


def test_the_promise_holds_in_as_many_draws_as_was_promised_and_naive_thresholds_break_it():
    pool = pool_of(6_000, STRENGTHS, seed=5)
    trial = Trial(samples=1_000, epsilon=0.01, delta=0.1)
    kept = {each.way: each for each in run_draws(pool, trial, draws=25)}
    # 25 draws at a chance of 0.1 break more than 6 times once in 100.
    assert kept["as built, all plans"].broken <= 6
    assert kept["per rung, certified"].broken <= 6
    assert kept["shared, certified"].broken <= 6
    assert kept["per rung, naive"].broken >= 10
    assert kept["per rung, certified"].upload_share < kept["shared, certified"].upload_share
    low, high = kept["per rung, naive"].interval
    assert low < kept["per rung, naive"].broken_share < high


def test_draws_do_not_depend_on_the_number_of_processes():
    pool = pool_of(2_000, STRENGTHS, seed=6)
    trial = Trial(samples=600, epsilon=0.02, delta=0.1)
    kept = [run_draws(pool, trial, draws=4, processes=n) for n in (1, 2)]
    assert kept[0] == kept[1]


def test_a_draw_fits_its_temperatures_to_its_own_samples():
    pool = pool_of(2_000, STRENGTHS, seed=6)
    ladder = pool.ladders[0]
    (some, _), (others, _) = (pool.calibrated(ladder, rows) for rows in (np.arange(300), np.arange(300, 600)))
    assert [rung.temperature for rung in some] != [rung.temperature for rung in others]
    assert [msgspec.structs.replace(rung, temperature=1.0) for rung in some] == list(ladder.rungs)


def test_a_pool_too_small_for_the_draws_is_refused():
    with pytest.raises(ValueError, match="no pool"):
        run_draws(pool_of(500), Trial(400, 0.01, 0.1), draws=2)
