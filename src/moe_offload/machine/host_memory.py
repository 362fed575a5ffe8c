"""Host memory that this process may still use: the machine's, or less inside a limited cgroup.

Containers and batch systems limit a process by its cgroup; /proc/meminfo goes on showing the whole
machine. Who loads by that is killed half-way.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil

PROC_CGROUP = Path("/proc/self/cgroup")
CGROUP_ROOT = Path("/sys/fs/cgroup")
# Of a cgroup's page cache and kernel memory, what the kernel takes back when memory is needed.
_RECLAIMABLE_V1 = ("total_inactive_file", "total_active_file")
_RECLAIMABLE_V2 = ("inactive_file", "active_file", "slab_reclaimable")


def available_bytes(proc_cgroup: Path = PROC_CGROUP, cgroup_root: Path = CGROUP_ROOT) -> int:
    """Bytes that can be allocated without swapping or being killed.

    `proc_cgroup` is /proc/self/cgroup and `cgroup_root` where cgroups are mounted, or stand-ins.
    """
    rooms = [limit - used for limit, used in _limits(proc_cgroup, cgroup_root)]
    return max(0, min([int(psutil.virtual_memory().available), *rooms]))


def limit_bytes(proc_cgroup: Path = PROC_CGROUP, cgroup_root: Path = CGROUP_ROOT) -> int | None:
    """The tightest cgroup limit on this process's memory; None where there is none."""
    physical = int(psutil.virtual_memory().total)
    limits = [limit for limit, _ in _limits(proc_cgroup, cgroup_root) if limit < physical]
    return min(limits, default=None)


def _limits(proc_cgroup: Path, cgroup_root: Path) -> Iterator[tuple[int, int]]:
    """(limit, used) in bytes of this process's cgroup and every one around it, v1 and v2."""
    for line in _text(proc_cgroup).splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            for folder in _upwards(cgroup_root, path):
                limits = [_number(folder / name) for name in ("memory.max", "memory.high")]
                known = [limit for limit in limits if limit is not None]
                used = _number(folder / "memory.current")
                if known and used is not None:
                    yield min(known), used - _reclaimable(folder, _RECLAIMABLE_V2)
        elif "memory" in controllers.split(","):
            for folder in _upwards(cgroup_root / "memory", path):
                limit = _number(folder / "memory.limit_in_bytes")
                used = _number(folder / "memory.usage_in_bytes")
                if limit is not None and used is not None:
                    yield limit, used - _reclaimable(folder, _RECLAIMABLE_V1)


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


def _reclaimable(folder: Path, names: tuple[str, ...]) -> int:
    fields = (line.split() for line in _text(folder / "memory.stat").splitlines())
    known = (field for field in fields if len(field) == 2 and field[1].isdecimal())
    return sum(int(field[1]) for field in known if field[0] in names)


def _number(path: Path) -> int | None:
    """The file's number; None for `max`, for no file, and for anything else."""
    text = _text(path)
    return int(text) if text.isdecimal() else None


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
