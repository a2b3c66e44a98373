"""Which samples a board keeps, which label counts and which rows go first: rules alone."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_daemon.core.examples import (
    ExampleCounts,
    ExampleRow,
    Label,
    Origin,
    OwnPace,
    decide_label,
    select_drawn,
    select_surplus,
)

labels = st.builds(Label, st.integers(0, 3), st.sampled_from(Origin), st.integers(0, 4))


@st.composite
def stores(draw):
    rows = draw(
        st.lists(st.tuples(st.none() | labels, st.booleans(), st.integers(1, 50), st.sampled_from("mn")))
    )
    return [
        ExampleRow(number, model, label, is_pending or label is None, size_bytes)
        for number, (label, is_pending, size_bytes, model) in enumerate(rows)
    ]


def class_of(row):
    return row.model, row.label.index if row.may_be_drawn else None


class TestLabels:
    def test_a_human_outranks_the_model_and_the_model_the_board_itself(self):
        own, model, human = (Label(index, origin) for index, origin in enumerate(Origin))
        assert decide_label(None, own) == own
        assert decide_label(own, model) == model
        assert decide_label(model, own) == model
        assert decide_label(human, Label(2, Origin.MODEL, 9)) == human
        assert decide_label(Label(2, Origin.MODEL, 9), human) == human

    def test_a_later_revision_wins_and_an_earlier_one_that_comes_late_does_not(self):
        first, second = Label(0, Origin.MODEL, 1), Label(1, Origin.MODEL, 2)
        assert decide_label(first, second) == second
        assert decide_label(second, first) == second

    def test_a_label_from_the_site_is_as_late_as_what_is_there(self):
        site = Label(3, Origin.HUMAN, None)
        assert decide_label(None, site) == Label(3, Origin.HUMAN, 0)
        assert decide_label(Label(1, Origin.MODEL, 7), site) == Label(3, Origin.HUMAN, 0)
        assert decide_label(Label(1, Origin.HUMAN, 7), site) == Label(3, Origin.HUMAN, 7)

    @given(st.lists(labels, min_size=1, unique_by=lambda label: (label.origin, label.revision)), st.randoms())
    def test_in_whatever_order_they_come_the_same_one_counts_in_the_end(self, offered, rng):
        rng.shuffle(offered)
        known = None
        for label in offered + offered[:3]:
            known = decide_label(known, label)
        assert known == max(offered, key=lambda label: (label.origin, label.revision))


class TestSurplus:
    def test_the_fullest_class_gives_first_its_least_trusted_then_its_oldest(self):
        rows = [
            ExampleRow(1, "m", Label(0, Origin.HUMAN), False, 10),
            ExampleRow(2, "m", Label(0, Origin.MODEL), False, 10),
            ExampleRow(3, "m", Label(1, Origin.SELF), False, 10),
            ExampleRow(4, "m", Label(0, Origin.SELF), False, 10),
            ExampleRow(5, "m", Label(0, Origin.SELF), False, 10),
            ExampleRow(6, "m", None, True, 10),
        ]
        assert [row.id for row in select_surplus(rows, excess_rows=4)] == [4, 5, 2, 6]
        assert [row.id for row in select_surplus(rows, excess_bytes=11)] == [4, 5]
        assert select_surplus(rows) == []

    @given(stores(), st.integers(-3, 60), st.integers(-3, 600))
    def test_it_frees_what_is_asked_or_everything_and_not_a_row_more(self, rows, excess_rows, excess_bytes):
        surplus = select_surplus(rows, excess_rows=excess_rows, excess_bytes=excess_bytes)
        assert len({row.id for row in surplus}) == len(surplus)
        freed = len(surplus), sum(row.size_bytes for row in surplus)
        assert len(surplus) == len(rows) or (freed[0] >= excess_rows and freed[1] >= excess_bytes)
        if surplus:
            assert freed[0] - 1 < excess_rows or freed[1] - surplus[-1].size_bytes < excess_bytes

    @given(stores(), st.integers(0, 60))
    def test_no_class_gives_while_another_one_is_fuller(self, rows, excess_rows):
        surplus = select_surplus(rows, excess_rows=excess_rows)
        left = Counter(map(class_of, rows))
        for row in surplus:
            assert left[class_of(row)] == max(left.values())
            left[class_of(row)] -= 1

    @given(stores(), st.integers(0, 60))
    def test_within_a_class_what_stays_is_worth_more_than_what_goes(self, rows, excess_rows):
        gone = select_surplus(rows, excess_rows=excess_rows)
        for row in gone:
            for other in rows:
                if other not in gone and class_of(other) == class_of(row):
                    assert worth(other) > worth(row)


def worth(row):
    return (0 if row.label is None else row.label.origin, row.id)


class TestDrawing:
    @given(stores(), st.integers(0, 40), st.sampled_from(Origin))
    def test_what_is_drawn_is_labelled_well_enough_newest_first_and_as_many_as_asked(
        self, rows, max_examples, least
    ):
        drawn = select_drawn(rows, max_examples, least=least)
        possible = [row for row in rows if row.may_be_drawn and row.label.origin >= least]
        assert len(drawn) == min(max_examples, len(possible))
        assert [row.id for row in drawn] == sorted({row.id for row in drawn}, reverse=True)
        assert all(row in possible for row in drawn)

    @given(stores(), st.integers(0, 40))
    def test_a_class_that_has_more_to_give_is_never_two_behind_another(self, rows, max_examples):
        drawn = Counter(row.label.index for row in select_drawn(rows, max_examples))
        available = Counter(row.label.index for row in rows if row.may_be_drawn)
        for label, count in available.items():
            if drawn[label] < count:
                assert max(drawn.values(), default=0) <= drawn[label] + 1

    def test_what_waits_for_its_verdict_is_not_drawn_though_the_site_has_labelled_it(self):
        assert select_drawn([ExampleRow(1, "m", Label(0, Origin.HUMAN), True, 1)], 9) == []


class TestOwnPace:
    @pytest.mark.parametrize("classes", [1, 3])
    def test_a_fast_stream_leaves_at_most_so_many_a_minute(self, classes):
        pace = OwnPace(60.0, random.Random(0).random)
        kept = Counter(
            number // 12_000
            for number in range(120_000)
            if pace.decide_keep(number % classes, now_s=number / 200)
        )
        assert all(30 <= count <= 60 + classes for count in kept.values())

    def test_a_rare_class_is_kept_as_often_as_the_usual_one_when_it_comes(self):
        pace = OwnPace(60.0, random.Random(0).random)
        kept = Counter()
        for number in range(120_000):
            label = int(number % 1000 == 0)  # one every five seconds
            kept[label] += pace.decide_keep(label, now_s=number / 200)
        assert kept[1] == 120
        assert kept[0] > 150

    def test_none_a_minute_keeps_none(self):
        pace = OwnPace(0.0, random.Random(0).random)
        assert not any(pace.decide_keep(0, now_s=float(second)) for second in range(1000))


def test_counts_add_up_from_an_origin_on():
    counts = ExampleCounts(
        rows={("m", Origin.SELF): 5, ("m", Origin.MODEL): 3, ("m", Origin.HUMAN): 1, ("n", Origin.SELF): 7}
    )
    assert (counts.of("m"), counts.of("m", least=Origin.MODEL), counts.of("x")) == (9, 4, 0)
