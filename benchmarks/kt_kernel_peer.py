"""The experts of one layer in bf16 by kt-kernel, which is no whole engine, and by our kernels."""

from __future__ import annotations

import importlib
import time
from typing import Any

import torch
from torch import Tensor

from moe_offload.checkpoint.block import Activation, block_layout
from moe_offload.errors import UserError
from moe_offload.experts.store import ExpertStore
from moe_offload.kernels.cpu_experts import CpuExperts

_SCALE = 0.02
_MOST_ERROR = 0.02  # of the norm, between two that round to bf16 at different places


class ExpertsOfBoth:
    """One layer's experts in one memory, `n_experts` of [hidden, inner], `top_k` of them a token.

    kt-kernel makes a copy in its own layout. UserError where it cannot serve these.
    """

    def __init__(
        self, n_experts: int, top_k: int, hidden: int, inner: int, isa: str, threads: int
    ) -> None:
        self._top_k, self._hidden = top_k, hidden
        layout = block_layout("bf16", hidden, inner)
        self._blocks = ExpertStore([layout], [n_experts]).blocks(0)
        gate_up, down = (layout.field(name) for name in ("gate_up", "down"))
        values = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0)) * _SCALE
        for expert, block in enumerate(self._blocks):
            for matrix in (gate_up.view(block), down.view(block)):
                flat = matrix.view(-1)
                for part in flat.split(len(values)):
                    part.copy_(values.roll(expert)[: len(part)])
        self.ours = CpuExperts(layout, Activation("silu"), kernel="native", isa=isa)
        self._pointers = torch.tensor([block.data_ptr() for block in self._blocks])
        self._on_cpu = torch.ones(n_experts, dtype=torch.uint8)
        gates = [gate_up.view(block).data_ptr() for block in self._blocks]
        downs = [down.view(block).data_ptr() for block in self._blocks]
        try:
            extension = importlib.import_module("kt_kernel").kt_kernel_ext
            kinds = ["AVX2BF16_MOE"] if isa == "avx2" else ["AMXBF16_MOE", "AVX2BF16_MOE"]
            kind = next(filter(None, (getattr(extension.moe, name, None) for name in kinds)))
            workers = extension.WorkerPoolConfig()
            workers.subpool_count, workers.subpool_numa_map = 1, [0]
            workers.subpool_thread_count = [threads]
            self._queue = extension.CPUInfer(workers)
            self._on_gpu = torch.zeros(n_experts, dtype=torch.bool)
            config = extension.moe.MOEConfig(
                n_experts, top_k, hidden, inner, self._on_gpu.data_ptr()
            )
            config.pool, config.max_len, config.layer_idx = self._queue.backend_, 4096, 0
            config.gate_projs, config.down_projs = [gates], [downs]
            config.up_projs = [[gate + 2 * inner * hidden for gate in gates]]
            self._theirs = kind(config)
            places = torch.arange(n_experts)
            self._queue.submit(self._theirs.load_weights_task(places.data_ptr()))
            self._queue.sync()
        except (ImportError, AttributeError, TypeError, StopIteration) as error:
            raise UserError(f"this kt-kernel has another interface ({error!r})") from None

    def seconds(self, n_tokens: int, repetitions: int) -> tuple[float, float]:
        """The medians, ours and theirs, in turns; each time other experts by chance.

        UserError where the two do not compute the same.
        """
        generator = torch.Generator().manual_seed(n_tokens)
        times: list[tuple[float, float]] = []
        for _ in range(repetitions + 1):  # one warms up
            hidden = torch.randn(n_tokens, self._hidden, generator=generator).bfloat16()
            scores = torch.rand(n_tokens, len(self._blocks), generator=generator)
            weights, index = scores.topk(self._top_k)
            weights = weights / weights.sum(dim=1, keepdim=True)
            mine, theirs = torch.empty(n_tokens, self._hidden), torch.empty_like(hidden)
            started_s = time.perf_counter()
            self.ours.run(hidden, self._pointers, self._on_cpu, index, weights, mine)
            between_s = time.perf_counter()
            self._run_theirs(hidden, index, weights, theirs)
            times.append((between_s - started_s, time.perf_counter() - between_s))
            error = (mine - theirs.float()).norm() / mine.norm()
            if not error < _MOST_ERROR:
                raise UserError(f"its kt-kernel differs from our experts by {error:.0%} in norm")
        mine_s, their_s = torch.tensor(times[1:], dtype=torch.float64).median(dim=0).values
        return float(mine_s), float(their_s)

    def _run_theirs(self, hidden: Tensor, index: Tensor, weights: Tensor, out: Tensor) -> None:
        count = torch.tensor([len(hidden)], dtype=torch.int32)
        parts: list[Any] = [one.data_ptr() for one in (index, weights, hidden, out)]
        self._queue.submit(self._theirs.forward_task(count.data_ptr(), self._top_k, *parts, False))
        self._queue.sync()
