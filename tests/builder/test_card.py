import dataclasses
import re
import sys
from html.parser import HTMLParser

import msgspec
import numpy as np
import pytest

pytest.importorskip("onnx", reason="the builder needs onnx (the dev extra)")

from cloud_hub.builder.calibration.outcomes import Outcomes
from cloud_hub.builder.reports.card import (
    Card,
    DataPart,
    Provenance,
    StageTime,
    TradeRow,
    make_card,
    reliability_of,
    select_curve_points,
)
from cloud_hub.builder.reports.card_files import CARD_HTML, CARD_MD, REPORT, write_card
from cloud_hub.builder.reports.card_pages import html_of, markdown_of
from cloud_hub.builder.reports.card_text import (
    certificate_sentence,
    promises_of,
    sections_of,
    share_of_many,
)
from cloud_hub.builder.reports.traffic import PlanRun
from tests.builder.reports import certificate, digits

HOSTILE = '</title><script>alert("1")</script>|`x` [a](b) \n# no heading'
PROVENANCE = Provenance(
    measured_on="test data",
    held_out=True,
    data=(DataPart("train", 797), DataPart("calibration", 500, groups=20, sha256="cd" * 32)),
    naive=(0.1, 0.1, 0.4),
    trade=(TradeRow(0.001, None), TradeRow(0.01, 0.25)),
    made_by={"edge network": HOSTILE},
)
VOID_ELEMENTS = {"meta", "br", "hr", "img", "link", "input"}


class Outline(HTMLParser):
    """What a browser would make of a page: that tags close, and every attribute."""

    def __init__(self):
        super().__init__()
        self.open = []
        self.tags = []
        self.attributes = []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *each) for each in attributes]
        if tag not in VOID_ELEMENTS:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *each) for each in attributes]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def outline_of(page):
    outline = Outline()
    outline.feed(page)
    outline.close()
    assert outline.open == []
    return outline


def run_of(certificates=(), labels=None):
    run = digits().run("int8")
    weights = msgspec.structs.replace(run.bundle.weights, certificates=certificates)
    graph = msgspec.structs.replace(run.bundle.graph, labels=labels or run.bundle.graph.labels)
    bundle = dataclasses.replace(run.bundle, weights=weights, graph=graph)
    plan = msgspec.structs.replace(run.plan, chosen=10)
    return PlanRun(bundle, plan, run.x, run.outcomes)


@pytest.fixture(scope="module")
def card():
    both = (certificate(), certificate(kind="disagreement", epsilon=0.015))
    labels = (HOSTILE, *digits().bundle.graph.labels[1:])
    return make_card(run_of(both, labels), PROVENANCE)


def test_a_loss_certificate_reads_as_one_sentence():
    assert certificate_sentence(certificate()) == (
        "With 95 % confidence, at most 5 in 1,000 samples are answered wrongly on the board although the full "
        "model would have been right; measured on 3,500 samples that trained nothing."
    )


def test_a_disagreement_certificate_names_its_groups():
    grouped = certificate(kind="disagreement", epsilon=0.0125, delta=0.001, groups=40)
    assert certificate_sentence(grouped) == (
        "With 99.9 % confidence, at most 125 in 10,000 samples are answered otherwise on the board than the full "
        "model would have answered; measured on 3,500 samples in 40 groups that trained nothing."
    )


@pytest.mark.parametrize(
    ("share", "words"),
    [
        (0.05, "5 in 100"),
        (0.005, "5 in 1,000"),
        (0.0003, "3 in 10,000"),
        (0.1, "10 in 100"),
        (0.123456, "12,346 in 100,000"),
    ],
)
def test_a_share_reads_as_a_count_of_a_round_number(share, words):
    assert share_of_many(share) == words


def test_the_report_reads_back_as_the_card(card, tmp_path):
    write_card(tmp_path, card)
    assert msgspec.json.decode((tmp_path / REPORT).read_bytes(), type=Card) == card


def test_the_curve_runs_from_the_hub_alone_to_the_board_alone(card):
    assert (card.curve[0].upload_share, card.curve[-1].upload_share) == (1.0, 0.0)
    assert card.curve[-1].bytes_up == 0.0
    assert card.evaluation.point in {each.point for each in card.curve}
    assert card.cloud_only.bytes_up > card.naive.bytes_up > 0.0


def test_a_long_chain_is_thinned_but_keeps_its_ends_and_the_chosen_point():
    points = digits().bundle.plan("int8").points * 10
    chosen = select_curve_points(points, 7)
    assert len(chosen) <= 24
    assert {0, 7, len(points) - 1} <= set(chosen)
    assert select_curve_points(points[:3], 1) == [0, 1, 2]


def test_a_rung_that_is_right_as_often_as_it_says_has_no_calibration_error():
    heads = np.zeros((1, 100, 5), np.float32)
    heads[0, :, 1] = 0.75
    labels = (np.arange(100) >= 75).astype(np.int64)
    honest = reliability_of(Outcomes(heads, labels, labels), 0)
    assert honest.ece == pytest.approx(0.0)
    assert [(each.samples, each.accuracy) for each in honest.bins] == [(100, 0.75)]
    heads[0, :, 1] = 1.0
    assert reliability_of(Outcomes(heads, labels, labels), 0).ece == pytest.approx(0.25)


def test_the_page_holds_nothing_of_a_hostile_name_but_its_text(card):
    page = html_of(HOSTILE, sections_of(card), {})
    outline = outline_of(page)
    assert "script" not in outline.tags
    assert page.count("&lt;script&gt;") >= 3


def test_markdown_holds_nothing_of_a_hostile_name_but_its_text(card):
    text = markdown_of(HOSTILE, sections_of(card))
    assert "<script" not in text
    assert "\n# no heading" not in text
    rows = [line for line in text.splitlines() if line.startswith("| edge network")]
    assert len(re.findall(r"(?<!\\)\|", rows[0])) == 3


def test_the_page_asks_for_nothing_and_its_plots_speak(card, tmp_path):
    pytest.importorskip("matplotlib", reason="plots need matplotlib (the build extra)")
    write_card(tmp_path, card)
    page = (tmp_path / CARD_HTML).read_text()
    outline = outline_of(page)
    assert outline.tags.count("svg") == 3
    for _, name, value in outline.attributes:
        if name in {"src", "href", "xlink:href", "srcset", "action"}:
            assert value.startswith("#")
    assert not re.search(r"url\((?!#)|@import", page)
    ids = [value for _, name, value in outline.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    labels = [value for tag, name, value in outline.attributes if (tag, name) == ("svg", "aria-label")]
    assert len(labels) == 3
    assert labels[0].startswith("accuracy against bytes a sample. This bundle: ")
    used = set(re.findall(r"url\(#([^)]+)\)", page)) | set(re.findall(r'href="#([^"]+)"', page))
    assert used <= set(ids)


def test_plots_take_their_ink_from_the_page(card, tmp_path):
    pytest.importorskip("matplotlib", reason="plots need matplotlib (the build extra)")
    write_card(tmp_path, card)
    figures = re.findall(r"<figure>.*?</figure>", (tmp_path / CARD_HTML).read_text(), re.DOTALL)
    for figure in figures:
        assert "var(--ink)" in figure
        assert "#000000" not in figure
        assert "#ffffff" not in figure


def test_the_same_card_gives_the_same_bytes(card, tmp_path):
    write_card(tmp_path, card)
    first = {name: (tmp_path / name).read_bytes() for name in (REPORT, CARD_MD, CARD_HTML)}
    write_card(tmp_path, card)
    assert first == {name: (tmp_path / name).read_bytes() for name in first}


def test_without_matplotlib_the_page_has_its_tables(card, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "cloud_hub.builder.reports.card_plots", raising=False)
    write_card(tmp_path, card)
    page = (tmp_path / CARD_HTML).read_text()
    assert "<svg" not in page
    assert "hub: full model" in page


def test_a_bundle_without_a_certificate_promises_nothing():
    text = markdown_of("digits", sections_of(make_card(run_of(), Provenance("test data"))))
    assert "Nothing: the thresholds fit the data they were chosen on" in text
    assert "With 95 % confidence" not in text


def test_certificates_are_held_only_against_samples_that_had_no_part_in_the_build():
    run = run_of((certificate(),))
    fresh = make_card(run, Provenance("test data", held_out=True))
    own = make_card(run, Provenance("calibration data"))
    assert [check.kind for check in fresh.evaluation.checks] == ["loss"]
    assert "held against data (test data)" in markdown_of("d", sections_of(fresh))
    assert own.evaluation.checks == ()
    assert "held against" not in markdown_of("d", sections_of(own))


def test_a_point_beyond_the_certified_one_is_said_to_be():
    text = markdown_of("d", sections_of(make_card(run_of((certificate(last_point=3),)), PROVENANCE)))
    assert "The point in use (10) lies beyond the certified one (3): there nothing is promised." in text


def test_a_certificate_of_escalating_everything_is_said_to_save_nothing():
    text = markdown_of("d", sections_of(make_card(run_of((certificate(last_point=0),)), PROVENANCE)))
    assert "everything is sent" in text


def test_a_certificate_that_does_not_reach_the_point_in_use_promises_nothing_of_it():
    short = certificate(kind="disagreement", epsilon=0.02, last_point=3)
    said = promises_of(make_card(run_of((certificate(last_point=10), short)), PROVENANCE))
    assert said[0].startswith("With 95 % confidence, at most 5 in 1,000 samples are answered wrongly")
    assert len(said) == 2
    assert said[1].startswith("The certificate of disagreement (at most 2 in 100) reaches point 3;")
    assert said[1].endswith("of the point in use (10) it promises nothing.")


def test_the_times_of_the_stages_stand_on_the_card_where_they_were_taken():
    times = (StageTime(0, "int8", 12.34), StageTime(0, "fp32", 20.0), StageTime(1, "fp32", 1234.0))
    text = markdown_of("d", sections_of(make_card(run_of(), Provenance("test data", stage_times=times))))
    assert "Time on the machine that built it" in text
    assert "| 0 | 20.0 | 12.3 |" in text
    assert "| 1 | 1,234.0 | - |" in text
