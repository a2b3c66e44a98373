"""Configuration: what is wrong is said in one line with the key, the value and the fix."""

import pytest

from cloud_hub.config import load_config, warnings_about
from cloud_hub.errors import ConfigError


def written(tmp_path, text):
    path = tmp_path / "hub.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_an_empty_file_is_a_whole_configuration(tmp_path):
    config = load_config(written(tmp_path, ""), {})
    assert (config.http.host, config.http.port, config.hub.prefix) == ("127.0.0.1", 8080, "edge")


def test_the_environment_overrides_the_file_and_speaks_json_for_lists(tmp_path):
    environ = {
        "CLOUD_HUB__HTTP__PORT": "9000",
        "CLOUD_HUB__HUB__HOLDOUT_SHARE": "0.5",
        "CLOUD_HUB__BROKER__USERNAME": "12345",
        "CLOUD_HUB__MODELS": '[{"bundle": "digits"}]',
        "OTHER": "x",
    }
    config = load_config(written(tmp_path, "[http]\nport = 1\n"), environ)
    assert (config.http.port, config.hub.holdout_share, config.broker.username) == (9000, 0.5, "12345")
    assert [model.bundle for model in config.models] == ["digits"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[http]\nport = 'abc'", r'http\.port = "abc": expected int, got str'),
        ("[http]\nport = 70000", r"http\.port = 70000: expected int <= 65535"),
        ("[http]\nprot = 80", r"http\.prot: unknown key; did you mean 'port'\?"),
        ("[hub]\nholdout_share = 2", r"hub\.holdout_share = 2: .*<= 1"),
        ("[hub]\nprefix = 'a/#'", r"hub\.prefix: .*'a/#'"),
        ("[broker]\ncertificate_file = 'x'", r"broker\.key_file: missing"),
        ("[broker]\ncertificate_file = 'x'\nkey_file = 'y'", r"broker\.ca_file: missing"),
        ("[broker]\nkeepalive_s = -5", r"broker\.keepalive_s = -5: allowed are 5"),
        ("[broker]\nhost = ''", r"broker\.host = \"\""),
        ("[broker]\nport = 0", r"broker\.port = 0: allowed are 1 to 65535"),
        ("[broker]\nprotocol = '3'", r'broker\.protocol = "3"'),
        ("[broker]\npassword_file = 'x'", r"broker\.password_file: a password needs a name"),
        ("[[models]]\nfull = 'x'", r"models\[0\]\.bundle: missing; add it"),
        (
            "[[models]]\nbundle = 'a'\n[[models]]\nbundle = 'a'",
            r'models\[1\]\.bundle = "a": models\[0\] is the same',
        ),
        ("[log]\nlevel = 'loud'", r'log\.level = "loud"'),
        ("[nonsense]", r"nonsense: unknown key"),
        ("http = 3", r"http = 3: expected object, got int"),
        ("[http", r"not TOML"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path, text, says):
    path = written(tmp_path, text)
    with pytest.raises(ConfigError, match=says) as caught:
        load_config(path, {})
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        load_config(tmp_path / "none.toml", {})
    (tmp_path / "hub.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(tmp_path / "hub.toml", {})


def test_a_variable_with_broken_json_names_itself(tmp_path):
    with pytest.raises(ConfigError, match="CLOUD_HUB__MODELS"):
        load_config(written(tmp_path, ""), {"CLOUD_HUB__MODELS": "[{"})


def test_listening_on_the_network_and_answering_nothing_are_warned_of(tmp_path):
    config = load_config(written(tmp_path, "[http]\nhost = '0.0.0.0'"), {})
    assert [warning.split(":")[0] for warning in warnings_about(config)] == [
        'http.host = "0.0.0.0"',
        "no [[models]]",
    ]
