"""What a calibration runs: experts on either side, copies, the rest of a step, plain reading.

`engine/timing.py` times it. And from how many tokens on a vendor's library is faster than our
kernels: oneDNN on the CPU, cuBLAS on a GPU.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from moe_offload.engine.timing import Counts, medians_in_turn_us
from moe_offload.errors import UserError
from moe_offload.experts.dispatcher import MoeDispatcher
from moe_offload.experts.fetcher import ExpertFetcher, make_fetcher
from moe_offload.experts.layer import HostHandoff
from moe_offload.experts.slots import GpuExperts, Group
from moe_offload.experts.store import ExpertStore
from moe_offload.kernels.cpu_experts import CpuExperts

# From the most: where oneDNN loses, nothing less is measured.
CROSSOVER_TOKENS = (256, 64, 16)
_CUBLAS_TOKENS = (1024, 256, 64, 16)
_CUBLAS_EXPERTS = 8  # at once: with more, launching them one by one counts for more
_CROSSOVER_MARGIN = 0.05
_BF16_FLAGS = frozenset(["avx512_bf16", "amx_bf16"])
_STEP_BUDGET_S = 0.3
_FIRST_STEPS = 3  # unlike those to come: a prompt; on a GPU a rehearsal and a recording of graphs
_READ_BYTES = 1 << 29  # twice the largest last-level cache met so far
_READS = 5
_SUMS = 10


def plain_read_gbps(store: ExpertStore, cpu: CpuExperts) -> float:
    """Plain-read bandwidth on the kernels' own threads; through torch where no kernel runs."""
    kernels, blocks = cpu.kernels, store.blocks(0)
    if kernels is not None and blocks.nbytes >= _READ_BYTES:
        memory = blocks.view(-1)[:_READ_BYTES]
        return statistics.median(kernels.read_gbps(memory) for _ in range(_READS))
    buffer = torch.ones(_READ_BYTES // 4)
    return buffer.nbytes / medians_in_turn_us([buffer.sum], budget_s=0.2)[0] / 1e3


Call = tuple[Tensor, Tensor, Tensor]  # hidden [T, H], ids int64 [T, 1], weights fp32 [T, 1]


def _calls(
    store: ExpertStore, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Callable[[Counts, int, int], Call]:
    """A call over so many tokens on each of the experts `first`, `first + 1`, ... of `n`.

    What a layer has at hand is made once, and is no part of a call's cost. The ids stay on the CPU.
    """
    width = store.layouts[0].hidden_size
    hidden = cache(lambda n_tokens: torch.ones(n_tokens, width, dtype=dtype, device=device))
    weights = cache(lambda n_tokens: torch.ones(n_tokens, 1, device=device))

    @cache
    def call(counts: Counts, first: int, n: int) -> Call:
        ids = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        return hidden(len(ids)), (ids[:, None] + first) % n, weights(len(ids))

    return call


def cpu_runner(store: ExpertStore, cpu: CpuExperts, dtype: torch.dtype) -> Callable[[Counts], None]:
    """Calls over the CPU's experts, others every time: nothing may be left in a cache."""
    turns, call = itertools.count(), _calls(store, dtype)
    masks = [torch.ones(n, dtype=torch.uint8) for n in store.n_experts]
    out_of = cache(lambda counts: torch.empty(sum(counts), store.layouts[0].hidden_size))

    def run(counts: Counts) -> None:
        turn = next(turns)
        layer = turn % store.n_stored  # the layers beyond use the same memory
        first, n = turn // store.n_stored * len(counts), store.n_experts[layer]
        hidden, index, weights = call(counts, first % n, n)
        cpu.run(hidden, store.pointers(layer), masks[layer], index, weights, out_of(counts))

    return run


def _blocks_in_turn(store: ExpertStore) -> Iterator[Tensor]:
    """Every block in memory, over and over: a layer's experts one after another."""
    layers = range(store.n_stored)
    return itertools.cycle(block for layer in layers for block in store.blocks(layer))


@contextmanager
def gpu_runner(
    store: ExpertStore, gpu: GpuExperts, dtype: torch.dtype
) -> Iterator[Callable[[Counts], None]]:
    """The same over the accelerator's slots, which are filled first; all of them in turn.

    A few slots alone would stay in a GPU's own cache, where a run's experts are not.
    """
    for slot, block in zip(gpu.slots, _blocks_in_turn(store), strict=False):
        slot.copy_(block)
    call, first = _calls(store, dtype, gpu.device), 0

    @cache
    def launch(counts: Counts, first: int) -> tuple[Tensor, list[int], Tensor]:
        hidden, slots, weights = call(counts, first, gpu.n_slots)
        return hidden, slots.flatten().tolist(), weights

    def run(counts: Counts) -> None:
        nonlocal first
        gpu.launch(*launch(counts, first), fetcher).result()
        first = (first + len(counts)) % gpu.n_slots
        if gpu.device.type == "cuda":
            torch.cuda.synchronize(gpu.device)

    with closing(make_fetcher(gpu.device, gpu.slots)) as fetcher:
        yield run


@contextmanager
def copier(
    store: ExpertStore, gpu: GpuExperts, emulate_pcie_gbps: float | None
) -> Iterator[Callable[[int], None]]:
    """Copies the first bytes of one block after another to the accelerator's last slot."""
    blocks = _blocks_in_turn(store)
    with ExitStack() as fetchers:

        @cache
        def fetcher_of(n_bytes: int) -> ExpertFetcher:
            slots = gpu.slots[:, :n_bytes]
            fetcher = make_fetcher(gpu.device, slots, emulate_pcie_gbps)
            return fetchers.enter_context(closing(fetcher))

        def copy_bytes(n_bytes: int) -> None:
            fetcher = fetcher_of(n_bytes)
            fetcher.fetch(gpu.n_slots - 1, next(blocks)[:n_bytes])
            for completion in fetcher.drain():
                if completion.error is not None:
                    raise UserError(f"calibration could not copy an expert: {completion.error}")

        yield copy_bytes


def sum_wait_us(store: ExpertStore, gpu: GpuExperts, dtype: torch.dtype) -> float:
    """How much later a layer's sum of the CPU is on the GPU while an expert is copied, in us.

    0 for the emulated accelerator, whose memory is the CPU's.
    """
    if gpu.device.type == "cpu":
        return 0.0
    handoff, blocks = HostHandoff(), _blocks_in_turn(store)
    width = store.layouts[0].hidden_size
    like = torch.zeros(1, width, dtype=dtype, device=gpu.device)
    result = handoff.result(1, width, gpu.device).zero_()

    def add() -> None:
        handoff.add(gpu, None, result, like)
        torch.cuda.current_stream(gpu.device).synchronize()

    with closing(make_fetcher(gpu.device, gpu.slots)) as fetcher:
        times_us: tuple[list[float], list[float]] = [], []
        for turn in range(2 * _SUMS):
            if turn % 2:
                fetcher.fetch(gpu.n_slots - 1, next(blocks))
            began_s = time.perf_counter()
            add()
            times_us[turn % 2].append(1e6 * (time.perf_counter() - began_s))
            fetcher.drain()
    alone_us, beside_us = map(statistics.median, times_us)
    return max(0.0, beside_us - alone_us)


def dense_costs(
    decode_step: Callable[[], None],
    dispatcher: MoeDispatcher,
    experts: Callable[[], None],
) -> tuple[float, float]:
    """(us a layer, us a step beside its layers) of decode steps without their experts.

    A layer is what lies between the starts of two layers' experts; with one layer alone, the whole
    step. Medians of steps behind some `experts` that have emptied the caches: what runs between
    the experts of a real step finds neither its weights nor its code there.
    """
    starts_s: list[float] = []
    layers_us: list[float] = []
    steps_us: list[float] = []
    n = dispatcher.store.n_layers

    def starts() -> None:
        starts_s.append(time.perf_counter())

    dispatcher.on_layer.append(starts)
    try:
        for _ in range(_FIRST_STEPS):
            decode_step()
        began_s = time.perf_counter()
        while len(steps_us) < 5 or time.perf_counter() < began_s + _STEP_BUDGET_S:
            experts()
            starts_s.clear()
            started_s = time.perf_counter()
            decode_step()
            steps_us.append(1e6 * (time.perf_counter() - started_s))
            first_s, last_s = starts_s[0], starts_s[-1]
            layers_us.append(1e6 * (last_s - first_s) / (n - 1) if n > 1 else steps_us[-1])
    finally:
        dispatcher.on_layer.remove(starts)
    layer_us = statistics.median(layers_us)
    return layer_us, max(0.0, statistics.median(steps_us) - n * layer_us)


@dataclass(frozen=True)
class Crossover:
    """From how many tokens on a `library` computes `what` faster; `from_tokens` is None for never.

    `tokens`, descending, are what was measured; `kernels_us` and `library_us` are medians.
    """

    what: str
    from_tokens: int | None
    tokens: tuple[int, ...]
    kernels_us: tuple[float, ...]
    library_us: tuple[float, ...]
    library: str = "oneDNN"

    def __str__(self) -> str:
        times = f"{self.library_us[0] / 1e3:.3g} ms, the kernels {self.kernels_us[0] / 1e3:.3g} ms"
        comparison = f"({self.tokens[0]} tokens: {self.library} {times})"
        if self.from_tokens is None:
            return f"{self.what}: the kernels {comparison}"
        return f"{self.what}: torch's {self.library} from {self.from_tokens} tokens on {comparison}"


def measure_crossover(
    what: str,
    kernels: Callable[[int], object],
    library: Callable[[int], object],
    budget_s: float = 0.1,
    tried: Sequence[int] = CROSSOVER_TOKENS,
    name: str = "oneDNN",
) -> Crossover:
    """The least of `tried`, descending, from which `library` is faster by `_CROSSOVER_MARGIN`.

    Both are called with a number of tokens, in turn, at least three times and for about `budget_s`.
    """
    from_tokens: int | None = None
    kernels_us: list[float] = []
    library_us: list[float] = []
    for n in tried:
        works = [partial(kernels, n), partial(library, n)]
        ours_us, theirs_us = medians_in_turn_us(works, budget_s / 2, n_turns=3)
        kernels_us.append(ours_us)
        library_us.append(theirs_us)
        if theirs_us > (1 - _CROSSOVER_MARGIN) * ours_us:
            break
        from_tokens = n
    tokens = tuple(tried[: len(library_us)])
    return Crossover(what, from_tokens, tokens, tuple(kernels_us), tuple(library_us), name)


def cublas_crossover(gpu: GpuExperts, dtype: torch.dtype) -> Crossover:
    """Of a prompt's experts on the GPU, whose slots are filled: all in tiles, or one by one.

    Few and large experts gain by cuBLAS from few tokens on, many small ones by one launch for all.
    """
    n = min(_CUBLAS_EXPERTS, gpu.n_slots)
    width = gpu.layout.hidden_size

    @cache
    def call(n_tokens: int) -> tuple[Tensor, list[Group], Tensor, Tensor, Tensor]:
        hidden = torch.ones(n_tokens, width, dtype=dtype, device=gpu.device)
        pairs = torch.arange(n_tokens * n, device=gpu.device).view(n_tokens, n).T.flatten()
        groups = [Group(slot, slot * n_tokens, n_tokens) for slot in range(n)]
        weights = torch.ones(n_tokens, n, device=gpu.device)
        return hidden, groups, pairs, weights, torch.zeros_like(hidden, dtype=torch.float32)

    with closing(make_fetcher(gpu.device, gpu.slots)) as fetcher:

        def way(cublas_tokens: int | None, n_tokens: int) -> None:
            gpu.cublas_tokens = cublas_tokens
            hidden, groups, pairs, weights, out = call(n_tokens)
            gpu.launch_groups(hidden, groups, pairs, weights, fetcher, out).result()
            gpu.synchronize()

        what, before = f"{n} experts of a prompt on the GPU", gpu.cublas_tokens
        ways = partial(way, None), partial(way, 1)
        try:
            return measure_crossover(what, *ways, tried=_CUBLAS_TOKENS, name="cuBLAS")
        finally:
            gpu.cublas_tokens = before


def has_bf16_products(cpu_flags: Collection[str]) -> bool:
    """Whether a CPU with these flags (`Hardware.isa`) has AMX or AVX512-BF16."""
    return not _BF16_FLAGS.isdisjoint(cpu_flags)
