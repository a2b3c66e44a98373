import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_cascade.profile import (
    MAX_PROFILE_BYTES,
    Machine,
    Profile,
    ProfileError,
    StageCost,
    decode_profile,
    encode_profile,
    read_profile,
    speed_ratio,
    write_profile,
)

MACHINE = Machine(
    "aarch64", "Cortex-A76", ("asimddp",), 4, 8 * 2**30, "Raspberry Pi 5", "ondemand", 2400.0, 0.1,
    "Debian 12", "3.11.2", {"onnxruntime": "1.31.1"},
)  # fmt: skip


def stage(number, precision="fp32", p50_us=100.0, *, pace="tight", runtime="onnxruntime", bundle="b1"):
    return StageCost("demo", bundle, number, precision, runtime, pace, 1000, p50_us, p50_us * 2, 50)


def profile(*stages):
    return Profile(1, "2026-11-21T15:00:00Z", MACHINE, 20.0, stages)


def test_a_profile_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "board.json"
    written = profile(stage(0), stage(0, "int8", 40.0), stage(0, pace="paced"))
    write_profile(path, written)
    assert read_profile(path) == written


def test_the_speed_ratio_is_the_geometric_mean_over_shared_stages_by_precision():
    here = profile(stage(0, p50_us=10.0), stage(1, p50_us=10.0), stage(0, "int8", 10.0), stage(2, p50_us=1.0))
    there = profile(
        stage(0, p50_us=20.0), stage(1, p50_us=80.0), stage(0, "int8", 15.0), stage(3, p50_us=9.0)
    )
    assert speed_ratio(here.stages, there.stages) == pytest.approx({"fp32": 4.0, "int8": 1.5})


def test_the_speed_ratio_never_mixes_bundles_runtimes_or_paces():
    here = profile(stage(0), stage(1))
    there = profile(
        stage(0, p50_us=7.0, bundle="b2"),
        stage(0, p50_us=7.0, runtime="litert"),
        stage(1, p50_us=7.0, pace="paced"),
    )
    assert speed_ratio(here.stages, there.stages) == {}
    paced = profile(stage(1, p50_us=14.0, pace="paced"))
    assert speed_ratio(paced.stages, there.stages, pace="paced") == pytest.approx({"fp32": 0.5})


costs = st.floats(min_value=1e-3, max_value=1e9)


@given(st.lists(st.tuples(costs, costs), min_size=1, max_size=6))
def test_there_and_back_again_is_a_ratio_of_one(pairs):
    here = profile(*(stage(number, p50_us=pair[0]) for number, pair in enumerate(pairs)))
    there = profile(*(stage(number, p50_us=pair[1]) for number, pair in enumerate(pairs)))
    assert speed_ratio(here.stages, there.stages)["fp32"] * speed_ratio(there.stages, here.stages)[
        "fp32"
    ] == pytest.approx(1.0)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_profile_or_a_profile_error_in_one_line(content):
    with pytest.raises(ProfileError) as raised:
        decode_profile(content)
    assert "\n" not in str(raised.value)


@given(st.data())
def test_a_damaged_profile_never_ends_in_another_error(data):
    content = bytearray(encode_profile(profile(stage(0), stage(1, "int8"))))
    for _ in range(data.draw(st.integers(1, 5))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = decode_profile(bytes(content))
    except ProfileError:
        return
    assert all(math.isfinite(cost.p50_us) and cost.p50_us > 0 for cost in found.stages)


def edited(**changes):
    document = msgspec.json.decode(encode_profile(profile(stage(0))))
    document["stages"][0].update(changes.pop("first", {}))
    return msgspec.json.encode({**document, **changes})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (edited(version=2), "profile version 2, this program reads 1"),
        (edited(colour="red"), "colour"),
        (edited(first={"p50_us": 0}), "p50_us"),
        (edited(first={"samples": 0}), "samples"),
        (edited(first={"precision": "fp16"}), "fp16"),
        (
            encode_profile(profile(stage(0), stage(0, p50_us=7.0))),
            "stage 0 in fp32 of one bundle is there twice",
        ),
        (b" " * (MAX_PROFILE_BYTES + 1), "more than"),
    ],
)
def test_what_is_no_profile_is_refused_with_its_place(content, message):
    with pytest.raises(ProfileError, match=message) as raised:
        decode_profile(content, "board.json")
    assert str(raised.value).startswith("board.json: ")


def test_a_file_that_is_not_there_says_how_to_make_one(tmp_path):
    with pytest.raises(ProfileError, match=r"no\.json: No such file.*edge-daemon profile"):
        read_profile(tmp_path / "no.json")
    with pytest.raises(ProfileError, match="No such file"):
        write_profile(tmp_path / "no" / "board.json", profile())
