"""The closed loop as real processes: two brokers with the written configuration, a hub, a device, a sensor.

The sensors' broker and the hub's are apart, so that either can go while the other stays. Everything is started,
killed and started again by the test; nothing here is a fake.
"""

import contextlib
import io
import json
import os

from cloud_hub.__main__ import main as cloud_hub
from edge_cascade.bundle import load_bundle
from tests.faults.processes import DEVICE, Broker, Device, Hub, wait_until
from tests.faults.sensor import Sensor, balance
from tests.identity.party import Party, tls_context
from tests.services import free_port

SENSOR = "probe-1"
SENSORS = {SENSOR: DEVICE}


def toml(**tables):
    """Tables of plain values as TOML; a list of dictionaries is an array of tables."""
    lines = []
    for name, table in tables.items():
        key = name.replace("__", ".")
        for one in table if isinstance(table, list) else [table]:
            lines.append(f"[[{key}]]" if isinstance(table, list) else f"[{key}]")
            lines += [f"{word} = {json.dumps(value)}" for word, value in one.items()]
    return "\n".join(lines) + "\n"


class Loop:
    """Everything together, and the accounts for it. With `mutual_tls` one broker serves both purposes.

    `sensors`: each with the device that it feeds; `device` and `sensor` are the first of each.
    """

    def __init__(self, folder, model_dir, *, mutual_tls=False, sensors=SENSORS):
        self.folder = folder
        self.model_dir = model_dir
        self.plan = load_bundle(model_dir / "bundle").plan(None)
        self.mutual_tls = mutual_tls
        self._keys = folder / "keys"
        self.hub_broker = Broker(folder / "hub-broker")
        self.site_broker = self.hub_broker if mutual_tls else Broker(folder / "site-broker")
        http_port = free_port()
        config = folder / "hub.toml"
        config.write_text(
            toml(
                hub={"state_dir": str(folder / "hub"), "max_payload_bytes": 110_000},
                http={"port": http_port},
                broker={"port": self.hub_broker.port, **self.credential("hub", self.hub_broker.folder)},
                models=[{"bundle": str(model_dir / "bundle")}],
            ),
            encoding="utf-8",
        )
        self.hub = Hub(config, http_port, folder / "hub", folder / "hub.log")
        self._make_accounts(sensors)
        self.device = self.new_device("device")
        self.sensor = self.new_sensor(SENSOR, DEVICE)

    def start(self):
        """Whatever of brokers, hub and sensor is not running."""
        self.site_broker.start()
        self.hub_broker.start()
        self.hub.start()
        self.hub.wait_ready()

    def stop(self):
        """Everything, whatever of it fails to end in order."""
        with contextlib.ExitStack() as last_first:
            for end in (
                self.hub_broker.stop,
                self.site_broker.stop,
                self.hub.stop,
                self.sensor.stop,
                self.device.stop,
            ):
                last_first.callback(end)

    def new_sensor(self, name, device):
        """A sensor that has an account to feed this device."""
        return Sensor(self.connect_as(name), name, self.model_dir, device=device)

    def new_device(self, name, *, device=DEVICE, **more):
        """A device with a disk of its own; of one id only one at a time can run."""
        port, state_dir, config = free_port(), self.folder / name, self.folder / f"{name}.toml"
        credential = self.credential(device, self._keys)
        tables = {
            "device": {"id": device, "state_dir": str(state_dir), "drain_s": 2.0},
            # Point 0 escalates everything.
            "models": [{"bundle": str(self.model_dir / "bundle"), "point": 0}],
            "inlet": {"max_payload_bytes": 100_000},
            "inlet__broker": {"port": self.site_broker.port, **credential},
            "inlet__sources": [
                {"topic": f"sensors/{device}/{{sensor}}", "format": "float32le"},
                {"topic": f"sensors/{device}/json/{{sensor}}", "format": "json"},
                {"topic": f"sensors/{device}/npy/{{sensor}}", "format": "npy"},
            ],
            "results": {"prefix": f"results/{device}"},
            "hub": {"batch_linger_s": 0.05, "ack_timeout_s": 2.0},
            "hub__broker": {"port": self.hub_broker.port, **credential},
            "audit": {"rate": 0.0},
            "http": {"port": port},
        }
        config.write_text(toml(**(tables | more)), encoding="utf-8")
        return Device(config, port, state_dir, self.folder / f"{name}.log")

    def credential(self, account, folder):
        """The keys of a `broker` table for an account."""
        if self.mutual_tls:
            return {
                "host": "localhost",
                "ca_file": str(folder / "ca.pem"),
                "certificate_file": str(folder / f"{account}.pem"),
                "key_file": str(folder / f"{account}.key"),
            }
        return {"username": account, "password_file": str(folder / f"{account}.password")}

    def connect_as(self, account):
        """How a paho client connects to the sensors' broker under an account."""
        folder, port = self._keys, self.site_broker.port

        def connect(client, **more):
            if self.mutual_tls:
                client.tls_set(
                    str(folder / "ca.pem"), str(folder / f"{account}.pem"), str(folder / f"{account}.key")
                )
            else:
                password = (folder / f"{account}.password").read_text(encoding="utf-8").strip()
                client.username_pw_set(account, password)
            client.connect("localhost" if self.mutual_tls else "127.0.0.1", port, **more)

        return connect

    def party(self, account):
        """Somebody else at the hub's broker, who has what proves an account."""
        folder = self.hub_broker.folder if account == "hub" else self._keys
        if self.mutual_tls:
            tls = tls_context(folder / "ca.pem", folder / f"{account}.pem", folder / f"{account}.key")
            return Party(self.hub_broker.port, tls=tls)
        password = (folder / f"{account}.password").read_text(encoding="utf-8").strip()
        return Party(self.hub_broker.port, account, password)

    def settle(self, names):
        """Wait until everything has arrived that was not given up; what became of the samples."""

        def is_settled():
            if not (all(self.sensor.answers[name] for name in names) and self.device.is_drained()):
                return False
            given_up = self.device.metric("edge_spool_dropped_total")
            awaited = [name for name in names if self.sensor.is_verdict_promised(name)]
            if sum(not self.sensor.verdicts[name] for name in awaited) > given_up:
                return False
            result = balance(names, self.sensor, self.hub.cases())
            return result.without_verdict == 0 and result.missing <= given_up

        # What is wrong is said better by the comparison with what is right than by a timeout.
        with contextlib.suppress(AssertionError):
            wait_until(is_settled, "everything to arrive")
        return balance(names, self.sensor, self.hub.cases())

    def tracebacks(self):
        """Every log that holds one."""
        return [log.name for log in sorted(self.folder.glob("*.log")) if "Traceback" in log.read_text()]

    def _make_accounts(self, sensors):
        certificate = ["--certificate"] if self.mutual_tls else []
        user = ["--user", "root"] if os.geteuid() == 0 else []
        if self.mutual_tls:
            self.command("broker", "certificate", "--host", "localhost", "127.0.0.1")
        for sensor, device in sensors.items():
            self.command("device", "add", device, "--out", self._keys, *certificate)
            self.command("sensor", "add", sensor, "--device", device, "--out", self._keys, *certificate)
        for broker in dict.fromkeys((self.hub_broker, self.site_broker)):
            security = ["--mutual-tls"] if self.mutual_tls else []
            self.command("broker", "config", "--out", broker.folder, "--port", broker.port, *user, *security)
        self.hub.token = self.command(
            "token", "create", "test", "--scope", "read", "--scope", "label"
        ).strip()

    def command(self, *words):
        """`cloud-hub WORDS`, in this process to save the start of one; what it printed."""
        said, complained = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complained):
            code = cloud_hub([*map(str, words), "--config", str(self.hub.config)])
        assert code == 0, complained.getvalue()
        return said.getvalue()
