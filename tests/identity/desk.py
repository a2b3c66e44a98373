"""The commands as they are typed, against a hub of its own."""

import os

from cloud_hub.__main__ import build_parser
from tests.services import free_port, start_mosquitto


class Desk:
    """A hub's configuration in a folder of its own, the commands over it, and the broker's folder."""

    def __init__(self, folder, *, prefix="edge"):
        self.folder = folder
        self.state_dir = folder / "state"
        self.broker = folder / "broker"
        self.keys = folder / "keys"
        self.config = folder / "hub.toml"
        self.port = free_port()
        self.config.write_text(
            f'[hub]\nstate_dir = "{self.state_dir}"\nprefix = "{prefix}"\n', encoding="utf-8"
        )

    def type(self, *words):
        """`cloud-hub WORDS --config ...`; raises what the program would print."""
        args = build_parser().parse_args([str(word) for word in words] + ["--config", str(self.config)])
        assert args.run(args) == 0

    def configure(self, *options):
        # The test's folder is closed to any other user than the one who runs the test.
        user = ("--user", "root") if os.geteuid() == 0 else ()
        self.type("broker", "config", "--out", self.broker, "--port", self.port, *user, *options)

    def rewrite_accounts(self):
        user = ("--user", "root") if os.geteuid() == 0 else ()
        self.type("broker", "accounts", "--out", self.broker, *user)

    def start(self):
        return start_mosquitto(self.folder, configuration=self.broker / "mosquitto.conf", port=self.port)

    def password_of(self, name):
        folder = self.broker if name == "hub" else self.keys
        return (folder / f"{name}.password").read_text(encoding="utf-8").strip()
