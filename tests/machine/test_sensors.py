"""Sensor readers against fake powercap trees, a fake NVML and a fake psutil."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from moe_offload.machine.sensors import (
    CpuReader,
    NvmlReader,
    RaplReader,
    Sample,
    SensorSampler,
    energies_at,
)


def add_zone(root: Path, name: str, label: str, energy_uj: int, range_uj: int = 1_000_000) -> Path:
    zone = root / name
    zone.mkdir(parents=True)
    (zone / "name").write_text(f"{label}\n")
    (zone / "energy_uj").write_text(f"{energy_uj}\n")
    (zone / "max_energy_range_uj").write_text(f"{range_uj}\n")
    return zone


class TestRapl:
    def test_packages_are_added_and_their_parts_are_not(self, tmp_path: Path) -> None:
        first = add_zone(tmp_path, "intel-rapl:0", "package-0", 100)
        second = add_zone(tmp_path, "intel-rapl:1", "package-1", 5000)
        core = add_zone(tmp_path, "intel-rapl:0:0", "core", 0)
        platform = add_zone(tmp_path, "intel-rapl:2", "psys", 0)
        reader = RaplReader(tmp_path)
        (first / "energy_uj").write_text("400100")
        (second / "energy_uj").write_text("105000")
        for other in (core, platform):
            (other / "energy_uj").write_text("999999")
        assert reader.read_j() == pytest.approx(0.5)
        assert reader.note is None

    def test_a_wrapping_counter_keeps_counting(self, tmp_path: Path) -> None:
        zone = add_zone(tmp_path, "intel-rapl:0", "package-0", 900_000, range_uj=1_000_000)
        reader = RaplReader(tmp_path)
        total_j = []
        for now_uj in (950_000, 50_000, 300_000, 100_000):  # wraps twice
            (zone / "energy_uj").write_text(str(now_uj))
            total_j.append(reader.read_j())
        assert total_j == pytest.approx([0.05, 0.15, 0.40, 1.20])

    def test_unreadable_without_root_says_how_to_enable(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        zone = add_zone(tmp_path, "intel-rapl:0", "package-0", 100)
        plain_read = Path.read_text

        def refuse(path: Path, *args: object) -> str:
            if path.name == "energy_uj":
                raise PermissionError(13, "Permission denied")
            return plain_read(path)

        if os.geteuid() == 0:  # root reads whatever the mode says
            monkeypatch.setattr(Path, "read_text", refuse)
        else:
            (zone / "energy_uj").chmod(0)
        reader = RaplReader(tmp_path)
        assert reader.read_j() is None
        assert reader.note is not None
        assert "readable by root only" in reader.note
        assert f"sudo chmod a+r {tmp_path}/intel-rapl:*/energy_uj" in reader.note

    def test_no_powercap(self, tmp_path: Path) -> None:
        reader = RaplReader(tmp_path / "missing")
        assert reader.read_j() is None
        assert "no powercap RAPL on this machine" in str(reader.note)

    def test_a_counter_that_is_no_number(self, tmp_path: Path) -> None:
        (add_zone(tmp_path, "intel-rapl:0", "package-0", 1) / "energy_uj").write_text("?")
        reader = RaplReader(tmp_path)
        assert reader.read_j() is None
        assert "cannot be read" in str(reader.note)

    def test_a_counter_that_vanishes_in_the_run(self, tmp_path: Path) -> None:
        zone = add_zone(tmp_path, "intel-rapl:0", "package-0", 100)
        reader = RaplReader(tmp_path)
        assert reader.read_j() == 0.0
        (zone / "energy_uj").unlink()
        assert reader.read_j() is None
        assert reader.read_j() is None
        assert "stopped being readable" in str(reader.note)


class NVMLError(Exception):
    pass


class FakeNvml:
    """Energy counter in mJ and power in mW; `broken` names the calls that fail."""

    NVMLError = NVMLError

    def __init__(self, *broken: str) -> None:
        self.broken = set(broken)
        self.energy_mj = 5000
        self.power_mw = 100_000

    def nvmlInit(self) -> None:
        if "init" in self.broken:
            raise NVMLError("Library Not Found")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> object:
        return f"the one called {uuid}"

    def nvmlDeviceGetHandleByIndex(self, index: int) -> object:
        return object()

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: object) -> int:
        if "counter" in self.broken:
            raise NVMLError("Not Supported")
        return self.energy_mj

    def nvmlDeviceGetPowerUsage(self, handle: object) -> int:
        if "power" in self.broken:
            raise NVMLError("Not Supported")
        return self.power_mw


class TestNvml:
    def test_the_energy_counter(self) -> None:
        nvml = FakeNvml()
        reader = NvmlReader(nvml=nvml)
        nvml.energy_mj += 2500
        assert reader.read_j() == 2.5
        assert reader.read_power_w() == 100.0
        assert reader.note is None

    def test_without_a_counter_there_is_power_alone(self) -> None:
        reader = NvmlReader(nvml=FakeNvml("counter"))
        assert reader.read_j() is None
        assert reader.read_power_w() == 100.0
        assert reader.note == (
            "GPU energy: this GPU counts none (Not Supported), its columns stay empty"
        )

    def test_neither_counter_nor_power(self) -> None:
        reader = NvmlReader(nvml=FakeNvml("counter", "power"))
        assert reader.read_j() is None
        assert reader.read_power_w() is None

    def test_no_library(self) -> None:
        reader = NvmlReader(nvml=FakeNvml("init"))
        assert reader.read_j() is None
        assert reader.read_power_w() is None
        assert "NVML is not available (Library Not Found)" in str(reader.note)

    def test_a_counter_that_fails_in_the_run(self) -> None:
        nvml = FakeNvml()
        reader = NvmlReader(nvml=nvml)
        nvml.broken.add("counter")
        assert reader.read_j() is None


class FakePsutil:
    def __init__(self, mhz: list[float], use: list[float], temperatures: object = None) -> None:
        self.mhz = mhz
        self.use = use
        self.temperatures = temperatures

    def cpu_percent(self, percpu: bool) -> list[float]:
        return self.use

    def cpu_freq(self, percpu: bool) -> list[SimpleNamespace]:
        return [SimpleNamespace(current=mhz) for mhz in self.mhz]

    def sensors_temperatures(self) -> object:
        if self.temperatures is None:
            raise AttributeError("not on this platform")
        return self.temperatures


class TestCpu:
    def test_the_frequency_is_that_of_the_busiest_cores(self) -> None:
        source = FakePsutil([1000, 4000, 2000, 3000], [5, 80, 10, 99])
        assert CpuReader(2, source).read_mhz() == 3500.0
        assert CpuReader(1, source).read_mhz() == 3000.0
        assert CpuReader(64, source).read_mhz() == 2500.0

    def test_one_figure_for_all_cores(self) -> None:
        assert CpuReader(2, FakePsutil([2600], [5, 80, 10, 99])).read_mhz() == 2600.0

    @pytest.mark.parametrize("mhz", [[], [0.0, 0.0]])
    def test_no_frequency(self, mhz: list[float]) -> None:
        assert CpuReader(2, FakePsutil(mhz, [1, 2])).read_mhz() is None

    def test_the_temperature_is_the_packages_hottest(self) -> None:
        def reading(celsius: float) -> SimpleNamespace:
            return SimpleNamespace(current=celsius)

        temperatures = {
            "nvme": [reading(80.0)],
            "acpitz": [reading(20.0)],
            "k10temp": [reading(61.5), reading(64.0)],
        }
        assert CpuReader(1, FakePsutil([1], [1], temperatures)).read_temperature_c() == 64.0

    @pytest.mark.parametrize("temperatures", [None, {}, {"nvme": [SimpleNamespace(current=40)]}])
    def test_no_temperature(self, temperatures: object) -> None:
        assert CpuReader(1, FakePsutil([1], [1], temperatures)).read_temperature_c() is None


class TestSampler:
    def test_even_a_short_run_has_two_samples(self, tmp_path: Path) -> None:
        sampler = SensorSampler(
            1,
            cpu=CpuReader(1, FakePsutil([3000], [50])),
            rapl=RaplReader(tmp_path),
            gpu=NvmlReader(nvml=FakeNvml()),
        )
        with sampler:
            pass
        first, last = sampler.samples
        assert first.unix_s <= last.unix_s
        assert (last.busiest_mhz, last.gpu_energy_j, last.gpu_power_w) == (3000.0, 0.0, 100.0)
        assert last.cpu_energy_j is last.cpu_temperature_c is None
        assert sampler.notes[1:] == [
            "GPU energy: its counter stands still, its cells stay empty",
            "CPU temperature: no sensor on this machine, its cells stay empty",
        ]
        assert "no powercap RAPL" in sampler.notes[0]

    def test_samples_are_taken_all_along(self, tmp_path: Path) -> None:
        source = FakePsutil([3000], [50])
        taken = 0

        def count(percpu: bool) -> list[float]:
            nonlocal taken
            taken += 1
            if taken > 4:
                sampler._left.set()
            return [50.0]

        source.cpu_percent = count  # type: ignore[method-assign]
        sampler = SensorSampler(
            1, period_s=0.001, cpu=CpuReader(1, source), rapl=RaplReader(tmp_path)
        )
        with sampler:
            assert sampler._left.wait(10)
        assert len(sampler.samples) >= 4

    def test_a_machine_without_any_sensor_runs_clean(self, tmp_path: Path) -> None:
        with SensorSampler(
            1,
            cpu=CpuReader(1, FakePsutil([], [])),
            rapl=RaplReader(tmp_path),
            gpu=NvmlReader(nvml=FakeNvml("init")),
        ) as sampler:
            pass
        assert sampler.samples[0] == Sample(sampler.samples[0].unix_s)
        assert len(sampler.notes) == 4

    def test_this_machine(self) -> None:
        with SensorSampler(1, gpu=NvmlReader()) as sampler:
            pass
        assert len(sampler.samples) == 2


def test_energy_between_samples_is_linear() -> None:
    samples = [Sample(10.0, cpu_energy_j=0.0), Sample(11.0), Sample(12.0, cpu_energy_j=100.0)]
    at = energies_at(np.array([9.0, 10.5, 11.0, 12.0, 13.0]), samples, "cpu_energy_j")
    assert at is not None
    assert at.tolist() == [0.0, 25.0, 50.0, 100.0, 100.0]
    assert energies_at(np.array([10.0]), samples, "gpu_energy_j") is None


def test_a_counter_that_stands_still_says_nothing() -> None:
    """A virtual machine may show one: 0.0 J a token would be a claim."""
    samples = [Sample(10.0, cpu_energy_j=3.0), Sample(12.0, cpu_energy_j=3.0)]
    assert energies_at(np.array([11.0]), samples, "cpu_energy_j") is None
    assert energies_at(np.array([11.0]), samples[:1], "cpu_energy_j") is None
