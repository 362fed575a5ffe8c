"""The experts of one layer by kt-kernel, which is no whole engine, and by our kernels."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from moe_offload.checkpoint.block import Activation, BlockLayout, MatrixName, block_layout
from moe_offload.checkpoint.quantization import GROUP, pack_levels
from moe_offload.config import WeightFormat
from moe_offload.errors import UserError
from moe_offload.experts.store import ExpertStore
from moe_offload.kernels.cpu_experts import CpuExperts

# A format of ours -> kt-kernel's class for AVX2, and the one for CPUs that can more.
KINDS: Final[dict[WeightFormat, tuple[str, str]]] = {
    "bf16": ("AVX2BF16_MOE", "AMXBF16_MOE"),
    "fp8": ("AVX2FP8_MOE", "AMXFP8_MOE"),
    "mxfp4": ("AVX2MXFP4_MOE", "AMXFP4_KGroup_MOE"),
}
_SCALE: Final = 0.02
_SCALE_EXPONENT: Final = -8  # of mxfp4, whose numbers reach 6
# Of the norm: the two round to bf16 at different places, and we mxfp4's activations to 8 bits.
_MOST_ERROR: Final = 0.02
# The threads of either spin for a while after a call, beside those of the other.
_REST_S: Final = 0.1


class _Theirs(NamedTuple):
    """An expert's matrix as kt-kernel reads it: rows of numbers and, if it has them, of scales."""

    numbers: Tensor
    scales: Tensor | None


def _fill(layout: BlockLayout, name: MatrixName, blocks: Tensor) -> list[_Theirs]:
    """Random numbers for a matrix of all experts in `blocks`, and the same for kt-kernel.

    In bf16 and fp8, which both read as they lie, each expert begins at another of them.
    """
    field, matrix = layout.field(name), layout.matrix(name)
    generator = torch.Generator().manual_seed(0)
    scales = [
        layout.field(f"{name}_scale").view(b) for b in blocks if layout.weight_format != "bf16"
    ]
    if layout.weight_format == "mxfp4":
        shape = matrix.n_rows, matrix.n_columns
        codes = torch.randint(0, 16, shape, dtype=torch.uint8, generator=generator)
        stored = pack_levels(codes, 4)
        for block, scale in zip(blocks, scales, strict=True):
            field.view(block).copy_(stored)
            scale.fill_(127 + _SCALE_EXPONENT)
        their_scales = torch.full((shape[0], shape[1] // GROUP), 2.0**_SCALE_EXPONENT)
        both = _Theirs(codes[:, ::2] | codes[:, 1::2] << 4, their_scales.bfloat16())
        return [both] * len(blocks)
    values = torch.randn(1_000_003, generator=generator)
    for scale in scales:
        scale.fill_(_SCALE)
    values *= 1 if scales else _SCALE
    views = [field.view(block) for block in blocks]
    for expert, view in enumerate(views):
        for part in view.view(-1).split(len(values)):
            part.copy_(values.roll(expert)[: len(part)])
    return [_Theirs(*pair) for pair in zip(views, scales or [None] * len(views), strict=True)]


def _seconds(run: Callable[..., None], *arguments: Tensor) -> float:
    time.sleep(_REST_S)
    started_s = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - started_s


class ExpertsOfBoth:
    """One layer's experts in one memory, `n_experts` of [hidden, inner], `top_k` of them a token.

    kt-kernel makes a copy in its own layout. UserError where it cannot serve these.
    """

    def __init__(
        self,
        weight_format: WeightFormat,
        n_experts: int,
        top_k: int,
        hidden: int,
        inner: int,
        isa: str,
        threads: int,
    ) -> None:
        self._top_k, self._hidden = top_k, hidden
        layout = block_layout(weight_format, hidden, inner)
        self._blocks = ExpertStore([layout], [n_experts]).blocks(0)
        gate_up, down = (_fill(layout, name, self._blocks) for name in ("gate_up", "down"))
        self.ours = CpuExperts(layout, Activation("silu"), kernel="native", isa=isa)
        self._pointers = torch.tensor([block.data_ptr() for block in self._blocks])
        self._on_cpu = torch.ones(n_experts, dtype=torch.uint8)
        try:
            extension = importlib.import_module("kt_kernel").kt_kernel_ext
            kinds = KINDS[weight_format][: 1 if isa == "avx2" else 2]
            kind = next(filter(None, (getattr(extension.moe, n, None) for n in reversed(kinds))))
            workers = extension.WorkerPoolConfig()
            workers.subpool_count, workers.subpool_numa_map = 1, [0]
            workers.subpool_thread_count = [threads]
            self._queue = extension.CPUInfer(workers)
            self._on_gpu = torch.zeros(n_experts, dtype=torch.bool)
            config = extension.moe.MOEConfig(
                n_experts, top_k, hidden, inner, self._on_gpu.data_ptr()
            )
            config.pool, config.max_len, config.layer_idx = self._queue.backend_, 4096, 0
            for name, part, which in (("gate", gate_up, 0), ("up", gate_up, 1), ("down", down, 0)):
                halves = 1 if name == "down" else 2
                numbers = [one.numbers.chunk(halves)[which].data_ptr() for one in part]
                setattr(config, f"{name}_projs", [numbers])
                scales = [one.scales.chunk(halves)[which] for one in part if one.scales is not None]
                if scales:
                    setattr(config, f"{name}_scales", [[one.data_ptr() for one in scales]])
            if weight_format != "bf16":
                config.quant_config.bits = 4 if weight_format == "mxfp4" else 8
                config.quant_config.group_size = GROUP if weight_format == "mxfp4" else 128
                config.quant_config.zero_point = False
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
            mine_s = _seconds(
                self.ours.run, hidden, self._pointers, self._on_cpu, index, weights, mine
            )
            times.append((mine_s, _seconds(self._run_theirs, hidden, index, weights, theirs)))
            error = (mine - theirs.float()).norm() / mine.norm()
            if not error < _MOST_ERROR:
                raise UserError(f"its kt-kernel differs from our experts by {error:.0%} in norm")
        medians = torch.tensor(times[1:], dtype=torch.float64).median(dim=0).values
        return float(medians[0]), float(medians[1])

    def _run_theirs(self, hidden: Tensor, index: Tensor, weights: Tensor, out: Tensor) -> None:
        count = torch.tensor([len(hidden)], dtype=torch.int32)
        parts: list[Any] = [one.data_ptr() for one in (index, weights, hidden, out)]
        self._queue.submit(self._theirs.forward_task(count.data_ptr(), self._top_k, *parts, False))
        self._queue.sync()
