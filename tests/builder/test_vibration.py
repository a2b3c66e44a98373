from dataclasses import replace

import numpy as np
import pytest

from edge_daemon.simulate.vibration import (
    LABELS,
    LENGTH,
    SAMPLE_RATE_HZ,
    SPLITS,
    Bearing,
    VibrationSource,
    draw_windows,
    machine_of,
    window,
)


def clear_machine():
    """A machine whose faults stand out: silent sensor, no strays, one speed, no slip."""
    return replace(
        machine_of(3), speed_hz=(30.0, 30.0), noise_floor=0.01, stray_rate_hz=0.0, slip=0.0, gain=1.0
    )


def envelope_spectrum(signals):
    """Mean spectrum of the squared envelope (Randall & Antoni 2011, section 4.3), and its frequencies."""
    spectrum = np.fft.fft(signals, axis=1)
    frequencies = np.fft.fftfreq(LENGTH, 1.0 / SAMPLE_RATE_HZ)
    # The band of the resonances; only positive frequencies make the signal analytic.
    spectrum[:, (frequencies < 800.0) | (frequencies > 4_500.0)] = 0.0
    envelope = np.abs(np.fft.ifft(spectrum, axis=1)) ** 2
    envelope -= envelope.mean(axis=1, keepdims=True)
    padded = 8 * LENGTH
    power = (np.abs(np.fft.rfft(envelope * np.hanning(LENGTH), padded, axis=1)) ** 2).mean(axis=0)
    return np.fft.rfftfreq(padded, 1.0 / SAMPLE_RATE_HZ), power


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("outer_race", lambda bearing: bearing.bpfo),
        ("inner_race", lambda bearing: bearing.bpfi),
    ],
)
def test_envelope_spectrum_peaks_at_the_faults_frequency(name, order):
    machine = clear_machine()
    rng = np.random.default_rng(0)
    signals = np.stack([window(machine, LABELS.index(name), rng) for _ in range(200)])
    frequencies, power = envelope_spectrum(signals)
    expected_hz = order(machine.bearing) * 30.0
    # Below are the shaft's modulation and the window's own main lobe.
    near = (frequencies > 75.0) & (frequencies < 1.5 * expected_hz)
    found_hz = frequencies[near][power[near].argmax()]
    assert found_hz == pytest.approx(expected_hz, abs=5.0)


def test_a_sound_machine_has_no_peak_there():
    machine = clear_machine()
    rng = np.random.default_rng(0)
    height = {}
    for name in ("normal", "outer_race"):
        signals = np.stack([window(machine, LABELS.index(name), rng) for _ in range(200)])
        frequencies, power = envelope_spectrum(signals)
        height[name] = power[np.abs(frequencies - machine.bearing.bpfo * 30.0).argmin()] / power.sum()
    assert height["outer_race"] > 5.0 * height["normal"]


def test_fault_frequencies_are_those_of_a_published_bearing():
    # SKF 6205-2RS of the Case Western Reserve set: 9 balls, 0.3126 in on a 1.537 in pitch.
    bearing = Bearing(balls=9, diameter_ratio=0.3126 / 1.537, contact_angle_rad=0.0)
    found = (bearing.ftf, bearing.bpfo, bearing.bpfi, 2.0 * bearing.bsf)
    assert found == pytest.approx((0.3983, 3.5848, 5.4152, 4.7135), abs=2e-3)


@pytest.mark.parametrize(("name", "order"), [("imbalance", 1), ("misalignment", 2)])
def test_shaft_faults_raise_their_order(name, order):
    machine = clear_machine()
    rng = np.random.default_rng(0)
    line = np.exp(-2j * np.pi * order * 30.0 * np.arange(LENGTH) / SAMPLE_RATE_HZ)
    size = {
        label: np.mean([abs(window(machine, LABELS.index(label), rng) @ line) for _ in range(100)])
        for label in ("normal", name)
    }
    assert size[name] > 2.0 * size["normal"]


def test_no_machine_is_in_two_splits():
    train, calibration, test = (set(SPLITS[split]) for split in ("train", "calibration", "test"))
    assert train.isdisjoint(calibration)
    assert train.isdisjoint(test)
    assert calibration.isdisjoint(test)
    numbers = [n for numbers in SPLITS.values() for n in list(numbers)[:100]]
    assert len({machine_of(number) for number in numbers}) == len(numbers)


def test_drawn_windows_cover_the_splits_machines_and_balance_classes():
    x, y, machines = draw_windows("test", 700, np.random.default_rng(0))
    assert (x.shape, x.dtype) == ((700, LENGTH), np.float32)
    assert np.isfinite(x).all()
    assert np.bincount(y).tolist() == [100] * len(LABELS)
    assert set(machines.tolist()) == set(SPLITS["test"])


def test_a_source_repeats_itself_and_differs_between_seeds():
    def first_windows(split, seed):
        source = iter(VibrationSource(split, seed))
        return [next(source) for _ in range(3)]

    again = zip(first_windows("test", 1), first_windows("test", 1), strict=True)
    assert all(a[1] == b[1] and np.array_equal(a[0], b[0]) for a, b in again)
    assert not np.array_equal(first_windows("test", 1)[0][0], first_windows("test", 2)[0][0])


def test_drift_changes_the_signal_and_stays_finite():
    machine = machine_of(20_000)
    fresh = window(machine, 0, np.random.default_rng(0))
    worn = window(machine, 0, np.random.default_rng(0), drift=1.0)
    assert np.isfinite(worn).all()
    assert not np.allclose(fresh, worn, rtol=0.1, atol=0.1)
