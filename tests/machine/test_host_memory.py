"""Memory limits of cgroups, v1 and v2, from fake trees."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from moe_offload.machine.hardware import available_bytes, limit_bytes

GB = 10**9
MACHINE = SimpleNamespace(total=64 * GB, available=50 * GB)


@pytest.fixture(autouse=True)
def _a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_offload.machine.hardware.psutil.virtual_memory", lambda: MACHINE)


class Tree:
    def __init__(self, folder: Path, cgroup: str) -> None:
        self.proc, self.root = folder / "cgroup-of-self", folder / "cgroup"
        self.root.mkdir()
        self.proc.write_text(cgroup)

    def add(self, group: str, **files: object) -> None:
        folder = self.root / group
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name.replace("memory_", "memory.", 1)).write_text(f"{content}\n")

    def answers(self) -> tuple[int, int | None]:
        return available_bytes(self.proc, self.root), limit_bytes(self.proc, self.root)


def test_without_cgroups_it_is_the_machines(tmp_path: Path) -> None:
    nothing = tmp_path / "none"
    assert available_bytes(nothing, nothing) == 50 * GB
    assert limit_bytes(nothing, nothing) is None


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
