"""The work that a calibration times: reads, calls over experts on either side, and copies."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from moe_offload.engine.calibration import Counts, measure_read_gbps
from moe_offload.errors import UserError
from moe_offload.experts.expert_fetcher import ExpertFetcher, make_fetcher
from moe_offload.experts.expert_store import ExpertStore
from moe_offload.experts.gpu_experts import GpuExperts
from moe_offload.kernels.cpu_experts import CpuExperts

_READ_BYTES = 1 << 29  # twice the largest last-level cache met so far
_READS = 5


def plain_read_gbps(store: ExpertStore, cpu: CpuExperts) -> float:
    """Plain-read bandwidth on the kernels' own threads; through torch where no kernel runs."""
    kernels = cpu.kernels
    blocks = store.blocks(0)
    if kernels is None or blocks.nbytes < _READ_BYTES:
        return measure_read_gbps()
    return median(kernels.read_gbps(blocks.view(-1)[:_READ_BYTES]) for _ in range(_READS))


def _routing(counts: Counts) -> Tensor:
    """int64 [T, 1]: `counts[e]` tokens on expert e."""
    return torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))[:, None]


def cpu_runner(store: ExpertStore, cpu: CpuExperts, dtype: torch.dtype) -> Callable[[Counts], None]:
    turns = itertools.count()

    def run(counts: Counts) -> None:
        turn = next(turns)  # other experts every time: nothing may be left in a cache
        layer = turn % store.n_stored  # the layers beyond use the same memory
        n_experts = store.n_experts[layer]
        index = (_routing(counts) + turn // store.n_stored * len(counts)) % n_experts
        hidden = torch.ones(len(index), store.layouts[layer].hidden_size, dtype=dtype)
        cpu.run(
            hidden,
            store.pointers(layer),
            torch.ones(n_experts, dtype=torch.uint8),
            index,
            torch.ones(index.shape),
            torch.empty(hidden.shape),
        )

    return run


def gpu_starter(
    gpu: GpuExperts, order: ExpertFetcher, store: ExpertStore, dtype: torch.dtype
) -> Callable[[Counts], Callable[[], None]]:
    def start(counts: Counts) -> Callable[[], None]:
        index = _routing(counts)
        hidden = torch.ones(
            len(index), store.layouts[0].hidden_size, dtype=dtype, device=gpu.device
        )
        pending = gpu.launch(hidden, index, torch.ones(index.shape, device=gpu.device), order)

        def wait() -> None:
            pending.result()
            if gpu.device.type == "cuda":
                torch.cuda.synchronize(gpu.device)

        return wait

    return start


class Copier:
    """Copies the first bytes of one block after another to the accelerator's last slot."""

    def __init__(
        self, store: ExpertStore, gpu: GpuExperts, emulate_pcie_gbps: float | None
    ) -> None:
        self._store = store
        self._gpu = gpu
        self._emulate_pcie_gbps = emulate_pcie_gbps
        self._fetchers: dict[int, ExpertFetcher] = {}
        self._turns = itertools.count()

    def copy(self, n_bytes: int) -> None:
        if n_bytes not in self._fetchers:
            slots = self._gpu.slots[:, :n_bytes]
            self._fetchers[n_bytes] = make_fetcher(self._gpu.device, slots, self._emulate_pcie_gbps)
        layer, turn = next(self._turns) % self._store.n_layers, next(self._turns)
        source = self._store.block(layer, turn % self._store.n_experts[layer])
        self._fetchers[n_bytes].fetch(self._gpu.n_slots - 1, source[:n_bytes])
        for completion in self._fetchers[n_bytes].drain():
            if completion.error is not None:
                raise UserError(f"calibration could not copy an expert: {completion.error}")

    def __enter__(self) -> Copier:
        return self

    def __exit__(self, *_: object) -> None:
        for fetcher in self._fetchers.values():
            fetcher.close()
