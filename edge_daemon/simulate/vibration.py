"""A rotating machine with a rolling bearing, as physics: what an accelerometer on its housing records.

No I/O and no global randomness: every function takes the generator it draws from.

A window is the sum of
- shaft orders: residual and faulty imbalance (1x, growing with the square of the speed), misalignment
  (2x, 3x), looseness (a comb of orders and half orders, truncated once per turn);
- impacts of a bearing fault, spaced by the bearing's kinematics with slip, weighted by the load zone,
  ringing through the housing's modes and the sensor's mounting (McFadden & Smith 1984, "Model for the
  vibration produced by a single point defect in a rolling element bearing"; Randall & Antoni 2011,
  "Rolling element bearing diagnostics - a tutorial", sections 2 and 3);
- rolling and process noise through the same path, stray impacts from neighbouring machinery, and the
  sensor's own noise floor; all of it times the sensor's gain.

Amplitudes are in units of the rolling noise's RMS at full load; a window is left in the sensor's unit
(that, times the gain), because a board does not know the machine's scale.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

SAMPLE_RATE_HZ = 10_240
LENGTH = 1_024
LABELS = ("normal", "outer_race", "inner_race", "ball", "imbalance", "misalignment", "looseness")

Split = Literal["train", "calibration", "test"]
SPLITS: dict[Split, range] = {
    "train": range(600),
    "calibration": range(10_000, 19_000),
    "test": range(20_000, 20_300),
}
"""Machine numbers of each split; a machine is its number, so disjoint ranges are disjoint machines."""

_LEAD = 256  # samples before the window, so that earlier impacts still ring inside it
_TOTAL = _LEAD + LENGTH
_FREQUENCIES_HZ = np.fft.rfftfreq(_TOTAL, 1.0 / SAMPLE_RATE_HZ)
_TIMES_S = np.arange(-_LEAD, LENGTH) / SAMPLE_RATE_HZ

Window = npt.NDArray[np.float32]
Signal = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Bearing:
    """Geometry of a rolling bearing with a fixed outer race."""

    balls: int
    diameter_ratio: float
    """Ball diameter over pitch diameter."""
    contact_angle_rad: float

    @property
    def _reach(self) -> float:
        return self.diameter_ratio * float(np.cos(self.contact_angle_rad))

    @property
    def ftf(self) -> float:
        """Cage speed, in orders of the shaft (Randall & Antoni 2011, eq. 3)."""
        return 0.5 * (1.0 - self._reach)

    @property
    def bpfo(self) -> float:
        """Ball passes over a point of the outer race per turn of the shaft (eq. 1)."""
        return 0.5 * self.balls * (1.0 - self._reach)

    @property
    def bpfi(self) -> float:
        """Ball passes over a point of the inner race per turn of the shaft (eq. 2)."""
        return 0.5 * self.balls * (1.0 + self._reach)

    @property
    def bsf(self) -> float:
        """Spins of a ball per turn of the shaft (eq. 4); a spot on it strikes twice a spin."""
        return 0.5 / self.diameter_ratio * (1.0 - self._reach**2)


@dataclass(frozen=True, slots=True)
class Mode:
    """One resonance of the housing between bearing and sensor."""

    frequency_hz: float
    damping: float
    weight: float


@dataclass(frozen=True, slots=True)
class Machine:
    """What distinguishes one machine, its bearing and its sensor from the next."""

    bearing: Bearing
    modes: tuple[Mode, ...]
    mounting_hz: float
    mounting_damping: float
    speed_hz: tuple[float, float]
    residual_imbalance: float
    residual_misalignment: float
    slip: float
    load_zone: float
    """Half the loaded share of the bearing's diameter (Stribeck's epsilon)."""
    stray_rate_hz: float
    gain: float
    noise_floor: float


def sample_machine(rng: np.random.Generator) -> Machine:
    """Draw a machine from the population."""
    slow = rng.uniform(25.0, 40.0)
    first_mode_hz = rng.uniform(900.0, 2_200.0)
    modes = tuple(
        Mode(
            frequency_hz=float(first_mode_hz * ratio * rng.uniform(0.9, 1.1)),
            damping=float(np.exp(rng.uniform(np.log(0.02), np.log(0.06)))),
            weight=float(np.exp(rng.normal(0.0, 0.5))) * (1.0 if rng.random() < 0.5 else -1.0),
        )
        for ratio in (1.0, 1.6, 2.3)
    )
    return Machine(
        bearing=Bearing(
            balls=int(rng.integers(7, 11)),
            diameter_ratio=float(rng.uniform(0.18, 0.28)),
            contact_angle_rad=float(np.deg2rad(rng.choice([0.0, 15.0]))),
        ),
        modes=modes,
        mounting_hz=float(rng.uniform(3_000.0, 6_500.0)),
        mounting_damping=float(rng.uniform(0.05, 0.25)),
        speed_hz=(float(slow), float(slow * rng.uniform(1.1, 1.5))),
        residual_imbalance=float(np.exp(rng.normal(np.log(0.35), 0.35))),
        residual_misalignment=float(np.exp(rng.normal(np.log(0.2), 0.35))),
        slip=float(rng.uniform(0.01, 0.02)),
        load_zone=float(rng.uniform(0.30, 0.50)),
        stray_rate_hz=float(rng.uniform(0.0, 8.0)),
        gain=float(np.exp(rng.normal(0.0, 0.25))),
        noise_floor=float(np.exp(rng.uniform(np.log(0.05), np.log(0.35)))),
    )


def machine_of(number: int) -> Machine:
    """The machine with this number, always the same one."""
    return sample_machine(np.random.default_rng([20_240_229, number]))


def window(machine: Machine, label: int, rng: np.random.Generator, drift: float = 0.0) -> Window:
    """Record one window of `machine` in the condition LABELS[label].

    `drift` in 0..1 ages machine and sensor: modes sink as joints loosen, rolling noise grows by wear, the
    sensor loses gain and gains noise. It changes no label. Returns (LENGTH,) float32.
    """
    name = LABELS[label]
    low_hz, high_hz = machine.speed_hz
    speed_hz = rng.uniform(low_hz, high_hz)
    load = rng.uniform(0.4, 1.0)
    severity = rng.uniform()
    spectrum, impulse_peak, noise_gain = _path(machine, drift)

    # Rolling noise rises with load; wear adds a part that follows the load zone once per turn.
    rolling = rng.standard_normal(_TOTAL) * (0.6 + 0.4 * load) * (1.0 + 0.6 * drift)
    turn_rad = 2.0 * np.pi * (speed_hz * _TIMES_S + rng.uniform())
    rolling *= 1.0 + (0.1 + 0.3 * drift) * np.cos(turn_rad)
    force = rolling / noise_gain

    impacts = _stray_impacts(machine, rng)
    if name in _IMPACT_ORDERS:
        impacts += _fault_impacts(machine, name, rng, speed_hz=speed_hz, load=load, severity=severity)
    force += impacts / impulse_peak
    signal = np.fft.irfft(np.fft.rfft(force) * spectrum, _TOTAL)

    signal += _shaft_orders(machine, name, rng, turn_rad=turn_rad, speed_hz=speed_hz, severity=severity)
    signal += machine.noise_floor * (1.0 + 1.5 * drift) * rng.standard_normal(_TOTAL)
    signal *= machine.gain * (1.0 - 0.35 * drift)
    return signal[_LEAD:].astype(np.float32)


def draw_windows(
    split: Split, count: int, rng: np.random.Generator, drift: float = 0.0
) -> tuple[Window, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Draw `count` windows over all machines of a split, classes balanced.

    Returns windows (count, LENGTH) float32, labels (count,) and machine numbers (count,) int64.
    """
    machines = SPLITS[split]
    numbers = np.asarray(machines, dtype=np.int64)[np.arange(count) % len(machines)]
    labels = rng.permutation(np.arange(count, dtype=np.int64) % len(LABELS))
    windows = np.empty((count, LENGTH), np.float32)
    built = {number: machine_of(int(number)) for number in np.unique(numbers)}
    for row, (number, label) in enumerate(zip(numbers, labels, strict=True)):
        windows[row] = window(built[number], int(label), rng, drift)
    return windows, labels, numbers


class VibrationSource:
    """A virtual sensor: one machine of a split, and an endless, seeded stream of labelled windows."""

    def __init__(self, split: Split, seed: int, drift: float = 0.0) -> None:
        self._rng = np.random.default_rng([seed, *split.encode()])
        self.number = int(self._rng.choice(np.asarray(SPLITS[split])))
        self.machine = machine_of(self.number)
        self.drift = drift
        """May be changed between two windows."""

    def draw(self) -> tuple[Window, int]:
        """The next window (LENGTH,) float32 and its label."""
        label = int(self._rng.integers(len(LABELS)))
        return window(self.machine, label, self._rng, self.drift), label

    def __iter__(self) -> Iterator[tuple[Window, int]]:
        while True:
            yield self.draw()


@lru_cache(maxsize=1_024)  # 10 KB each; a machine's path is asked for at every window
def _path(machine: Machine, drift: float) -> tuple[npt.NDArray[np.complex128], float, float]:
    """Transfer from force at the bearing to acceleration at the sensor.

    A sum of modes that ring at their resonance (Ewins 2000, "Modal Testing", section 2.4; the mass line,
    which passes an impact in one sample, is left out as in McFadden & Smith), behind the mounting's low-pass.
    Returns it with the peak of its impulse response and the RMS of white noise of variance 1 behind it.
    """
    f = _FREQUENCIES_HZ
    sink = 1.0 - 0.12 * drift
    total = np.zeros(f.size, np.complex128)
    for mode in machine.modes:
        centre = mode.frequency_hz * sink
        total += mode.weight * centre**2 / (centre**2 - f**2 + 2j * mode.damping * f * centre)
    mounting = machine.mounting_hz * sink
    total *= mounting**2 / (mounting**2 - f**2 + 2j * machine.mounting_damping * f * mounting)
    peak = np.abs(np.fft.irfft(total, _TOTAL)).max()
    return total, float(peak), float(np.sqrt(np.mean(np.abs(total) ** 2)))


_IMPACT_ORDERS = ("outer_race", "inner_race", "ball")


def _fault_impacts(
    machine: Machine, name: str, rng: np.random.Generator, *, speed_hz: float, load: float, severity: float
) -> Signal:
    """The force of a point defect: jittered impacts, weighted by the load at the place where they happen."""
    bearing = machine.bearing
    order, carrier = {
        "outer_race": (bearing.bpfo, 0.0),  # the defect stands still in the load zone
        "inner_race": (bearing.bpfi, 1.0),  # it passes through the zone with the shaft,
        "ball": (2.0 * bearing.bsf, bearing.ftf),  # or with the cage
    }[name]
    period_s = 1.0 / (order * speed_hz)
    count = int(_TOTAL / SAMPLE_RATE_HZ / period_s * 1.2) + 4
    # Slip makes the spacing a random walk, not a jittered clock (Randall & Antoni 2011, section 2.3).
    gaps = period_s * (1.0 + machine.slip * rng.standard_normal(count))
    times = _TIMES_S[0] - period_s * rng.uniform() + np.cumsum(gaps)
    peak = 3.0 * np.exp(severity * np.log(4.5))
    sizes = peak * (0.7 + 0.3 * load) * np.exp(0.15 * rng.standard_normal(count))
    if carrier:
        angle = 2.0 * np.pi * (carrier * speed_hz * times + rng.uniform())
        sizes *= 0.1 + 0.9 * _load_at(angle, machine.load_zone)
    if name == "ball":
        sizes[::2] *= rng.uniform(0.5, 1.0)  # the outer race is farther from the spot's path than the inner
    return _strike(times, sizes)


def _load_at(angle: Signal, zone: float) -> Signal:
    """Stribeck's load distribution: share of the maximum load at an angle from its direction."""
    inside = np.maximum(0.0, 1.0 - (1.0 - np.cos(angle)) / (2.0 * zone))
    return np.asarray(inside**1.5, np.float64)


def _stray_impacts(machine: Machine, rng: np.random.Generator) -> Signal:
    """Impacts from elsewhere: at random times, so no fault, however loud."""
    count = int(rng.poisson(machine.stray_rate_hz * _TOTAL / SAMPLE_RATE_HZ))
    times = _TIMES_S[0] + rng.uniform(size=count) * _TOTAL / SAMPLE_RATE_HZ
    return _strike(times, np.exp(rng.uniform(np.log(1.5), np.log(9.0), count)))


def _strike(times: Signal, sizes: Signal) -> Signal:
    """Put impulses at fractional times, split between the two neighbouring samples."""
    force = np.zeros(_TOTAL + 1)
    position = (times - _TIMES_S[0]) * SAMPLE_RATE_HZ
    inside = (position >= 0.0) & (position < _TOTAL - 1)
    position, sizes = position[inside], sizes[inside]
    index = position.astype(np.int64)
    share = position - index
    np.add.at(force, index, sizes * (1.0 - share))
    np.add.at(force, index + 1, sizes * share)
    return force[:_TOTAL]


def _shaft_orders(
    machine: Machine,
    name: str,
    rng: np.random.Generator,
    *,
    turn_rad: Signal,
    speed_hz: float,
    severity: float,
) -> Signal:
    """What turns with the shaft: imbalance, misalignment, looseness; a sound machine has a little of two."""
    low_hz, high_hz = machine.speed_hz
    speed_factor = (speed_hz / (0.5 * (low_hz + high_hz))) ** 2  # a rotating mass pulls with omega squared
    first = machine.residual_imbalance * speed_factor * rng.uniform(0.8, 1.25)
    second = machine.residual_misalignment * rng.uniform(0.8, 1.25)
    third = 0.4 * second
    if name == "imbalance":
        first += speed_factor * 0.5 * np.exp(severity * np.log(6.0))
    elif name == "misalignment":
        growth = 0.4 * np.exp(severity * np.log(6.0))
        second += growth
        third += growth * rng.uniform(0.2, 0.7)
        first += 0.3 * growth  # the coupling's bending shows at 1x too
    phase = rng.uniform(0.0, 2.0 * np.pi, 2)
    signal = (
        first * np.cos(turn_rad)
        + second * np.cos(2.0 * turn_rad + phase[0])
        + third * np.cos(3.0 * turn_rad + phase[1])
    )
    if name == "looseness":
        signal += _rattle(turn_rad, 0.35 * np.exp(severity * np.log(6.0)), rng)
    return np.asarray(signal, np.float64)


def _rattle(turn_rad: Signal, size: float, rng: np.random.Generator) -> Signal:
    """A loose foot: clipped motion makes many orders, every second turn differs (half orders)."""
    orders = np.arange(1, 9) * 0.5 if rng.random() < 0.6 else np.arange(1.0, 9.0)
    weights = size * np.exp(0.3 * rng.standard_normal(orders.size)) / np.sqrt(orders + 0.5)
    phases = rng.uniform(0.0, 2.0 * np.pi, orders.size)
    return np.asarray(weights @ np.cos(np.outer(orders, turn_rad) + phases[:, None]), np.float64)
