"""What the machine's sensors say while a run is going: frequency, temperature, energy, power.

Every reader tolerates the absence of its sensor: it then gives None (an empty cell) and one line
that says what is missing and how to have it. Nothing here raises for a missing sensor.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import pynvml

from moe_offload.machine.hardware import gpu_handle

POWERCAP_ROOT = Path("/sys/class/powercap")
# Names under which psutil lists CPU package sensors (Intel, AMD, Arm boards), best first.
_CPU_SENSORS = ("coretemp", "k10temp", "zenpower", "cpu_thermal", "cpu-thermal", "acpitz")


@dataclass(frozen=True)
class Sample:
    """One reading. Energies are joules since the sampler started; None where no sensor is."""

    unix_s: float
    busiest_mhz: float | None = None
    cpu_temperature_c: float | None = None
    cpu_energy_j: float | None = None
    gpu_energy_j: float | None = None
    gpu_power_w: float | None = None


class RaplReader:
    """CPU package energy from Linux powercap, counter wrap handled, all packages together.

    `root` is the powercap folder. `note` says why there is no reading, or is None.
    """

    def __init__(self, root: Path = POWERCAP_ROOT) -> None:
        self.note: str | None = None
        self._total_uj = 0
        self._last_uj: dict[Path, int] = {}
        zones = sorted(filter(_is_package, root.glob("intel-rapl:*")))
        try:
            self._range_uj = {zone: _number(zone / "max_energy_range_uj") for zone in zones}
            self._last_uj = {zone: _number(zone / "energy_uj") for zone in zones}
        except PermissionError:
            self.note = (
                f"CPU energy: {zones[0]}/energy_uj is readable by root only, energy columns "
                f"stay empty; to enable: sudo chmod a+r {root}/intel-rapl:*/energy_uj"
            )
        except (OSError, ValueError) as error:
            self.note = f"CPU energy: {zones[0]} cannot be read ({error})"
        if not zones:
            self.note = "CPU energy: no powercap RAPL on this machine, energy columns stay empty"

    def read_j(self) -> float | None:
        """Joules since this reader was made, or None."""
        try:
            for zone, last_uj in self._last_uj.items():
                now_uj = self._last_uj[zone] = _number(zone / "energy_uj")
                wrapped_uj = self._range_uj[zone] if now_uj < last_uj else 0
                self._total_uj += now_uj - last_uj + wrapped_uj
        except (OSError, ValueError) as error:
            self.note = f"CPU energy: the RAPL counter stopped being readable ({error})"
            self._last_uj = {}
        return self._total_uj / 1e6 if self._last_uj else None


def _is_package(zone: Path) -> bool:
    """Top-level zones named package-N: subzones are part of them, psys and dram are not the CPU."""
    try:
        return zone.name.count(":") == 1 and (zone / "name").read_text().startswith("package")
    except OSError:
        return False


def _number(path: Path) -> int:
    return int(path.read_text())


class NvmlReader:
    """Power of one NVIDIA GPU and, where it counts it (Volta and later), energy, through NVML.

    `uuid` names the GPU, by default NVML's first. `nvml` is the pynvml module (nvidia-ml-py) or a
    stand-in. `note` says why there is no energy, or is None.
    """

    def __init__(self, uuid: str | None = None, nvml: ModuleType | Any = pynvml) -> None:
        self.note: str | None = None
        self._nvml: Any = nvml
        self._handle: Any = None
        self._start_mj: int | None = None
        try:
            self._handle = gpu_handle(nvml, uuid)
            self._start_mj = nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        except nvml.NVMLError as error:
            missing = "NVML is not available" if self._handle is None else "this GPU counts none"
            self.note = f"GPU energy: {missing} ({error}), its columns stay empty"

    def _read(self, call: str) -> int | None:
        """What NVML's `call` says of the GPU, in thousandths; None where it cannot say."""
        with suppress(self._nvml.NVMLError):
            return None if self._handle is None else int(getattr(self._nvml, call)(self._handle))
        return None

    def read_power_w(self) -> float | None:
        """The GPU's power draw now, W, or None."""
        now_mw = self._read("nvmlDeviceGetPowerUsage")
        return None if now_mw is None else now_mw / 1e3

    def read_j(self) -> float | None:
        """Joules since this reader was made, or None."""
        now_mj = self._read("nvmlDeviceGetTotalEnergyConsumption")
        if now_mj is None or self._start_mj is None:
            return None
        return (now_mj - self._start_mj) / 1e3


class CpuReader:
    """Frequency of the busiest cores and CPU temperature through psutil (or a stand-in)."""

    def __init__(self, n_busiest: int, source: ModuleType | Any = psutil) -> None:
        self._n_busiest = max(1, n_busiest)
        self._source = source
        self._utilisation()  # psutil reports use since the previous call

    def _utilisation(self) -> list[float]:
        with suppress(OSError, NotImplementedError):
            return list(self._source.cpu_percent(percpu=True))
        return []

    def read_mhz(self) -> float | None:
        """Mean MHz of the `n_busiest` cores with the highest use since the last call, or None."""
        use = self._utilisation()
        try:
            mhz = [core.current for core in self._source.cpu_freq(percpu=True) or []]
        except (AttributeError, OSError, NotImplementedError):
            return None
        if len(mhz) == len(use):  # else one figure stands for all cores
            mhz = [mhz[core] for core in np.argsort(use)[::-1]]
        busiest = mhz[: self._n_busiest]
        return sum(busiest) / len(busiest) if any(busiest) else None

    def read_temperature_c(self) -> float | None:
        """The CPU's temperature in degrees Celsius (hottest of its sensors), or None."""
        try:
            sensors = self._source.sensors_temperatures()
        except (AttributeError, OSError, NotImplementedError):
            return None
        for name in _CPU_SENSORS:
            readings = [entry.current for entry in sensors.get(name, []) if entry.current]
            if readings:
                return float(max(readings))
        return None


class SensorSampler:
    """While entered, reads all sensors once per `period_s` on a thread of its own.

    The first of `samples` is taken on entering and the last on leaving, so that even a run shorter
    than the period has two.
    """

    def __init__(
        self,
        n_busiest: int,
        *,
        period_s: float = 1.0,
        cpu: CpuReader | None = None,
        rapl: RaplReader | None = None,
        gpu: NvmlReader | None = None,
    ) -> None:
        self._period_s = period_s
        self._cpu = cpu or CpuReader(n_busiest)
        self._rapl = rapl or RaplReader()
        self._gpu = gpu
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="sensors", daemon=True)
        self.samples: list[Sample] = []

    def _read(self) -> None:
        self.samples.append(
            Sample(
                unix_s=time.time(),
                busiest_mhz=self._cpu.read_mhz(),
                cpu_temperature_c=self._cpu.read_temperature_c(),
                cpu_energy_j=self._rapl.read_j(),
                gpu_energy_j=self._gpu.read_j() if self._gpu else None,
                gpu_power_w=self._gpu.read_power_w() if self._gpu else None,
            )
        )

    def _loop(self) -> None:
        while not self._left.wait(self._period_s):
            self._read()

    def __enter__(self) -> SensorSampler:
        self._read()
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._left.set()
        self._thread.join()
        self._read()

    @property
    def notes(self) -> list[str]:
        """One line for each sensor that is missing, known once the samples are taken."""
        notes = [reader.note for reader in (self._rapl, self._gpu) if reader and reader.note]
        for last in self.samples[-1:]:
            missing = {
                "CPU energy: its counter stands still": last.cpu_energy_j == 0,  # virtual machines
                "GPU energy: its counter stands still": last.gpu_energy_j == 0,
                "CPU temperature: no sensor on this machine": last.cpu_temperature_c is None,
                "CPU frequency: not reported on this machine": last.busiest_mhz is None,
            }
            notes += [f"{what}, its cells stay empty" for what, is_so in missing.items() if is_so]
        return notes


def energies_at(
    unix_s: npt.NDArray[np.float64], samples: Sequence[Sample], sensor: str
) -> npt.NDArray[np.float64] | None:
    """Joules that `sensor` (`cpu_energy_j` or `gpu_energy_j`) had counted by each moment.

    Linear between samples, flat before the first and after the last; None where the samples do not
    say, as of a counter that stands still.
    """
    known = [(s.unix_s, getattr(s, sensor)) for s in samples if getattr(s, sensor) is not None]
    if not known or known[-1][1] <= known[0][1]:
        return None
    at_s, joules = np.array(known).T
    start_s = at_s[0]  # small numbers keep the precision that unix time would eat
    counted_j: npt.NDArray[np.float64] = np.interp(unix_s - start_s, at_s - start_s, joules)
    return counted_j
