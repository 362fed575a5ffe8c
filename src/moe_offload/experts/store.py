"""Every expert's block in host memory, pinned when a GPU will copy from it."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_offload.checkpoint.block import BlockLayout
from moe_offload.checkpoint.prepared import MoeLayer, read_block
from moe_offload.experts.plan import Trial
from moe_offload.kernels.bindings import CpuKernels, zlib_crc32

READ_THREADS = 4  # as many as saturate an NVMe disk with reads of one block each
_ALREADY_REGISTERED = 712  # cudaErrorHostMemoryAlreadyRegistered


@dataclass
class DiskCounts:
    """Experts asked for that were in memory or not, and the disk's part in it, since loading.

    `n_bytes` were read in `busy_s`, and for `wait_s` a layer stood still for an expert.
    """

    hits: int = 0
    misses: int = 0
    n_bytes: int = 0
    wait_s: float = 0.0
    busy_s: float = 0.0


class ExpertStore:
    """Host memory holding `E` blocks for each of `L` MoE layers; (layer, expert) -> view.

    One anonymous, page-aligned mapping per layer, touched once: by the read that fills it. With
    `pin`, each mapping is registered with CUDA where it lies (torch's own pinned allocations
    round up to a power of two) and unregistered by `close` or, at the latest, when nobody holds it
    any more: pages left registered would be read in the place of what lies there next. A refused
    registration leaves the memory pageable. Not thread-safe while filling; read-only after.

    With `n_stored`, only so many layers, all of one shape, have memory of their own, and the others
    use it again in turn: a model of random weights is then as deep as the real one in a part of its
    memory. Bytes that a step reads and copies stay the same. `kernels`, where there are any, take
    the checksums of what is read.
    """

    def __init__(
        self,
        layouts: Sequence[BlockLayout],
        n_experts: Sequence[int],
        n_stored: int | None = None,
        kernels: CpuKernels | None = None,
    ) -> None:
        self.layouts = tuple(layouts)
        self.n_experts = tuple(n_experts)
        self._crc32 = zlib_crc32 if kernels is None else kernels.crc32
        self.disk = DiskCounts()  # nothing comes from there
        self.trial: Trial | None = None  # and nothing is to be found out about it
        self._registered: dict[int, weakref.finalize[..., Any]] = {}  # by position in _stored
        shapes = list(zip(self.layouts, self.n_experts, strict=True))
        self.n_stored = len(shapes) if n_stored is None else n_stored
        assert self.n_stored == len(shapes) or len(set(shapes)) == 1
        self._stored: list[Tensor] = []
        self._memory: list[ctypes.Array[ctypes.c_uint8]] = []
        for layout, count in shapes[: self.n_stored]:
            n_bytes = layout.block_bytes * count
            # Unlike the mapping, an array on it tells of its end before the memory is gone.
            memory = (ctypes.c_uint8 * n_bytes).from_buffer(_mapping(n_bytes))
            self._memory.append(memory)
            blocks = torch.frombuffer(memory, dtype=torch.uint8)
            self._stored.append(blocks.view(count, layout.block_bytes))
        self._blocks = [self._stored[layer % self.n_stored] for layer in range(len(shapes))]
        self._pointers = [
            torch.arange(len(blocks)) * blocks.shape[1] + blocks.data_ptr()
            for blocks in self._blocks
        ]

    @property
    def n_layers(self) -> int:
        return len(self.layouts)

    def is_pinned(self, layer: int) -> bool:
        """Whether a GPU copies this layer's blocks without the host's help."""
        return layer % self.n_stored in self._registered

    @property
    def total_bytes(self) -> int:
        return sum(blocks.numel() for blocks in self._stored)

    @property
    def memory(self) -> ExpertStore:
        """What of it is in host memory: all."""
        return self

    def is_there(self, layer: int, expert: int) -> bool:
        """Whether the expert is in memory: always."""
        return True

    def block(self, layer: int, expert: int) -> Tensor:
        """The block of one expert, a uint8 [block_bytes] view."""
        return self._blocks[layer][expert]

    def arriving(self, layer: int, experts: Sequence[int]) -> Iterator[Sequence[int]]:
        """Groups of `experts` as they are in memory: all at once (`DiskTier` has more)."""
        yield experts

    def recover(self) -> None:
        """After a pass that never ended: nothing was under way."""

    def blocks(self, layer: int) -> Tensor:
        """All blocks of one layer, a uint8 [E, block_bytes] view."""
        return self._blocks[layer]

    def pointers(self, layer: int) -> Tensor:
        """The addresses of one layer's blocks, int64 [E]."""
        return self._pointers[layer]

    def read(
        self, layers: Sequence[MoeLayer], progress: Callable[[int], None] | None = None
    ) -> None:
        """Fill every block from the experts files, several checked reads at a time.

        `progress` is called with the bytes of each block as it arrives. Raises UserError when a
        file ends early, cannot be read, or does not match its checksum.
        """
        jobs = [
            (layer, expert, self._blocks[position][expert], self._crc32)
            for position, layer in enumerate(layers)
            for expert in range(layer.n_experts)
        ]
        with ThreadPoolExecutor(READ_THREADS) as pool:
            pending = [pool.submit(read_block, *job) for job in jobs]
            try:
                for job, done in zip(jobs, pending, strict=True):
                    done.result()
                    if progress is not None:
                        progress(job[2].numel())
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def pin(self) -> str | None:
        """Register the memory with CUDA; returns a line for the user when it was refused.

        Layer by layer, so that where a limit is met the first layers, those that are cached, keep
        their pages locked; the rest stays pageable.
        """
        runtime = torch.cuda.cudart()
        pinned_bytes = 0
        for position, (memory, blocks) in enumerate(zip(self._memory, self._stored, strict=True)):
            pointer, n_bytes = blocks.data_ptr(), blocks.numel()
            code = int(runtime.cudaHostRegister(pointer, n_bytes, 0))
            if code != 0:
                _forget_cuda_error()
                remedy = (
                    "close what this program loaded before"
                    if code == _ALREADY_REGISTERED
                    else "free memory or raise the locked-memory limit (ulimit -l)"
                )
                return (
                    f"pinning experts was refused after {pinned_bytes / 1e9:.1f} of "
                    f"{self.total_bytes / 1e9:.1f} GB (CUDA error {code}): layers from {position} "
                    "on use pageable memory, whose copies are slower and hold the CPU up, so "
                    f"none of them is started in the background; {remedy} to avoid it"
                )
            end = weakref.finalize(memory, runtime.cudaHostUnregister, pointer)
            end.atexit = False  # the process gives all up at once
            self._registered[position] = end
            pinned_bytes += n_bytes
        return None

    def close(self) -> None:
        """Unregister pinned memory; the views stay readable."""
        for unregister in self._registered.values():
            unregister()
        self._registered.clear()


def _mapping(n_bytes: int) -> mmap.mmap:
    """Private anonymous memory: Linux gives shared memory no huge pages unless told to.

    With them memory that the machine has free is filled at 6.7 to 12 GB/s rather than 2.3 to 3.7,
    there are fewer pages to pin, and the kernels read 2% faster (33.4 against 32.7 GB/s, Mixtral's
    shape in bf16; two threads of an AMD EPYC, 2026-11-24).
    """
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, n_bytes)
    mapping = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # A child gets none of it: for pages that are pinned, fork would copy all experts.
    for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
        if hasattr(mmap, advice):
            with contextlib.suppress(OSError):  # a kernel without it is slower, not wrong
                mapping.madvise(getattr(mmap, advice))
    return mapping


def _forget_cuda_error() -> None:
    """CUDA hands an old error to whoever launches next: let that be a launch that does not matter.

    torch has no call for it.
    """
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda")
