"""The expert cache's slot memory and the expert FFN computed from it.

On CUDA the work goes to the current stream and the host runs on. Without a GPU an emulated
accelerator, one thread behind a stream of its own, does the same work with torch, at the same time
as the CPU computes the misses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from expert_format import Activation, BlockLayout
from streams import HostEvent, HostStream
from torch_experts import ActivationModule, expert_ffn

Allocator = Callable[[int, int, torch.device], Tensor]

# Above this many tokens per hit expert the weights are better unpacked once for a GEMM than read by
# one vector product per token. Derived from the bytes each way moves (int4: 0.6 against 4.6 per
# weight); not measured on a GPU.
_TOKENS_PER_SLOT_FOR_GEMM = 4
# The grouped kernels' scratch is fp32 for every pair of the call, hit or not: decode only.
_PAIRS_FOR_GROUPED = 512
# Of 8 pairs a loop finds the hits in 1.3 us and torch in 6; of 16384, mostly misses, in 330 and 21.
_PAIRS_WORTH_FILTERING = 64


class SlotOrder(Protocol):
    """What orders computation against copies into the slots: `expert_fetcher.ExpertFetcher`."""

    def wait_ready(self, slots: list[int], stream: Any) -> list[Any]: ...

    def mark_released(self, slots: list[int], stream: Any) -> None: ...


class GroupedKernels(Protocol):
    """All pairs of a layer in a few launches: `triton_experts.TritonExperts`."""

    def grouped(self, hidden: Tensor, slot_of_pair: Tensor, weights: Tensor) -> Tensor: ...

    def expert(self, slot: int, x: Tensor) -> Tensor: ...


@dataclass
class Pending:
    """A launch under way. `start` and `end` bracket its work in its stream.

    `copies` are those it waited for: where one failed the work was left out, and `result` raises.
    """

    _out: Tensor | None
    _copies: list[Any]
    start: Any
    end: Any
    _error: Exception | None = None

    @property
    def copy_failed(self) -> bool:
        """Whether a copy that the work needed failed; final once `result` has raised."""
        return any(copy.error is not None for copy in self._copies)

    def result(self) -> Tensor:
        """fp32 [T, H]: the weighted sum over each token's hits, zero where it has none.

        Hands the tensor over: call it once. On CUDA it returns at once, for use on the launching
        stream; the emulated accelerator is waited for. Raises what went wrong in the computation or
        in a copy it needed.
        """
        if isinstance(self.end, HostEvent):
            self.end.synchronize()
        error = self._error or _first_error(self._copies)
        if error is not None:
            raise error
        out, self._out = self._out, None  # timings outlive the run's outputs
        assert out is not None, "result() hands over once"
        return out

    def resolve(self) -> float:
        """Microseconds from the start of the work to its end; waits for the end."""
        self.end.synchronize()
        return float(self.start.elapsed_time(self.end)) * 1e3


class GpuExperts:
    """`n_slots` blocks on `device` and the expert FFN that reads them.

    `slots` is uint8 [n_slots, block_bytes], one allocation. When the device has no room for it the
    number is halved until it fits; `n_slots` is what it came to and `notices` says so. `kernels` is
    "triton", "torch" or "auto": Triton on CUDA where it can be imported, else torch, with a notice.
    `before_compute` is called with the number of hits on the emulated accelerator's thread before
    each launch's work: it may sleep, or raise.
    """

    def __init__(
        self,
        layout: BlockLayout,
        activation: Activation,
        n_slots: int,
        device: torch.device | str,
        act_module: ActivationModule | None = None,
        *,
        kernels: str = "auto",
        before_compute: Callable[[int], None] | None = None,
        allocate: Allocator | None = None,
    ) -> None:
        self.layout = layout
        self.activation = activation
        self.act_module = act_module
        self.device = torch.device(device)
        self.notices: list[str] = []
        self.slots = self._allocate(n_slots, allocate or _allocate_bytes)
        self.n_slots = len(self.slots)
        self._before_compute = before_compute
        self._thread = None if self.device.type == "cuda" else HostStream("emulated accelerator")
        self._kernels = self._load_kernels(kernels)

    @property
    def description(self) -> str:
        """What computes the hits, for the run's summary."""
        where = "emulated accelerator (one CPU thread)" if self._thread else str(self.device)
        return f"{where}, {'Triton' if self._kernels else 'torch'} kernels"

    def launch(
        self,
        hidden: Tensor,
        slot_of_pair: Tensor,
        top_k_weights: Tensor,
        order: SlotOrder,
        out: Tensor | None = None,
    ) -> Pending:
        """Start computing the pairs that hit.

        `hidden` [T, H] fp32 or bf16 on the device; `slot_of_pair` int64 [T, K] on the CPU, a slot
        or -1 for a pair that is not ours; `top_k_weights` [T, K] on the device. The work waits for
        copies into its slots in its stream, not on the host, and later copies wait for it. None of
        the arguments may be written before `result`. With `out`, fp32 [T, H] on the device, the
        result is added to it and is it: several launches share one tensor.
        """
        pairs = _pairs_of_slot(slot_of_pair)
        slots = list(pairs)
        stream = self._thread or _current_stream(self.device)
        copies = order.wait_ready(slots, stream)
        pending = Pending(None, copies, *self._new_events())

        def work() -> None:
            if self._before_compute is not None:
                self._before_compute(sum(map(len, pairs.values())))
            # The caller's tensors may be inference tensors, and that mode belongs to a thread.
            with torch.inference_mode():
                if not pending.copy_failed:
                    pending._out = self._forward(hidden, slot_of_pair, top_k_weights, pairs, out)

        pending.start.record(stream)
        if self._thread is None:
            _run_keeping_error(work, pending)
        else:
            self._thread.submit(lambda: _run_keeping_error(work, pending))
        pending.end.record(stream)
        order.mark_released(slots, stream)
        return pending

    def close(self) -> None:
        """Finish what was launched; end the emulated accelerator's thread."""
        if self._thread is not None:
            self._thread.close()
        else:
            torch.cuda.synchronize(self.device)

    def _new_events(self) -> tuple[Any, Any]:
        if self._thread is not None:
            return HostEvent(), HostEvent()
        cuda: Any = torch.cuda
        return cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)

    def _forward(
        self,
        hidden: Tensor,
        slot_of_pair: Tensor,
        top_k_weights: Tensor,
        pairs: dict[int, list[int]],
        out: Tensor | None,
    ) -> Tensor:
        n_hits = sum(map(len, pairs.values()))
        few = slot_of_pair.numel() <= _PAIRS_FOR_GROUPED
        if self._kernels and few and 0 < n_hits <= _TOKENS_PER_SLOT_FOR_GEMM * len(pairs):
            on_device = slot_of_pair.to(torch.int32).to(self.device, non_blocking=True)
            result = self._kernels.grouped(hidden, on_device, top_k_weights)
            return result if out is None else out.add_(result)
        if out is None:
            out = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        top_k = slot_of_pair.shape[1]
        flat_weights = top_k_weights.reshape(-1)
        for slot, members in pairs.items():
            if len(hidden) == 1:  # decode: nothing to gather, no index to send
                weight = flat_weights[members[0]].float()
                for pair in members[1:]:
                    weight = weight + flat_weights[pair]
                out += self._expert(slot, hidden).float() * weight
                continue
            chosen = torch.tensor(members).to(hidden.device, non_blocking=True)
            token = chosen // top_k
            y = self._expert(slot, hidden[token]).float()
            out.index_add_(0, token, y * flat_weights[chosen, None].float())
        return out

    def _expert(self, slot: int, x: Tensor) -> Tensor:
        if self._kernels is not None:
            return self._kernels.expert(slot, x)
        return expert_ffn(self.layout, self.slots[slot], x, self.activation, self.act_module)

    def _allocate(self, n_slots: int, allocate: Allocator) -> Tensor:
        wanted = n_slots
        while True:
            try:
                slots = allocate(n_slots, self.layout.block_bytes, self.device)
            except RuntimeError as error:  # the CPU's allocator has no class of its own for it
                out_of_memory = isinstance(error, torch.OutOfMemoryError)
                if n_slots == 0 or not (out_of_memory or "allocate memory" in str(error)):
                    raise
                n_slots //= 2
                continue
            if n_slots < wanted:
                self.notices.append(
                    f"out of memory on {self.device}: {n_slots} of {wanted} cache slots "
                    f"of {self.layout.block_bytes / 1e6:.1f} MB fit"
                )
            return slots

    def _load_kernels(self, kernels: str) -> GroupedKernels | None:
        if kernels == "torch" or (kernels == "auto" and self._thread is not None):
            return None
        if kernels == "triton":
            return self._triton()
        return self._triton_if_it_runs()

    def _triton(self) -> GroupedKernels:
        from triton_experts import TritonExperts  # slow to import, and absent on many machines

        return TritonExperts(self.layout, self.activation, self.slots, self.act_module)

    def _triton_if_it_runs(self) -> GroupedKernels | None:
        """Compile the kernels now: Triton may lack a compiler, or this GPU, or be absent itself."""
        hidden = torch.zeros(1, self.layout.hidden_size, dtype=torch.bfloat16, device=self.device)
        no_hits = torch.full((1, 2), -1, dtype=torch.int32, device=self.device)
        try:
            triton = self._triton()
            triton.grouped(hidden, no_hits, torch.zeros(1, 2, device=self.device))
        except Exception as error:  # whatever it is, torch computes the same
            first_line = (str(error) or type(error).__name__).splitlines()[0]
            self.notices.append(
                f"Triton kernels cannot run ({first_line}): torch computes the hits, slower"
            )
            return None
        return triton


def _allocate_bytes(n_slots: int, block_bytes: int, device: torch.device) -> Tensor:
    slots = torch.empty(n_slots, block_bytes, dtype=torch.uint8, device=device)
    if device.type == "cpu":
        # A GPU's memory is there from the start; the first copy into pages that the system has yet
        # to supply took several times as long, and the first tokens' hits came late.
        slots.zero_()
    return slots


def _current_stream(device: torch.device) -> Any:
    return torch.cuda.current_stream(device)


def _run_keeping_error(work: Callable[[], None], pending: Pending) -> None:
    try:
        work()
    except Exception as error:  # raised again by result()
        pending._error = error


def _first_error(copies: list[Any]) -> Exception | None:
    return next((copy.error for copy in copies if copy.error is not None), None)


def _pairs_of_slot(slot_of_pair: Tensor) -> dict[int, list[int]]:
    """slot -> its pairs, as t * K + k."""
    flat = slot_of_pair.reshape(-1)
    hits: Sequence[int] = range(flat.numel())
    if flat.numel() > _PAIRS_WORTH_FILTERING:
        there = (flat >= 0).nonzero()[:, 0]
        hits, flat = there.tolist(), flat[there]
    pairs: dict[int, list[int]] = {}
    for pair, slot in zip(hits, flat.tolist(), strict=True):
        if slot >= 0:
            pairs.setdefault(slot, []).append(pair)
    return pairs
