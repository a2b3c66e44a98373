"""What this machine is. Files are read under a root directory; what is not there is None."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from edge_cascade.profile import Machine

ROOT: Final = Path("/")

# Dot products and matrix instructions on int8, as /proc/cpuinfo calls them.
_INT8_FEATURES: Final = (
    "asimddp", "i8mm", "sve", "sve2", "avx2", "avx_vnni", "avx512_vnni", "amx_int8",
)  # fmt: skip
# "CPU implementer" and "CPU part" of boards' cores (util-linux, sys-utils/lscpu-arm.c).
_ARM_CORES: Final = {
    (0x41, 0xC07): "Cortex-A7",
    (0x41, 0xD03): "Cortex-A53",
    (0x41, 0xD05): "Cortex-A55",
    (0x41, 0xD07): "Cortex-A57",
    (0x41, 0xD08): "Cortex-A72",
    (0x41, 0xD0A): "Cortex-A75",
    (0x41, 0xD0B): "Cortex-A76",
    (0x41, 0xD42): "Cortex-A78AE",
    (0x4E, 0x003): "Denver 2",
    (0x4E, 0x004): "Carmel",
}
_RUNTIMES: Final = ("onnxruntime", "onnxruntime-gpu", "ai-edge-litert")


def describe_machine(root: Path = ROOT) -> Machine:
    """The machine that this process runs on; `root` stands for `/`."""
    facts = _cpu_facts(root)
    frequency = root / "sys/devices/system/cpu/cpu0/cpufreq"
    max_khz = _read(frequency / "cpuinfo_max_freq") or _read(frequency / "scaling_max_freq")
    return Machine(
        architecture=platform.machine(),
        cpu=_cpu_name(facts)[:256],
        features=tuple(name for name in _INT8_FEATURES if name in _cpu_flags(facts)),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=_kilobytes(root / "proc/meminfo", "MemTotal"),
        board=_read(root / "proc/device-tree/model") or _read(root / "sys/class/dmi/id/product_name"),
        governor=_read(frequency / "scaling_governor"),
        max_mhz=int(max_khz) / 1e3 if max_khz is not None and max_khz.isdecimal() else None,
        load_1min=round(os.getloadavg()[0], 2),
        os=_os_name(root),
        python=platform.python_version(),
        packages=_packages(),
    )


def resident_bytes(root: Path = ROOT) -> int | None:
    """What this process has in memory now (VmRSS)."""
    return _kilobytes(root / "proc/self/status", "VmRSS")


def peak_resident_bytes(root: Path = ROOT) -> int | None:
    """The most that this process has had in memory so far (VmHWM)."""
    # getrusage's peak is inherited from the parent process over exec.
    return _kilobytes(root / "proc/self/status", "VmHWM")


def _cpu_facts(root: Path) -> dict[str, str]:
    """The first line of each key in /proc/cpuinfo."""
    facts: dict[str, str] = {}
    for line in (_read(root / "proc/cpuinfo", 65536) or "").splitlines():
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    return facts


def _cpu_name(facts: dict[str, str]) -> str:
    if "model name" in facts:
        return facts["model name"]
    try:
        implementer, part = int(facts["CPU implementer"], 16), int(facts["CPU part"], 16)
    except (KeyError, ValueError):
        return platform.processor() or "unknown"
    return _ARM_CORES.get((implementer, part), f"ARM {implementer:#04x}:{part:#05x}")


def _cpu_flags(facts: dict[str, str]) -> set[str]:
    return set(facts.get("flags", facts.get("Features", "")).split())


def _kilobytes(path: Path, key: str) -> int | None:
    found = re.search(rf"^{key}:\s+(\d+) kB", _read(path, 65536) or "", re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _os_name(root: Path) -> str:
    found = re.search(r'^PRETTY_NAME="?([^"\n]*)', _read(root / "etc/os-release", 65536) or "", re.MULTILINE)
    return f"{found[1] if found else platform.system()}, kernel {platform.release()}"[:256]


def _packages() -> dict[str, str]:
    found = {}
    for name in _RUNTIMES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _read(path: Path, max_bytes: int = 256) -> str | None:
    try:
        with path.open("rb") as file:
            return file.read(max_bytes).decode("utf-8", "replace").strip("\0 \n\t") or None
    except OSError:
        return None
