import dataclasses
import gc
import json

import msgspec
import numpy as np
import pytest

from edge_cascade.bundle import LitertModel, load_bundle
from edge_cascade.errors import BundleError
from edge_cascade.gate import Exit
from edge_cascade.ladder import Climb, Ladder
from edge_cascade.profile import decode_profile
from edge_cascade.shipped import find_bundle, shipped_model_dir
from edge_cascade.stage_timing import StageKey, runnable_cases, runnable_plans, runnable_stages
from edge_cascade.timing import (
    MAX_BLOCK,
    MIN_ROUNDS,
    Case,
    Stopwatch,
    collector_off,
    measure_paced,
    measure_rate,
    measure_tight,
)
from edge_daemon.__main__ import main
from edge_daemon.bench.board import describe_machine, peak_resident_bytes, resident_bytes
from edge_daemon.bench.plans import PlanCost, price_plan, recommend_plan, with_exit_points
from edge_daemon.bench.samples import DataError, default_samples, load_samples
from edge_daemon.bench.vitals import Rail, Stretch, Temperature, Watch, rails_of, temperatures_of
from edge_daemon.models import open_stage
from edge_daemon.sensors import Energy, read_energy, read_rails, read_temperatures, watts_between


def tree(root, files):
    """A fake /sys or / of relative paths and contents."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else f"{content}\n".encode())
    return root


# The kernel's ina3221 driver on a Jetson AGX Orin: two chips, shunt voltages and sums beside the rails.
ORIN = {
    "class/hwmon/hwmon3/name": "ina3221",
    "class/hwmon/hwmon3/in1_label": "VDD_GPU_SOC",
    "class/hwmon/hwmon3/in1_input": 19000,
    "class/hwmon/hwmon3/curr1_input": 200,
    "class/hwmon/hwmon3/in2_label": "VDD_CPU_CV",
    "class/hwmon/hwmon3/in2_input": 19000,
    "class/hwmon/hwmon3/curr2_input": 100,
    "class/hwmon/hwmon3/in3_label": "VIN_SYS_5V0",
    "class/hwmon/hwmon3/in3_input": 5000,
    "class/hwmon/hwmon3/curr3_input": 800,
    "class/hwmon/hwmon3/in4_input": 400,
    "class/hwmon/hwmon3/curr4_input": 1100,
    "class/hwmon/hwmon3/in7_label": "sum of shunt voltages",
    "class/hwmon/hwmon3/in7_input": 2200,
    "class/hwmon/hwmon4/name": "ina3221",
    "class/hwmon/hwmon4/in1_label": "NC",
    "class/hwmon/hwmon4/in1_input": 0,
    "class/hwmon/hwmon4/curr1_input": 0,
    "class/hwmon/hwmon4/in2_label": "VDDQ_VDD2_1V8AO",
    "class/hwmon/hwmon4/in2_input": 5000,
    "class/hwmon/hwmon4/curr2_input": 100,
    "class/thermal/thermal_zone0/type": "cpu-thermal",
    "class/thermal/thermal_zone0/temp": 47562,
    "class/thermal/thermal_zone1/type": "tj-thermal",
    "class/thermal/thermal_zone1/temp": 48000,
    # A core that is powered off: the zone is there, its reading is not.
    "class/thermal/thermal_zone2/type": "cv0-thermal",
    "class/hwmon/hwmon0/name": "cpu_thermal",
    "class/hwmon/hwmon0/temp1_input": 47562,
}
XAVIER_JETPACK_4 = {
    "bus/i2c/drivers/ina3221x/1-0040/iio:device0/rail_name_0": "GPU",
    "bus/i2c/drivers/ina3221x/1-0040/iio:device0/in_power0_input": 613,
    "bus/i2c/drivers/ina3221x/1-0040/iio:device0/rail_name_1": "CPU",
    "bus/i2c/drivers/ina3221x/1-0040/iio:device0/in_power1_input": 1226,
    "bus/i2c/drivers/ina3221x/1-0041/iio:device1/rail_name_0": "SYS5V",
    "bus/i2c/drivers/ina3221x/1-0041/iio:device1/in_power0_input": 2100,
    "class/thermal/thermal_zone0/type": "CPU-therm",
    "class/thermal/thermal_zone0/temp": 31500,
}
PI_5 = {
    "class/thermal/thermal_zone0/type": "cpu-thermal",
    "class/thermal/thermal_zone0/temp": 52350,
    "class/hwmon/hwmon0/name": "cpu_thermal",
    "class/hwmon/hwmon0/temp1_input": 52350,
    "class/hwmon/hwmon1/name": "rp1_adc",
    "class/hwmon/hwmon1/in1_input": 1468,
    "class/hwmon/hwmon1/temp1_input": 55472,
    "class/hwmon/hwmon2/name": "rpi_volt",
    "class/hwmon/hwmon2/in0_lcrit_alarm": 0,
}
PC = {
    "class/powercap/intel-rapl:0/name": "package-0",
    "class/powercap/intel-rapl:0/energy_uj": 5_000_000,
    "class/powercap/intel-rapl:0/max_energy_range_uj": 262_143_328_850,
    "class/powercap/intel-rapl:0:0/name": "core",
    "class/powercap/intel-rapl:0:0/energy_uj": 3_000_000,
    "class/powercap/intel-rapl:0:0/max_energy_range_uj": 262_143_328_850,
    "class/hwmon/hwmon1/name": "ina226",
    "class/hwmon/hwmon1/power1_input": 3_250_000,
    "class/hwmon/hwmon1/power1_average": 3_000_000,
}


class TestSensors:
    def test_an_orins_rails_are_its_three_channels_and_no_sums(self, tmp_path):
        assert read_rails(tree(tmp_path, ORIN)) == pytest.approx(
            {"VDD_GPU_SOC": 3.8, "VDD_CPU_CV": 1.9, "VIN_SYS_5V0": 4.0, "VDDQ_VDD2_1V8AO": 0.5}
        )

    def test_a_zone_that_does_not_read_is_absent_and_none_is_there_twice(self, tmp_path):
        assert read_temperatures(tree(tmp_path, ORIN)) == pytest.approx(
            {"cpu-thermal": 47.562, "tj-thermal": 48.0}
        )

    def test_an_old_xaviers_rails_are_in_milliwatts(self, tmp_path):
        assert read_rails(tree(tmp_path, XAVIER_JETPACK_4)) == pytest.approx(
            {"GPU": 0.613, "CPU": 1.226, "SYS5V": 2.1}
        )

    def test_a_raspberry_pi_has_temperatures_and_no_watts(self, tmp_path):
        root = tree(tmp_path, PI_5)
        assert read_temperatures(root) == pytest.approx({"cpu-thermal": 52.35, "rp1_adc temp1": 55.472})
        assert (read_rails(root), read_energy(root)) == ({}, {})

    def test_power_is_in_microwatts_and_energy_is_the_packages(self, tmp_path):
        root = tree(tmp_path, PC)
        assert read_rails(root) == pytest.approx({"ina226 power1": 3.25})
        assert read_energy(root) == {"RAPL package-0": pytest.approx(Energy(5.0, 262_143.32885))}

    def test_what_is_not_there_is_empty_and_never_zero(self, tmp_path):
        for root in (tmp_path, tmp_path / "missing"):
            assert (read_rails(root), read_temperatures(root), read_energy(root)) == ({}, {}, {})

    def test_what_is_no_number_is_absent(self, tmp_path):
        root = tree(tmp_path, {**PI_5, "class/thermal/thermal_zone0/temp": b"\xff\x00n/a"})
        assert "cpu-thermal" not in read_temperatures(root)

    def test_an_energy_counter_may_wrap(self):
        before, after = {"p": Energy(90.0, 100.0), "gone": Energy(0, 1)}, {"p": Energy(20.0, 100.0)}
        assert watts_between(before, after, 10.0) == {"p": 3.0}

    def test_a_watch_gives_means_of_watts_and_the_highest_temperature(self, tmp_path):
        root = tree(tmp_path, {**PI_5, **PC})
        now_s = [0.0]
        watch = Watch(root, lambda: now_s[0])
        steps = [(0.1, 9_999_999, 99_000), (0.3, 1_000_000, 60_000), (0.6, 2_000_000, 50_000)]
        for now_s[0], microwatts, millidegrees in steps:
            tree(root, {"class/hwmon/hwmon1/power1_input": microwatts})
            tree(root, {"class/thermal/thermal_zone0/temp": millidegrees})
            watch.look()  # at 0.1 s it is too early
        now_s[0] = 2.0
        tree(root, {"class/hwmon/hwmon1/power1_input": 6_000_000})
        tree(root, {"class/powercap/intel-rapl:0/energy_uj": 25_000_000})
        stretch = watch.finish()
        assert stretch.watts == pytest.approx({"ina226 power1": 3.0, "RAPL package-0": 10.0})
        assert stretch.max_celsius["cpu-thermal"] == 60.0

    def test_the_energy_of_a_sample_is_what_it_took_above_rest(self):
        idle, busy = (
            Stretch({"VDD_IN": 2.0}, {"cpu": 40.0}),
            Stretch({"VDD_IN": 5.0, "new": 1.0}, {"cpu": 55.0}),
        )
        assert rails_of(idle, busy, 1000.0) == (Rail("VDD_IN", 2.0, 5.0, 3.0),)
        assert temperatures_of(idle, busy) == (Temperature("cpu", 40.0, 55.0),)


class TestBoard:
    def test_an_arm_board_is_named_by_its_device_tree_and_its_cores_by_their_numbers(self, tmp_path):
        cpu = "processor\t: 0\nFeatures\t: fp asimd asimddp\nCPU implementer\t: 0x41\nCPU part\t: 0xd42\n"
        frequency = "sys/devices/system/cpu/cpu0/cpufreq"
        root = tree(
            tmp_path,
            {
                "proc/cpuinfo": cpu,
                "proc/meminfo": "MemTotal:        7990436 kB",
                "proc/device-tree/model": b"NVIDIA Jetson AGX Orin Developer Kit\0",
                f"{frequency}/scaling_governor": "schedutil",
                f"{frequency}/cpuinfo_max_freq": 2201600,
                "etc/os-release": 'NAME="Ubuntu"\nPRETTY_NAME="Ubuntu 22.04.4 LTS"',
            },
        )
        found = describe_machine(root)
        assert found.board == "NVIDIA Jetson AGX Orin Developer Kit"
        assert found.cpu == "Cortex-A78AE"
        assert found.features == ("asimddp",)
        assert (found.memory_bytes, found.governor, found.max_mhz) == (7990436 * 1024, "schedutil", 2201.6)
        assert found.os.startswith("Ubuntu 22.04.4 LTS, kernel ")

    def test_an_unknown_core_is_named_by_its_numbers_and_what_is_missing_is_none(self, tmp_path):
        root = tree(tmp_path, {"proc/cpuinfo": "CPU implementer : 0x42\nCPU part : 0xfff"})
        found = describe_machine(root)
        assert found.cpu == "ARM 0x42:0xfff"
        assert (found.board, found.governor, found.max_mhz, found.memory_bytes) == (None,) * 4
        assert "onnxruntime" in found.packages

    def test_memory_is_read_from_the_kernel_or_not_said(self, tmp_path):
        root = tree(tmp_path, {"proc/self/status": "VmHWM:\t   2048 kB\nVmRSS:\t   1024 kB"})
        assert (resident_bytes(root), peak_resident_bytes(root)) == (2**20, 2**21)
        assert resident_bytes(tmp_path / "missing") is None


class FakeTime:
    """A clock that calls and sleeps move."""

    def __init__(self):
        self.now_ns = 0
        self.slept_s = []

    def spend_us(self, microseconds):
        self.now_ns += int(microseconds * 1e3)

    def sleep(self, seconds):
        self.slept_s.append(seconds)
        self.now_ns += int(seconds * 1e9)

    def stopwatch(self, watch=None):
        return Stopwatch(lambda: self.now_ns, self.sleep, watch)


class TestMeasuring:
    def test_the_tight_loop_gives_each_case_its_own_time(self):
        fake, prepared = FakeTime(), []
        cases = [
            Case("slow", lambda: fake.spend_us(900), lambda: prepared.append("slow")),
            Case("quick", lambda: fake.spend_us(30)),
        ]
        passed = []
        timings = measure_tight(cases, 0.1, fake.stopwatch(passed.append))
        assert timings["slow"].p50_us == timings["slow"].p99_us == 900.0
        assert timings["quick"].p50_us == 30.0
        assert timings["quick"].samples > timings["slow"].samples
        assert sum(passed) == pytest.approx(0.1, abs=0.02)
        assert len(prepared) == len(passed) + 1  # each round, and the warm-up

    def test_a_slow_minute_counts_once_in_the_tight_median(self):
        fake, rounds = FakeTime(), []
        case = Case("one", lambda: fake.spend_us(500 if len(rounds) == 2 else 100), lambda: rounds.append(1))
        timing = measure_tight([case], 0.04, fake.stopwatch())["one"]
        assert timing.p50_us == 100.0
        assert timing.p99_us == 500.0

    def test_a_budget_too_small_still_measures_a_few_rounds(self):
        fake = FakeTime()
        cases = [Case(name, lambda: fake.spend_us(1e6)) for name in "ab"]
        assert measure_tight(cases, 0.001, fake.stopwatch())["a"].samples == MIN_ROUNDS
        assert measure_paced(cases, 0.02, 0.001, fake.stopwatch())["b"].samples == MIN_ROUNDS

    def test_a_clock_too_coarse_for_a_call_never_gives_zero(self):
        ticks = iter(range(10**6))
        stopwatch = Stopwatch(lambda: next(ticks) // 1000 * 10**6)
        timing = measure_tight([Case("none", lambda: None)], 0.001, stopwatch)["none"]
        assert timing.p50_us > 0
        assert timing.samples <= MAX_BLOCK * 2000

    def test_paced_calls_come_a_gap_apart_and_late_ones_do_not_pile_up(self):
        fake, starts = FakeTime(), []

        def run():
            starts.append(fake.now_ns / 1e9)
            fake.spend_us(50_000 if len(starts) == 53 else 100)

        timing = measure_paced([Case("one", run)], 0.02, 0.2, fake.stopwatch())["one"]
        gaps = np.diff(starts[50:])
        assert gaps == pytest.approx([0.02, 0.02, 0.05, *[0.02] * (len(gaps) - 3)])
        assert (timing.p50_us, timing.samples) == (100.0, len(starts) - 50)

    def test_the_rate_leaves_out_what_the_watch_takes(self):
        fake = FakeTime()
        watch = fake.stopwatch(lambda _: fake.spend_us(1e6))
        assert measure_rate(lambda: fake.spend_us(200), 0.5, watch) == pytest.approx(5000.0)

    def test_the_collector_is_off_while_measuring_and_on_again_after_an_error(self):
        assert gc.isenabled()
        with pytest.raises(KeyError), collector_off():
            assert not gc.isenabled()
            raise KeyError
        assert gc.isenabled()


def climb(last_rung, accepted=True):
    exits = tuple(Exit(rung, 0, 0.9, 0.1) for rung in range(last_rung + 1))
    return Climb(exits, exits[-1], accepted)


def cost(name, paced_us, upload_share=0.05, is_certified=False):
    return PlanCost(name, 1, is_certified, paced_us / 10, paced_us, 1.5, upload_share, 0.04)


class TestPlans:
    def test_a_plan_costs_the_mean_over_samples_of_the_way_to_their_exits(self, tiny_bundle):
        plan = tiny_bundle.plan("fp32")
        climbs = [climb(0), climb(0), climb(2), climb(2, accepted=False)]
        priced = price_plan(
            plan, 3, climbs, tight_us=[10, 25, 50], paced_us=[100, 130, 160], certified_point=-1
        )
        assert (priced.plan, priced.point, priced.is_certified) == ("fp32", 3, False)
        assert (priced.tight_us, priced.paced_us, priced.mean_rungs) == (30.0, 130.0, 2.0)
        assert priced.escalated_share == 0.25
        assert priced.upload_share == plan.points[3].upload_share

    @pytest.mark.parametrize(("point", "is_certified"), [(0, True), (2, True), (3, False)])
    def test_a_plan_is_certified_up_to_the_point_that_its_certificate_covers(
        self, tiny_bundle, point, is_certified
    ):
        plan = msgspec.structs.replace(tiny_bundle.plan("fp32"), method="certified")
        costs = {"tight_us": [1, 2, 3], "paced_us": [1, 2, 3], "certified_point": 2}
        assert price_plan(plan, point, [climb(0)], **costs).is_certified is is_certified

    def test_exit_points_climb_to_just_that_rung(self, tiny_bundle):
        plan = with_exit_points(tiny_bundle.plan("fp32"))
        ladder = Ladder(tiny_bundle, plan, open_stage)
        x = tiny_bundle.golden_inputs[0]
        for rung in range(len(plan.rungs)):
            ladder.set_point(rung)
            found = ladder.climb(x)
            assert (found.accepted, len(found.exits)) == (True, rung + 1)

    @pytest.mark.parametrize(
        ("current", "others", "recommended"),
        [
            (cost("a", 100), [cost("b", 60)], "b"),
            (cost("a", 100), [cost("b", 60), cost("c", 50)], "c"),
            (cost("a", 100), [cost("b", 97)], "a"),
            (cost("a", 100), [cost("b", 140)], "a"),
            (cost("a", 100), [cost("b", 60, upload_share=0.055)], "b"),
            (cost("a", 100), [cost("b", 60, upload_share=0.09)], "a"),
            (cost("a", 100, is_certified=True), [cost("b", 60)], "a"),
            (cost("a", 100, is_certified=True), [cost("b", 60, is_certified=True)], "b"),
            (cost("a", 100), [], "a"),
        ],
    )
    def test_the_cheaper_plan_is_recommended_if_it_uploads_and_promises_as_much(
        self, current, others, recommended
    ):
        found = recommend_plan(current, others)
        assert found.plan == recommended
        assert found.reason


def test_every_stage_and_precision_becomes_a_case_on_the_features_before_it(tiny_bundle):
    cases = runnable_cases(tiny_bundle, "onnxruntime", open_stage)
    assert [case.key for case in cases] == [
        StageKey(stage, precision)
        for stage in range(3)
        for precision in tiny_bundle.graph.stages[stage].files
    ]
    ladder = Ladder(tiny_bundle, with_exit_points(tiny_bundle.plan("fp32")), open_stage)
    answer = ladder.climb(tiny_bundle.golden_inputs[0]).exits[-1]
    last = next(case for case in cases if case.key == StageKey(2, "fp32"))
    last.run()
    assert int(last.run.__self__.head[0, 0]) == answer.label


def test_a_runtime_without_files_for_a_stage_runs_neither_it_nor_its_plans(tiny_bundle):
    assert runnable_stages(tiny_bundle, "litert") == []
    assert runnable_plans(tiny_bundle, "litert") == []
    models = {
        key: dataclasses.replace(model, litert=LitertModel(b"", None)) if key[1] == "fp32" else model
        for key, model in tiny_bundle.stage_models.items()
    }
    partly = dataclasses.replace(tiny_bundle, stage_models=models)
    assert runnable_stages(partly, "litert") == [StageKey(stage, "fp32") for stage in range(3)]
    assert [plan.name for plan in runnable_plans(partly, "litert")] == ["fp32"]
    assert runnable_plans(partly, "onnxruntime") == list(tiny_bundle.weights.plans)


class TestSamples:
    @pytest.fixture
    def npz(self, tmp_path):
        def write(**arrays):
            np.savez(tmp_path / "data.npz", **arrays)
            return tmp_path / "data.npz"

        return write

    def test_the_first_samples_of_x_are_taken_as_float32(self, npz, tiny_bundle):
        found = load_samples(npz(x=np.ones((2500, 1, 128), np.uint8)), tiny_bundle)
        assert (found.x.shape, found.x.dtype) == ((2000, 1, 128), np.float32)
        assert found.source == "the first 2000 of 2500 samples of data.npz"

    def test_a_test_set_of_the_builder_is_taken_before_all_else(self, npz, tiny_bundle):
        test = np.ones((3, 1, 128))
        assert len(load_samples(npz(x_test=test), tiny_bundle).x) == 3
        found = load_samples(npz(x=np.zeros((5, 1, 128)), x_test=test), tiny_bundle)
        assert np.array_equal(found.x, test)

    @pytest.mark.parametrize(
        ("arrays", "message"),
        [
            ({"y": np.zeros(3)}, "no array 'x' or 'x_test', only: y"),
            ({}, "no array 'x' or 'x_test', only: nothing"),
            ({"x": np.zeros((4, 128))}, r"x has the shape \(4, 128\), 'tiny' takes \(n, 1, 128\)"),
            ({"x": np.zeros((0, 1, 128))}, r"x has the shape \(0, 1, 128\)"),
            ({"x": np.full((2, 1, 128), "a")}, "x is <U1, expected numbers"),
            ({"x_test": np.full((2, 1, 128), "a")}, "x_test is <U1, expected numbers"),
            ({"x": np.full((2, 1, 128), np.nan)}, "NaN or infinity"),
            ({"x": np.full((2, 1, 128), 1e300)}, "NaN or infinity"),
            ({"x": np.array([{}, 1], dtype=object)}, "no .npz file of plain arrays"),
        ],
    )
    def test_what_does_not_fit_is_refused_with_what_would(self, npz, tiny_bundle, arrays, message):
        with pytest.raises(DataError, match=message):
            load_samples(npz(**arrays), tiny_bundle)

    @pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 cut"])
    def test_what_is_no_npz_is_refused_in_one_line(self, tmp_path, tiny_bundle, content):
        path = tmp_path / "data.npz"
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"no \.npz file") as raised:
            load_samples(path, tiny_bundle)
        assert "pickle" not in str(raised.value)
        np.save(tmp_path / "one.npy", np.zeros(3))
        with pytest.raises(DataError, match="a single array"):
            load_samples(tmp_path / "one.npy", tiny_bundle)
        with pytest.raises(DataError, match="No such file"):
            load_samples(tmp_path / "no.npz", tiny_bundle)

    def test_without_data_a_shipped_model_has_its_sensor_and_others_their_golden_inputs(self, tiny_bundle):
        assert "golden inputs" in default_samples("./build/tiny", tiny_bundle).source
        assert np.array_equal(default_samples("./build/tiny", tiny_bundle).x, tiny_bundle.golden_inputs)
        shipped = default_samples("digits", tiny_bundle)
        assert (shipped.source, shipped.x.shape) == ("500 samples of the virtual sensor", (500, 1, 8, 8))

    def test_a_bundle_is_found_by_name_by_build_directory_and_by_itself(self, tiny_model_dir, monkeypatch):
        assert find_bundle("digits") == shipped_model_dir("digits") / "bundle"
        for typed in (tiny_model_dir, tiny_model_dir / "bundle"):
            assert find_bundle(str(typed)) == tiny_model_dir / "bundle"
        monkeypatch.chdir(tiny_model_dir.parent)
        assert find_bundle(tiny_model_dir.name).samefile(tiny_model_dir / "bundle")
        with pytest.raises(BundleError, match="no model 'nosuch' ships; there are: digits, vibration"):
            find_bundle("nosuch")


class TestCommands:
    def test_bench_reports_everything_of_a_build_and_prints_json_alone(
        self, tiny_model_dir, tmp_path, capsys
    ):
        np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).normal(1, 3, (40, 1, 128)))
        data = ["--data", str(tmp_path / "x.npz")]
        arguments = [str(tiny_model_dir), "--plan", "fp32", "--point", "2", "--rate", "500", "--seconds", "1"]
        assert main(["bench", *arguments, *data, "--json", "-"]) == 0
        out, err = capsys.readouterr()
        report = json.loads(out)
        assert (report["model"], report["plan"], report["point"], report["samples"]) == (
            "tiny",
            "fp32",
            2,
            40,
        )
        assert all(check["passes"] for check in report["golden"])
        assert [rung["rung"] for rung in report["rungs"]] == [0, 1, 2]
        shares = [rung["answered_share"] for rung in report["rungs"]]
        assert sum(shares) + report["escalated_share"] == pytest.approx(1.0)
        assert report["samples_per_s"] > 0
        assert report["paced"]["rate_hz"] == 500
        assert len(report["stages"]) == 2 * 3 * 2
        assert [gain["stage"] for gain in report["gains"]] == [0, 1, 2]
        plans = [plan["plan"] for plan in report["plans"]]
        assert plans[0] == "fp32"
        assert report["recommended"]["plan"] in plans
        assert report["memory"]["peak_bytes"] >= report["memory"]["loaded_bytes"] > 0
        for words in ("golden outputs", "recommended plan:", "watts", "temperature"):
            assert words in err

    def test_bench_prints_tables_and_says_what_the_samples_were(self, tiny_model_dir, tmp_path, capsys):
        path = tmp_path / "report.json"
        arguments = [str(tiny_model_dir / "bundle"), "--rate", "500", "--seconds", "1"]
        assert main(["bench", *arguments]) == 0
        assert "golden inputs; --data FILE.npz" in " ".join(capsys.readouterr().out.split())
        assert main(["bench", *arguments, "--json", str(path)]) == 0
        assert capsys.readouterr().out == ""
        assert json.loads(path.read_text())["model"] == "tiny"

    def test_bench_calls_no_plan_certified_beyond_the_point_that_its_certificate_covers(self, capsys):
        bundle = load_bundle(find_bundle("digits"))
        beyond = bundle.certified_point(bundle.plan()) + 1
        assert 0 < beyond < len(bundle.plan().points)
        arguments = ["digits", "--point", str(beyond), "--rate", "1000", "--seconds", "1", "--json", "-"]
        assert main(["bench", *arguments]) == 0
        used, *others = json.loads(capsys.readouterr().out)["plans"]
        assert (used["point"], used["is_certified"]) == (beyond, False)
        assert all(other["is_certified"] for other in others)

    def test_bench_says_that_this_board_computes_something_else(self, tiny_model_dir, capsys, monkeypatch):
        monkeypatch.setattr(
            "edge_daemon.bench.run.golden_errors", lambda *_: {"fp32": float("inf"), "int8": 0.0}
        )
        arguments = [str(tiny_model_dir), "--rate", "500", "--seconds", "1", "--json", "-"]
        assert main(["bench", *arguments]) == 11
        out, err = capsys.readouterr()
        assert {check["deviation"] for check in json.loads(out)["golden"]} == {None, 0.0}
        assert "this board computes something else than the builder did" in err

    @pytest.mark.parametrize(
        ("arguments", "code", "message"),
        [
            (["bench", "nosuch"], 11, "bundle 'nosuch': no model 'nosuch' ships"),
            (["bench", "digits", "--plan", "nope"], 11, "no plan 'nope'; it has: int8"),
            (["bench", "digits", "--point", "99"], 11, "has points 0 to"),
            (["bench", "digits", "--data", "no.npz"], 2, "no.npz: No such file"),
            (
                ["bench", "digits", "--json", "/nonexistent/x"],
                10,
                "the directory /nonexistent does not exist",
            ),
            (["profile", "nosuch"], 11, "bundle 'nosuch': no model 'nosuch' ships"),
            (["profile", "--out", "/"], 10, "--out /: cannot be written"),
        ],
    )
    def test_what_is_wrong_is_one_line_and_an_exit_code(self, arguments, code, message, capsys):
        assert main(arguments) == code
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert message in err

    @pytest.mark.parametrize("option", [["--rate", "0"], ["--seconds", "nan"], ["--runtime", "abacus"]])
    def test_a_wrong_option_is_refused_by_the_parser(self, option, capsys):
        with pytest.raises(SystemExit) as ended:
            main(["bench", "digits", *option])
        assert ended.value.code == 2
        assert option[1] in capsys.readouterr().err

    def test_profile_measures_shipped_and_own_bundles_and_its_json_stands_alone(
        self, tiny_model_dir, tiny_bundle, tmp_path, capsys
    ):
        path = tmp_path / "board.json"
        assert main(["profile", str(tiny_model_dir), "--seconds", "1", "--out", str(path), "--json"]) == 0
        out, err = capsys.readouterr()
        profile = decode_profile(out.encode())
        assert path.read_text() == out
        assert {cost.model for cost in profile.stages} == {"digits", "vibration", "tiny"}
        own = [cost for cost in profile.stages if cost.bundle_id == tiny_bundle.bundle_id]
        assert {(cost.stage, cost.precision, cost.pace) for cost in own} == {
            (stage, precision, pace)
            for stage in range(3)
            for precision in ("fp32", "int8")
            for pace in ("tight", "paced")
        }
        assert "tiny stage 2 int8" in err
        assert msgspec.json.decode(out)["machine"]["cores"] >= 1
