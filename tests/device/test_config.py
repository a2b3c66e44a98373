"""Configurations that are meant, and one line for each that cannot be."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_cascade.mqtt import Broker
from edge_cascade.setting_errors import Origin, explained, unknown_keys
from edge_daemon.config import (
    AuditConfig,
    Config,
    DeviceConfig,
    HttpConfig,
    HubConfig,
    InletConfig,
    LogConfig,
    ModelConfig,
    ResultsConfig,
    SourceConfig,
    SpoolConfig,
    TrainingConfig,
)
from edge_daemon.config_file import filters_overlap, load_config, warnings_about
from edge_daemon.core.spooling import SpoolLimits
from edge_daemon.core.vitals import VitalsLimits
from edge_daemon.errors import ConfigError

OWN_RESULTS = (
    "would read our own output results/+/# (from results.prefix); narrow the topic or change results.prefix"
)
OWN_HUB_TREE = "would read our own output edge/v1/# (from hub.prefix); narrow the topic or change hub.prefix"

KEY = "00112233445566778899aabbccddeeff" * 2

SMALLEST = """
[device]
id = "press-3"
[[models]]
bundle = "vibration"
[[inlet.sources]]
topic = "sensors/{sensor}"
"""

FULL = """
[device]
id = "press-3"
state_dir = "/srv/edge"
drain_s = 2
[[models]]
bundle = "vibration"
plan = "fast"
point = 4
[[models]]
bundle = "./models/digits"
[inlet]
queue_size = 10
max_payload_bytes = 4096
[inlet.broker]
host = "10.0.0.5"
port = 8883
username = "press-3"
password_file = "/etc/edge/password"
ca_file = "/etc/edge/ca.pem"
protocol = "3.1.1"
[[inlet.sources]]
topic = "sensors/pump-1/{sensor}"
model = "vibration"
format = "float32le"
window = "bundle"
[[inlet.sources]]
topic = "cam/+/{sensor}/#"
model = "digits"
field = "a.b"
[results]
prefix = "answers/here"
qos = 0
[hub]
enabled = true
prefix = "fleet"
max_in_flight_batches = 2
max_batch_items = 8
max_batch_bytes = 2048
batch_linger_s = 1
ack_timeout_s = 5
report_every_s = 60
[spool]
max_bytes = 1000000
max_age_s = 3600
commit_window_ms = 20
[audit]
rate = 0.5
max_per_hour = 6
[training]
enabled = true
max_examples = 100
max_bytes = 1000000
own_per_minute = 6
own_min_probability = 0.5
labels_prefix = "truth/here"
hub_key = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff"
max_temperature_celsius = 60
max_load = 0.3
min_free_mb = 100
on_battery = true
max_queued = 5
max_passes = 5000
max_memory_mb = 256
nice = 10
[http]
enabled = false
host = "::1"
port = 9000
[log]
level = "debug"
"""


@pytest.fixture
def load(tmp_path):
    def load_text(text, **environ):
        path = tmp_path / "edge.toml"
        path.write_text(text, encoding="utf-8")
        return load_config(path, {f"EDGE_DAEMON__{key}": value for key, value in environ.items()})

    return load_text


@pytest.fixture
def complaint(load, tmp_path):
    """The message without the file that it starts with; it must be one line."""

    def complaint_of(text, **environ):
        with pytest.raises(ConfigError) as caught:
            load(text, **environ)
        message = str(caught.value).removeprefix(f"{tmp_path}/edge.toml: ")
        assert "\n" not in message
        return message

    return complaint_of


def test_the_smallest_configuration_has_every_default(load):
    assert load(SMALLEST) == Config(
        device=DeviceConfig(id="press-3", state_dir="/var/lib/edge-daemon", drain_s=5),
        models=(ModelConfig(bundle="vibration", plan=None, point=None),),
        inlet=InletConfig(
            broker=Broker(),
            queue_size=4096,
            max_payload_bytes=1048576,
            sources=(
                SourceConfig(topic="sensors/{sensor}", model=None, format="json", field=None, window=None),
            ),
        ),
        results=ResultsConfig(prefix="results", qos=1),
        hub=HubConfig(
            enabled=True,
            broker=Broker(),
            prefix="edge",
            max_in_flight_batches=4,
            max_batch_items=64,
            max_batch_bytes=98304,
            batch_linger_s=0.2,
            ack_timeout_s=30,
            report_every_s=300,
        ),
        spool=SpoolConfig(max_bytes=64 * 2**20, max_age_s=7 * 86400, commit_window_ms=10),
        audit=AuditConfig(rate=0.01, max_per_hour=60),
        training=TrainingConfig(
            enabled=False,
            max_examples=2000,
            max_bytes=64 * 2**20,
            own_per_minute=60,
            own_min_probability=0.9,
            labels_prefix="labels",
            hub_key=None,
            max_temperature_celsius=75,
            max_load=0.5,
            min_free_mb=200,
            on_battery=False,
            max_queued=32,
            max_passes=1_000_000,
            max_memory_mb=512,
            nice=19,
        ),
        http=HttpConfig(enabled=True, host="127.0.0.1", port=9464),
        log=LogConfig(level="info"),
    )


def test_every_key_is_read(load):
    config = load(FULL)
    assert config.inlet == InletConfig(
        broker=Broker(
            host="10.0.0.5",
            port=8883,
            username="press-3",
            password_file="/etc/edge/password",
            ca_file="/etc/edge/ca.pem",
            protocol="3.1.1",
        ),
        queue_size=10,
        max_payload_bytes=4096,
        sources=(
            SourceConfig(
                topic="sensors/pump-1/{sensor}", model="vibration", format="float32le", window="bundle"
            ),
            SourceConfig(topic="cam/+/{sensor}/#", model="digits", field="a.b"),
        ),
    )
    assert [source.topic_filter for source in config.inlet.sources] == ["sensors/pump-1/+", "cam/+/+/#"]
    assert [model.is_shipped for model in config.models] == [True, False]
    assert config.spool_limits == SpoolLimits(1_000_000, 3600.0, 20.0, 2)
    assert (config.results, config.training, config.log) == (
        ResultsConfig(prefix="answers/here", qos=0),
        TrainingConfig(
            enabled=True,
            max_examples=100,
            max_bytes=1_000_000,
            own_per_minute=6,
            own_min_probability=0.5,
            labels_prefix="truth/here",
            hub_key=KEY,
            max_temperature_celsius=60,
            max_load=0.3,
            min_free_mb=100,
            on_battery=True,
            max_queued=5,
            max_passes=5000,
            max_memory_mb=256,
            nice=10,
        ),
        LogConfig(level="debug"),
    )


def test_the_environment_overrides_with_the_type_of_the_key(load):
    config = load(
        SMALLEST,
        HUB__BROKER__PORT="1884",
        HUB__ENABLED="false",
        HUB__BATCH_LINGER_S="0.5",
        RESULTS__QOS="0",
        DEVICE__ID="17",
        MODELS__0__POINT="3",
        MODELS__1__BUNDLE="digits",
        INLET__SOURCES__0__MODEL="digits",
        INLET__BROKER='{"host": "far", "port": 99}',
    )
    assert (
        config.hub.broker.port,
        config.hub.enabled,
        config.hub.batch_linger_s,
        config.results.qos,
        config.device.id,
        config.models,
        config.inlet.sources[0].model,
        config.inlet.broker,
    ) == (
        1884,
        False,
        0.5,
        0,
        "17",
        (ModelConfig(bundle="vibration", point=3), ModelConfig(bundle="digits")),
        "digits",
        Broker(host="far", port=99),
    )


@pytest.mark.parametrize(
    ("addition", "message"),
    [
        (
            "[hub]\nbroker = { prot = 1 }",
            (
                "hub.broker.prot: unknown key; did you mean 'port'? (known here: host, port, username, "
                "password_file, ca_file, certificate_file, key_file, keepalive_s, protocol)"
            ),
        ),
        (
            "[logg]",
            (
                "logg: unknown key; did you mean 'log'? (known here: device, models, inlet, results, hub, "
                "spool, audit, training, releases, http, log)"
            ),
        ),
        (
            '[[inlet.sources]]\ntopic = "b"\nqzx = 1',
            "inlet.sources[1].qzx: unknown key; remove it (known here: topic, format, model, field, window)",
        ),
        (
            '[[inlet.sources]]\ntopic = "b"\nformat = "jsn"',
            (
                "inlet.sources[1].format = \"jsn\": not one of the allowed values 'jsn' "
                '(allowed: "float32le", "json", "npy")'
            ),
        ),
        (
            "[spool]\ncommit_window_ms = 21",
            "spool.commit_window_ms = 21: expected float <= 20.0 (allowed: a number >= 0 and <= 20)",
        ),
        (
            "[audit]\nrate = nan",
            "audit.rate = nan: expected float >= 0.0 (allowed: a number >= 0 and <= 1)",
        ),
        (
            '[http]\nport = "9464"',
            'http.port = "9464": expected int, got str (allowed: a whole number >= 0 and <= 65535)',
        ),
        (
            "[http]\nenabled = 1",
            "http.enabled = 1: expected bool, got int (allowed: true, false)",
        ),
        ("[hub]\nbroker = 5", "hub.broker = 5: expected object, got int (allowed: a table)"),
        (
            "[hub]\nbroker = { port = 0 }",
            "hub.broker.port = 0: allowed are 1 to 65535; MQTT's are 1883 and 8883",
        ),
        (
            '[hub]\nbroker = { certificate_file = "a", ca_file = "c" }',
            "hub.broker.key_file: missing; certificate_file and key_file belong together",
        ),
        (
            '[hub]\nbroker = { certificate_file = "a", key_file = "c" }',
            "hub.broker.ca_file: missing; a client certificate needs TLS, and TLS needs the CA",
        ),
        (
            '[hub]\nbroker = { password_file = "a" }',
            "hub.broker.password_file: a password needs a name; add username",
        ),
        (
            '[hub]\nprefix = "a/#"',
            "hub.prefix: topic prefix 'a/#' must be levels of letters, digits, '.', '_' or '-'",
        ),
        (
            "[spool]\nmax_bytes = 70000",
            (
                "hub.max_batch_bytes = 98304: 4 batches in flight would be more than the whole spool "
                "(spool.max_bytes = 70000); lower the one or raise the other"
            ),
        ),
        (
            '[[models]]\nbundle = "vibration"',
            'models[1].bundle = "vibration": models[0] is the same; a model is served once, remove one',
        ),
        (
            '[[models]]\nbundle = "digits"',
            "inlet.sources[0].model: missing; with several models say which (vibration, digits)",
        ),
        (
            '[[inlet.sources]]\ntopic = "b"\nmodel = "vibratoin"',
            'inlet.sources[1].model = "vibratoin": no such model (vibration); did you mean "vibration"?',
        ),
        (
            '[[inlet.sources]]\ntopic = "b"\nformat = "npy"\nfield = "x"',
            'inlet.sources[1].field: only json has fields, format is "npy"; remove field',
        ),
        (
            '[[inlet.sources]]\ntopic = "sensors/+"',
            'inlet.sources[1].topic = "sensors/+": the same topics as inlet.sources[0]; remove one',
        ),
    ],
)
def test_what_cannot_be_meant_is_one_line_with_key_value_and_fix(complaint, addition, message):
    assert complaint(f"{SMALLEST}{addition}\n") == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", 'device: missing; add it, e.g. [device] with id = "press-3"'),
        ("device = {}", 'device.id: missing; add it, e.g. id = "press-3"'),
        (
            "[device",
            "not TOML: Expected ']' at the end of a table declaration (at end of document)",
        ),
        (
            SMALLEST.replace("press-3", "a/b"),
            (
                "device.id: device id 'a/b' is not 1 to 64 letters, digits, '.', '_' or '-', a letter "
                'or digit first; e.g. "press-3"'
            ),
        ),
    ],
)
def test_what_is_missing_or_no_toml_is_one_line(complaint, text, message):
    assert complaint(text) == message


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        (
            "HUB__BROKER__PORT",
            "99999",
            "hub.broker.port = 99999: allowed are 1 to 65535; MQTT's are 1883 and 8883",
        ),
        ("HUB__BROKER__PORT", "x", 'hub.broker.port = "x": expected a number'),
        ("HTTP__ENABLED", "maybe", 'http.enabled = "maybe": expected true or false'),
        ("HTTP__PROT", "1", "http.prot: unknown key; did you mean 'port'? (known here: enabled, host, port)"),
        ("MODELS__7__BUNDLE", "x", "models takes an entry's number, 0 to 1, not '7'"),
        ("LOG__LEVEL__X", "x", "log.level is one value and has no 'x' inside"),
        ("INLET__BROKER", "{", 'inlet.broker = "{": expected JSON'),
        (
            "RESULTS__QOS",
            "2",
            "results.qos = 2: not one of the allowed values 2 (allowed: 0, 1)",
        ),
    ],
)
def test_a_bad_override_names_its_variable(complaint, variable, value, message):
    assert complaint(SMALLEST, **{variable: value}) == f"environment EDGE_DAEMON__{variable}: {message}"


def test_a_file_that_cannot_be_read_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"^/.*/none\.toml: cannot be read: No such file or directory$"):
        load_config(tmp_path / "none.toml", {})
    (tmp_path / "latin.toml").write_bytes(b"# \xe9")
    with pytest.raises(ConfigError, match=r"latin\.toml: not UTF-8 at byte 2$"):
        load_config(tmp_path / "latin.toml", {})


@pytest.mark.parametrize(
    ("topic", "problem"),
    [
        ("$SYS/x", "topics with $ belong to the broker; name the sensors' own topics"),
        ("a/#/b", "'#' may only be the last level, alone"),
        ("a/b#", "'#' may only be the last level, alone"),
        ("{sensor}/{sensor}", "{sensor} may stand once"),
        ("a/b+", "'+' and {sensor} take a whole level, as in a/+/b and a/{sensor}/b"),
        ("a/x-{sensor}", "'+' and {sensor} take a whole level, as in a/+/b and a/{sensor}/b"),
        ("a/{name}", "'+' and {sensor} take a whole level, as in a/+/b and a/{sensor}/b"),
        ("results/x", OWN_RESULTS),
        ("results/+/verdict", OWN_RESULTS),
        ("{sensor}/x/#", OWN_RESULTS),
        ("#", OWN_RESULTS),
        ("edge/v1/+/up/cases", OWN_HUB_TREE),
    ],
)
def test_a_topic_that_cannot_be_a_source_is_refused(complaint, topic, problem):
    text = SMALLEST.replace("sensors/{sensor}", topic)
    assert complaint(text) == f'inlet.sources[0].topic = "{topic}": {problem}'


def test_without_a_hub_its_topics_are_free(load):
    text = SMALLEST.replace("sensors/{sensor}", "edge/v1/{sensor}")
    assert load(f"{text}[hub]\nenabled = false\n").inlet.sources[0].topic_filter == "edge/v1/+"


@pytest.mark.parametrize("topic", ["labels/{sensor}", "+/line", "labels/+/x"])
def test_a_source_that_would_take_labels_for_samples_is_refused_where_labels_are_read(load, complaint, topic):
    text = f'{SMALLEST.replace("sensors/{sensor}", topic)}[results]\nprefix = "answers/own/here"\n'
    assert load(text).inlet.sources[0].topic == topic
    assert complaint(f"{text}[training]\nenabled = true\n") == (
        f'inlet.sources[0].topic = "{topic}": would take labels for samples, labels/+/# (from '
        "training.labels_prefix); narrow the topic or change training.labels_prefix"
    )


def test_labels_are_not_read_from_our_own_answers(complaint):
    assert complaint(f'{SMALLEST}[training]\nenabled = true\nlabels_prefix = "results"\n') == (
        'training.labels_prefix = "results": would read our own output results/+/# (from results.prefix) as '
        "labels; choose another prefix"
    )


def test_rounds_are_joined_only_of_a_hub_whose_key_is_known(complaint):
    assert complaint(f"{SMALLEST}[training]\nenabled = true\n") == (
        "training.hub_key: missing; only rounds that this key has signed are joined, and `cloud-hub round "
        "key` prints it"
    )


@pytest.mark.parametrize("key", ["abc", KEY[1:], KEY + "0", f"{KEY[:-1]}g"])
def test_a_key_that_is_none_is_refused(complaint, key):
    assert complaint(f'{SMALLEST}[training]\nhub_key = "{key}"\n') == (
        f'training.hub_key = "{key}": expected 64 hexadecimal digits; `cloud-hub round key` prints them'
    )


def test_without_a_hub_nothing_is_trained(complaint):
    text = f'{SMALLEST}[training]\nenabled = true\nhub_key = "{KEY}"\n[hub]\nenabled = false\n'
    assert complaint(text) == (
        "training.enabled: rounds come from the hub, and hub.enabled is false; change one of the two"
    )


def test_private_heads_are_served_only_where_there_can_be_some(complaint, load):
    assert complaint(f"{SMALLEST}[training]\nserve_private_heads = true\n") == (
        "training.serve_private_heads: private heads come from rounds, and training.enabled is false; change "
        "one of the two"
    )
    text = f'{SMALLEST}[training]\nenabled = true\nhub_key = "{KEY}"\nserve_private_heads = true\n'
    assert load(text).training.serve_private_heads


def test_limits_of_training_are_what_the_rules_take(load):
    training = load(FULL).training
    assert training.vitals_limits == VitalsLimits(60.0, 0.3, 100 * 2**20, True, 5)
    assert training.key_bytes == bytes.fromhex(KEY)


def test_a_labels_prefix_with_a_wildcard_is_refused_though_training_is_off(complaint):
    assert complaint(f'{SMALLEST}[training]\nlabels_prefix = "a/#"\n') == (
        "training.labels_prefix: topic prefix 'a/#' must be levels of letters, digits, '.', '_' or '-'"
    )


def test_a_host_that_others_can_reach_is_allowed_with_a_warning(load):
    assert warnings_about(load(SMALLEST)) == []
    assert warnings_about(load(f'{SMALLEST}[http]\nhost = "0.0.0.0"\n')) == [
        (
            'http.host = "0.0.0.0": health and metrics are readable from the network without a password; '
            '"127.0.0.1" keeps them on this board'
        )
    ]


def matches(topic_filter, topic):
    """MQTT 5, section 4.7, written for one topic."""
    pattern, levels = topic_filter.split("/"), topic.split("/")
    for position, level in enumerate(pattern):
        if level == "#":
            return True
        if position >= len(levels) or level not in {"+", levels[position]}:
            return False
    return len(pattern) == len(levels)


levels = st.lists(st.sampled_from(["a", "b", "+"]), min_size=1, max_size=3)
filters = st.builds(lambda front, tail: "/".join([*front, *tail]), levels, st.sampled_from([[], ["#"]]))


@given(filters, filters)
def test_overlap_is_that_some_topic_matches_both(one, other):
    alphabet = ["a", "b", "c"]
    topics = [[x] for x in alphabet]
    for depth in range(3):
        topics += [[*topic, x] for topic in topics if len(topic) == depth + 1 for x in alphabet]
    some = any(matches(one, "/".join(topic)) and matches(other, "/".join(topic)) for topic in topics)
    assert filters_overlap(one, other) == some


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=5,
)
some_key = st.sampled_from(
    ["device", "models", "inlet", "hub", "log", "device.id", "hub.broker", "inlet.sources"]
)


@given(anything, some_key)
def test_no_value_of_any_type_is_a_traceback(value, key):
    document = {"device": {"id": "a"}, "models": [{"bundle": "m"}], "inlet": {"sources": [{"topic": "t"}]}}
    target = document
    *path, last = key.split(".")
    for step in path:
        target = target.setdefault(step, {})
    target[last] = value
    root = msgspec.inspect.type_info(Config)
    assert all(isinstance(step, str) for _, step, _ in unknown_keys(document, root, ""))
    assert "\n" not in complaint_about(document, root)


def complaint_about(document, root):
    try:
        msgspec.convert(document, Config)
    except msgspec.ValidationError as error:
        return str(explained(error, document, root, Origin("f", {}), {}))
    return ""


@pytest.mark.parametrize(
    ("addition", "message"),
    [
        (
            '[releases]\nenabled = true\nurl = "https://hub.example/v1/fleet"',
            (
                "releases.root: missing; only what the keys named in this file have signed is run, and "
                "`cloud-hub keys root` prints it"
            ),
        ),
        (
            '[releases]\nenabled = true\nroot = "root.json"\nurl = "http://hub.example/v1/fleet"',
            'releases.url = "http://hub.example/v1/fleet": would send the token in the clear; use https',
        ),
        (
            '[releases]\nenabled = true\nroot = "root.json"',
            'releases.url = "": expected an address such as "https://hub.example:8443/v1/fleet"',
        ),
        (
            '[releases]\nhours = "22-6"',
            'releases.hours = "22-6": expected a stretch of a day such as "22:00-06:00"',
        ),
        (
            "[releases]\nmin_probation_s = 10\nmax_probation_s = 5",
            (
                "releases.min_probation_s = 10: more than releases.max_probation_s = 5; lower the one or raise "
                "the other"
            ),
        ),
    ],
)
def test_releases_that_could_not_be_believed_or_fetched_are_refused(complaint, addition, message):
    assert complaint(f"{SMALLEST}{addition}\n") == message
