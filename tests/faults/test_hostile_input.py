"""Whatever anybody sends to running programs: counted or refused, and the next good sample is served as ever."""

import io
import json
import os
import socket
import struct
import zlib
from urllib.parse import urlsplit

import msgspec
import numpy as np
import pytest

from edge_cascade.codec import MAGIC, VERSION, decode, encode
from edge_cascade.gate import Exit
from edge_cascade.manifest import Wire
from edge_cascade.messages import (
    Acks,
    Case,
    CaseBatch,
    Chunk,
    Kind,
    Reason,
    Source,
    Use,
    Verdict,
    VerdictBatch,
)
from edge_cascade.packing import pack_exits
from edge_cascade.tensors import encode_tensor
from edge_cascade.topics import DOWN, UP
from tests.bundles import LABELS, SHAPE_1D
from tests.faults.processes import DEVICE, http, wait_until
from tests.faults.sensor import Balance

BOOT = b"\x00hostile"
MIB = 2**20
ONE_EXIT = (Exit(0, 1, 0.5, 0.5),)


@pytest.fixture(autouse=True)
def still_serving(running_loop):
    """After every test: both processes live, and a good sample is answered, kept and judged."""
    yield
    names = running_loop.sensor.send(2)
    assert running_loop.settle(names) == Balance(samples=2)
    assert running_loop.device.program.is_running
    assert running_loop.hub.program.is_running


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def sample(value=0.5):
    return np.full(SHAPE_1D, value, np.float32)


def a_case(seq, *, tensor=None, exits=ONE_EXIT, sensor="hostile"):
    tensor = encode_tensor(sample(), Wire("int8")) if tensor is None else tensor
    return Case(seq, sensor, 1, 0, pack_exits(exits), True, 0, Reason.UNSURE, True, True, tensor)


def a_batch(*cases, device=DEVICE):
    return CaseBatch(device, BOOT, "tiny", bytes(32), "int8", list(cases))


def bomb_frame(kind, *, announced, size=64 * MIB):
    """A frame of some ten kilobytes that inflates to `size` and says `announced`."""
    compressor = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    packed = compressor.compress(bytes(size)) + compressor.flush()
    return bytes((MAGIC, VERSION, kind, 1)) + struct.pack("<I", announced) + packed


def bomb_tensor(*, sizes):
    """A tensor whose shape says `sizes` and whose few bytes inflate to 64 MiB."""
    compressor = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    packed = compressor.compress(bytes(64 * MIB)) + compressor.flush()
    return bytes((0x80, len(sizes))) + b"".join(map(varint, sizes)) + packed


def varint(value):
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*encoded, value))


def hostile_frames(good, kind):
    """No frame at all, half a frame, and frames that lie about themselves."""
    whole = encode(good)
    return {
        "empty": b"\x00",
        "random": os.urandom(512),
        "text": b'{"label": "a"}',
        "truncated": whole[: len(whole) // 2],
        "another version": bytes((MAGIC, 99)) + whole[2:],
        "unknown kind": bytes((MAGIC, VERSION, 200, 0)) + whole[4:],
        "unknown flags": whole[:3] + bytes((0x82,)) + whole[4:],
        "trailing bytes": bytes((MAGIC, VERSION, kind, 0)) + msgspec.msgpack.encode(good) + b"more",
        "endless nesting": bytes((MAGIC, VERSION, kind, 0)) + b"\x91" * 60_000,
        "huge array": bytes((MAGIC, VERSION, kind, 0)) + b"\xdd\xff\xff\xff\xff",
        "bomb that says so": bomb_frame(kind, announced=64 * MIB),
        "bomb that lies": bomb_frame(kind, announced=1000),
        "oversize": whole + bytes(120_000 - len(whole)),
        "chunk with another digest": encode(Chunk(bytes(32), 0, 1, 4, b"abcd")),
        "chunk of terabytes": encode(Chunk(bytes(32), 0, 2, 2**42, b"abcd")),
        "chunk beyond its count": encode(Chunk(bytes(32), 7, 2, 100, b"abcd")),
    }


def test_malformed_samples_are_counted_and_acknowledged(running_loop):
    sensor, device = running_loop.sensor, running_loop.device
    with_nan = sample()
    with_nan[0, 64] = np.nan
    payloads = {
        "bad": [
            b"",
            with_nan.tobytes(),
            sample(np.inf).tobytes(),
            sample().tobytes()[:-3],
            sample().tobytes()[:-4],
            os.urandom(333),
            bytes(120_000),
        ],
        "json/bad": [
            b"[NaN]",
            json.dumps([float("nan")] * 128).encode(),
            b"[1e999]",
            json.dumps([0.5] * 127).encode(),
            json.dumps([[0.5] * 64] * 2).encode(),
            json.dumps([0.5] * 128).encode()[:-9],
            b'{"x": 1}',
            b'["one"]',
            b"[" * 100_000,
            b"\xff\xfe[1]",
            os.urandom(333),
        ],
        "npy/bad": [
            npy(with_nan),
            npy(np.zeros((3, 3), np.float32)),
            npy(np.array(["one"])),
            npy(sample())[:-8],
            npy(np.zeros(20, np.float32))[:20],
            b"\x93NUMPY\x01\x00\xff\xff" + b" " * 70,
            os.urandom(333),
        ],
        "json/" + "n" * 200: [json.dumps([0.5] * 128).encode()],
    }
    before = device.metric("edge_malformed_total")
    handed = [sensor.publish(topic, payload) for topic, bodies in payloads.items() for payload in bodies]
    for each in handed:
        # The broker's, not the device's; that the device acknowledges is seen by what comes behind.
        each.wait_for_publish(10)
    wait_until(lambda: device.metric("edge_malformed_total") - before >= len(handed), "all to be counted")
    assert device.metric("edge_malformed_total") - before == len(handed)
    assert sensor.answers["bad"] == []


def test_hostile_frames_on_every_up_topic_are_counted(running_loop):
    before = running_loop.hub.stats()["malformed"]
    frames = hostile_frames(a_batch(a_case(1)), Kind.CASES)
    # What a device must not say though it is well-formed: another's name, a message of the hub's.
    frames["another device"] = encode(a_batch(a_case(1), device="pump-2"))
    frames["a message of the hub's"] = encode(Acks(BOOT, committed=[1]))
    with running_loop.party(DEVICE) as device:
        for channel in UP:
            for frame in frames.values():
                assert device.publish(f"edge/v1/{DEVICE}/up/{channel}", frame) == "Success"

    def counted():
        after = running_loop.hub.stats()["malformed"]
        return {kind: after[kind] - before.get(kind, 0) for kind in after}

    wait_until(lambda: sum(counted().values()) >= len(UP) * len(frames), "all to be counted")
    of_each = {"frame": 12, "oversize": 4, "device": 1, "kind": 1}
    assert counted() == {kind: len(UP) * times for kind, times in of_each.items()}
    assert "hostile" not in {case["sensor"] for case in running_loop.hub.cases()}


def test_cases_that_lie_are_rejected_one_by_one(running_loop):
    before = running_loop.hub.stats()["rejected"]
    lies = [
        a_case(1, tensor=bomb_tensor(sizes=(1, 128))),
        a_case(2, tensor=bomb_tensor(sizes=(2**34, 2**34))),
        a_case(3, tensor=bomb_tensor(sizes=(4096, 4096))),
        a_case(4, tensor=os.urandom(100)),
        a_case(5, tensor=b""),
        a_case(6, tensor=encode_tensor(np.full((1, 4), np.nan, np.float32), Wire("float32"))),
        a_case(7, tensor=encode_tensor(np.zeros((3, 3), np.float32), Wire("float32"))),
        a_case(8, exits=(Exit(0, len(LABELS), 0.5, 0.5),)),
        a_case(9, sensor="a\x00b"),
        a_case(10, exits=()),
    ]
    with running_loop.party(DEVICE) as device:
        device.subscribe(f"edge/v1/{DEVICE}/down/acks")
        assert device.publish(f"edge/v1/{DEVICE}/up/cases", encode(a_batch(*lies))) == "Success"
        acks = acks_of(device, BOOT)
    assert [rejection.seq for rejection in acks.rejected] == list(range(1, 11))
    assert (acks.committed, acks.duplicate, acks.refused) == ([], [], [])
    after = running_loop.hub.stats()["rejected"]
    counted = {kind: after[kind] - before.get(kind, 0) for kind in after}
    assert counted == {"tensor": 6, "shape": 1, "label": 1, "name": 1, "exits": 1}


def test_hostile_frames_on_every_down_topic_are_counted(running_loop):
    device = running_loop.device
    before = device.metric("edge_uplink_malformed_total")
    verdict = Verdict(BOOT, 1, "hostile", 0, b"\xff\xff" * 4, Source.MODEL, Use.TRAIN, 1)
    frames = hostile_frames(VerdictBatch("tiny", bytes(32), [verdict]), Kind.VERDICTS)
    # What the hub never says there, though a device might.
    frames["a message of a device's"] = encode(a_batch(a_case(1)))
    with running_loop.party("hub") as hub:
        for channel in DOWN:
            for frame in frames.values():
                assert hub.publish(f"edge/v1/{DEVICE}/down/{channel}", frame) == "Success"
    expected = len(DOWN) * len(frames)
    wait_until(lambda: device.metric("edge_uplink_malformed_total") - before >= expected, "all to be counted")
    assert device.metric("edge_uplink_malformed_total") - before == expected


@pytest.mark.parametrize(
    ("account", "topic"),
    [(DEVICE, f"edge/v1/{DEVICE}/up/cases"), ("hub", f"edge/v1/{DEVICE}/down/verdicts")],
)
def test_whoever_sends_more_than_the_broker_takes_is_thrown_out_alone(running_loop, account, topic):
    connects = running_loop.device.metric("edge_uplink_connects_total")
    with running_loop.party(account) as party:
        party._client.publish(topic, bytes(200_000), qos=1)
        assert party.is_thrown_out()
    assert running_loop.device.metric("edge_uplink_connects_total") == connects


def test_well_formed_nonsense_from_the_hub_changes_nothing(running_loop):
    sensor = running_loop.sensor
    unknown = Verdict(BOOT, 1, "hostile", 60_000, b"", Source.MODEL, Use.TRAIN, 1)
    with running_loop.party("hub") as hub:
        for message in (
            Acks(BOOT, committed=[1, 2**62], duplicate=[3]),
            VerdictBatch("no-such-model", bytes(32), [unknown]),
        ):
            channel = "acks" if isinstance(message, Acks) else "verdicts"
            assert hub.publish(f"edge/v1/{DEVICE}/down/{channel}", encode(message)) == "Success"
    wait_until(lambda: sensor.verdicts["hostile"], "the verdict, passed on as it is")
    assert [verdict["label"] for verdict in sensor.verdicts["hostile"]] == [None]


def test_rest_answers_what_is_wrong_with_4xx(running_loop):
    url, token = running_loop.hub.url, running_loop.hub.token
    case = running_loop.hub.get("/v1/cases?limit=1")["cases"][0]["id"]
    label = f"{url}/v1/cases/{case}/label"

    def post(body, **more):
        return http(label, method="POST", body=body, **({"token": token} | more))[0]

    assert {
        "no token": http(f"{url}/v1/cases")[0],
        "wrong token": http(f"{url}/v1/cases", token="wrong.token")[0],
        "long token": http(f"{url}/v1/cases", token="x" * 5000)[0],
        "token that no header may hold": http(f"{url}/v1/cases", token="\x7f" * 500)[0],
        "garbage JSON": post(b"{"),
        "random bytes": post(os.urandom(200)),
        "unknown field": post(b'{"label": "a", "more": 1}'),
        "unknown label": post(b'{"label": "z"}'),
        "label out of range": post(b'{"label": 65535}'),
        "nested JSON": post(b"[" * 15_000),
        "huge body": post(bytes(5 * MIB)),
        "no such case": http(f"{url}/v1/cases/999999999", token=token)[0],
        "no number": http(f"{url}/v1/cases/..%2f..%2fetc", token=token)[0],
        "bad filter": http(f"{url}/v1/cases?limit=-1", token=token)[0],
        "unknown filter": http(f"{url}/v1/cases?x=1", token=token)[0],
        "no such path": http(f"{url}/v2", token=token)[0],
        "wrong method": http(f"{url}/v1/stats", token=token, method="DELETE")[0],
    } == {
        "no token": 401,
        "wrong token": 401,
        "long token": 401,
        "token that no header may hold": 400,
        "garbage JSON": 400,
        "random bytes": 400,
        "unknown field": 400,
        "unknown label": 400,
        "label out of range": 400,
        "nested JSON": 400,
        "huge body": 413,
        "no such case": 404,
        "no number": 404,
        "bad filter": 400,
        "unknown filter": 400,
        "no such path": 404,
        "wrong method": 405,
    }


def test_what_is_no_http_is_refused(running_loop):
    for program in (running_loop.hub, running_loop.device):
        address = urlsplit(program.url)
        for said in (
            b"\x16\x03\x01\x02\x00" + bytes(100),
            b"GET / HTTP/9.9\r\n\r\n",
            b"GET " + b"/" * 20_000 + b" HTTP/1.1\r\n\r\n",
        ):
            with socket.create_connection((address.hostname, address.port), timeout=10) as connection:
                connection.sendall(said)
                assert connection.recv(12) == b"HTTP/1.0 400"


def acks_of(party, boot):
    """The next acknowledgement for a boot."""
    while True:
        acks = decode(party.received.get(timeout=10)[1])
        if acks.boot == boot:
            return acks
