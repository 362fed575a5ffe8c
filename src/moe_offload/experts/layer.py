"""Executes the plan of one layer: launches, copies, CPU compute, and the sum of both sides.

Moves one layer's routing and hidden state to the host, and the CPU's result back.

With a GPU this is one device-to-host copy and one host-to-device copy per layer through pinned
staging memory; on the CPU nothing moves.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from moe_offload.experts.accelerator import Accelerator
from moe_offload.experts.slots import PAIRS_FOR_TABLE, Pending
from moe_offload.experts.store import ExpertStore
from moe_offload.kernels.cpu_experts import CpuExperts
from moe_offload.machine.streams import is_out_of_memory


class HostHandoff:
    """Staging memory for one model; grows to the largest prompt seen.

    Not thread-safe. A result handed to `to_device` is copied asynchronously; its memory is
    reused by the next layer only after that layer's `to_host`, which waits for the stream, so no
    copy still reads it.
    """

    def __init__(self) -> None:
        self._inbox = torch.empty(0, dtype=torch.uint8)
        self._result = torch.empty(0, dtype=torch.float32)

    def to_host(self, hidden: Tensor, *routing: Tensor) -> list[Tensor]:
        """`hidden` [T, H] and the small `routing` tensors, contiguous on the host.

        On a GPU all travel in one buffer, and the call waits for the current stream.
        """
        if hidden.device.type == "cpu":
            return [part.contiguous() for part in (hidden, *routing)]
        parts = sorted((hidden, *routing), key=lambda part: -part.element_size())
        sources = [part.contiguous().view(torch.uint8).flatten() for part in parts]
        n_bytes = sum(source.numel() for source in sources)
        if self._inbox.numel() < n_bytes:
            self._inbox = _staging(n_bytes, torch.uint8)
        inbox = self._inbox[:n_bytes]
        _copy_joined(sources, inbox)
        torch.cuda.current_stream(hidden.device).synchronize()
        host = {}
        start = 0
        for part in parts:  # widest elements first, so that every view is aligned
            end = start + part.numel() * part.element_size()
            host[id(part)] = inbox[start:end].view(part.dtype).view(part.shape)
            start = end
        return [host[id(part)] for part in (hidden, *routing)]

    def result(self, n_tokens: int, hidden_size: int, device: torch.device) -> Tensor:
        """Host memory for the CPU's output, fp32 [T, H]: pinned and reused for a GPU, else new."""
        if device.type == "cpu":  # it may become the layer's output, which callers may keep
            return torch.empty(n_tokens, hidden_size)
        size = n_tokens * hidden_size
        if self._result.numel() < size:
            self._result = _staging(size, torch.float32)
        return self._result[:size].view(n_tokens, hidden_size)

    def to_device(self, result: Tensor, device: torch.device) -> Tensor:
        """`result` on `device`, asynchronously on a GPU."""
        return result if device.type == "cpu" else result.to(device, non_blocking=True)


def _copy_joined(sources: list[Tensor], inbox: Tensor) -> None:
    """The `sources`, uint8, one after the other into `inbox`: one copy, or one each.

    A GPU without room to join a long prompt's on the device sends each by itself.
    """
    try:
        inbox.copy_(torch.cat(sources), non_blocking=True)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        places = inbox.split([source.numel() for source in sources])
        for place, source in zip(places, sources, strict=True):
            place.copy_(source, non_blocking=True)


def _staging(size: int, dtype: torch.dtype) -> Tensor:
    """Pinned memory; where the system refuses to lock more, pageable: slower, not wrong.

    Its copies then hold the host up until they are staged, and say so once.
    """
    with torch.inference_mode(False):  # kept, so it must serve callers in either mode
        try:
            return torch.empty(size, dtype=dtype, pin_memory=True)
        except RuntimeError as error:
            print(
                f"warning: no memory could be pinned to hand layers over ({_first_line(error)}): "
                "it goes through pageable memory, slower",
                file=sys.stderr,
            )
            return torch.empty(size, dtype=dtype)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


Pairs = list[list[int]]

_COMBINED_IN = 16  # pieces of a prompt, where the device has no room for it as a whole


@dataclass
class LayerStep:
    """One call of one MoE layer. `hidden` is where the model runs, the `host_*` are its copies.

    `index` int64 [T, K] and `weights` fp32 [T, K] are on hidden's device. `index` and `host_index`
    hold -1 where a token is padding; `pairs` is the same as a list.
    """

    store: ExpertStore
    cpu: CpuExperts
    handoff: HostHandoff
    layer: int
    hidden: Tensor
    index: Tensor
    weights: Tensor
    host_hidden: Tensor
    host_index: Tensor
    host_weights: Tensor
    pairs: Pairs
    n_fetches: int = 0
    out_of_memory: bool = False  # final after `wait`: no room on the accelerator for some launch
    _shared_out: Tensor | None = None  # one sum for all launches by expert
    _outs: list[Tensor] = field(default_factory=list)
    _failed: list[int] = field(default_factory=list)
    launches: list[tuple[Pending, tuple[int, ...]]] = field(default_factory=list)

    def counts(self) -> list[int]:
        """The tokens of each expert of the layer, chosen or not; padding left out."""
        n_experts = self.store.n_experts[self.layer]
        return torch.bincount(self.host_index.flatten() + 1, minlength=n_experts + 1)[1:].tolist()

    def launch(self, accelerator: Accelerator, slots: dict[int, int]) -> None:
        """Start computing the experts of `slots` (expert -> slot) on the accelerator, at once."""
        if not slots:
            return
        if self.index.numel() > PAIRS_FOR_TABLE:
            for expert, slot in slots.items():
                self._launch_expert(accelerator, expert, slot)
            return
        table = torch.full((self.store.n_experts[self.layer] + 1,), -1, dtype=torch.int64)
        for expert, slot in slots.items():
            table[expert] = slot
        slot_of_pair = table[self.host_index]  # -1, padding, takes the last entry: -1
        pending = accelerator.gpu.launch(
            self.hidden, slot_of_pair, self.weights, accelerator.fetcher
        )
        self.launches.append((pending, tuple(slots)))

    def launch_waited(
        self,
        accelerator: Accelerator,
        experts: Iterable[int],
        keep: Mapping[int, int] | None = None,
    ) -> None:
        """Copy and compute each expert, one launch each, so that a copy hides the previous one.

        In a prompt, `keep` maps the experts that the cache is to hold afterwards to their slots;
        the others pass through a staging slot. Without it, in decode, each is admitted to the
        cache where its index has a way.
        """
        for expert in experts:
            if keep is not None and expert in keep:
                slot = keep[expert]
                accelerator.fetch(self.layer, expert, slot)
            else:
                slot, started = accelerator.slot_for_waited(
                    self.layer, expert, staging_only=keep is not None
                )
                self.n_fetches += started
            if len(self.hidden) == 1:
                self.launch(accelerator, {expert: slot})
            else:
                self._launch_expert(accelerator, expert, slot)

    def _launch_expert(self, accelerator: Accelerator, expert: int, slot: int) -> None:
        """A launch whose cost on this thread does not grow with the number of tokens.

        Where the device has no room for what these launches share, the CPU computes the expert.
        """
        try:
            if self._shared_out is None and not self.out_of_memory:
                self._shared_out = torch.zeros(
                    self.hidden.shape, dtype=torch.float32, device=self.hidden.device
                )
            pairs = None if self.out_of_memory else self._pairs_of_expert[expert]
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self.out_of_memory, pairs = True, None
        if self._shared_out is None or pairs is None:  # not tried again in this layer
            self._failed.append(expert)
            return
        pending = accelerator.gpu.launch_expert(
            self.hidden,
            slot,
            pairs,
            self.weights,
            accelerator.fetcher,
            self._shared_out,
        )
        self.launches.append((pending, (expert,)))

    @cached_property
    def _pairs_of_expert(self) -> list[Tensor]:
        """Each expert's pairs, as t * K + k, int64 on the accelerator: slices of one sort.

        Their bounds are known here, so that nothing is sent and nothing waited for.
        """
        counts = self.counts()
        n_padding = self.index.numel() - sum(counts)
        by_expert = torch.argsort(self.index.flatten(), stable=True)
        return list(by_expert.split([n_padding, *counts])[1:])

    def compute_on_cpu(self, experts: Sequence[int]) -> Tensor | None:
        """The CPU's share, fp32 [T, H] on the host, or None without experts."""
        if not experts:
            return None
        mask = bytearray(self.store.n_experts[self.layer])
        for expert in experts:
            mask[expert] = 1
        on_cpu = torch.frombuffer(mask, dtype=torch.uint8)  # no tensor operation to dispatch
        n_tokens, hidden_size = self.hidden.shape
        out = self.handoff.result(n_tokens, hidden_size, self.hidden.device)
        self.cpu.run(
            self.host_hidden,
            self.store.pointers(self.layer),
            on_cpu,
            self.host_index,
            self.host_weights,
            out,
        )
        return out

    def wait(self) -> None:
        """Wait for the emulated accelerator; on a GPU the stream does, and the host runs on."""
        for pending, experts in self.launches:
            try:
                out = pending.result()
            except Exception as error:
                self.out_of_memory |= pending.out_of_memory
                if not (pending.copy_failed or pending.out_of_memory):  # a mistake of ours
                    raise
                error.__traceback__ = None  # kept, and its frames would hold the layer's tensors
                self._failed.extend(experts)
            else:
                if all(out is not other for other in self._outs):
                    self._outs.append(out)

    def combine(self, cpu_out: Tensor | None) -> Tensor:
        """The layer's output [T, H] in hidden's dtype, after `wait`.

        Experts whose copy failed, or for which the GPU had no memory, are computed on the CPU here.
        """
        on_host = []
        if cpu_out is not None:
            # The next CPU result would take the same memory.
            on_host.append(cpu_out.clone() if self._failed else cpu_out)
        if self._failed:
            late = self.compute_on_cpu(self._failed)
            assert late is not None
            on_host.append(late)
        if not self._outs and not on_host:
            return torch.zeros_like(self.hidden)
        n_tokens = len(self.hidden)
        try:
            return self._sum(on_host, slice(n_tokens))
        except RuntimeError as error:
            if n_tokens == 1 or not is_out_of_memory(error):
                raise
        # A long prompt on a full GPU: the fp32 parts of a few tokens at a time find room.
        total = torch.empty_like(self.hidden)
        n_rows = -(-n_tokens // _COMBINED_IN)
        for start in range(0, n_tokens, n_rows):
            rows = slice(start, start + n_rows)
            total[rows] = self._sum(on_host, rows)
        return total

    def _sum(self, on_host: list[Tensor], rows: slice) -> Tensor:
        """Both sides of some tokens added up; leaves its arguments as they are."""
        device = self.hidden.device
        parts = [out[rows] for out in self._outs]
        parts += [self.handoff.to_device(part[rows], device) for part in on_host]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total.to(self.hidden.dtype)
