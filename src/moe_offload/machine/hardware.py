"""What this machine is (CPU, caches, NUMA, memory, GPU) and how much memory a process may use.

Containers and batch systems limit a process by its cgroup, while /proc/meminfo goes on showing the
whole machine: who loads by that is killed half-way. What a machine can do is engine/timing.py's.
"""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pynvml

PROC_ROOT = Path("/proc")
SYS_ROOT = Path("/sys/devices/system")
CGROUP_ROOT = Path("/sys/fs/cgroup")
# Page cache and kernel memory, in memory.stat, that the kernel takes back when memory is needed.
_RECLAIMABLE = ("inactive_file", "active_file", "slab_reclaimable")
_GIB = 2**30

# Of a CPU's many flags, those that decide which expert kernels run (x86, then Arm).
_ISA = (
    *("sse4_2", "avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl"),
    *("avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16"),
    *("asimd", "asimddp", "asimdhp", "bf16", "i8mm", "sve", "sve2"),
)


@dataclass(frozen=True)
class Cache:
    """One CPU cache level: `n_instances` of `size_bytes` each."""

    level: int
    kind: str
    size_bytes: int
    n_instances: int


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU; PCIe generation and width are the most that card and slot agree on."""

    name: str
    memory_bytes: int
    driver: str
    pcie_generation: int | None
    pcie_width: int | None


@dataclass(frozen=True)
class Hardware:
    """A machine's facts. `n_cores` are physical cores, `n_threads` what the system schedules on.

    `memory_limit_bytes` is what a cgroup (a container, a batch system) leaves of `memory_bytes`.
    """

    cpu: str
    n_cores: int
    n_threads: int
    isa: tuple[str, ...]
    caches: tuple[Cache, ...]
    numa_nodes: tuple[str, ...]
    memory_bytes: int
    memory_limit_bytes: int | None
    gpu: Gpu | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def key(self) -> dict[str, Any]:
        """The facts that a calibration depends on (memory in GiB: kernels reserve a little)."""
        facts = self.to_json()
        del facts["memory_limit_bytes"]
        facts["memory_bytes"] = round(self.memory_bytes / _GIB) * _GIB
        if facts["gpu"]:
            del facts["gpu"]["driver"]
        return facts

    @property
    def last_level_cache_bytes(self) -> int:
        """All instances of the highest cache level together; 0 where the system does not say."""
        top = max((cache.level for cache in self.caches), default=0)
        return sum(c.size_bytes * c.n_instances for c in self.caches if c.level == top)

    def describe(self) -> list[str]:
        """The facts as lines for people."""
        limit, caches, gpu = "", "not reported", "none found"
        if self.memory_limit_bytes is not None:
            limit = f", limited to {self.memory_limit_bytes / _GIB:.1f} GiB by a cgroup"
        if self.caches:
            caches = ", ".join(
                f"L{c.level} {c.kind.lower()} {c.n_instances} x {c.size_bytes // 1024} KiB"
                for c in self.caches
            )
        if self.gpu is not None:
            gpu = (
                f"{self.gpu.name}, {self.gpu.memory_bytes / _GIB:.1f} GiB, "
                f"PCIe {self.gpu.pcie_generation or '?'} x{self.gpu.pcie_width or '?'}, "
                f"driver {self.gpu.driver}"
            )
        return [
            f"CPU: {self.cpu}, {self.n_cores} cores ({self.n_threads} threads), "
            f"{len(self.numa_nodes) or 1} NUMA node(s), "
            f"{self.memory_bytes / _GIB:.1f} GiB memory{limit}",
            f"ISA: {' '.join(self.isa) or 'not reported'}",
            f"Caches: {caches}",
            f"GPU: {gpu}",
        ]


def read_hardware(
    proc_root: Path = PROC_ROOT,
    sys_root: Path = SYS_ROOT,
    nvml: ModuleType | Any = pynvml,
    gpu_uuid: str | None = None,
) -> Hardware:
    """This machine's facts; what cannot be found out is empty, never an error.

    `proc_root` and `sys_root` are /proc and /sys/devices/system, `nvml` the pynvml module, or
    stand-ins for them. `gpu_uuid` names the GPU in use, by default NVML's first: the two libraries
    number GPUs differently.
    """
    fields = _cpuinfo(proc_root / "cpuinfo")
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    n_threads = psutil.cpu_count() or 1
    return Hardware(
        cpu=fields.get("model name") or platform.processor() or platform.machine(),
        n_cores=psutil.cpu_count(logical=False) or n_threads,
        n_threads=n_threads,
        isa=tuple(flag for flag in _ISA if flag in flags),
        caches=_caches(sys_root / "cpu"),
        numa_nodes=_numa_nodes(sys_root / "node"),
        memory_bytes=psutil.virtual_memory().total,
        memory_limit_bytes=limit_bytes(),
        gpu=_gpu(nvml, gpu_uuid),
    )


def _cpuinfo(path: Path) -> dict[str, str]:
    """The first value of each field: that of the first core."""
    fields: dict[str, str] = {}
    for line in _text(path).splitlines():
        name, colon, value = line.partition(":")
        if colon:
            fields.setdefault(name.strip(), value.strip())
    return fields


def _caches(cpu_root: Path) -> tuple[Cache, ...]:
    instances = set()
    for index in cpu_root.glob("cpu[0-9]*/cache/index[0-9]*"):
        level, kind, size = (_text(index / name) for name in ("level", "type", "size"))
        if level.isdigit() and size[:-1].isdigit():
            size_bytes = int(size[:-1]) * {"K": 1024, "M": 1024**2}.get(size[-1], 1)
            # Cores that share an instance name the same cores.
            shared_by = _text(index / "shared_cpu_list") or str(index)
            instances.add((int(level), kind, size_bytes, shared_by))
    alike = Counter(instance[:3] for instance in instances)
    return tuple(Cache(*key, n_instances) for key, n_instances in sorted(alike.items()))


def _numa_nodes(node_root: Path) -> tuple[str, ...]:
    """Each node's cores, such as '0-23'."""
    nodes = sorted(node_root.glob("node[0-9]*"), key=lambda node: int(node.name[4:]))
    return tuple(_text(node / "cpulist") for node in nodes)


def _text(path: Path) -> str:
    """What the file says; nothing where it cannot be read."""
    try:
        return path.read_text().strip()
    except (OSError, ValueError):
        return ""


def gpu_handle(nvml: ModuleType | Any, uuid: str | None) -> Any:
    """NVML's handle of the GPU called `uuid`, by default its first; NVMLError without one."""
    nvml.nvmlInit()
    by_uuid, by_index = nvml.nvmlDeviceGetHandleByUUID, nvml.nvmlDeviceGetHandleByIndex
    return by_index(0) if uuid is None else by_uuid(uuid)


def _gpu(nvml: ModuleType | Any, uuid: str | None) -> Gpu | None:
    try:
        handle = gpu_handle(nvml, uuid)
        name, driver = nvml.nvmlDeviceGetName(handle), nvml.nvmlSystemGetDriverVersion()
        memory_bytes = int(nvml.nvmlDeviceGetMemoryInfo(handle).total)
    except nvml.NVMLError:
        return None
    generation = width = None
    with suppress(nvml.NVMLError):
        generation = int(nvml.nvmlDeviceGetMaxPcieLinkGeneration(handle))
        width = int(nvml.nvmlDeviceGetMaxPcieLinkWidth(handle))
    return Gpu(str(name), memory_bytes, str(driver), generation, width)


def available_bytes(proc_root: Path = PROC_ROOT, cgroup_root: Path = CGROUP_ROOT) -> int:
    """Bytes that can be allocated without swapping or being killed.

    `proc_root` is /proc and `cgroup_root` where cgroups are mounted, or stand-ins for them.
    """
    rooms = [limit - used for limit, used in _limits(proc_root, cgroup_root)]
    return max(0, min([int(psutil.virtual_memory().available), *rooms]))


def limit_bytes(proc_root: Path = PROC_ROOT, cgroup_root: Path = CGROUP_ROOT) -> int | None:
    """The tightest cgroup limit on this process's memory; None where there is none."""
    physical = int(psutil.virtual_memory().total)
    limits = [limit for limit, _ in _limits(proc_root, cgroup_root) if limit < physical]
    return min(limits, default=None)


def _limits(proc_root: Path, cgroup_root: Path) -> Iterator[tuple[int, int]]:
    """(limit, used) in bytes of this process's cgroup and every one around it, v1 and v2."""
    for line in _text(proc_root / "self" / "cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            root, of_subgroups = cgroup_root, ""  # v2 adds them in
            limit_files, use_file = ["memory.max", "memory.high"], "memory.current"
        elif "memory" in controllers.split(","):
            root, of_subgroups = cgroup_root / "memory", "total_"
            limit_files, use_file = ["memory.limit_in_bytes"], "memory.usage_in_bytes"
        else:
            continue
        for folder in _upwards(root, path):
            limits = [n for name in limit_files if (n := _number(folder / name)) is not None]
            used = _number(folder / use_file)
            if limits and used is not None:
                yield min(limits), used - _reclaimable(folder, of_subgroups)


def _upwards(root: Path, path: str) -> Iterator[Path]:
    """The folder of cgroup `path` and those above it, up to `root`.

    Inside a container `path` may name a folder of the host that is not mounted here; its own
    cgroup is then `root`.
    """
    folder = root / path.strip("/")
    if ".." not in folder.parts:
        while folder != root:
            yield folder
            folder = folder.parent
    yield root


def _reclaimable(folder: Path, prefix: str) -> int:
    lines = (line.partition(" ") for line in _text(folder / "memory.stat").splitlines())
    wanted = [prefix + name for name in _RECLAIMABLE]
    return sum(int(n) for name, _, n in lines if name in wanted and n.isdecimal())


def _number(path: Path) -> int | None:
    """The file's number; None for `max`, for no file, and for anything else."""
    text = _text(path)
    return int(text) if text.isdecimal() else None
