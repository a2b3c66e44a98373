"""What passed a check once is not checked again; what did not, is."""

import pytest

from edge_cascade import bundle as bundles
from edge_cascade.bundle import load_bundle
from edge_cascade.errors import HostileFileError
from edge_cascade.inspected import MAX_KEPT, Inspected


class Check:
    def __init__(self, *, refuses=False):
        self.times = 0
        self.refuses = refuses

    def __call__(self):
        self.times += 1
        if self.refuses:
            raise HostileFileError("no")
        return "fine"


def test_the_same_content_is_checked_once_and_other_content_by_itself():
    inspected, check = Inspected(), Check()
    assert [inspected.of(digest, check) for digest in ("a", "a", "b")] == ["fine"] * 3
    assert check.times == 2


def test_what_was_refused_is_checked_and_refused_again():
    inspected, check = Inspected(), Check(refuses=True)
    for _ in range(2):
        with pytest.raises(HostileFileError):
            inspected.of("a", check)
    assert check.times == 2


def test_no_more_than_so_many_findings_are_kept():
    inspected, check = Inspected(), Check()
    for number in range(MAX_KEPT + 1):
        inspected.of(str(number), check)
    inspected.of("0", check)
    assert check.times == MAX_KEPT + 2


def test_a_bundle_that_is_read_again_has_no_graph_checked_again_and_is_the_same(monkeypatch, tiny_model_dir):
    once = load_bundle(tiny_model_dir / "bundle")

    def refuse(*_, **__):
        raise AssertionError("checked again")

    monkeypatch.setattr(bundles, "inspect_model", refuse)
    again = load_bundle(tiny_model_dir / "bundle")
    assert {key: each.summary for key, each in again.stage_models.items()} == {
        key: each.summary for key, each in once.stage_models.items()
    }
