import io
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edge_cascade.manifest import Window
from edge_cascade.mqtt import Broker, Incoming
from edge_daemon.inlet.acks import OrderedAcks
from edge_daemon.inlet.decode import SampleError, make_decoder, shape_sample
from edge_daemon.inlet.mqtt import MqttInlet, Source
from edge_daemon.inlet.queue import Queued, SampleQueue
from edge_daemon.inlet.sources import TopicPattern, filter_of
from edge_daemon.inlet.window import Windower

json_array = make_decoder("json")
raw = make_decoder("float32le")
npy = make_decoder("npy")


def npy_bytes(array, *, version=None):
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version=version, allow_pickle=True)
    return file.getvalue()


def message(topic, payload=b"", *, qos=1, packet_id=1):
    return Incoming(topic, payload, qos, False, packet_id)


class TestDecode:
    def test_a_flat_and_a_nested_json_array_keep_their_shape(self):
        assert json_array(b"[1, 2.5, -3]").tolist() == [1.0, 2.5, -3.0]
        assert json_array(b"[[1,2],[3,4],[5,6]]").shape == (3, 2)

    def test_a_field_path_reaches_into_objects(self):
        decode = make_decoder("json", "data.values")
        assert decode(b'{"data": {"values": [1, 2], "unit": "g"}}').tolist() == [1.0, 2.0]
        with pytest.raises(SampleError, match=r"no field 'data\.values'"):
            decode(b'{"data": {}}')

    def test_a_single_number_is_one_value_of_a_stream(self):
        assert json_array(b"3.5").tolist() == [3.5]

    @pytest.mark.parametrize(
        "payload",
        [b"", b"{", b"[]", b"[1, null]", b'["a"]', b'["1"]', b"[true]", b"[[1],[2,3]]", b"[NaN]", b"[1e999]", b"[1e39]", b"{}", b"true",
         b"\xff\xfe", b"[" * 5000],
    )  # fmt: skip
    def test_what_is_no_array_of_finite_numbers_is_refused(self, payload):
        with pytest.raises(SampleError):
            json_array(payload)

    @given(hnp.arrays(np.float32, hnp.array_shapes(max_dims=3), elements=st.floats(-1e3, 1e3, width=32)))
    def test_every_format_gives_the_array_that_was_sent(self, x):
        assert np.array_equal(npy(npy_bytes(x)), x)
        assert np.array_equal(raw(x.tobytes()), x.ravel())
        assert np.allclose(json_array(json.dumps(x.tolist()).encode()), x)

    @pytest.mark.parametrize("dtype", ["<f8", ">f4", "<i2", "u1"])
    def test_npy_of_other_number_types_is_converted(self, dtype):
        x = np.arange(6).reshape(2, 3).astype(dtype)
        assert np.array_equal(npy(npy_bytes(x)), x.astype(np.float32))
        assert np.array_equal(npy(npy_bytes(np.asfortranarray(x))), x.astype(np.float32))

    def test_a_pickle_inside_npy_is_refused_unread(self):
        class Bomb:
            def __reduce__(self):
                return (pytest.fail, ("unpickled",))

        with pytest.raises(SampleError):
            npy(npy_bytes(np.array([Bomb()], dtype=object)))

    def test_an_npy_header_that_announces_more_than_there_is_is_refused(self):
        forged = npy_bytes(np.zeros(4, dtype=np.float32)).replace(b"(4,)", b"(9,)")
        with pytest.raises(SampleError, match="does not fit"):
            npy(forged)

    @pytest.mark.parametrize("decode", [json_array, raw, npy], ids=["json", "float32le", "npy"])
    @given(data=st.binary(max_size=200))
    def test_random_bytes_are_refused_or_finite(self, decode, data):
        try:
            assert np.isfinite(decode(data)).all()
        except SampleError:
            return

    @given(data=st.binary(max_size=100), cut=st.integers(0, 140))
    def test_a_damaged_npy_is_refused_or_finite(self, data, cut):
        try:
            assert np.isfinite(npy(npy_bytes(np.ones(4))[:cut] + data)).all()
        except SampleError:
            return

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_a_value_that_is_not_finite_is_named_by_its_place(self, bad):
        with pytest.raises(SampleError, match=r"value 2 is"):
            raw(np.array([0, 1, bad], dtype=np.float32).tobytes())

    def test_a_sum_that_overflows_is_not_mistaken_for_an_infinity(self):
        assert raw(np.full(10, 3e38, dtype=np.float32).tobytes()).size == 10

    def test_a_flat_array_becomes_the_models_shape_and_a_wrong_one_is_refused(self):
        assert shape_sample(np.zeros(64, dtype=np.float32), (1, 8, 8)).shape == (1, 8, 8)
        assert shape_sample(np.zeros((8, 8), dtype=np.float32), (1, 8, 8)).shape == (1, 8, 8)
        for wrong in [(63,), (4, 16), (2, 8, 8)]:
            with pytest.raises(SampleError, match=r"where the model takes \(1, 8, 8\)"):
                shape_sample(np.zeros(wrong, dtype=np.float32), (1, 8, 8))


class TestWindows:
    @given(
        st.integers(1, 20), st.integers(1, 20), st.lists(st.integers(1, 50), max_size=12), st.integers(1, 3)
    )
    def test_any_cutting_of_a_stream_gives_the_same_windows(self, length, hop, pieces, channels):
        hop = min(hop, length)
        total = sum(pieces)
        stream = np.arange(total * channels, dtype=np.float32).reshape(channels, total)
        windower = Windower(Window(length, hop), (channels, length))
        got, start = [], 0
        for size in pieces:
            got += windower.push("s", stream[:, start : start + size])
            start += size
        wanted = [stream[:, at : at + length] for at in range(0, total - length + 1, hop)]
        assert len(got) == len(wanted)
        assert all(np.array_equal(a, b) for a, b in zip(got, wanted, strict=True))

    def test_a_flat_payload_of_several_channels_is_read_frame_by_frame(self):
        windower = Windower(Window(2, 2), (2, 2))
        assert windower.push("s", np.array([1, 10, 2, 20], dtype=np.float32))[0].tolist() == [
            [1, 2],
            [10, 20],
        ]

    def test_sensors_do_not_mix(self):
        windower = Windower(Window(2, 2), (1, 2))
        assert windower.push("a", np.array([1], dtype=np.float32)) == []
        assert windower.push("b", np.array([2], dtype=np.float32)) == []
        assert windower.push("a", np.array([3], dtype=np.float32))[0].tolist() == [[1, 3]]

    def test_the_sensor_that_was_silent_longest_is_forgotten_first(self):
        windower = Windower(Window(2, 2), (1, 2), max_sensors=2)
        for sensor in "aba":
            windower.push(sensor, np.array([1], dtype=np.float32))
        windower.push("c", np.array([1], dtype=np.float32))
        assert windower.push("b", np.array([2], dtype=np.float32)) == []

    def test_values_that_are_no_whole_frames_are_refused(self):
        with pytest.raises(SampleError, match="2 channels"):
            Windower(Window(4, 4), (2, 4)).push("s", np.zeros(3, dtype=np.float32))

    def test_one_message_cannot_ask_for_unlimited_work(self):
        with pytest.raises(SampleError, match="windows"):
            Windower(Window(1000, 1), (1, 1000)).push("s", np.zeros(100_000, dtype=np.float32))


class TestTopicPatterns:
    @pytest.mark.parametrize(
        ("pattern", "topic", "sensor"),
        [
            ("sensors/pump-1/{sensor}", "sensors/pump-1/bearing", "bearing"),
            ("{sensor}/raw/+", "motor/raw/x", "motor"),
            ("plant/{sensor}/#", "plant/m1/a/b", "m1"),
            ("plant/{sensor}/#", "plant/m1", "m1"),
            ("plant/line", "plant/line", "plant/line"),
            ("sensors/{sensor}", "sensors/a/b", None),
            ("sensors/{sensor}", "sensors", None),
            ("sensors/{sensor}", "other/a", None),
        ],
    )
    def test_sensor_level_names_the_sensor(self, pattern, topic, sensor):
        assert TopicPattern.parse(pattern).sensor_of(topic) == sensor

    def test_the_subscription_has_a_wildcard_in_its_place(self):
        assert filter_of("a/{sensor}/b") == "a/+/b"


class TestAcks:
    def test_messages_are_acknowledged_in_the_order_of_their_arrival(self):
        acknowledged = []
        acks = OrderedAcks(acknowledged.append)
        first, second = message("a", packet_id=1), message("b", packet_id=2)
        one, two = acks.open(first, 2), acks.open(second, 1)
        two.finish()
        one.finish()
        assert acknowledged == []
        one.finish()
        assert acknowledged == [first, second]

    def test_after_a_lost_connection_nothing_old_is_acknowledged(self):
        acknowledged = []
        acks = OrderedAcks(acknowledged.append)
        ticket = acks.open(message("a"), 1)
        acks.forget_all()
        ticket.finish()
        assert acknowledged == []
        assert len(acks) == 0

    def test_qos_0_needs_none(self):
        acks = OrderedAcks(pytest.fail)
        acks.open(message("a", qos=0), 3).finish()
        assert len(acks) == 0


class TestQueue:
    def test_when_full_the_oldest_is_shed_and_reported(self):
        shed = []
        queue = SampleQueue(2, shed.append)
        items = [Queued("m", n, None) for n in range(4)]
        for item in items:
            queue.put(item)
        assert shed == items[:2]
        assert queue.get(10, 0) == items[2:]

    def test_a_wake_ends_the_wait_with_nothing(self):
        queue = SampleQueue(2, pytest.fail)
        queue.wake()
        assert queue.get(10, 60) == []


class TestInlet:
    def make(self, *, windower=None):
        self.malformed = 0
        self.queue = SampleQueue(10, pytest.fail)
        source = Source("sensors/{sensor}", "m", (1, 4), raw, windower)
        self.inlet = MqttInlet(
            Broker(), "test", [source], self.queue, max_payload_bytes=1000, on_malformed=self.note,
            now_s=lambda: 5.0, now_ms=lambda: 7,
        )  # fmt: skip
        return self.inlet

    def note(self, pattern):
        assert pattern == "sensors/{sensor}"
        self.malformed += 1

    def test_a_message_becomes_a_sample_of_its_sensor(self):
        self.make().receive(message("sensors/a", np.arange(4, dtype=np.float32).tobytes()))
        (item,) = self.queue.get(9, 0)
        assert (item.model, item.sample.sensor, item.sample.received_s, item.sample.taken_at_ms) == (
            "m",
            "a",
            5.0,
            7,
        )
        assert item.sample.x.tolist() == [[0, 1, 2, 3]]
        assert self.inlet.unacknowledged == 1

    @pytest.mark.parametrize("payload", [b"", b"abc", bytes(20), bytes(2000), b"\xff" * 16])
    def test_a_malformed_message_is_counted_and_acknowledged(self, payload, caplog):
        inlet = self.make()
        for _ in range(3):
            inlet.receive(message("sensors/a", payload))
        assert (self.malformed, len(self.queue), inlet.unacknowledged) == (3, 0, 0)
        assert caplog.text.count("malformed input") == 1

    def test_a_message_that_completes_no_window_is_acknowledged_at_once(self):
        inlet = self.make(windower=Windower(Window(4, 4), (1, 4)))
        inlet.receive(message("sensors/a", np.zeros(3, dtype=np.float32).tobytes()))
        assert (len(self.queue), inlet.unacknowledged, self.malformed) == (0, 0, 0)
        inlet.receive(message("sensors/a", np.zeros(9, dtype=np.float32).tobytes()))
        assert (len(self.queue), inlet.unacknowledged) == (3, 1)
