"""The expert cache's slot memory and the expert FFN computed from it.

On CUDA the work goes to the current stream and the host runs on. Without a GPU an emulated
accelerator, one thread behind a stream of its own, does the same work with torch, at the same time
as the CPU computes the misses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from moe_offload.checkpoint.block import Activation, BlockLayout
from moe_offload.experts.fetcher import Copy, ExpertFetcher
from moe_offload.kernels.oracle import ActivationModule, expert_ffn
from moe_offload.machine.streams import HostEvent, HostStream, is_out_of_memory

if TYPE_CHECKING:  # Triton is slow to import, and absent on many machines
    from moe_offload.kernels.triton_experts import TritonExperts
    from moe_offload.kernels.triton_tiles import TiledExperts

# Above this many tokens per hit expert the weights are better unpacked once for a GEMM than read by
# one vector product per token. Derived from the bytes each way moves (int4: 0.6 against 4.6 per
# weight); not measured on a GPU.
TOKENS_PER_SLOT_FOR_GEMM = 4
# From so many tokens on an expert's weights are unpacked once, for cuBLAS; below, what counts is
# the number of launches, and tiles need three for all of a layer's. Until a calibration knows.
_TOKENS_FOR_CUBLAS = 256
# The most pairs that a launch names one by one; above, they are to be sorted by expert on the
# device. The grouped kernels' scratch is fp32 for every pair, hit or not.
PAIRS_FOR_TABLE = 512
# What computing one expert takes beside the slots: at most the larger matrix of Mixtral's in bf16,
# unpacked, of 235 MB. Slots that leave less on a GPU are too many.
_SCRATCH_BYTES = 256 << 20


class Group(NamedTuple):
    """An expert's slot, and which of a layer's sorted pairs are its: `n` from `first` on."""

    slot: int
    first: int
    n: int


@dataclass
class Pending:
    """A launch under way. `start` and `end` bracket its work in its stream.

    `copies` are those it waited for: where one failed the work was left out, and `result` raises.
    """

    copies: list[Copy]
    start: Any
    end: Any
    out: Tensor | None = None
    error: Exception | None = None

    @property
    def awaits_copy(self) -> bool:
        """Whether its stream had to wait for copies that were under way."""
        return bool(self.copies)

    @property
    def copy_failed(self) -> bool:
        """Whether a copy that the work needed failed; final once `result` has raised."""
        return any(copy.error is not None for copy in self.copies)

    def result(self) -> Tensor:
        """fp32 [T, H]: the weighted sum over each token's hits, zero where it has none.

        Hands the tensor over: call it once. On CUDA it returns at once, for use on the launching
        stream; the emulated accelerator is waited for. Raises what went wrong in the computation or
        in a copy it needed.
        """
        if isinstance(self.end, HostEvent):
            self.end.synchronize()
        for error in (self.error, *(copy.error for copy in self.copies)):
            if error is not None:
                raise error
        out, self.out = self.out, None  # timings outlive the run's outputs
        assert out is not None, "result() hands over once"
        return out

    def resolve(self) -> float:
        """Microseconds from the start of the work to its end; waits for the end."""
        self.end.synchronize()
        return float(self.start.elapsed_time(self.end)) * 1e3


def replayed_event() -> Any:
    """An event with a time that, recorded inside a CUDA graph, every replay records again."""
    cuda: Any = torch.cuda
    return cuda.Event(enable_timing=True, external=True)


class GpuExperts:
    """`n_slots` blocks on `device` and the expert FFN that reads them.

    `slots` is uint8 [n_slots, block_bytes], one allocation. When the device has no room for it, as
    many as fit: `n_slots` is what it came to and `notices` says so. What computing an expert needs
    beside them is reserved with them. On CUDA Triton computes where it runs, else torch, with a
    notice. What a run in `dtype` will launch is compiled here, so that nothing is while decoding.
    `before_compute` is called with the number of hits on the emulated accelerator's thread before
    each launch's work: it may sleep, or raise.

    `cublas_tokens`: of a prompt, an expert with so many tokens or more is computed by itself; None
    for none. Set it to what a measurement found.
    """

    def __init__(
        self,
        layout: BlockLayout,
        activation: Activation,
        n_slots: int,
        device: torch.device | str,
        act_module: ActivationModule | None = None,
        *,
        dtype: torch.dtype = torch.bfloat16,
        before_compute: Callable[[int], None] | None = None,
    ) -> None:
        self.layout = layout
        self.activation = activation
        self.act_module = act_module
        self.device = torch.device(device)
        self.notices: list[str] = []
        self.cublas_tokens: int | None = _TOKENS_FOR_CUBLAS
        self.slots = self._allocate(n_slots)
        self.n_slots = len(self.slots)
        self._before_compute = before_compute
        self._thread = None if self.device.type == "cuda" else HostStream("emulated accelerator")
        self._kernels: TritonExperts | None = None
        self._tiles: TiledExperts | None = None
        if self._thread is None:
            self._use_triton_if_it_runs(dtype)

    @property
    def description(self) -> str:
        """What computes the hits, for the run's summary."""
        where = "emulated accelerator (one CPU thread)" if self._thread else str(self.device)
        return f"{where}, {'Triton' if self._kernels else 'torch'} kernels"

    def launch(
        self,
        hidden: Tensor,
        slot_of_pair: Sequence[int],
        top_k_weights: Tensor,
        fetcher: ExpertFetcher,
    ) -> Pending:
        """Start computing the pairs that hit.

        `hidden` [T, H] fp32 or bf16 on the device; `slot_of_pair` has T * K entries, a slot or -1
        for a pair that is not ours; `top_k_weights` [T, K] on the device. The work waits for copies
        into its slots in its stream, not on the host, and later copies wait for it. None of the
        arguments may be written before `result`.
        """
        pairs: dict[int, list[int]] = {}  # slot -> its pairs, as t * K + k
        for pair, slot in enumerate(slot_of_pair):
            if slot >= 0:
                pairs.setdefault(slot, []).append(pair)
        return self._start(
            list(pairs),
            sum(map(len, pairs.values())),
            fetcher,
            lambda: self._forward(hidden, slot_of_pair, top_k_weights, pairs),
        )

    def launch_groups(
        self,
        hidden: Tensor,
        groups: Sequence[Group],
        pairs: Tensor,
        top_k_weights: Tensor,
        fetcher: ExpertFetcher,
        out: Tensor,
    ) -> Pending:
        """The same for experts with many tokens, added to `out`, fp32 [T, H] on the device.

        The result is `out` itself: several launches share it. `pairs` are a layer's, as t * K + k,
        int64 on the device, of which each group is a part: the host touches and sends nothing that
        grows with the number of tokens, but for a table of a few KiB where there are several
        groups.
        """

        def forward() -> Tensor:
            self._add_groups(hidden, groups, pairs, top_k_weights, out)
            return out

        slots = [group.slot for group in groups]
        return self._start(slots, sum(group.n for group in groups), fetcher, forward)

    def _start(
        self, slots: list[int], n_pairs: int, fetcher: ExpertFetcher, forward: Callable[[], Tensor]
    ) -> Pending:
        """`forward` in the stream, behind copies into `slots` and before later ones."""
        stream: Any = self._thread or torch.cuda.current_stream(self.device)
        pending = Pending(fetcher.wait_ready(slots, stream), self._new_event(), self._new_event())
        # The mode belongs to a thread. The caller's, so that it may use the result as its own.
        inference = torch.is_inference_mode_enabled()

        def work() -> None:
            try:
                if self._before_compute is not None:
                    self._before_compute(n_pairs)
                with torch.inference_mode(inference), torch.no_grad():
                    if not pending.copy_failed:
                        pending.out = forward()
            except Exception as error:  # raised again by result()
                pending.error = error

        pending.start.record(stream)
        if self._thread is None:
            with self._as_current_device():
                work()
        else:
            self._thread.submit(work)
        pending.end.record(stream)
        fetcher.mark_released(slots, pending.end)
        return pending

    @property
    def has_tiles(self) -> bool:
        """Whether a prompt's experts can be computed together."""
        return self._tiles is not None

    @property
    def reads_host(self) -> bool:
        """Whether what reads the host's memory can be called."""
        return self._kernels is not None and self.device.type == "cuda"

    def add_from_host(self, on_device: Tensor | None, on_host: Tensor, like: Tensor) -> Tensor:
        """`on_device` + `on_host` in the dtype of `like`, all [T, H], on the current stream.

        `on_host` fp32 is pinned and read where it lies: it does not queue behind copies of experts.
        """
        from moe_offload.kernels.triton_combine import add_from_host

        with self._as_current_device():
            return add_from_host(on_device, on_host, like)

    def record_hits(self, hidden: Tensor, slot_of_pair: Tensor, top_k_weights: Tensor) -> Pending:
        """As `launch`, into a graph that the current stream records; what waits is the caller's.

        `slot_of_pair` int32 [T * K] is pinned and read by each replay, of at most
        `TOKENS_PER_SLOT_FOR_GEMM` tokens. The launch's `out` stays its own: `result` is not for it.
        """
        assert self._kernels is not None
        stream = torch.cuda.current_stream(self.device)
        pending = Pending([], replayed_event(), replayed_event())
        with self._as_current_device():
            pending.start.record(stream)
            pending.out = self._kernels.grouped_by(hidden, slot_of_pair, top_k_weights)
            pending.end.record(stream)
        return pending

    def record_sum(
        self, on_device: Tensor, on_host: Tensor, present: Tensor, like: Tensor
    ) -> Tensor:
        """As `add_from_host`, of the parts that `present`, pinned int32 [2], says there are."""
        from moe_offload.kernels.triton_combine import add_present

        with self._as_current_device():
            return add_present(on_device, on_host, present, like)

    def replay(self, graph: Callable[[], None], launch: Pending) -> Pending:
        """Start a recorded launch by its graph's replay, in the current stream."""
        graph()
        return launch

    def synchronize(self) -> None:
        """Wait until what was launched has ended."""
        if self._thread is None:
            torch.cuda.synchronize(self.device)
        else:
            self._thread.synchronize()

    def close(self) -> None:
        """Finish what was launched; end the emulated accelerator's thread."""
        if self._thread is None:
            torch.cuda.synchronize(self.device)
        else:
            self._thread.close()

    def _as_current_device(self) -> AbstractContextManager[Any]:
        """Triton launches on the current device, whatever its arguments are on."""
        return torch.cuda.device(self.device) if self._thread is None else nullcontext()

    def _new_event(self) -> Any:
        cuda: Any = torch.cuda
        return HostEvent() if self._thread is not None else cuda.Event(enable_timing=True)

    def _forward(
        self,
        hidden: Tensor,
        slot_of_pair: Sequence[int],
        top_k_weights: Tensor,
        pairs: dict[int, list[int]],
    ) -> Tensor:
        n_hits = sum(map(len, pairs.values()))
        few = len(slot_of_pair) <= PAIRS_FOR_TABLE
        if self._kernels and few and 0 < n_hits <= TOKENS_PER_SLOT_FOR_GEMM * len(pairs):
            return self._kernels.grouped(hidden, slot_of_pair, top_k_weights)
        out = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        if len(hidden) > 1:
            # One small copy for all slots; what is pageable and small does not hold the host up.
            members = torch.tensor([pair for of_slot in pairs.values() for pair in of_slot])
            members = members.to(hidden.device, non_blocking=True)
            groups, first = [], 0
            for slot, of_slot in pairs.items():
                groups.append(Group(slot, first, len(of_slot)))
                first += len(of_slot)
            self._add_groups(hidden, groups, members, top_k_weights, out)
            return out
        flat_weights = top_k_weights.reshape(-1)
        for slot, members_of_slot in pairs.items():  # decode: nothing to gather, no index to send
            weight = flat_weights[members_of_slot[0]].float()
            for pair in members_of_slot[1:]:
                weight = weight + flat_weights[pair]
            out += self._expert(slot, hidden).float() * weight
        return out

    def _add_groups(
        self,
        hidden: Tensor,
        groups: Sequence[Group],
        pairs: Tensor,
        top_k_weights: Tensor,
        out: Tensor,
    ) -> None:
        alone = groups
        if self._tiles is not None:
            least = inf if self.cublas_tokens is None else self.cublas_tokens
            alone = [group for group in groups if group.n >= least]
            if tiled := [group for group in groups if group.n < least]:
                self._tiles.add(hidden, tiled, pairs, top_k_weights, out)
        for group in alone:
            part = pairs[group.first : group.first + group.n]
            self._add_expert(hidden, group.slot, part, top_k_weights, out)

    def _add_expert(
        self, hidden: Tensor, slot: int, pairs: Tensor, top_k_weights: Tensor, out: Tensor
    ) -> None:
        token = pairs // top_k_weights.shape[1]
        y = self._expert(slot, hidden[token]).float()
        out.index_add_(0, token, y * top_k_weights.reshape(-1)[pairs, None].float())

    def _expert(self, slot: int, x: Tensor) -> Tensor:
        if self._kernels is not None:
            return self._kernels.expert(slot, x)
        return expert_ffn(self.layout, self.slots[slot], x, self.activation, self.act_module)

    def _allocate(self, wanted: int) -> Tensor:
        """As many of `wanted` slots as fit, by bisection."""
        slots = None
        fit, too_many, n_slots = 0, wanted + 1, wanted
        while fit + 1 < too_many or slots is None:
            slots = None  # the smaller allocation makes room for the larger
            try:
                slots = _allocate_bytes(n_slots, self.layout.block_bytes, self.device)
                fit = n_slots
            except RuntimeError as error:
                if n_slots == 0 or not is_out_of_memory(error):
                    raise
                too_many, fit = n_slots, min(fit, n_slots - 1)
            n_slots = fit if fit + 1 == too_many else (fit + too_many) // 2
        if fit < wanted:
            self.notices.append(
                f"out of memory on {self.device}: {fit} of {wanted} cache slots "
                f"of {self.layout.block_bytes / 1e6:.1f} MB fit"
            )
        return slots

    def _use_triton(self) -> None:
        from moe_offload.kernels.triton_experts import TritonExperts

        self._kernels = TritonExperts(self.layout, self.activation, self.slots, self.act_module)

    def _use_tiles(self) -> None:
        from moe_offload.kernels.triton_tiles import TiledExperts, runs_tiles

        assert self._kernels is not None
        self._tiles = TiledExperts(self._kernels) if runs_tiles(self.device) else None

    def _warm_up_sum(self, dtype: torch.dtype) -> None:
        like = torch.empty(1, self.layout.hidden_size, dtype=dtype, device=self.device)
        try:
            on_host = torch.zeros(like.shape, pin_memory=True)
        except RuntimeError:  # a machine that pins nothing: nothing will be read from the host
            return
        for on_device in (None, like.float()):
            self.add_from_host(on_device, on_host, like)
        present = torch.zeros(2, dtype=torch.int32, pin_memory=True)
        self.record_sum(like.float(), on_host, present, like)
        torch.cuda.current_stream(self.device).synchronize()  # `on_host` is read until then

    def _use_triton_if_it_runs(self, dtype: torch.dtype) -> None:
        """Compile the kernels now: Triton may lack a compiler, or this GPU, or be absent itself."""
        try:
            with self._as_current_device():
                self._use_triton()
                assert self._kernels is not None
                self._kernels.warm_up(dtype)
                self._warm_up_sum(dtype)
        except Exception as error:  # whatever it is, torch computes the same
            self.notices.append(
                f"Triton kernels cannot run ({_first_line(error)}): torch computes the hits, slower"
            )
            self._kernels = None
            return
        try:
            with self._as_current_device():
                self._use_tiles()
                if self._tiles is not None:
                    self._tiles.warm_up(dtype)
        except Exception as error:  # the other kernels and cuBLAS do without
            self.notices.append(
                f"Triton's kernels for prompts cannot run ({_first_line(error)}): their experts "
                "are computed one by one, slower"
            )
            self._tiles = None


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _allocate_bytes(n_slots: int, block_bytes: int, device: torch.device) -> Tensor:
    if device.type == "cuda":
        # cuBLAS takes memory of its own for its first product: before the slots take the rest.
        probe = torch.zeros(16, 16, dtype=torch.bfloat16, device=device)
        torch.nn.functional.linear(probe, probe)
    with torch.inference_mode(False):  # copies write to them later, in whatever mode
        slots = torch.empty(n_slots, block_bytes, dtype=torch.uint8, device=device)
    if device.type == "cuda":
        torch.empty(_SCRATCH_BYTES, dtype=torch.uint8, device=device)
    else:
        # A GPU's memory is there from the start; the first copy into pages that the system has yet
        # to supply took several times as long, and the first tokens' hits came late.
        slots.zero_()
    return slots
