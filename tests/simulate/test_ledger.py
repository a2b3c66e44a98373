from edge_daemon.simulate.ledger import (
    Accuracy,
    AnswerView,
    Keeping,
    Ledger,
    Percentiles,
    Setting,
    Traffic,
    VerdictView,
    make_report,
)


def answer(number, label="a", *, exit_=0, escalated=False, audited=False):
    return AnswerView(f"boot-{number}", label, exit_, "int8", 100 + number, escalated, audited)


def fill():
    """Five samples: sure and right; unsure, wrong and corrected; audited; sure and wrong; unanswered."""
    ledger = Ledger()
    for number, label in enumerate("aabab"):
        ledger.sent("d", f"s{number}", label)
    ledger.note_answer("d", "s0", answer(0), now_s=1.0)
    ledger.note_answer("d", "s1", answer(1, "b", exit_=2, escalated=True), now_s=1.0)
    ledger.note_answer("d", "s2", answer(2, "b", audited=True), now_s=1.0)
    ledger.note_answer("d", "s3", answer(3, "b"), now_s=1.0)
    ledger.note_verdict("d", "s1", VerdictView("boot-1", "a"), now_s=1.25)
    ledger.note_verdict("d", "s2", VerdictView("boot-2", "b"), now_s=1.75)
    return ledger


SETTING = Setting("m", 1, "mosquitto", 3.0)
TRAFFIC = Traffic(100, 50, 1000)
CLOUD = {("d", f"s{n}"): label for n, label in enumerate("aabbb")}


def report(ledger, *, in_hub=("boot-1", "boot-2"), shed=0, dropped=0):
    return make_report(ledger, SETTING, TRAFFIC, Keeping(in_hub, shed, dropped, 0), CLOUD)


def test_accuracy_is_that_of_labels_nobody_else_saw_at_once_and_after_verdicts():
    assert report(fill()).accuracy == Accuracy(edge=0.5, cascade=0.75, cloud=0.75)


def test_counts_and_latencies_are_those_of_the_answers():
    made = report(fill())
    assert (made.samples, made.escalated, made.audited, made.verdicts) == (5, 1, 1, 2)
    assert (made.answered_by_exit, made.answered_by_precision) == ({"0": 3, "2": 1}, {"int8": 4})
    assert made.verdict_latency_ms == Percentiles(500.0, 745.0)
    assert made.latency_us == Percentiles(101.5, 103.0)


def test_a_sample_that_was_neither_answered_nor_shed_is_lost():
    assert report(fill()).lost == 1
    assert report(fill(), shed=1).lost == 0


def test_a_case_that_is_neither_in_the_hub_nor_dropped_is_lost():
    assert report(fill(), in_hub=("boot-1",), shed=1).lost == 1
    assert report(fill(), in_hub=("boot-1",), shed=1, dropped=1).lost == 0


def test_a_case_that_the_hub_holds_twice_is_a_duplicate():
    assert report(fill(), in_hub=("boot-1", "boot-2", "boot-2")).duplicates == 1


def test_a_repeated_answer_or_verdict_counts_once():
    ledger = fill()
    ledger.note_answer("d", "s0", answer(9, "b"), now_s=9.0)
    ledger.note_verdict("d", "s1", VerdictView("boot-1", "a"), now_s=9.0)
    assert (ledger.answered, ledger.verdicts) == (4, 2)
    assert report(ledger).accuracy == report(fill()).accuracy


def test_an_empty_run_has_a_report_too():
    made = make_report(Ledger(), SETTING, TRAFFIC, Keeping((), 0, 0, 0), {})
    assert (made.samples, made.lost, made.accuracy) == (0, 0, Accuracy(0, 0, 0))
