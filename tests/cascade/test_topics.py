import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_cascade.errors import ProtocolError
from edge_cascade.topics import (
    DOWN,
    UP,
    Topic,
    check_device_id,
    check_prefix,
    down_topic,
    fleet_filter,
    parse_topic,
    up_topic,
)

devices = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", fullmatch=True)


@given(devices, st.sampled_from(UP))
def test_what_is_built_for_a_device_parses_back_going_up(device, channel):
    assert parse_topic("a/b", up_topic("a/b", device, channel)) == Topic(device, "up", channel)


@given(devices, st.sampled_from(DOWN))
def test_what_is_built_for_a_device_parses_back_going_down(device, channel):
    assert parse_topic("edge", down_topic("edge", device, channel)) == Topic(device, "down", channel)


@given(st.text(max_size=60))
def test_any_other_topic_is_refused(topic):
    with pytest.raises(ProtocolError):
        parse_topic("edge", topic)


@pytest.mark.parametrize(
    "topic",
    [
        "edge/v1/a/up/acks",
        "edge/v1/a/down/cases",
        "edge/v1/a/up",
        "edge/v1//up/cases",
        "edge/v1/+/up/cases",
        "edge/v2/a/up/cases",
        "edge/v1/a/up/cases/x",
        "other/v1/a/up/cases",
        "edge/v1/a/sideways/cases",
    ],
)
def test_near_misses_are_refused(topic):
    with pytest.raises(ProtocolError):
        parse_topic("edge", topic)


@pytest.mark.parametrize("device", ["", "+", "#", "a/b", "a+", "$SYS", ".a", "a" * 65, "ä", "a b", "a\n"])
def test_a_device_id_that_could_not_be_one_topic_level_is_refused(device):
    with pytest.raises(ProtocolError, match="device id"):
        check_device_id(device)


@pytest.mark.parametrize("prefix", ["", "/edge", "edge/", "a//b", "edge/#", "+", "$share/x", "a b"])
def test_a_prefix_with_wildcards_or_empty_levels_is_refused(prefix):
    with pytest.raises(ProtocolError, match="prefix"):
        check_prefix(prefix)


def test_the_hub_subscribes_to_one_channel_of_every_device():
    assert fleet_filter("edge", "cases") == "edge/v1/+/up/cases"
