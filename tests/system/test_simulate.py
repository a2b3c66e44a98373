"""`edge-daemon --simulate` as it is typed: real processes, an outage in the middle, nothing lost."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from edge_cascade.shipped import shipped_models
from edge_daemon.simulate.ledger import SimulationReport
from tests.services import require_program

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 180
OPTIONS = ["--devices", "2", "--samples", "60", "--rate", "60", "--outage", "1", "--seed", "3"]
START = "import sys; from edge_daemon.__main__ import main; sys.exit(main(sys.argv[1:]))"
WITHOUT_MOSQUITTO = f"import edge_daemon.simulate.brokers as b; b.find_mosquitto = lambda: None; {START}"
WITHOUT_HUB = f"import sys; sys.modules['sqlalchemy'] = None; {START}"
# What is promised; the report may say more.
PROMISED = {
    *("samples", "answered_by_exit", "answered_by_precision", "escalated", "audited", "verdicts", "lost"),
    *("duplicates", "shed", "bytes_up", "bytes_down", "bytes_cloud_only", "accuracy", "latency_us"),
    *("verdict_latency_ms", "broker"),
}
# By name: the program, the model, and the broker that it is to find.
RUNS = {
    "vibration": (START, "vibration", "mosquitto"),
    "digits": (START, "digits", "mosquitto"),
    "embedded broker": (WITHOUT_MOSQUITTO, "digits", "embedded"),
}


def simulate(program, *options):
    return subprocess.run(
        [sys.executable, "-c", program, "--simulate", *map(str, options)],
        cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Every run that can be made here, all at once: they wait more than they work."""
    folder = tmp_path_factory.mktemp("simulate")
    possible = {name: run for name, run in RUNS.items() if run[1] in shipped_models()}

    def run(name):
        program, model, _ = possible[name]
        return simulate(program, "--model", model, *OPTIONS, "--json", folder / f"{name}.json")

    with ThreadPoolExecutor(len(RUNS)) as pool:
        ends = dict(zip(possible, pool.map(run, possible), strict=True))
    return {name: (end, folder / f"{name}.json") for name, end in ends.items()}


def test_a_fleet_learns_from_verdicts_alone_and_a_draft_is_made_or_said_why_not(tmp_path):
    require_program("mosquitto", package="mosquitto")
    options = ["--model", "digits", "--devices", 2, "--samples", 400, "--rate", 100, "--drift", 0.3]
    end = simulate(START, *options, "--rounds", 2, "--seed", 3, "--json", tmp_path / "report.json")
    assert end.returncode == 0, end.stderr
    report = msgspec.json.decode((tmp_path / "report.json").read_bytes(), type=SimulationReport)
    learning = report.learning
    assert (report.lost, report.duplicates) == (0, 0)
    committed = [each for each in learning.rounds if each.phase == "committed"]
    # A round that leads no further is rolled back; a series that stalls hands on what it has.
    assert committed
    assert len(committed) == 2 or learning.rounds[-1].phase == "rolled_back"
    assert all(each.counted == 2 and each.bytes_up > 0 and each.bytes_down > 0 for each in committed)
    # Noise and contrast that the shipped network never saw: there is much to learn.
    assert learning.exits_after[-1] > learning.exits_before[-1] + 0.03
    assert (learning.draft is not None) == (learning.phase == "made")
    assert learning.draft is not None or learning.why
    assert "learned from verdicts alone" in end.stdout


@pytest.mark.parametrize("name", RUNS)
def test_a_simulation_with_an_outage_loses_nothing(name, request):
    _, model, broker = RUNS[name]
    if model not in shipped_models():
        pytest.skip(f"the bundle of {model!r} is not built: python models/{model}/recipe.py")
    if broker == "mosquitto":
        require_program("mosquitto", package="mosquitto")
    else:
        pytest.importorskip("amqtt", reason="the embedded broker is in the demo extra")
    end, file = request.getfixturevalue("runs")[name]
    assert end.returncode == 0, end.stderr
    assert "Traceback" not in end.stderr
    found = json.loads(file.read_bytes())
    assert list(found) == [field.name for field in msgspec.structs.fields(SimulationReport)]
    assert found.keys() >= PROMISED
    report = msgspec.convert(found, SimulationReport)
    assert (report.model, report.broker) == (model, broker)
    assert (report.devices, report.samples) == (2, 120)
    assert (report.lost, report.duplicates, report.shed, report.dropped) == (0, 0, 0, 0)
    assert sum(report.answered_by_exit.values()) == 120
    assert sum(report.answered_by_precision.values()) == 120
    # Some are both.
    assert max(report.escalated, report.audited) <= report.verdicts <= report.escalated + report.audited
    assert 0 < report.bytes_up < report.bytes_cloud_only
    assert report.bytes_down > 0
    for share in (report.accuracy.edge, report.accuracy.cascade, report.accuracy.cloud):
        assert 0.5 < share <= 1.0
    assert 0 < report.latency_us.p50 <= report.latency_us.p99
    assert 0 < report.verdict_latency_ms.p50 <= report.verdict_latency_ms.p99
    assert f"broker: {broker}" in end.stderr


def test_without_the_hub_extra_it_says_what_to_install():
    end = simulate(WITHOUT_HUB, *OPTIONS)
    assert (end.returncode, end.stdout, end.stderr) == (
        31,
        "",
        "edge-daemon: --simulate runs a hub: install edge-daemon[hub]\n",
    )
