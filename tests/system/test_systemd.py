"""The units as systemd's own tools judge them. Nothing here starts a service."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from edge_cascade.mqtt import Broker
from tests.services import require_program

UNITS = Path(__file__).parent.parent.parent / "systemd"
PROGRAMS = {"edge-daemon": "/opt/edge-daemon/bin/edge-daemon", "cloud-hub": "/opt/edge-daemon/bin/cloud-hub"}
EXPOSURE = {"edge-daemon": 1.5, "cloud-hub": 2.0}


@pytest.fixture
def analyze():
    program = require_program("systemd-analyze", package="systemd")

    def analyze(*words):
        return subprocess.run([program, *words], capture_output=True, text=True, timeout=60, check=False)

    return analyze


@pytest.fixture
def copy_of(tmp_path):
    """A copy of a unit whose program exists here, with the drop-ins that are named."""

    def copy_of(unit, *drop_ins):
        text = (UNITS / f"{unit}.service").read_text(encoding="utf-8")
        # `verify` asks whether the program is there, and on a developer's machine it is not.
        assert text.count(PROGRAMS[unit]) == 1
        copy = tmp_path / f"{unit}.service"
        copy.write_text(text.replace(PROGRAMS[unit], shutil.which("true")), encoding="utf-8")
        folder = tmp_path / f"{unit}.service.d"
        for name in drop_ins:
            folder.mkdir(exist_ok=True)
            example = UNITS / f"{unit}.service.d" / f"{name}.conf.example"
            (folder / f"{name}.conf").write_bytes(example.read_bytes())
        return copy

    return copy_of


@pytest.mark.parametrize(
    ("unit", "drop_ins"),
    [
        ("edge-daemon", ()),
        ("cloud-hub", ()),
        ("edge-daemon", ("tls",)),
        ("cloud-hub", ("tls",)),
        ("edge-daemon", ("gpu",)),
        ("edge-daemon", ("training",)),
        ("edge-daemon", ("releases",)),
        ("edge-daemon", ("releases", "training")),
    ],
)
def test_systemd_finds_nothing_wrong_with_a_unit(analyze, copy_of, unit, drop_ins):
    result = analyze("verify", "--man=no", str(copy_of(unit, *drop_ins)))
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_systemd_would_find_a_misspelt_setting(analyze, copy_of):
    unit = copy_of("edge-daemon")
    unit.write_text(
        unit.read_text(encoding="utf-8").replace("ProtectHome=", "ProtectHomes="), encoding="utf-8"
    )
    assert "ProtectHomes" in analyze("verify", "--man=no", str(unit)).stderr


@pytest.mark.parametrize("unit", PROGRAMS)
def test_exposure_is_within_its_bound(analyze, copy_of, unit):
    result = analyze("security", "--offline=true", "--no-pager", str(copy_of(unit)))
    assert result.returncode == 0, result.stderr
    exposure = float(re.search(rf"Overall exposure level for {unit}\.service: ([\d.]+)", result.stdout)[1])
    assert exposure <= EXPOSURE[unit]


@pytest.mark.parametrize("unit", PROGRAMS)
def test_the_service_tells_systemd_how_it_is_and_is_started_again(unit):
    settings = settings_of(UNITS / f"{unit}.service")
    assert settings["Type"] == ["notify"]
    assert settings["NotifyAccess"] == ["main"]
    assert settings["WatchdogSec"] == ["30"]
    assert settings["Restart"] == ["always"]
    assert settings["StartLimitIntervalSec"] == ["0"]
    assert settings["SystemCallErrorNumber"] == ["EPERM"]


@pytest.mark.parametrize("unit", PROGRAMS)
@pytest.mark.parametrize("form", ["{}.service", "{}.service.d/tls.conf.example"])
def test_the_comment_shows_keys_that_exist_and_credentials_that_are_loaded(unit, form):
    file = UNITS / form.format(unit)
    shown = re.findall(r'^#   (\w+ = ".*")$', file.read_text(encoding="utf-8"), re.MULTILINE)
    keys = tomllib.loads("\n".join(shown))
    assert keys
    assert set(keys) <= set(Broker.__struct_fields__)
    loaded = {value.partition(":")[0] for value in settings_of(file)["LoadCredential"] if value}
    assert {Path(value) for value in keys.values()} == {
        Path("/run/credentials") / f"{unit}.service" / name for name in loaded
    }


def settings_of(file):
    settings = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        if "=" in line and not line.startswith(("#", "[")):
            key, _, value = line.partition("=")
            settings.setdefault(key, []).append(value)
    return settings
