"""The store of examples on a real disk: what is kept, for how long, with which label, and what trouble costs."""

import random
import sqlite3
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_cascade.gate import Exit
from edge_cascade.ladder import Climb
from edge_cascade.manifest import Wire
from edge_cascade.messages import Case, Reason, Source, Use, Verdict
from edge_cascade.packing import pack_probabilities
from edge_cascade.tensors import through_wire
from edge_daemon import example_ledger
from edge_daemon.config import TrainingConfig
from edge_daemon.core.examples import ExampleDrop, LabelOutcome, Origin
from edge_daemon.example_file import ROW_OVERHEAD_BYTES
from edge_daemon.example_ledger import ExampleLedger, ExampleModel, Judged, Labelled, Truth
from edge_daemon.example_store import MAX_SAMPLES_A_TURN, ExampleStore
from edge_daemon.pipeline import Answer, Outcome, Sample
from edge_daemon.recent import MAX_PER_SENSOR, OVERHEAD_BYTES, RecentSamples, Seen

BOOT = bytes(range(8))
WIRE = Wire("int8")
LABELS = ("normal", "fault", "2")
SHAPE = (1, 16)
MODEL = ExampleModel(LABELS, SHAPE, WIRE)


def values(number):
    return np.random.default_rng(number).normal(size=SHAPE).astype(np.float32)


def sample(number, sensor="pump"):
    # A minute apart, so that no pace keeps one of them out.
    return Sample(sensor, values(number), received_s=number * 600.0, taken_at_ms=0)


def outcome(number, *, label=0, probability=0.95, sent=False, sensor="pump", answered=True):
    exit_ = Exit(0, label, probability, 1 - probability)
    case = (
        Case(number, sensor, 0, 0, b"", True, 0, Reason.UNSURE, True, False, b"not looked at")
        if sent
        else None
    )
    if not answered:
        return Outcome(None, None, case)
    answer = Answer(
        id=answer_id(number), sensor=sensor, model="m", label=LABELS[label], probability=probability,
        score=1 - probability, exit=0, stage=0, precision="fp32", bundle="0" * 64, plan="p", point=0,
        latency_us=1, escalated=sent, audited=False, deferred=sent, uncertified=False, taken_at_ms=0,
    )  # fmt: skip
    return Outcome(answer, Climb((exit_,), exit_, accepted=not sent), case)


def answer_id(number):
    return f"{BOOT.hex()}-{number}"


def verdict(number, label, *, source=Source.MODEL, use=Use.TRAIN, revision=1, sensor="pump"):
    probabilities = pack_probabilities([0.5 if index == label else 0.25 for index in range(len(LABELS))])
    return Verdict(BOOT, number, sensor, label, probabilities, source, use, revision)


@pytest.fixture
def make(tmp_path):
    """Stores over one file; every one that a test leaves open is closed."""
    made = []

    def make_store(*, models=None, verdicts_come=True, **limits):
        limits = {"own_per_minute": 60.0, "max_examples": 100, **limits}
        store = ExampleStore(
            tmp_path / "examples.sqlite",
            TrainingConfig(enabled=True, **limits),
            models or {"m": MODEL},
            verdicts_come=verdicts_come,
            boot=BOOT,
            chance=random.Random(0).random,
        )
        store.open()
        made.append(store)
        return store

    yield make_store
    for store in made:
        store.close()


def see(store, number, **what):
    store.observe("m", sample(number, what.get("sensor", "pump")), outcome(number, **what))


def drawn(store, **options):
    """Label and origin by the sample's number; the draw waits for all that the store was told."""
    found = store.draw("m", 1000, **options)
    numbers = [number_of(x) for x in found.x]
    return dict(
        zip(numbers, zip(found.labels.tolist(), map(Origin, found.origins), strict=True), strict=True)
    )


def number_of(x):
    return next(number for number in range(2000) if np.array_equal(through_wire(values(number), WIRE), x))


class TestWhatIsKept:
    def test_a_sure_answer_that_was_not_sent_is_kept_with_its_own_label(self, make):
        store = make()
        see(store, 1, label=1)
        found = store.draw("m", 10)
        assert np.array_equal(found.x, [through_wire(values(1), WIRE)])
        assert (found.labels.tolist(), found.origins.tolist()) == ([1], [Origin.SELF])
        assert found.confidence.tolist() == [np.float32(0.95)]
        assert np.isnan(found.probabilities).all()
        assert found.probabilities.shape == (1, 3)

    def test_an_answer_below_the_bound_is_not_kept(self, make):
        store = make(own_min_probability=0.96)
        see(store, 1)
        assert len(store.draw("m", 10)) == 0

    def test_nothing_of_a_model_that_does_not_learn_is_kept(self, make):
        store = make(models={"n": MODEL})
        see(store, 1)
        store.verdict("m", verdict(1, 0))
        assert len(store.draw("n", 10)) == 0
        assert store.counts().stored == 0

    def test_an_empty_draw_has_the_shapes_of_a_full_one(self, make):
        found = make().draw("m", 10)
        assert (found.x.shape, found.labels.shape, found.probabilities.shape) == ((0, 1, 16), (0,), (0, 3))
        assert (found.x.dtype, found.labels.dtype, found.origins.dtype) == (np.float32, np.int64, np.uint8)

    def test_own_answers_are_kept_at_their_pace(self, make):
        store = make(own_per_minute=6.0)
        for number in range(1000):
            store.observe("m", Sample("pump", values(number), number / 200, 0), outcome(number))
        assert len(store.draw("m", 10)) == 1

    def test_more_than_are_kept_in_a_second_are_counted_and_forgotten(self, make, monkeypatch):
        monkeypatch.setattr("edge_daemon.example_store.TURN_S", 60.0)
        store = make(max_examples=1000)
        for number in range(MAX_SAMPLES_A_TURN + 7):
            see(store, number, sent=True)
        store.draw("m", 1)
        counts = store.counts()
        assert (counts.pending, counts.dropped) == ({"m": MAX_SAMPLES_A_TURN}, {ExampleDrop.BUSY: 7})

    def test_a_window_of_a_long_message_does_not_keep_the_message(self, make):
        store = make()
        message = np.zeros((1, 1000), np.float32)
        window = Sample("pump", message[:, :16].reshape(SHAPE), 1.0, 0)
        store.observe("m", window, outcome(1))
        (seen,) = store._recent._sensors["pump"]
        assert seen.x.base is None


class TestVerdicts:
    def test_what_was_sent_waits_for_its_verdict(self, make):
        store = make()
        see(store, 1, sent=True, label=0, probability=0.4)
        assert drawn(store) == {}
        assert store.counts().pending == {"m": 1}
        store.verdict("m", verdict(1, 2))
        found = store.draw("m", 10)
        assert (found.labels.tolist(), found.origins.tolist()) == ([2], [Origin.MODEL])
        assert found.probabilities[0] == pytest.approx([0.25, 0.25, 0.5], abs=1e-4)
        assert found.confidence[0] == pytest.approx(0.4)

    def test_a_sample_without_any_answer_becomes_an_example_too(self, make):
        store = make()
        see(store, 1, sent=True, answered=False)
        store.verdict("m", verdict(1, 2))
        found = store.draw("m", 10)
        assert found.labels.tolist() == [2]
        assert np.isnan(found.confidence[0])

    def test_the_holdout_never_becomes_an_example_whatever_the_site_says(self, make):
        store = make()
        for number in range(3):
            see(store, number, sent=True)
        store.label("pump", "fault", answer_id(0))
        store.verdict("m", verdict(0, 1, use=Use.HOLDOUT))
        store.verdict("m", verdict(1, 1, use=Use.HOLDOUT))
        store.label("pump", "fault", answer_id(1))
        store.verdict("m", verdict(2, len(LABELS), use=Use.HOLDOUT))
        store.label("pump", "fault", None)
        assert drawn(store) == {}
        counts = store.counts()
        assert counts.dropped == {ExampleDrop.HOLDOUT: 3}
        assert counts.labels == {LabelOutcome.USED: 1, LabelOutcome.UNMATCHED: 2}

    def test_a_later_revision_wins_and_a_human_outranks_the_model(self, make):
        store = make()
        for number in range(3):
            see(store, number, sent=True)
        store.verdict("m", verdict(0, 1, revision=1))
        store.verdict("m", verdict(0, 2, revision=2))
        store.verdict("m", verdict(0, 0, revision=1))
        store.verdict("m", verdict(1, 1, source=Source.HUMAN, revision=2))
        store.verdict("m", verdict(1, 2, revision=3))
        store.label("pump", "normal", answer_id(2))
        store.verdict("m", verdict(2, 1, revision=1))
        assert drawn(store) == {0: (2, Origin.MODEL), 1: (1, Origin.HUMAN), 2: (0, Origin.HUMAN)}
        assert drawn(store, least=Origin.HUMAN) == {1: (1, Origin.HUMAN), 2: (0, Origin.HUMAN)}

    @pytest.mark.parametrize(
        "odd", [("m", verdict(9, 1)), ("m", verdict(1, 3)), ("other", verdict(1, 1))], ids=str
    )
    def test_a_verdict_for_nothing_that_is_here_changes_nothing(self, make, odd):
        store = make()
        see(store, 1, sent=True)
        store.verdict(*odd)
        assert drawn(store) == {}
        assert store.counts().pending == {"m": 1}

    def test_without_a_hub_nothing_waits_for_a_verdict_and_the_site_may_still_label_it(self, make):
        store = make(verdicts_come=False)
        see(store, 1, sent=True)
        see(store, 2, sent=True)
        store.label("pump", "fault", answer_id(1))
        assert drawn(store) == {1: (1, Origin.HUMAN)}
        assert store.counts().pending == {}


class TestLabels:
    def test_a_label_is_for_the_answer_that_it_names_or_for_the_sensors_last_one(self, make):
        store = make(own_per_minute=0.0)
        for number, sensor in enumerate(["pump", "pump", "fan"]):
            see(store, number, sensor=sensor)
        store.label("pump", "2", answer_id(0))
        store.label("pump", "fault", None)
        store.label("fan", "0", None)
        assert drawn(store) == {0: (2, Origin.HUMAN), 1: (1, Origin.HUMAN), 2: (0, Origin.HUMAN)}
        assert store.counts().labels == {LabelOutcome.USED: 3}

    def test_a_label_changes_what_is_on_disk_though_the_sample_is_not_remembered(self, make):
        store = make()
        see(store, 1)
        store.close()
        store = make()
        store.label("pump", "fault", answer_id(1))
        store.label("pump", "2", answer_id(1))
        assert drawn(store) == {1: (2, Origin.HUMAN)}

    @pytest.mark.parametrize(
        ("sensor", "label", "about", "what"),
        [
            ("fan", "fault", None, LabelOutcome.UNMATCHED),
            ("fan", "fault", answer_id(1), LabelOutcome.UNMATCHED),
            ("pump", "fault", answer_id(9), LabelOutcome.UNMATCHED),
            ("pump", "fault", "no id", LabelOutcome.UNMATCHED),
            ("pump", "fault", f"00-{2**70}", LabelOutcome.UNMATCHED),
            ("pump", "broken", None, LabelOutcome.UNKNOWN),
            ("pump", "3", None, LabelOutcome.UNKNOWN),
            ("pump", "²", None, LabelOutcome.UNKNOWN),
        ],
    )
    def test_a_label_for_nothing_or_of_no_class_is_counted(self, make, sensor, label, about, what):
        store = make()
        see(store, 1)
        store.label(sensor, label, about)
        assert drawn(store) == {1: (0, Origin.SELF)}
        assert store.counts().labels == {what: 1}

    def test_a_label_of_no_class_is_told_once_per_burst(self, make, caplog):
        store = make()
        see(store, 1)
        for _ in range(3):
            store.label("pump", "broken", None)
        store.draw("m", 1)
        assert caplog.text.count("no class of model m: 'broken'") == 1


class TestRecentSamples:
    def seen(self, number, sensor="pump", size=16):
        return Seen("m", sensor, str(number), np.zeros(size, np.float32), 0, 1.0, False)

    def test_so_many_per_sensor_are_found_by_their_id(self):
        recent = RecentSamples()
        for number in range(MAX_PER_SENSOR + 1):
            recent.add(self.seen(number))
        assert recent.find("pump", "0") is None
        assert recent.find("pump", "1").answer_id == "1"
        assert recent.find("pump", None).answer_id == str(MAX_PER_SENSOR)
        assert recent.find("fan", "1") is None

    def test_of_large_samples_the_last_one_is_remembered(self):
        recent = RecentSamples()
        for number in range(3):
            recent.add(self.seen(number, size=100_000))
        assert [recent.find("pump", str(number)) is not None for number in range(3)] == [False, False, True]

    def test_the_sensor_that_was_silent_longest_is_forgotten_first(self):
        recent = RecentSamples(max_bytes=2 * (64 + OVERHEAD_BYTES))
        for number, sensor in enumerate(["a", "b", "a", "c"]):
            recent.add(self.seen(number, sensor))
        assert [recent.find(sensor, None) is not None for sensor in "abc"] == [False, False, True]

    def test_hostile_names_of_sensors_stay_bounded(self):
        recent = RecentSamples(max_bytes=10 * (64 + OVERHEAD_BYTES))
        for number in range(1000):
            recent.bar(f"s{number - 1}", str(number - 1))
            recent.add(self.seen(number, f"s{number}"))
        assert len(recent._sensors) == 10
        assert len(recent._barred) == 9


class TestBounds:
    def test_a_full_class_gives_first_so_that_classes_balance(self, make):
        store = make(max_examples=16)
        for number in range(40):
            see(store, number, label=0)
        for number in range(40, 48):
            see(store, number, label=1)
        kept = drawn(store)
        assert Counter(label for label, _ in kept.values()) == {0: 8, 1: 8}
        assert set(kept) == {*range(32, 48)}
        assert store.counts().dropped == {ExampleDrop.LIMIT: 32}
        assert store.counts().of("m") == 16

    def test_what_somebody_confirmed_outlives_what_the_board_thinks_itself(self, make):
        store = make(max_examples=16)
        see(store, 0, sent=True)
        store.verdict("m", verdict(0, 0))
        for number in range(1, 60):
            see(store, number, label=0)
        kept = drawn(store)
        assert kept[0] == (0, Origin.MODEL)
        assert len(kept) == 16

    def test_what_waits_for_a_verdict_expires_by_count_and_takes_no_examples_place(self, make):
        store = make(max_examples=16)
        see(store, 0)
        for number in range(1, 21):
            see(store, number, sent=True)
        store.draw("m", 1)
        for number in range(1, 21):
            store.verdict("m", verdict(number, 1))
        assert set(drawn(store)) == {*range(5, 21)} - {5} | {0}
        counts = store.counts()
        assert counts.dropped == {ExampleDrop.EXPIRED: 4, ExampleDrop.LIMIT: 1}

    def test_the_bytes_of_all_models_are_bounded(self, make):
        store = make(max_bytes=64 * 2**10, max_examples=100_000, models={"m": MODEL, "n": MODEL})
        for turn in range(8):
            for number in range(turn * 100, turn * 100 + 100):
                see(store, number)
                store.observe("n", sample(number), outcome(number + 1000))
            store.draw("m", 1)
            assert store.counts().size_bytes <= 64 * 2**10
        counts = store.counts()
        assert counts.dropped[ExampleDrop.LIMIT] > 0
        assert counts.stored == 1600
        assert abs(counts.of("m") - counts.of("n")) <= 1

    def test_bytes_count_as_they_are_on_disk(self, make, tmp_path):
        store = make()
        for number in range(5):
            see(store, number, sent=True)
            store.verdict("m", verdict(number, 1))
        store.draw("m", 1)
        before = store.counts()
        store.close()
        with sqlite3.connect(tmp_path / "examples.sqlite") as connection:
            (on_disk,) = connection.execute(
                "SELECT sum(length(tensor) + length(probabilities)) FROM example"
            ).fetchone()
        connection.close()
        assert before.size_bytes == on_disk + 5 * ROW_OVERHEAD_BYTES
        again = make()
        again.draw("m", 1)
        assert again.counts().size_bytes == before.size_bytes

    def test_a_draw_is_balanced_and_newest_first(self, make):
        store = make()
        for number in range(30):
            see(store, number, label=int(number % 10 == 0))
        found = store.draw("m", 6)
        assert [number_of(x) for x in found.x] == [29, 28, 27, 20, 10, 0]


class TestRestart:
    def test_examples_and_what_waits_survive_with_their_labels(self, make):
        store = make()
        see(store, 1, label=1)
        see(store, 2, sent=True)
        see(store, 3, sent=True)
        store.verdict("m", verdict(2, 2, source=Source.HUMAN, revision=4))
        store.label("pump", "fault", answer_id(3))
        store.close()
        store = make()
        assert drawn(store) == {1: (1, Origin.SELF), 2: (2, Origin.HUMAN)}
        store.verdict("m", verdict(2, 1, source=Source.HUMAN, revision=3))
        store.verdict("m", verdict(3, 0))
        see(store, 4)
        assert drawn(store) == {
            1: (1, Origin.SELF),
            2: (2, Origin.HUMAN),
            3: (1, Origin.HUMAN),
            4: (0, Origin.SELF),
        }

    def test_labels_given_among_other_classes_are_forgotten(self, make):
        def n_too(labels):
            return {"m": ExampleModel(labels, SHAPE, WIRE), "n": MODEL}

        store = make(models=n_too(LABELS))
        see(store, 1, label=1)
        store.observe("n", sample(2), outcome(2))
        store.close()
        store = make(models=n_too(("fault", "normal", "2")))
        see(store, 3, label=1)
        assert drawn(store) == {3: (1, Origin.SELF)}
        assert len(store.draw("n", 10)) == 1
        assert store.counts().dropped == {ExampleDrop.RENAMED: 1}

    def test_what_was_drawn_once_is_on_disk_though_the_process_is_killed(self, make, tmp_path):
        store = make()
        see(store, 1)
        store.draw("m", 1)
        # The file as a kill -9 would leave it: the log is not written back.
        copy = tmp_path / "copy"
        copy.mkdir()
        for suffix in ("", "-wal"):
            path = tmp_path / f"examples.sqlite{suffix}"
            (copy / path.name).write_bytes(path.read_bytes())
        connection = sqlite3.connect(copy / "examples.sqlite")
        assert connection.execute("SELECT count(*) FROM example").fetchone() == (1,)
        connection.close()

    def test_an_example_that_does_not_fit_the_model_any_more_is_dropped(self, make):
        store = make()
        for number in range(3):
            see(store, number, label=2)
        store.close()
        store = make(models={"m": ExampleModel(LABELS, (1, 8), WIRE)})
        assert len(store.draw("m", 10)) == 0
        assert store.counts().dropped == {ExampleDrop.DAMAGED: 3}
        assert store.counts().of("m") == 0


@st.composite
def happenings(draw):
    """What the store may see and hear, in any order: samples, verdicts and labels for a few numbers."""
    number, label = st.integers(0, 30), st.integers(0, 2)
    seen = st.builds(seen_of, number, label, st.booleans())
    judged = st.builds(
        lambda number, label, source, use, revision: Judged(
            "m", verdict(number, label, source=source, use=use, revision=revision)
        ),
        *(number, label, st.sampled_from(Source), st.sampled_from(Use), st.integers(1, 3)),
    )
    labelled = st.builds(
        lambda number, label: Labelled("pump", LABELS[label], answer_id(number), None), number, label
    )
    return draw(st.lists(st.lists(seen | judged | labelled, max_size=20), max_size=5))


def seen_of(number, label, is_sent):
    return Seen("m", "pump", answer_id(number), values(number), label, 0.95, is_sent)


@settings(max_examples=40)
@given(happenings())
def test_whatever_happens_bounds_hold_every_row_is_accounted_for_and_a_restart_changes_nothing(groups):
    def opened():
        ledger = ExampleLedger(Path(folder) / "e.sqlite", {"m": MODEL}, max_examples=16, max_bytes=3000)
        ledger.open()
        return ledger

    with tempfile.TemporaryDirectory() as folder:
        ledger = opened()
        for group in groups:
            ledger.write(group)
            assert ledger.counts.of("m") <= 16
            assert ledger.counts.size_bytes <= 3000
        before = ledger.draw("m", 100, Origin.SELF)
        counts = ledger.counts
        ledger.close()
        again = opened()
        after = again.draw("m", 100, Origin.SELF)
        for name in ("x", "labels", "origins", "probabilities", "confidence"):
            assert np.array_equal(getattr(before, name), getattr(after, name), equal_nan=True)
        assert (counts.rows, counts.pending, counts.size_bytes) == (
            again.counts.rows,
            again.counts.pending,
            again.counts.size_bytes,
        )
        again.close()
    assert ExampleDrop.DISK not in counts.dropped
    held = sum(counts.rows.values()) + sum(counts.pending.values())
    assert counts.stored == held + sum(counts.dropped.values())


class TestTrouble:
    def test_a_full_disk_costs_what_came_meanwhile_and_nothing_else(self, make, caplog):
        store = make()
        see(store, 1)
        store.draw("m", 1)
        connection = store._ledger._file._connection
        before_next(store, "write", lambda: connection.execute("PRAGMA max_page_count = 1"))
        for number in range(2, 100):
            see(store, number)
        store.label("pump", "fault", answer_id(1))
        assert drawn(store) == {1: (0, Origin.SELF)}
        assert store.counts().dropped == {ExampleDrop.DISK: 98}
        assert store.counts().labels == {}
        before_next(store, "write", lambda: connection.execute("PRAGMA max_page_count = 100000"))
        see(store, 100)
        assert drawn(store) == {1: (0, Origin.SELF), 100: (0, Origin.SELF)}
        assert caplog.text.count("examples were not taken") == 1

    @pytest.mark.parametrize("damage", ["no database", "a page", "another program's", "another version"])
    def test_a_damaged_file_is_moved_aside_and_begun_anew(self, make, tmp_path, damage):
        path = tmp_path / "examples.sqlite"
        if damage == "another program's":
            run_sql(path, "CREATE TABLE theirs (x)")
        else:
            store = make()
            for number in range(100):
                see(store, number)
            store.close()
        if damage == "no database":
            path.write_bytes(b"\xff" * 8192)
        elif damage == "a page":
            content = path.read_bytes()
            path.write_bytes(content[:4096] + b"\xff" * 4096 + content[8192:])
        elif damage == "another version":
            run_sql(path, "PRAGMA user_version = 3")
        store = make()
        see(store, 200)
        assert drawn(store) == {200: (0, Origin.SELF)}
        assert store.counts().corruptions == 1
        assert (tmp_path / "examples.corrupt-1").exists()

    @pytest.mark.parametrize("during", ["draw", "write"])
    def test_damage_that_shows_while_running_costs_the_file_and_not_the_store(self, make, during):
        store = make()
        see(store, 1)
        store.draw("m", 1)
        before_next(store, during, lambda: spoil(store._ledger._file))
        see(store, 2)
        assert drawn(store) == {}
        see(store, 3)
        assert drawn(store) == {3: (0, Origin.SELF)}
        assert store.counts().corruptions == 1
        assert store.counts().dropped == ({ExampleDrop.DISK: 1} if during == "write" else {})

    def test_a_defect_leaves_nobody_waiting(self, make, monkeypatch, caplog):
        def defect(self):
            raise RuntimeError("no")

        monkeypatch.setattr(ExampleLedger, "open", defect)
        store = make()
        assert len(store.draw("m", 1)) == 0
        store.close()
        assert len(store.draw("m", 1)) == 0
        assert "defect in the store of examples" in caplog.text

    def test_a_directory_that_cannot_be_made_is_tried_again(self, make, tmp_path, monkeypatch):
        monkeypatch.setattr(example_ledger, "REOPEN_S", 0.0)
        blocker = tmp_path / "examples.sqlite"
        blocker.mkdir()
        store = make()
        see(store, 1)
        assert drawn(store) == {}
        assert store.counts().dropped == {ExampleDrop.DISK: 1}
        blocker.rmdir()
        see(store, 2)
        assert drawn(store) == {2: (0, Origin.SELF)}

    def test_a_second_process_on_the_same_file_keeps_nothing_and_harms_nothing(self, make):
        store, second = make(), None
        see(store, 1)
        store.draw("m", 1)
        second = make()
        see(second, 2)
        assert drawn(second) == {}
        assert second.counts().dropped == {ExampleDrop.DISK: 1}
        assert drawn(store) == {1: (0, Origin.SELF)}

    def test_a_closed_store_gives_nothing_and_takes_no_more(self, make):
        store = make()
        store.close()
        see(store, 1)
        store.label("pump", "fault", None)
        assert len(store.draw("m", 10)) == 0

    def test_a_defect_in_one_example_ends_no_thread(self, make, monkeypatch):
        store = make()
        see(store, 1)
        store.draw("m", 1)
        monkeypatch.setattr(example_ledger, "encode_tensor", lambda *_, **__: 1 / 0)
        see(store, 2)
        assert drawn(store) == {1: (0, Origin.SELF)}
        monkeypatch.undo()
        see(store, 3)
        assert drawn(store) == {1: (0, Origin.SELF), 3: (0, Origin.SELF)}
        assert store.counts().dropped == {ExampleDrop.DISK: 1}


def before_next(store, method, run):
    """SQLite lets only the thread that opened a connection use it: run this there, before the next call."""
    original = getattr(store._ledger, method)

    def run_first(*arguments):
        setattr(store._ledger, method, original)
        run()
        return original(*arguments)

    setattr(store._ledger, method, run_first)


def spoil(file):
    """Have the file answer as SQLite does when a page turns out to be damaged."""
    error = sqlite3.DatabaseError("database disk image is malformed")
    error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
    connection = file._connection

    class Damaged:
        close = connection.close

        def execute(self, *_):
            raise error

    file._connection = Damaged()


def run_sql(path, statement):
    connection = sqlite3.connect(path)
    connection.execute(statement)
    connection.close()


def test_whoever_asks_is_told_of_truths_and_not_of_own_answers_or_the_holdout(tmp_path):
    told = []
    ledger = ExampleLedger(
        tmp_path / "truths.sqlite",
        {"m": MODEL},
        max_examples=100,
        max_bytes=2**20,
        on_truth=lambda truth, read: told.append((truth, read())),
    )
    ledger.open()

    def seen(number, *, is_sent):
        return Seen("m", "pump", answer_id(number), values(number), 0, 0.95, is_sent)

    ledger.write([seen(1, is_sent=True), seen(2, is_sent=True), seen(3, is_sent=False)])
    assert told == []
    # The site may be quicker than the verdict that says what it is good for.
    ledger.write(
        [Labelled("pump", "fault", answer_id(1), None), Labelled("pump", "fault", answer_id(2), None)]
    )
    assert told == []
    ledger.write(
        [
            Judged("m", verdict(1, 2)),
            Judged("m", verdict(2, 2, use=Use.HOLDOUT)),
            Labelled("pump", "2", answer_id(3), None),
            Labelled("pump", "fault", answer_id(4), seen(4, is_sent=False)),
        ]
    )
    ledger.close()
    assert [truth for truth, _ in told] == [
        Truth("m", (BOOT, 1), "pump", 1),
        Truth("m", (BOOT, 3), "pump", 2),
        Truth("m", (BOOT, 4), "pump", 1),
    ]
    for truth, x in told:
        assert np.array_equal(x, through_wire(values(truth.name[1]), WIRE))
