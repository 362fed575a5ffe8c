"""The machine and its limits, from fake /proc, /sys, cgroup and NVML trees and from itself."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from moe_offload.machine.hardware import (
    Cache,
    Gpu,
    available_bytes,
    limit_bytes,
    read_hardware,
)


class NVMLError(Exception):
    pass


class FakeNvml:
    """The NVML calls that hardware facts need; `broken` names those that fail."""

    NVMLError = NVMLError

    def __init__(self, *broken: str) -> None:
        self.broken = broken

    def _answer(self, call: str, value: object) -> object:
        if call in self.broken:
            raise NVMLError(f"{call}: not supported")
        return value

    def nvmlInit(self) -> None:
        self._answer("init", None)

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> object:
        return f"the one called {uuid}"

    def nvmlDeviceGetHandleByIndex(self, index: int) -> object:
        return self._answer("handle", f"gpu{index}")

    def nvmlDeviceGetName(self, handle: str) -> object:
        return self._answer("name", f"Test card {handle}")

    def nvmlSystemGetDriverVersion(self) -> object:
        return "999.1"

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> object:
        return SimpleNamespace(total=24 * 2**30)

    def nvmlDeviceGetMaxPcieLinkGeneration(self, handle: str) -> object:
        return self._answer("pcie", 4)

    def nvmlDeviceGetMaxPcieLinkWidth(self, handle: str) -> object:
        return 16


def fake_machine(root: Path) -> tuple[Path, Path]:
    """Four threads on two cores with a shared L3 of 8 MiB, one socket per NUMA node."""
    proc, system = root / "proc", root / "sys"
    proc.mkdir()
    block = "processor\t: {}\nmodel name\t: Test CPU @ 3 GHz\nflags\t\t: fpu avx2 fma avx512f ht\n"
    (proc / "cpuinfo").write_text("\n".join(block.format(n) for n in range(4)))
    for cpu in range(4):
        for index, (level, kind, size, shared) in enumerate(
            [(1, "Data", "32K", f"{cpu % 2},{cpu % 2 + 2}"), (3, "Unified", "8M", "0-3")]
        ):
            folder = system / f"cpu/cpu{cpu}/cache/index{index}"
            folder.mkdir(parents=True)
            for name, text in (("level", level), ("type", kind), ("size", size)):
                (folder / name).write_text(f"{text}\n")
            (folder / "shared_cpu_list").write_text(f"{shared}\n")
    for node, cores in enumerate(("0,2", "1,3")):
        folder = system / f"node/node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(f"{cores}\n")
    return proc, system


def test_facts_from_fake_trees(tmp_path: Path) -> None:
    hardware = read_hardware(*fake_machine(tmp_path), nvml=FakeNvml())
    assert hardware.cpu == "Test CPU @ 3 GHz"
    assert hardware.isa == ("avx2", "fma", "avx512f")
    assert hardware.caches == (Cache(1, "Data", 32 * 1024, 2), Cache(3, "Unified", 8 * 2**20, 1))
    assert hardware.last_level_cache_bytes == 8 * 2**20
    assert hardware.numa_nodes == ("0,2", "1,3")
    assert hardware.gpu == Gpu("Test card gpu0", 24 * 2**30, "999.1", 4, 16)
    lines = "\n".join(hardware.describe())
    assert "2 NUMA node(s)" in lines
    assert "GPU: Test card gpu0, 24.0 GiB, PCIe 4 x16, driver 999.1" in lines


def test_the_gpu_in_use_is_the_one_described(tmp_path: Path) -> None:
    hardware = read_hardware(*fake_machine(tmp_path), nvml=FakeNvml(), gpu_uuid="GPU-12")
    assert hardware.gpu is not None
    assert hardware.gpu.name == "Test card the one called GPU-12"


def test_a_limited_container_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_offload.machine.hardware.limit_bytes", lambda: 2**33)
    hardware = read_hardware(*fake_machine(tmp_path), nvml=FakeNvml())
    assert hardware.memory_limit_bytes == 2**33
    assert hardware.describe()[0].endswith("GiB memory, limited to 8.0 GiB by a cgroup")
    assert "memory_limit_bytes" not in hardware.key()


@pytest.mark.parametrize("broken", ["init", "handle", "name"])
def test_without_a_usable_gpu(tmp_path: Path, broken: str) -> None:
    hardware = read_hardware(*fake_machine(tmp_path), nvml=FakeNvml(broken))
    assert hardware.gpu is None
    assert hardware.describe()[-1] == "GPU: none found"


def test_a_gpu_that_hides_its_link(tmp_path: Path) -> None:
    hardware = read_hardware(*fake_machine(tmp_path), nvml=FakeNvml("pcie"))
    assert hardware.gpu is not None
    assert hardware.gpu.pcie_generation is None
    assert "PCIe ? x?" in hardware.describe()[-1]


def test_a_machine_that_tells_nothing(tmp_path: Path) -> None:
    hardware = read_hardware(tmp_path / "none", tmp_path / "none", nvml=FakeNvml("init"))
    assert hardware.isa == hardware.caches == hardware.numa_nodes == ()
    assert hardware.last_level_cache_bytes == 0
    assert hardware.cpu
    assert "ISA: not reported" in hardware.describe()


def test_the_key_leaves_out_what_calibrations_do_not_depend_on(tmp_path: Path) -> None:
    key = read_hardware(*fake_machine(tmp_path), nvml=FakeNvml()).key()
    assert "driver" not in key["gpu"]
    assert key["memory_bytes"] % 2**30 == 0


def test_this_machine() -> None:
    hardware = read_hardware()
    assert 1 <= hardware.n_cores <= hardware.n_threads
    assert hardware.memory_bytes > 2**28
    assert json.loads(json.dumps(hardware.to_json()))["cpu"] == hardware.cpu


GB = 10**9
MACHINE = SimpleNamespace(total=64 * GB, available=50 * GB)


class Tree:
    def __init__(self, folder: Path, cgroup: str) -> None:
        self.proc, self.root = folder / "proc", folder / "cgroup"
        for made in (self.proc / "self", self.root):
            made.mkdir(parents=True)
        (self.proc / "self/cgroup").write_text(cgroup)

    def add(self, group: str, **files: object) -> None:
        folder = self.root / group
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name.replace("memory_", "memory.", 1)).write_text(f"{content}\n")

    def answers(self) -> tuple[int, int | None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("moe_offload.machine.hardware.psutil.virtual_memory", lambda: MACHINE)
            return available_bytes(self.proc, self.root), limit_bytes(self.proc, self.root)


def test_without_cgroups_it_is_the_machines(tmp_path: Path) -> None:
    assert Tree(tmp_path, "").answers() == (50 * GB, None)


def test_v2_counts_what_can_be_reclaimed_as_free(tmp_path: Path) -> None:
    tree = Tree(tmp_path, "0::/job\n")
    stat = f"anon {2 * GB}\ninactive_file {3 * GB}\nactive_file {GB}\nslab_reclaimable {GB}\nx\n"
    tree.add("job", memory_max=16 * GB, memory_current=8 * GB, memory_stat=stat)
    assert tree.answers() == (16 * GB - (8 - 5) * GB, 16 * GB)


def test_v2_obeys_the_tightest_group_above(tmp_path: Path) -> None:
    tree = Tree(tmp_path, "0::/outer/inner\n")
    tree.add("outer/inner", memory_max="max", memory_high="max", memory_current=GB)
    tree.add("outer", memory_max=20 * GB, memory_high=12 * GB, memory_current=4 * GB)
    assert tree.answers() == (8 * GB, 12 * GB)


def test_v2_in_a_container_its_own_group_is_the_root(tmp_path: Path) -> None:
    tree = Tree(tmp_path, "0::/system.slice/docker-1234.scope\n")  # the host's name for it
    tree.add(".", memory_max=4 * GB, memory_current=GB)
    assert tree.answers() == (3 * GB, 4 * GB)
    (tmp_path / "b").mkdir()
    escaped = Tree(tmp_path / "b", "0::/../x\n")
    escaped.add(".", memory_max=5 * GB, memory_current=GB)
    assert escaped.answers() == (4 * GB, 5 * GB)


V1 = "12:cpu,cpuacct:/job\n4:memory:/job\n1:name=systemd:/job\n"


def test_v1(tmp_path: Path) -> None:
    tree = Tree(tmp_path, V1)
    stat = f"cache {GB}\ntotal_inactive_file {GB}\ntotal_active_file {GB}\ninactive_file 7\n"
    tree.add(
        "memory/job",
        memory_limit_in_bytes=10 * GB,
        memory_usage_in_bytes=6 * GB,
        memory_stat=stat,
    )
    tree.add("memory", memory_limit_in_bytes=2**63 - 4096, memory_usage_in_bytes=30 * GB)
    tree.add("cpu,cpuacct/job", memory_limit_in_bytes=1, memory_usage_in_bytes=0)
    assert tree.answers() == (6 * GB, 10 * GB)


def test_v1_without_a_limit(tmp_path: Path) -> None:
    """The kernel writes no limit as a number beyond any machine."""
    tree = Tree(tmp_path, V1)
    tree.add("memory/job", memory_limit_in_bytes=2**63 - 4096, memory_usage_in_bytes=6 * GB)
    assert tree.answers() == (50 * GB, None)


def test_a_full_group_has_nothing_left(tmp_path: Path) -> None:
    tree = Tree(tmp_path, "0::/\n")
    tree.add(".", memory_max=GB, memory_current=2 * GB)
    assert tree.answers() == (0, GB)


def test_nonsense_is_no_limit(tmp_path: Path) -> None:
    tree = Tree(tmp_path, "what\n0::/job\n::\n")
    tree.add("job", memory_max="lots", memory_current=GB, memory_stat="inactive_file many")
    assert tree.answers() == (50 * GB, None)
