"""A MoE layer's part of decode steps that CUDA graphs replay: nothing is made anew in a step.

Of a layer three graphs are replayed. What lies before its experts ends by sending routing and
hidden state to pinned memory. The hits' kernels read their slots from pinned memory, which the host
fills when it has planned; and so does the sum, which finds there whose part there is. In between
the host does what it does in every other step (`MoeDispatcher`).

No copy has to wait for the hits of such a step (*released*, see `fetcher.py`). A slot belongs to
one layer, and who starts a copy into it has waited since for the stream: for the routing of that
layer, or of the one before, in a later step. And a hit has been seen to be ready.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

import torch
from torch import Tensor

from moe_offload.experts.accelerator import Accelerator
from moe_offload.experts.device_clock import DeviceClock
from moe_offload.experts.disk_tier import DiskTier
from moe_offload.experts.layer import HostHandoff, LayerStep, staging
from moe_offload.experts.slots import Pending
from moe_offload.experts.store import ExpertStore
from moe_offload.kernels.cpu_experts import CpuExperts

Replay = Callable[[], None]  # of a graph


class StepMemory(HostHandoff):
    """What all layers hand over in, one after the other: memory of one size, pinned.

    For `n_tokens` tokens of `hidden_size` elements, each with at most `top_k` experts. `slots`,
    int32 [T * K], and `present`, int32 [2], are read by the GPU: the slot of each pair, or -1;
    whether the GPU and the CPU have a part in the sum. Where `is_mapped` is false, no memory could
    be pinned, and none of this can be used.
    """

    def __init__(self, n_tokens: int, top_k: int, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        routing_bytes = top_k * (torch.int64.itemsize + torch.float32.itemsize)
        n_bytes = n_tokens * (routing_bytes + hidden_size * dtype.itemsize)
        self._inbox, has_inbox = staging(n_bytes, torch.uint8)
        self._result, has_result = staging(n_tokens * hidden_size, torch.float32)
        self.slots, has_slots = staging(n_tokens * top_k, torch.int32)
        self.present, has_present = staging(2, torch.int32)
        self.is_mapped = has_inbox and has_result and has_slots and has_present


class RecordedStep(LayerStep):
    """One layer's calls: `LayerStep` over memory that stays where it is.

    Make it while the graph that ends with the layer's routing is recorded, whose last work is to
    hand over; then let `record` record the others. A call starts with `begin`.
    """

    def __init__(
        self,
        store: ExpertStore | DiskTier,
        cpu: CpuExperts,
        memory: StepMemory,
        accelerator: Accelerator | None,
        layer: int,
        hidden: Tensor,
        index: Tensor,
        weights: Tensor,
        clock: DeviceClock | None,
    ) -> None:
        self.store, self.cpu, self.memory, self.accelerator = store, cpu, memory, accelerator
        self.handoff, self.layer, self.clock = memory, layer, clock
        self.hidden, self.index, self.weights = hidden, index.long(), weights.float()
        self.host_index, self.host_weights, self.host_hidden = memory.send(
            self.index, self.weights, hidden
        )
        if clock is not None:
            clock.routed(layer)
        self.has_guess, self.guessed = False, []
        self._ids = self.host_index.numpy()
        self._slots = memory.slots.numpy()[: index.numel()]
        self._present = memory.present.numpy()
        self._result = memory.result(hidden.shape[0], hidden.shape[1], hidden.device)
        self._on_cpu = bytearray(store.n_experts[layer])
        self._compute = cpu.prepared(
            self.host_hidden,
            store.pointers(layer),
            torch.frombuffer(self._on_cpu, dtype=torch.uint8),
            self.host_index,
            self.host_weights,
            self._result,
        )
        self._hits: Pending | None = None

    def record(self, recorded: Callable[[Callable[[], None]], Replay]) -> None:
        """Record the hits, where there can be some, and the sum, each as `recorded` does.

        It replays what it has recorded, which then finds no hit, and no part to add.
        """
        self.begin()  # the layer before reads the same memory
        self._slots[:] = -1
        self._present[:] = False
        if self.accelerator is not None:
            self._replay_hits = recorded(self._record_hits)
        self._replay_sum = recorded(self._record_sum)

    def begin(self) -> None:
        """Wait for the layer's routing."""
        torch.cuda.current_stream(self.hidden.device).synchronize()
        self.ids = self._ids.tolist()
        self.launches, self._awaited, self._outs, self._failed = [], [], [], []
        self._has_hits = False

    def force(self, index: Tensor, weights: Tensor) -> None:
        """Let these, on the host, be the routing that has come."""
        self.host_index.copy_(index)
        self.host_weights.copy_(weights)
        # From memory that is not pinned: CUDA takes so little at once, and it queues for no engine.
        self.weights.copy_(weights.clone(), non_blocking=True)
        self.ids = self._ids.tolist()

    def launch(self, slots: Mapping[int, int]) -> None:
        """As `LayerStep.launch`: the graph reads the slots."""
        if not slots:
            return
        assert self.accelerator is not None and self._hits is not None
        self._slots[:] = [slots.get(expert, -1) for token in self.ids for expert in token]
        self.accelerator.gpu.replay(self._replay_hits, self._hits)
        self.launches.append(self._hits)
        self._has_hits = True

    def launch_waited(self, experts: Iterable[int], keep: Collection[int] | None = None) -> None:
        """As `LayerStep.launch_waited`: these are launched as in any other step."""
        assert self.accelerator is not None
        for expert in experts:
            slot = self.accelerator.slot_for_waited(self.layer, expert, keep)
            self._launch_pairs({expert: slot})

    def compute_on_cpu(
        self, experts: Collection[int], others: Tensor | None = None
    ) -> Tensor | None:
        """As `LayerStep.compute_on_cpu`, the first share of a layer without a tensor made."""
        if not experts or others is not None:
            return super().compute_on_cpu(experts, others)
        for expert in experts:
            self._on_cpu[expert] = 1
        self._compute()
        for expert in experts:
            self._on_cpu[expert] = 0
        return self._result

    def combine(self, cpu_out: Tensor | None) -> Tensor:
        """The layer's output, always the same tensor: it holds until the next step."""
        cpu_out = self._with_failed(cpu_out)
        if self._hits is None and cpu_out is None:
            self._result.zero_()
        for out in self._outs:
            assert self._hits is not None and self._hits.out is not None
            (self._hits.out.add_ if self._has_hits else self._hits.out.copy_)(out)
            self._has_hits = True
        self._present[:] = self._has_hits, cpu_out is not None
        self._replay_sum()
        return self.out

    def _record_hits(self) -> None:
        assert self.accelerator is not None
        gpu, slots = self.accelerator.gpu, self.memory.slots[: self.index.numel()]
        self._hits = gpu.record_hits(self.hidden, slots, self.weights)

    def _record_sum(self) -> None:
        if self._hits is not None:
            assert self.accelerator is not None and self._hits.out is not None
            gpu, parts = self.accelerator.gpu, (self._hits.out, self._result)
            self.out = gpu.record_sum(*parts, self.memory.present, self.hidden)
        else:
            self.out = self._result.to(self.hidden.device, non_blocking=True).to(self.hidden.dtype)
        if self.clock is not None:
            self.clock.combined(self.layer)
