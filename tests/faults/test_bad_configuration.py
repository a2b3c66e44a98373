"""What cannot work ends at once, with one line that says why and an exit code that says of which kind."""

import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from cloud_hub.__main__ import main as cloud_hub
from edge_daemon.__main__ import main as edge_daemon
from tests.faults.loop import toml
from tests.faults.processes import ROOT
from tests.services import free_port

TIMEOUT_S = 60

# By fault: the exit code of `edge-daemon`, and what its line says beside the file's name.
EDGE = {
    "wrong TOML": (10, "edge-daemon: {config}: not TOML: "),
    "unknown key": (10, "edge-daemon: {config}: device.idd: unknown key; did you mean 'id'?"),
    "wrong type": (10, 'edge-daemon: {config}: inlet.queue_size = "many": expected'),
    "own output as inlet": (
        10,
        'edge-daemon: {config}: inlet.sources[0].topic = "results/{{sensor}}": would read our own output',
    ),
    "missing bundle": (
        11,
        "edge-daemon: models: bundle '{folder}/nowhere': {folder}/nowhere: no such directory",
    ),
    "damaged bundle": (
        11,
        "edge-daemon: models: bundle '{folder}/damaged/bundle': {folder}/damaged/bundle/weights",
    ),
    "unreadable password file": (10, "edge-daemon: password_file '{folder}': Is a directory"),
    "port in use": (12, "edge-daemon: http.host='127.0.0.1' http.port={port}: "),
}
HUB = {
    "wrong TOML": (2, "cloud-hub: {config}: not TOML: "),
    "unknown key": (2, "cloud-hub: {config}: http.prot: unknown key; did you mean 'port'?"),
    "wrong type": (2, 'cloud-hub: {config}: hub.drain_s = "long": expected '),
    "missing certificate": (2, "cloud-hub: http.certificate_file = '{folder}/http.pem': No such file or"),
    "missing bundle": (7, "cloud-hub: model '{folder}/nowhere': {folder}/nowhere: no such directory"),
    "damaged bundle": (7, "cloud-hub: model '{folder}/damaged/bundle': {folder}/damaged/bundle/weights"),
    "damaged full model": (7, "cloud-hub: {folder}/other/full.onnx: its SHA-256 is not the one"),
    "unreadable password file": (2, "cloud-hub: broker: password_file '{folder}': Is a directory"),
    "port in use": (9, "cloud-hub: http.host = '127.0.0.1', http.port = {port}: cannot listen: "),
}
# What only a start finds out: whether a configuration is right does not depend on who uses a port today. For
# these there are processes; the others end before there is any thread or loop, and a call shows the same.
FOUND_AT_START = ("unreadable password file", "port in use")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model_dir):
    """Bundles with a flipped byte, and the models that are whole."""
    folder = tmp_path_factory.mktemp("bad")
    for name, file in (("damaged", "bundle/weights/weights.safetensors"), ("other", "full.onnx")):
        shutil.copytree(tiny_model_dir, folder / name)
        damaged = folder / name / file
        content = bytearray(damaged.read_bytes())
        content[len(content) // 2] ^= 1
        damaged.write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def taken_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.fixture(scope="module")
def edge_configs(folder, taken_port, tiny_model_dir):
    """A configuration per fault, right in everything else."""

    def tables(fault):
        device = {"id": "pump-1", "state_dir": str(folder / fault)}
        inlet = {"queue_size": 100}
        broker = {"port": free_port()}
        source = {"topic": "sensors/{sensor}"}
        bundle, port = tiny_model_dir / "bundle", 0
        match fault:
            case "unknown key":
                device = {"idd": "pump-1"}
            case "wrong type":
                inlet = {"queue_size": "many"}
            case "own output as inlet":
                source = {"topic": "results/{sensor}"}
            case "missing bundle":
                bundle = folder / "nowhere"
            case "damaged bundle":
                bundle = folder / "damaged/bundle"
            case "unreadable password file":
                broker |= {"username": "pump-1", "password_file": str(folder)}
            case "port in use":
                port = taken_port
        return toml(
            device=device,
            models=[{"bundle": str(bundle)}],
            inlet=inlet,
            inlet__broker=broker,
            inlet__sources=[source],
            hub__broker={"port": free_port()},
            http={"port": port},
            # What else is said at the start is no complaint.
            log={"level": "error"},
        )

    return written(folder, "edge", EDGE, tables)


@pytest.fixture(scope="module")
def hub_configs(folder, taken_port, tiny_model_dir):
    def tables(fault):
        hub = {"state_dir": str(folder / f"hub of {fault}")}
        broker, http = {"port": free_port()}, {"port": 0}
        model = {"bundle": str(tiny_model_dir / "bundle")}
        match fault:
            case "unknown key":
                http = {"prot": 1}
            case "wrong type":
                hub |= {"drain_s": "long"}
            case "missing certificate":
                http |= {"certificate_file": str(folder / "http.pem"), "key_file": str(folder / "http.pem")}
            case "missing bundle":
                model = {"bundle": str(folder / "nowhere")}
            case "damaged bundle":
                model = {"bundle": str(folder / "damaged/bundle")}
            case "damaged full model":
                model |= {"full": str(folder / "other/full.onnx")}
            case "unreadable password file":
                broker |= {"username": "hub", "password_file": str(folder)}
            case "port in use":
                http = {"port": taken_port}
        return toml(hub=hub, broker=broker, http=http, models=[model], log={"level": "error"})

    return written(folder, "hub", HUB, tables)


@pytest.fixture(scope="module")
def ends(edge_configs, hub_configs):
    """What became of the programs that were started, by program and fault."""
    commands = {
        (program, fault): ["-m", program, "run", "--config", configs[fault]]
        for program, configs in (("edge_daemon", edge_configs), ("cloud_hub", hub_configs))
        for fault in FOUND_AT_START
    }

    def run(command):
        return subprocess.run(
            [sys.executable, *map(str, command)],
            cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
        )  # fmt: skip

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(commands, pool.map(run, commands.values()), strict=True))


@pytest.mark.parametrize("fault", FOUND_AT_START)
def test_a_program_that_cannot_start_ends_with_one_line(
    fault, ends, edge_configs, hub_configs, folder, taken_port
):
    for program, faults, configs in (("edge_daemon", EDGE, edge_configs), ("cloud_hub", HUB, hub_configs)):
        code, line = faults[fault]
        end = ends[program, fault]
        assert (end.returncode, end.stdout) == (code, "")
        assert_one_line(end.stderr, line.format(config=configs[fault], folder=folder, port=taken_port))


@pytest.mark.parametrize("fault", [fault for fault in EDGE if fault not in FOUND_AT_START])
def test_check_config_of_the_device_says_the_same_as_its_start(fault, edge_configs, folder, capsys):
    code, line = EDGE[fault]
    said = []
    for command in (["run", "--config"], ["check-config", "--config"]):
        assert edge_daemon([*command, str(edge_configs[fault])]) == code
        said.append(capsys.readouterr())
    assert said[0] == said[1]
    assert said[0].out == ""
    assert_one_line(said[0].err, line.format(config=edge_configs[fault], folder=folder))


@pytest.mark.parametrize("fault", [fault for fault in HUB if fault not in FOUND_AT_START])
def test_check_config_of_the_hub_says_the_same_as_its_start(fault, hub_configs, folder, capsys):
    code, line = HUB[fault]
    said = []
    for command in ("run", "check-config"):
        assert cloud_hub([command, "--config", str(hub_configs[fault])]) == code
        said.append(capsys.readouterr())
    assert said[0] == said[1]
    assert said[0].out == ""
    assert_one_line(said[0].err, line.format(config=hub_configs[fault], folder=folder))


def assert_one_line(said, start):
    assert said.endswith("\n")
    assert said.count("\n") == 1, said
    assert said.startswith(start)


def written(folder, program, faults, tables):
    configs = {fault: folder / f"{program} {fault}.toml" for fault in faults}
    for fault, config in configs.items():
        content = "[device\n" if fault == "wrong TOML" else tables(fault)
        config.write_text(content, encoding="utf-8")
    return configs
