"""The real hub as a child process with its real broker, accounts and tokens; nothing of it runs in here."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from edge_cascade.mqtt import Broker
from edge_daemon.errors import SimulationError
from edge_daemon.simulate.brokers import (
    BrokerKind,
    ChildProcess,
    embedded,
    free_port,
    mosquitto,
)

PAGE: Final = 500


class SimulatedHub:
    """`cloud-hub run` and the broker that it shares with the fleet, set up by the hub's own commands."""

    def __init__(
        self,
        kind: BrokerKind,
        directory: Path,
        model: str,
        *,
        holdout_share: float | None = None,
        rollouts: Mapping[str, object] | None = None,
    ) -> None:
        """`rollouts`: that section of the hub's configuration."""
        directory.mkdir(parents=True)
        self.state_dir = directory / "state"
        self._kind = kind
        self._directory = directory
        self._http_port = free_port()
        self._broker_port = free_port()
        self._config = directory / "hub.toml"
        self._secrets = directory / "secrets"
        broker: dict[str, object] = {"port": self._broker_port}
        if kind == "embedded":
            broker |= {
                "username": "fleet",
                "password_file": str(self._password_of("fleet")),
                "protocol": "3.1.1",
            }
        else:
            broker |= {"username": "hub", "password_file": str(self._password_of("hub"))}
        hub: dict[str, object] = {"state_dir": str(self.state_dir)}
        if holdout_share is not None:
            hub["holdout_share"] = holdout_share
        tables: dict[str, Mapping[str, object]] = {
            "hub": hub,
            "http": {"port": self._http_port},
            "broker": broker,
            "rollouts": rollouts or {},
            "log": {"level": "warning"},
        }
        self._config.write_text(_toml(tables, model), encoding="utf-8")
        self._hub = ChildProcess(
            "cloud-hub",
            [sys.executable, "-m", "cloud_hub", "run", "--config", str(self._config)],
            directory / "hub.log",
        )
        self._broker: ChildProcess | None = None
        self._token = ""
        self._signing: tuple[str, ...] = ()

    def _password_of(self, account: str) -> Path:
        if self._kind == "mosquitto" and account == "hub":
            return self._directory / "broker" / "hub.password"
        return self._secrets / f"{account}.password"

    def start(self, devices: list[str]) -> None:
        """Make accounts, start broker and hub, wait for both.

        Raises:
            SimulationError: with the last words of what did not start.
        """
        self._secrets.mkdir(mode=0o700)
        if self._kind == "mosquitto":
            for device in devices:
                self._command("device", "add", device, "--out", str(self._secrets))
            directory = str(self._directory / "broker")
            # Started by root, mosquitto becomes a user that cannot read this directory.
            stay_root = ("--user", "root") if os.geteuid() == 0 else ()
            self._command(
                "broker", "config", "--out", directory, "--port", str(self._broker_port), *stay_root
            )
            self._broker = mosquitto(
                self._directory / "broker/mosquitto.conf", self._directory / "broker.log"
            )
        else:
            import secrets

            password = secrets.token_urlsafe(24)
            self._password_of("fleet").write_text(password, encoding="utf-8")
            self._broker = embedded(self._broker_port, "fleet", password, self._directory / "broker.log")
        self._token = self._command("token", "create", "simulation").strip()
        self.start_broker()
        self._hub.start()
        self._hub.wait_until_listening(self._http_port)

    def start_broker(self) -> None:
        """Start the broker, at first or after an outage."""
        assert self._broker is not None
        self._broker.start()
        self._broker.wait_until_listening(self._broker_port)

    def stop_broker(self) -> None:
        """The outage: nobody reaches anybody."""
        assert self._broker is not None
        self._broker.stop()

    def stop(self) -> None:
        """End both."""
        self._hub.stop()
        if self._broker is not None:
            self._broker.stop()

    def address_for(self, device: str) -> Broker:
        """Where a device connects, and as whom."""
        account = device if self._kind == "mosquitto" else "fleet"
        return Broker(
            port=self._broker_port,
            username=account,
            password_file=str(self._password_of(account)),
            protocol="5" if self._kind == "mosquitto" else "3.1.1",
        )

    def case_ids(self) -> list[str]:
        """The id of every case that the hub holds, through its REST interface."""
        return [f"{case['boot']}-{case['seq']}" for case in self.cases()]

    def stats(self) -> dict[str, Any]:
        """What `/v1/stats` says."""
        return self._get("/v1/stats")

    def round_key(self) -> str:
        """What boards pin as `training.hub_key`."""
        return self._command("round", "key").strip()

    def start_rounds(self, model: str, settings: Mapping[str, object]) -> int:
        """Start a series of rounds; its number.

        Raises:
            SimulationError: with the hub's reason not to.
        """
        options = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
        return int(self._command("round", "start", model, *options))

    def series(self, number: int) -> dict[str, Any]:
        """A series as `/v1/series` shows it."""
        page = self._get(f"/v1/series?limit=1&cursor={number + 1}")
        return dict(page["series"][0])

    def rounds(self, series: int) -> list[dict[str, Any]]:
        """The rounds of a series as `/v1/rounds` shows them, the first one first."""
        return list(reversed(self._get(f"/v1/rounds?series={series}&limit={PAGE}")["rounds"]))

    def bundle_of_release(self, release: str) -> str:
        """The id of the bundle of a release."""
        return str(self._get(f"/v1/releases/{release}")["bundle"])

    # --- releases ------------------------------------------------------------------------------------------

    @property
    def fleet_url(self) -> str:
        """Where boards fetch releases: their `releases.url`."""
        return f"http://127.0.0.1:{self._http_port}/v1/fleet"

    def make_keys(self) -> tuple[Path, Path]:
        """Keys for releases, once the hub runs; the files of what a board trusts first, and of its token."""
        passphrase = self._secrets / "passphrase"
        passphrase.write_text("of a simulation\n", encoding="utf-8")
        self._signing = ("--passphrase-file", str(passphrase))
        self._command("keys", "init", "--offline", str(self._secrets / "keys"), *self._signing)
        root, token = self._secrets / "root.json", self._secrets / "fetch-token"
        root.write_text(self._command("keys", "root"), encoding="utf-8")
        token.write_text(
            self._command("token", "create", "boards", "--scope", "fetch").strip(), encoding="utf-8"
        )
        return root, token

    def add_release(self, bundle: Path) -> str:
        """Register a bundle and sign it by the offline keys; the number of the release."""
        self._command("release", "add", str(bundle))
        release = str(self._get("/v1/releases?limit=1")["releases"][0]["id"])
        key = self._secrets / "keys" / "targets-1.pem"
        self._command("release", "sign", release, "--key", str(key), *self._signing)
        return release

    def start_rollout(self, release: str, plan: Mapping[str, object]) -> str:
        """Begin a rollout by this plan (see docs/rollouts.md); its id."""
        path = self._directory / "plan.json"
        path.write_text(json.dumps(plan), encoding="utf-8")
        return self._command("rollout", "start", release, "--waves", str(path)).split()[-1]

    def rollout(self, rollout: str) -> dict[str, Any]:
        """A rollout as `/v1/rollouts/{rollout}` shows it."""
        return self._get(f"/v1/rollouts/{rollout}")

    def cases(self) -> list[dict[str, Any]]:
        """Every case that the hub holds."""
        return [case for page in self._pages("/v1/cases", "cases") for case in page]

    # --- underneath ----------------------------------------------------------------------------------------

    def _pages(self, path: str, key: str) -> Iterator[list[dict[str, Any]]]:
        cursor = ""
        while True:
            answer = self._get(f"{path}?limit={PAGE}{cursor}")
            yield answer[key]
            if not answer["next"]:
                return
            cursor = f"&cursor={answer['next']}"

    def _get(self, path: str) -> dict[str, Any]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self._http_port}{path}", headers={"Authorization": f"Bearer {self._token}"}
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                answer: dict[str, Any] = json.load(response)
                return answer
        except (urllib.error.URLError, ValueError) as error:
            raise SimulationError(
                f"the hub does not answer {path}: {error}; {self._hub.last_words()}"
            ) from error

    def _command(self, *arguments: str) -> str:
        from cloud_hub.__main__ import main

        # Some commands print text, some bytes.
        printed, err = io.BytesIO(), io.StringIO()
        out = io.TextIOWrapper(printed, encoding="utf-8", write_through=True)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main([*arguments, "--config", str(self._config)])
        if code != 0:
            raise SimulationError(f"cloud-hub {' '.join(arguments)}: {err.getvalue().strip()}")
        return printed.getvalue().decode("utf-8")


def _toml(tables: Mapping[str, Mapping[str, object]], model: str) -> str:
    lines = ["[[models]]", f"bundle = {json.dumps(model)}"]
    for name, table in tables.items():
        lines.append(f"[{name}]")
        lines += [f"{key} = {json.dumps(value)}" for key, value in table.items()]
    return "\n".join([*lines, ""])
