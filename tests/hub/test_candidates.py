"""New weights are judged on what was looked at, certified on what was not, and refused by name."""

import dataclasses
import shutil
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import numpy as np
import pytest

from cloud_hub.candidates import make
from cloud_hub.candidates.certificate import promise_of, targets_of
from cloud_hub.candidates.make import Wish, make_candidate
from cloud_hub.candidates.outcome import Base, Candidate, Lineage, Refused, Waiting
from cloud_hub.candidates.series import SeriesCandidates
from cloud_hub.candidates.training import examples_of, train_on_cases, window_of
from cloud_hub.core.federation.guard import GuardRules
from cloud_hub.errors import BuildError, ModelError
from cloud_hub.examples import LabelledCases, read_examples
from cloud_hub.federation import ports
from cloud_hub.registry import recover_drafts, register_bundle, register_draft, release_directory
from cloud_hub.store.releases import get_release, list_releases, looked_at, take_fresh
from cloud_hub.store.store import Store
from edge_cascade.backends.onnx import OnnxStage
from edge_cascade.bundle import load_bundle
from edge_cascade.errors import BundleError
from edge_cascade.golden import golden_errors
from edge_cascade.messages import Use
from edge_cascade.training import Schedule
from tests.builder.models import built, images
from tests.hub.candidates import MODEL, QUICK, answer, config_of, label, send, the_base

RULES = GuardRules()
SEEN, FRESH, TAUGHT = 450, 1000, 600


@pytest.fixture(scope="module")
def sent(tmp_path_factory):
    """600 cases to train on (ids 1 to 600), 450 that the guard has seen, 1,000 that nothing has."""
    directory = tmp_path_factory.mktemp("sent")
    with Store(directory) as store:
        send(store, TAUGHT, 11)
        send(store, SEEN, 12, use=Use.HOLDOUT)
        send(store, FRESH, 13, use=Use.HOLDOUT)
        answer(store)
    return directory


@pytest.fixture
def store(sent, tmp_path):
    shutil.copytree(sent, tmp_path, dirs_exist_ok=True)
    with Store(tmp_path) as store:
        yield store


WINDOW = TAUGHT + SEEN
WISH = Wish(WINDOW, RULES)


@pytest.fixture(scope="module")
def better(sent, tmp_path_factory):
    """Weights that were trained on the 600 cases."""
    directory = tmp_path_factory.mktemp("taught")
    shutil.copytree(sent, directory, dirs_exist_ok=True)
    base = the_base()
    with Store(directory) as store:
        cases = read_examples(store, base.model, Use.TRAIN)
    return train_on_cases(
        base.bundle, base.bundle.parameters(), cases, QUICK, soft_share=0.0, rng=np.random.default_rng(0)
    ).weights


def mark_of(store):
    return store.database.run(lambda c: looked_at(c, MODEL))


def registered(store, tmp_path, candidate, **lineage):
    values = {"parent": the_base().bundle.bundle_id, "weights": "00" * 32, "trained": "hub"} | lineage
    return register_draft(store.database, tmp_path, candidate, Lineage(**values), created_by="test", now_ms=7)


def test_better_weights_become_a_weights_only_bundle_that_boards_take(store, better, tmp_path):
    said = []
    candidate = make_candidate(store, the_base(), better, WISH, say=said.append)
    assert isinstance(candidate, Candidate)
    figures = candidate.figures
    assert (figures.whole_release, figures.unseen) == ("", FRESH)
    assert figures.guard.after > figures.guard.before
    assert figures.guard.samples == SEEN
    assert figures.upload_share < figures.base_upload_share
    assert figures.thresholds_from == "450 holdout cases"
    release = registered(store, tmp_path, candidate)
    bundle = load_bundle(release_directory(tmp_path, release.bundle))
    base = the_base().bundle
    assert bundle.graph_sha256 == base.graph_sha256 == release.graph
    assert bundle.weights_sha256 != base.weights_sha256
    before = base.parameters()
    for name, array in bundle.parameters().items():
        # A step of eight bits a value: off by half of its finest level at most.
        finest = np.abs(better[name] - before[name]).max() / 127
        np.testing.assert_allclose(array, better[name], rtol=0, atol=0.51 * finest)
    errors = golden_errors(bundle, bundle.plan(), OnnxStage)
    assert all(error <= bundle.weights.tolerance[kind] for kind, error in errors.items())
    assert said == [
        "quantising anew",
        "choosing thresholds",
        "certifying on 1000 cases that nothing has looked at",
    ]


def test_the_certificate_is_of_agreement_at_the_promise_of_the_base_and_on_fresh_cases(store, better):
    promise = promise_of(the_base().bundle)
    candidate = make_candidate(store, the_base(), better, WISH)
    assert [
        (c.kind, c.plan, c.epsilon, c.delta, c.samples, c.method) for c in candidate.figures.certificates
    ] == [
        ("disagreement", plan.name, promise.disagreement, promise.delta, FRESH, "binomial")
        for plan in candidate.weights.plans
    ]


def test_what_certified_once_certifies_nothing_else(store, better):
    assert isinstance(make_candidate(store, the_base(), better, WISH), Candidate)
    assert mark_of(store) == WINDOW + FRESH
    again = make_candidate(store, the_base(), better, WISH)
    assert isinstance(again, Waiting)
    assert (again.has, again.what) == (0, "fresh holdout cases for the certificate")
    assert str(again).startswith("0 fresh holdout cases for the certificate, at least ")
    send(store, FRESH, 14, use=Use.HOLDOUT)
    answer(store)
    third = make_candidate(store, the_base(), better, WISH)
    assert isinstance(third, Candidate)
    assert third.figures.certificates[0].data_sha256 != ""
    assert mark_of(store) == WINDOW + 2 * FRESH


def test_a_refused_candidate_has_spent_its_cases_too(store, better, monkeypatch):
    def refuse(*_):
        raise make.CertificateError("it does not hold")

    monkeypatch.setattr(make.certificate, "certified", refuse)
    assert make_candidate(store, the_base(), better, WISH) == Refused("it does not hold")
    assert mark_of(store) == WINDOW + FRESH


def test_two_candidates_cannot_take_the_same_cases(store):
    assert store.database.run(lambda c: take_fresh(c, MODEL, after_id=10, upto_id=20))
    assert not store.database.run(lambda c: take_fresh(c, MODEL, after_id=10, upto_id=30))
    assert mark_of(store) == 20


def test_too_few_fresh_cases_wait_and_spend_nothing(tmp_path, better):
    with Store(tmp_path) as store:
        send(store, SEEN, 12, use=Use.HOLDOUT)
        send(store, 40, 13, use=Use.HOLDOUT)
        answer(store)
        outcome = make_candidate(store, the_base(), better, Wish(SEEN, RULES))
        assert isinstance(outcome, Waiting)
        assert outcome.has == 40 < outcome.needs
        assert mark_of(store) == SEEN


def test_so_few_that_nothing_is_expected_to_pass_wait_for_as_many_as_it_takes(store):
    # Agreeing always, 106 cases would certify 3.5 % for two plans; agreeing as often as it does, it takes more.
    wish = Wish(WINDOW + FRESH - 110, RULES, must_be_better=False)
    outcome = make_candidate(store, the_base(), the_base().bundle.parameters(), wish)
    assert isinstance(outcome, Waiting)
    assert (outcome.has, outcome.needs % 110) == (110, 0)
    assert outcome.needs > 110
    assert mark_of(store) == wish.window_start


def test_without_enough_for_the_guard_it_waits(store, better):
    outcome = make_candidate(store, the_base(), better, Wish(TAUGHT + 20, RULES))
    assert outcome == Waiting(20, 100, "holdout cases for the guard")


def test_weights_that_are_no_better_are_refused_unless_that_is_enough(store):
    same = the_base().bundle.parameters()
    outcome = make_candidate(store, the_base(), same, WISH)
    assert isinstance(outcome, Refused)
    assert outcome.why.startswith("not better beyond noise: not worse: ")
    assert mark_of(store) == WINDOW, "what is fresh was not touched"
    relaxed = make_candidate(store, the_base(), same, dataclasses.replace(WISH, must_be_better=False))
    assert isinstance(relaxed, Candidate)


def test_weights_that_are_worse_are_refused(store):
    worse = {name: -array for name, array in the_base().bundle.parameters().items()}
    outcome = make_candidate(store, the_base(), worse, dataclasses.replace(WISH, must_be_better=False))
    assert isinstance(outcome, Refused)
    assert "worse at exit" in outcome.why


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda w: w | {"stage0.conv0.weight": w["stage0.conv0.weight"] * 1e4}, "the graph's bound is"),
        (lambda w: w | {"stage0.conv0.weight": w["stage0.conv0.weight"] * np.nan}, "reaches nan"),
        (lambda w: {k: v for k, v in w.items() if k != "stage0.conv0.weight"}, "is missing"),
        (lambda w: w | {"extra": np.zeros(1, np.float32)}, "'extra' is not known"),
        (lambda w: w | {"stage0.conv0.weight": np.zeros((1, 1), np.float32)}, "the network has"),
    ],
)
def test_weights_that_boards_would_refuse_are_refused_by_name(store, change, why):
    outcome = make_candidate(store, the_base(), change(the_base().bundle.parameters()), WISH)
    assert isinstance(outcome, Refused)
    assert why in outcome.why
    assert "extra" in outcome.why or "stage0.conv0.weight" in outcome.why


def test_few_cases_that_were_looked_at_are_helped_out_by_audits_that_may_have_trained(store, better):
    send(store, 400, 15, audited=True)
    answer(store)
    wish = Wish(TAUGHT + 120, RULES, must_be_better=False)
    candidate = make_candidate(store, the_base(), better, wish)
    assert isinstance(candidate, Candidate)
    assert candidate.figures.thresholds_from == "120 holdout cases and 180 audits that may have trained"


def test_loss_is_certified_where_people_have_labelled_every_case(tmp_path, better):
    with Store(tmp_path) as store:
        shown = images(SEEN + FRESH, 21)
        send(store, SEEN + FRESH, 21, use=Use.HOLDOUT, x=shown.x)
        label(store, {index + 1: int(truth) for index, truth in enumerate(shown.y)})
        candidate = make_candidate(store, the_base(), better, Wish(SEEN, RULES))
        assert isinstance(candidate, Candidate)
        promise = promise_of(the_base().bundle)
        assert {(c.kind, c.epsilon) for c in candidate.figures.certificates} == {
            ("loss", promise.loss),
            ("disagreement", promise.disagreement),
        }


def test_a_promise_without_truth_is_one_of_agreement():
    promise = promise_of(the_base().bundle)
    assert targets_of(promise, truth_is_known=False).epsilon == promise.disagreement
    known = targets_of(promise, truth_is_known=True)
    assert (known.epsilon, known.disagreement_epsilon) == (promise.loss, promise.disagreement)


def test_a_base_that_promises_nothing_is_followed_by_a_candidate_that_promises_nothing(store, better):
    base = the_base()
    silent = dataclasses.replace(base.bundle, weights=_without_certificates(base.bundle.weights))
    candidate = make_candidate(store, Base(base.model, silent), better, WISH)
    assert isinstance(candidate, Candidate)
    assert candidate.figures.certificates == ()
    assert candidate.figures.unseen == 0
    assert {plan.method for plan in candidate.weights.plans} == {"naive"}
    assert mark_of(store) == WINDOW


def _without_certificates(weights):
    from msgspec.structs import replace

    return replace(weights, certificates=())


def test_the_extra_of_a_hub_brings_what_stages_for_litert_are_written_with():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    assert any(each.startswith("flatbuffers") for each in extras["hub"])


def test_a_base_with_litert_stages_gives_a_whole_release_with_new_ones(store, better, tmp_path):
    from cloud_hub.builder.assemble import Content, Declaration, Policy, cut_network, write_model
    from cloud_hub.builder.collect import stages_of_bundle
    from cloud_hub.builder.joined import staged_of_stages
    from cloud_hub.builder.litert.stage_files import litert_files

    old, graph = the_base().bundle, the_base().bundle.graph
    declaration = Declaration(graph.model, graph.labels, graph.input_shape, graph.preprocess, graph.wire)
    cuts = cut_network(
        staged_of_stages(stages_of_bundle(old), len(graph.labels)), old.golden_inputs, declaration
    )
    policy = Policy(old.weights.plans, old.weights.default_plan, old.weights.certificates)
    full = (built() / "full.onnx").read_bytes()
    litert = litert_files(cuts.by_precision, cuts.staged)
    write_model(tmp_path / "own", Content(declaration, cuts.stages, policy, full, old.golden_inputs, litert))
    base = Base(the_base().model, load_bundle(tmp_path / "own" / "bundle"))
    candidate = make_candidate(store, base, better, WISH)
    assert isinstance(candidate, Candidate)
    assert candidate.figures.whole_release == "its stages for LiteRT hold their weights inside"
    release = registered(store, tmp_path, candidate)
    bundle = load_bundle(release_directory(tmp_path, release.bundle))
    assert bundle.graph_sha256 != base.bundle.graph_sha256
    assert bundle.stage_models[0, "int8"].litert.content != base.bundle.stage_models[0, "int8"].litert.content


def test_a_draft_is_registered_once_and_a_series_has_one(store, better, tmp_path):
    candidate = make_candidate(store, the_base(), better, WISH)
    first = registered(store, tmp_path, candidate, series=3)
    assert registered(store, tmp_path, candidate, series=3) == first
    assert (first.state, first.created_by, first.created_at_ms) == ("draft", "test", 7)
    rows = store.database.run(list_releases)
    assert [row["id"] for row in rows] == [first.id]
    assert [path.name for path in (tmp_path / "releases").iterdir() if not path.name.startswith(".")] == [
        first.bundle
    ]
    with pytest.raises(Exception, match="there is no release 99"):
        store.database.run(lambda c: get_release(c, 99))


def test_a_draft_whose_process_died_before_its_row_is_registered_later(store, better, tmp_path, monkeypatch):
    candidate = make_candidate(store, the_base(), better, WISH)
    left = tmp_path / "releases" / ".new.1"
    (left / "bundle").mkdir(parents=True)

    def die(name):
        if name == "hub.release-written":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("cloud_hub.registry.crash_point", die)
        with pytest.raises(KeyboardInterrupt):
            registered(store, tmp_path, candidate, series=5)
    assert not left.exists()
    assert store.database.run(list_releases) == []
    made = SeriesCandidates(store, tmp_path, {MODEL: the_base().model})
    assert made.make(5, MODEL, bytes(32), better, lineage_of()) == ports.Registered("1")
    row = store.database.run(lambda c: get_release(c, 1))
    assert (row["series"], row["created_at_ms"], row["created_by"]) == (5, 7, "test")
    assert recover_drafts(store.database, tmp_path) == []


def test_a_series_that_has_its_release_leaves_no_folder_of_another_bundle(store, better, tmp_path):
    candidate = make_candidate(store, the_base(), better, WISH)
    first = registered(store, tmp_path, candidate, series=3)
    releases = tmp_path / "releases"
    shipped = Path(config_of(tmp_path).models[0].bundle)
    bundle_id = the_base().bundle.bundle_id

    def folders():
        return [path.name for path in releases.iterdir() if not path.name.startswith(".")]

    again = register_bundle(
        store.database, tmp_path, shipped, first.lineage, first.figures, created_by="test", now_ms=8
    )
    assert (again, folders()) == (first, [first.bundle])
    # A version before has left one.
    shutil.copytree(shipped, releases / bundle_id / "bundle")
    shutil.copy(releases / first.bundle / "release.json", releases / bundle_id)
    assert recover_drafts(store.database, tmp_path) == []
    assert folders() == [first.bundle]


def test_a_damaged_folder_is_left_alone(store, tmp_path):
    folder = tmp_path / "releases" / ("ab" * 32)
    folder.mkdir(parents=True)
    (folder / "release.json").write_text("{}")
    assert recover_drafts(store.database, tmp_path) == []
    assert folder.exists()


def test_a_bundle_that_boards_would_refuse_is_not_registered(store, better, tmp_path, monkeypatch):
    candidate = make_candidate(store, the_base(), better, WISH)

    def refuse(_):
        raise BundleError("odd")

    monkeypatch.setattr("cloud_hub.registry.load_bundle", refuse)
    with pytest.raises(BuildError, match="a board would refuse it: odd"):
        registered(store, tmp_path, candidate)
    assert store.database.run(list_releases) == []


# --- for a series of rounds


SETTINGS = '{"rounds":2,"strategy":"fedavgm","include_hub":true}'


def lineage_of(series=5, window=WINDOW):
    rounds = tuple(ports.LineageRound(f"r{n}", n, bytes(32), bytes(32), 4) for n in (1, 2))
    return ports.Lineage(series, bytes(32), rounds, SETTINGS, window)


def test_a_series_gets_a_draft_and_asking_twice_gives_the_same(store, better, tmp_path):
    made = SeriesCandidates(store, tmp_path, {MODEL: the_base().model}, clock_ms=lambda: 9)
    outcome = made.make(5, MODEL, bytes(range(32)), better, lineage_of())
    assert outcome == ports.Registered("1")
    assert made.make(5, MODEL, bytes(range(32)), better, lineage_of()) == outcome
    row = store.database.run(lambda c: get_release(c, 1))
    assert row["series"] == 5
    assert '"strategy":"fedavgm"' in row["lineage"]
    assert '"trained":"combined"' in row["lineage"]


def test_a_series_is_told_why_it_waits_or_gets_none(store, better, tmp_path):
    made = SeriesCandidates(store, tmp_path, {MODEL: the_base().model})
    waiting = made.make(5, MODEL, bytes(32), better, lineage_of(window=WINDOW + FRESH))
    assert isinstance(waiting, ports.Waiting)
    assert "fresh holdout cases" in waiting.reason
    same = the_base().bundle.parameters()
    declined = made.make(6, MODEL, bytes(32), same, lineage_of(6))
    assert isinstance(declined, ports.Declined)
    with pytest.raises(ModelError, match="no model 'other'"):
        made.make(5, "other", bytes(32), same, lineage_of())


def test_a_series_that_waits_is_only_counted_for_until_there_is_enough(store, better, tmp_path, monkeypatch):
    made = SeriesCandidates(store, tmp_path, {MODEL: the_base().model})
    late = lineage_of(window=WINDOW + FRESH)
    first = made.make(5, MODEL, bytes(32), better, late)
    with monkeypatch.context() as patch:
        patch.setattr("cloud_hub.candidates.series.make_candidate", None)
        assert made.make(5, MODEL, bytes(32), better, late) == first
    send(store, FRESH, 14, use=Use.HOLDOUT)
    answer(store)
    assert made.make(5, MODEL, bytes(32), better, late) == ports.Registered("1")


def test_the_hubs_vote_is_what_it_learned_from_uploaded_cases(store, tmp_path):
    made = SeriesCandidates(store, tmp_path, {MODEL: the_base().model})
    base = the_base().bundle.parameters()
    vote = made.train(MODEL, base, Schedule(1, 32, 0.01), max_examples=64, soft_share=0.5, seed=1)
    assert vote.num_examples == 64
    assert vote.delta.keys() == base.keys()
    assert any(np.abs(array).max() > 0 for array in vote.delta.values())
    again = made.train(MODEL, base, Schedule(1, 32, 0.01), max_examples=64, soft_share=0.5, seed=1)
    assert all(np.array_equal(again.delta[name], vote.delta[name]) for name in base)


def test_without_a_case_the_hub_has_no_vote(tmp_path):
    with Store(tmp_path) as store:
        made = SeriesCandidates(store, tmp_path, {MODEL: the_base().model})
        base = the_base().bundle.parameters()
        assert made.train(MODEL, base, Schedule(1, 32, 0.01), max_examples=9, soft_share=0, seed=1) is None


# --- parts


def test_targets_mix_labels_and_the_full_models_probabilities_where_no_person_spoke():
    nan = float("nan")
    cases = LabelledCases(
        np.arange(2),
        np.zeros((2, 1, 8, 8), np.float32),
        np.array([1, 2]),
        np.array([[0.2, 0.6, 0.1, 0.1], [nan] * 4], np.float32),
        np.array([False, True]),
        np.array([1, -1]),
    )
    found = examples_of(the_base().bundle, cases, 0.5)
    np.testing.assert_allclose(found.targets, [[0.1, 0.8, 0.05, 0.05], [0, 0, 1, 0]], rtol=1e-6)
    assert found.weight.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("count", "looked_at_id", "window"),
    [(0, 0, 0), (50, 0, 50), (200, 0, 100), (1000, 0, 300), (1000, 100, 300), (1000, 640, 640)],
)
def test_three_in_ten_judge_and_what_was_looked_at_is_never_fresh_again(count, looked_at_id, window):
    assert window_of(np.arange(1, count + 1), looked_at_id, min_samples=100) == window


def test_no_torch_no_plots_and_no_scikit_learn_are_needed(tmp_path):
    built()
    program = textwrap.dedent(
        """
        import sys
        for name in ("torch", "matplotlib", "sklearn", "PIL", "scipy", "pytest"):
            sys.modules[name] = None
        import numpy as np
        from pathlib import Path
        from cloud_hub.candidates.base import load_base
        from cloud_hub.candidates.make import Wish, make_candidate
        from cloud_hub.candidates.outcome import Candidate
        from cloud_hub.config import Config, HubSection, ModelSection
        from cloud_hub.core.federation.guard import GuardRules
        from cloud_hub.store.beside import open_beside

        state, bundle, window = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
        config = Config(hub=HubSection(state_dir=str(state)), models=(ModelSection(bundle=bundle),))
        base = load_base(config, "digit-like")
        with open_beside(state, None) as store:
            wish = Wish(window, GuardRules(), must_be_better=False)
            made = make_candidate(store, base, base.bundle.parameters(), wish)
        assert isinstance(made, Candidate), made
        """
    )
    with Store(tmp_path) as store:
        send(store, SEEN, 12, use=Use.HOLDOUT)
        send(store, FRESH, 13, use=Use.HOLDOUT)
        answer(store)
    arguments = [str(tmp_path), str(built() / "bundle"), str(SEEN)]
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_configuration_names_its_models_when_another_is_asked_for(tmp_path):
    from cloud_hub.candidates.base import load_base
    from cloud_hub.errors import ConfigError

    with pytest.raises(ConfigError, match="none is called 'pump'; there are: digit-like"):
        load_base(config_of(tmp_path), "pump")
