"""One call of one MoE layer: to the host, launch, compute on the CPU, wait, combine.

With a GPU, input comes by one device-to-host copy into pinned memory. The CPU's sum is read from
pinned memory by the kernel that adds both sides up; without Triton it goes by a host-to-device
copy. On the CPU nothing moves.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import InitVar, dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from moe_offload.experts.accelerator import Accelerator
from moe_offload.experts.device_clock import DeviceClock
from moe_offload.experts.disk_tier import DiskTier
from moe_offload.experts.slots import PAIRS_FOR_TABLE, GpuExperts, Group, Pending
from moe_offload.experts.store import ExpertStore
from moe_offload.kernels.cpu_experts import CpuExperts


@dataclass
class LayerStep:
    """One call of one MoE layer, made as its input arrives on the host.

    `hidden` [T, H], `index` [T, K] and `weights` [T, K] are where the model runs, the `host_*` are
    their copies, and `ids` is the index as a list: -1 where a token is padding. `guess` [T, K] are
    experts that the next layer is expected to choose; `guessed` lists them. What a step launches
    stays in `launches`. A GPU's `clock` is told when the routing is there, and the layer's sum.
    """

    store: ExpertStore | DiskTier
    cpu: CpuExperts
    handoff: HostHandoff
    accelerator: Accelerator | None
    layer: int
    hidden: Tensor
    index: Tensor
    weights: Tensor
    guess: InitVar[Tensor | None] = None
    clock: DeviceClock | None = None

    def __post_init__(self, guess: Tensor | None) -> None:
        self.index = self.index.long()
        self.weights = self.weights.float()
        self.has_guess = guess is not None
        guesses = [] if guess is None else [guess]
        self.host_index, *host_guesses, self.host_weights, self.host_hidden = self.handoff.to_host(
            self.index, *guesses, self.weights, self.hidden
        )
        if self.clock is not None:
            self.clock.routed(self.layer)
        self.ids: list[list[int]] = self.host_index.tolist()
        self.guessed = list(dict.fromkeys(e for g in host_guesses for e in g.flatten().tolist()))
        self.launches: list[Pending] = []
        self._awaited: list[tuple[Pending, tuple[int, ...]]] = []  # with the experts of each
        self._outs: list[Tensor] = []
        self._failed: list[int] = []

    def counts(self) -> list[int]:
        """The tokens of each expert of the layer, chosen or not; padding left out."""
        n_experts = self.store.n_experts[self.layer]
        return torch.bincount(self.host_index.flatten() + 1, minlength=n_experts + 1)[1:].tolist()

    def launch(self, slots: Mapping[int, int]) -> None:
        """Start computing the experts of `slots` (expert -> slot) on the accelerator, at once."""
        if not slots:
            return
        if self.index.numel() > PAIRS_FOR_TABLE:
            self._launch_groups(slots)
        else:
            self._launch_pairs(slots)

    def _launch_pairs(self, slots: Mapping[int, int]) -> None:
        slot_of_pair = [slots.get(expert, -1) for token in self.ids for expert in token]
        assert self.accelerator is not None
        pending = self.accelerator.gpu.launch(
            self.hidden, slot_of_pair, self.weights, self.accelerator.fetcher
        )
        self._note(pending, slots)

    def launch_waited(self, experts: Iterable[int], keep: Collection[int] | None = None) -> None:
        """Copy and compute each expert, one launch each, so that a copy hides the previous one.

        `keep` as in `Accelerator.slot_for_waited`.
        """
        assert self.accelerator is not None
        for expert in experts:
            slot = self.accelerator.slot_for_waited(self.layer, expert, keep)
            if len(self.hidden) == 1:
                self._launch_pairs({expert: slot})
            else:
                self._launch_groups({expert: slot})

    def compute_on_cpu(
        self, experts: Collection[int], others: Tensor | None = None
    ) -> Tensor | None:
        """The CPU's share, fp32 [T, H] on the host, or None without experts.

        The experts are in memory. `others` is the share of some that came before: it is added to.
        """
        if not experts:
            return others
        mask = bytearray(self.store.n_experts[self.layer])
        for expert in experts:
            mask[expert] = 1
        n_tokens, hidden_size = self.hidden.shape
        if others is None:
            out = self.handoff.result(n_tokens, hidden_size, self.hidden.device)
        else:
            out = torch.empty(n_tokens, hidden_size)
        self.cpu.run(
            self.host_hidden,
            self.store.pointers(self.layer),
            torch.frombuffer(mask, dtype=torch.uint8),  # no tensor operation to dispatch
            self.host_index,
            self.host_weights,
            out,
        )
        return out if others is None else others.add_(out)

    def wait(self) -> None:
        """Wait for the emulated accelerator; on a GPU the stream does, and the host runs on."""
        for pending, experts in self._awaited:
            try:
                out = pending.result()
            except Exception as error:
                if not pending.copy_failed:
                    raise
                error.__traceback__ = None  # kept, and its frames would hold the layer's tensors
                self._failed.extend(experts)
            else:
                if all(out is not other for other in self._outs):
                    self._outs.append(out)

    def combine(self, cpu_out: Tensor | None) -> Tensor:
        """The layer's output [T, H] in hidden's dtype, after `wait`.

        Experts whose copy failed are computed on the CPU here.
        """
        output = self._sum(self._with_failed(cpu_out))
        if self.clock is not None:
            self.clock.combined(self.layer)
        return output

    def _with_failed(self, cpu_out: Tensor | None) -> Tensor | None:
        """`cpu_out`, to which the experts whose copy failed have been added."""
        if self._failed:
            for group in self.store.arriving(self.layer, tuple(dict.fromkeys(self._failed))):
                cpu_out = self.compute_on_cpu(group, cpu_out)
        return cpu_out

    def _sum(self, cpu_out: Tensor | None) -> Tensor:
        """Both sides' sums, [T, H] in hidden's dtype."""
        on_device = None
        for out in self._outs:
            on_device = out if on_device is None else on_device + out
        if cpu_out is not None:
            gpu = None if self.accelerator is None else self.accelerator.gpu
            return self.handoff.add(gpu, on_device, cpu_out, self.hidden)
        if on_device is None:
            return torch.zeros_like(self.hidden)
        return on_device.to(self.hidden.dtype)

    def _launch_groups(self, slots: Mapping[int, int]) -> None:
        """A launch whose cost on this thread does not grow with the number of tokens."""
        accelerator = self.accelerator
        assert accelerator is not None
        pairs, first, counts = self._sorted_pairs
        pending = accelerator.gpu.launch_groups(
            self.hidden,
            [Group(slot, first[expert], counts[expert]) for expert, slot in slots.items()],
            pairs,
            self.weights,
            accelerator.fetcher,
            self._shared_out,
        )
        self._note(pending, slots)

    def _note(self, pending: Pending, experts: Iterable[int]) -> None:
        self.launches.append(pending)
        self._awaited.append((pending, tuple(experts)))

    @cached_property
    def _shared_out(self) -> Tensor:
        """fp32 [T, H] on the accelerator: one sum for all launches by expert."""
        return torch.zeros(self.hidden.shape, dtype=torch.float32, device=self.hidden.device)

    @cached_property
    def _sorted_pairs(self) -> tuple[Tensor, list[int], list[int]]:
        """All pairs by their experts, as t * K + k, int64 on the accelerator; and of each expert
        where its begin and how many they are, known here: nothing is sent and nothing waited for.
        """
        counts = self.counts()
        n_padding = self.index.numel() - sum(counts)
        first = list(accumulate(counts[:-1], initial=n_padding))
        return torch.argsort(self.index.flatten(), stable=True), first, counts


class HostHandoff:
    """Staging memory for one model; grows to the largest prompt seen.

    Not thread-safe. A result is read asynchronously, by a kernel or by a copy to the GPU; its
    memory is used again by the next layer only after that layer's `to_host`, which waits for the
    stream, so nobody still reads it. `is_mapped`: a GPU's kernels can read what `result` gave.
    """

    def __init__(self) -> None:
        self.is_mapped = False
        self._inbox = torch.empty(0, dtype=torch.uint8)
        self._result = torch.empty(0, dtype=torch.float32)

    def to_host(self, *parts: Tensor) -> list[Tensor]:
        """`parts` contiguous on the host.

        On a GPU all travel in one buffer, and the call waits for the current stream. The widest
        elements come first, so that every view of the buffer is aligned.
        """
        if parts[0].device.type == "cpu":
            return [part.contiguous() for part in parts]
        hosts = self.send(*parts)
        torch.cuda.current_stream(parts[0].device).synchronize()
        return hosts

    def send(self, *parts: Tensor) -> list[Tensor]:
        """`parts` of a GPU as they will be on the host once the current stream has come so far."""
        joined = torch.cat([part.contiguous().view(torch.uint8).flatten() for part in parts])
        if self._inbox.numel() < joined.numel():
            self._inbox, _ = staging(joined.numel(), torch.uint8)
        inbox = self._inbox[: joined.numel()]
        inbox.copy_(joined, non_blocking=True)
        hosts = inbox.split([part.nbytes for part in parts])
        return [
            host.view(part.dtype).view(part.shape) for host, part in zip(hosts, parts, strict=True)
        ]

    def result(self, n_tokens: int, hidden_size: int, device: torch.device) -> Tensor:
        """Host memory for the CPU's output, fp32 [T, H]: pinned and reused for a GPU, else new."""
        if device.type == "cpu":  # it may become the layer's output, which callers may keep
            return torch.empty(n_tokens, hidden_size)
        size = n_tokens * hidden_size
        if self._result.numel() < size:
            self._result, self.is_mapped = staging(size, torch.float32)
        return self._result[:size].view(n_tokens, hidden_size)

    def add(
        self, gpu: GpuExperts | None, on_device: Tensor | None, result: Tensor, like: Tensor
    ) -> Tensor:
        """`on_device`, if any, and `result` in the dtype and on the device of `like`, all [T, H].

        A GPU whose kernels can read `result` does so where it lies; else it is sent.
        """
        if gpu is not None and gpu.reads_host and self.is_mapped:
            return gpu.add_from_host(on_device, result, like)
        sent = result.to(like.device, non_blocking=True)
        return (sent if on_device is None else on_device + sent).to(like.dtype)


def staging(size: int, dtype: torch.dtype) -> tuple[Tensor, bool]:
    """Memory, and whether it is pinned; where the system refuses to lock more, it is pageable.

    Copies from there hold the host up until they are staged, and are slower, not wrong.
    """
    with torch.inference_mode(False):  # kept, so it must serve callers in either mode
        try:
            return torch.empty(size, dtype=dtype, pin_memory=True), True
        except RuntimeError as error:
            first_line = (str(error) or type(error).__name__).splitlines()[0]
            print(
                f"warning: no memory could be pinned to hand layers over ({first_line}): "
                "it goes through pageable memory, slower",
                file=sys.stderr,
            )
            return torch.empty(size, dtype=dtype), False
