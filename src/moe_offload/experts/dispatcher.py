"""Carries out one MoE layer: hits on the accelerator, misses on the CPU, copies in flight, at once.

`MoeExperts` stands where transformers' experts module stood and hands every call to the model's
one `MoeDispatcher`. A call copies the routing and the hidden state to the host, plans, launches
the hits, starts the copies, computes the misses on the calling thread and adds the two results.
"""

from __future__ import annotations

import functools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from moe_offload.errors import UserError
from moe_offload.experts.accelerator import Accelerator
from moe_offload.experts.device_clock import DeviceClock
from moe_offload.experts.disk_tier import DiskTier
from moe_offload.experts.layer import HostHandoff, LayerStep
from moe_offload.experts.plan import Plan, plan_decode, plan_prefill
from moe_offload.experts.recorder import LayerEvent, NullRecorder, NvtxRanges, Phase, Recorder
from moe_offload.experts.store import DiskCounts, ExpertStore
from moe_offload.kernels.cpu_experts import CpuExperts
from moe_offload.machine.streams import is_out_of_memory

_Copying = Callable[[Sequence[int]], None]  # starts the copies of experts in host memory
_Run = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # `MoeDispatcher.run`


class RoutingChoice(Protocol):
    """What chooses experts in the routers' place, such as a recorded trace."""

    def begin_pass(self, decode: bool, n_tokens: int) -> None:
        """A forward pass over `n_tokens` tokens, padding included, begins."""

    def choose(self, layer: int, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The ids int64 [T, K] and weights [T, K] to use for those of the router."""


class MoeExperts(nn.Module):
    """One layer's experts, called as transformers calls its own."""

    def __init__(self, dispatcher: MoeDispatcher, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.dispatcher = dispatcher

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[T, H] from `hidden_states` [T, H], `top_k_index` [T, K] and `top_k_weights` [T, K]."""
        call = self.dispatcher.called_by or self.dispatcher.run
        return call(self.layer, hidden_states, top_k_index, top_k_weights)


class MoeDispatcher:
    """Runs the MoE layers of one model, driven by the thread whose turn it is to call the model.

    Without an accelerator every expert is computed on the CPU. `prompt` numbers the prompt (the
    first of a batch) that recorded passes belong to; where nobody sets it, sequences are numbered
    as they begin. `forced_routing` replaces the routers. Whoever uses the slots or changes what
    passes do holds `turn`. Each of `on_layer` is called before a layer's experts are, and may
    raise: where graphs replay the rest of a step, no hook of the model's is called.
    """

    def __init__(
        self,
        store: ExpertStore | DiskTier,
        cpu: Sequence[CpuExperts],
        recorder: Recorder,
        accelerator: Accelerator | None = None,
        ranges: NvtxRanges | None = None,
    ) -> None:
        self.store = store
        self.recorder = recorder
        self.accelerator = accelerator
        self.prompt: int | None = None
        self.turn = threading.RLock()  # one pass may call the model again
        self.forced_routing: RoutingChoice | None = None
        self.called_by: _Run | None = None  # what the model's layers call in the place of `run`
        self.on_layer: list[Callable[[], None]] = []
        self.cpu = cpu
        self._ranges = ranges or NvtxRanges(enabled=False)
        self._handoff = HostHandoff()
        self._is_open = False  # the pass begun last has not ended
        self._device = torch.device("cpu")  # the model's, as a layer sees it
        self._clock: DeviceClock | None = None  # the GPU's
        self._decode = False
        self._skip_experts = False
        self._ones = torch.empty(0, dtype=torch.uint8)
        self._token_mask: Tensor | None = None
        self._batch_prompt = 0  # of the batch that is running, and of the next to begin
        self._next_prompt = 0
        self._next_layer = 0
        self._pass_started_s = 0.0
        self._last_end_s = 0.0
        self._block_started_s = 0.0

    def attach(self, model: nn.Module, blocks: Iterable[nn.Module]) -> None:
        """Follow `model`'s forward passes and the start of each MoE block.

        Threads take turns from now on: what is kept of a pass is one pass's. Hooks would not do,
        for none is called after a Ctrl-C, and the turn must end then too.
        """
        forward = model.forward

        @functools.wraps(forward)
        def one_pass(*args: Any, **kwargs: Any) -> Any:
            with self.turn:
                self.begin_pass(args, kwargs)
                output = forward(*args, **kwargs)
                self._after_pass()
            return output

        model.forward = one_pass
        for block in blocks:
            block.register_forward_pre_hook(self._before_block)
        self._device = next((parameter.device for parameter in model.parameters()), self._device)
        self._clock = DeviceClock(self._device) if self._on_gpu else None

    @property
    def _on_gpu(self) -> bool:
        return self._device.type == "cuda"

    @contextmanager
    def experts_called_by(self, call: _Run) -> Iterator[None]:
        """Inside, the model's layers call `call`, which calls `run`."""
        self.called_by = call
        try:
            yield
        finally:
            self.called_by = None

    def begin_pass(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pass with these arguments begins, in the place of one that has not ended."""
        if self._is_open:  # an error, a Ctrl-C
            if self.accelerator is not None:
                self.accelerator.recover()
            self.store.recover()
        self._is_open = True
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            ids = kwargs["inputs_embeds"][..., 0]
        batch, length = ids.shape
        mask = kwargs.get("attention_mask")
        self._token_mask = None
        n_tokens = batch * length
        if isinstance(mask, Tensor) and mask.dim() == 2 and length > 1:
            recent = mask[:, -length:].bool().flatten()
            n_tokens = int(recent.sum())
            self._token_mask = None if n_tokens == recent.numel() else recent
        past = kwargs.get("past_key_values")
        if past is None:
            past = kwargs.get("cache")  # its name from transformers 5.24 on
        is_first = past is not None and past.get_seq_length() == 0  # a prompt of one token
        self._decode = length == 1 and not is_first
        if (is_first or past is None) and not self._skip_experts:
            self._batch_prompt, self._next_prompt = self._next_prompt, self._next_prompt + batch
        if self.forced_routing is not None:
            self.forced_routing.begin_pass(self._decode, batch * length)
        phase: Phase = "decode" if self._decode else "prefill"
        self._ranges.begin_pass(phase)
        self._next_layer = 0
        self._ranges.part(self._next_layer, "attention")
        prompt = self._batch_prompt if self.prompt is None else self.prompt
        self.recorder.begin_pass(phase, n_tokens, prompt, batch)
        if self.accelerator is not None:
            self.accelerator.begin_pass()
        if self._clock is not None:
            self._clock.begin_pass()
        self._pass_started_s = self._last_end_s = time.perf_counter()

    def _after_pass(self) -> None:
        if self._on_gpu:
            torch.cuda.current_stream(self._device).synchronize()
        duration_s = time.perf_counter() - self._pass_started_s
        self.recorder.end_pass(duration_s)
        self._ranges.end_pass()
        self._is_open = False
        if self._decode and not self._skip_experts:
            for one in (self.accelerator, self.store):
                if one is not None and one.trial is not None and not one.trial.is_decided:
                    one.trial.record(duration_s)
                    break  # the other waits, off: two at once would each find what both do

    def _before_block(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        self._block_started_s = time.perf_counter()
        if self._clock is not None:
            self._clock.begin_block(self._next_layer)
        self._ranges.part(self._next_layer, "router")

    @contextmanager
    def experts_left_out(self) -> Iterator[None]:
        """Inside, layers return zeros and nothing is recorded: what all the rest costs."""
        with self.turn:
            recorder, self.recorder = self.recorder, NullRecorder()
            self._skip_experts = True
            try:
                yield
            finally:
                self.recorder = recorder
                self._skip_experts = False

    def run(self, layer: int, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """The layer's output [T, H] in hidden's dtype, on hidden's device.

        `hidden` [T, H], `index` [T, K] and `weights` [T, K] are the router's. Padding tokens of a
        batch are left out: their rows are zero. UserError where the accelerator has no room left.
        """
        for look in self.on_layer:
            look()
        self._device = hidden.device
        if self.forced_routing is not None:
            index, weights = self.forced_routing.choose(layer, index, weights)
        if self._skip_experts:
            self._handoff.to_host(index.long(), weights.float(), hidden)
            self._next_layer = layer + 1  # what is recorded as a graph meanwhile marks the layers
            return torch.zeros_like(hidden)
        if self._token_mask is not None:
            index = index.masked_fill(~self._token_mask[:, None], -1)
        try:
            return self._compute(layer, hidden, index, weights)
        except RuntimeError as error:
            if self.accelerator is None or not is_out_of_memory(error):
                raise
            first_line = str(error).splitlines()[0]
            raise UserError(
                f"expected room on the accelerator to compute the experts of layer {layer} for "
                f"{len(hidden)} tokens, found none left ({first_line}): use fewer cache slots, "
                "a smaller batch or a shorter prompt"
            ) from error

    def _compute_in_memory(
        self, layer: int, hidden: Tensor, index: Tensor, weights: Tensor
    ) -> Tensor:
        """The layer where there is nothing to plan: every expert on the CPU, all in its memory.

        Of a decode step of small experts, what passes outside their kernel is no small part.
        """
        index, weights = index.long().contiguous(), weights.float().contiguous()
        self._ranges.part(layer, "cpu experts")
        routed_s = time.perf_counter()
        sums = torch.empty(hidden.shape, dtype=torch.float32)
        pointers, on_cpu = self.store.pointers(layer), self._everywhere(layer)
        self.cpu[layer].run(hidden.contiguous(), pointers, on_cpu, index, weights, sums)
        computed_s = time.perf_counter()
        output = sums.to(hidden.dtype)
        ended_s = time.perf_counter()
        began_s, block_began_s = self._last_end_s, self._block_started_s

        def event() -> LayerEvent:
            tokens = [token for token in index.tolist() if token[0] >= 0]
            chosen = {expert for token in tokens for expert in token}
            return LayerEvent(
                layer=layer,
                ids=tokens,
                n_hits_of_token=None,
                attention_us=(block_began_s - began_s) * 1e6,
                router_us=(routed_s - block_began_s) * 1e6,
                cpu_us=(computed_s - routed_s) * 1e6,
                combine_us=(ended_s - computed_s) * 1e6,
                cpu_bytes=len(chosen) * self.store.layouts[layer].block_bytes,
            )

        self._end_layer(layer, event, ended_s)
        return output

    def _everywhere(self, layer: int) -> Tensor:
        """uint8 [E] of ones: every expert of the layer is the CPU's."""
        n_experts = self.store.n_experts[layer]
        if self._ones.numel() < n_experts:
            self._ones = torch.ones(n_experts, dtype=torch.uint8)
        return self._ones[:n_experts]

    def _end_layer(self, layer: int, event: Callable[[], LayerEvent], ended_s: float) -> None:
        if self.recorder.enabled:
            self.recorder.at_end(event)
        self._last_end_s = ended_s
        self._next_layer = layer + 1
        is_last = self._next_layer == self.store.n_layers
        self._ranges.part(self._next_layer, "head" if is_last else "attention")

    def _compute(self, layer: int, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        accelerator = self.accelerator
        if accelerator is None and isinstance(self.store, ExpertStore) and not self._on_gpu:
            return self._compute_in_memory(layer, hidden, index, weights)
        guess = None
        if accelerator is not None and self._decode:
            guess = accelerator.guess(layer + 1, hidden)
        fetches_ahead = guess is not None
        if guess is None and isinstance(self.store, DiskTier) and self._decode:
            guess = self.store.guess(layer + 1, hidden)
        parts = self.store, self.cpu[layer], self._handoff, accelerator
        step = LayerStep(*parts, layer, hidden, index, weights, guess)
        routed_s = time.perf_counter()
        clock = self._clock
        if clock is not None:
            clock.routed(layer)
        self._ranges.part(layer, "plan")
        before = self._counters()
        copy: _Copying | None = None
        if accelerator is None:
            plan = Plan({}, (), tuple(_counts(step.ids)))
        elif self._decode:
            plan, copy = self._start_decode(accelerator, step)
        else:
            plan, copy = self._start_prefill(accelerator, step)
        if guess is not None and isinstance(self.store, DiskTier):
            self.store.read_ahead_later(layer + 1, step.guessed)
        cpu_out, cpu_s = None, 0.0
        missed = (*plan.waited, *plan.cpu)
        for group in self.store.arriving(layer, missed):
            if copy is not None:
                copy(group)
            if accelerator is not None and fetches_ahead and (group or not missed):
                fetches_ahead = False  # once, behind what the layer itself misses
                accelerator.fetch_ahead(layer + 1, step.guessed)
            self._ranges.part(layer, "cpu experts")
            called_s = time.perf_counter()
            on_cpu = [expert for expert in group if expert not in plan.waited]
            cpu_out = step.compute_on_cpu(on_cpu, cpu_out)
            cpu_s += time.perf_counter() - called_s
        if accelerator is not None and self._decode:
            accelerator.cache.end_step(layer)
        computed_s = time.perf_counter()
        self._ranges.part(layer, "combine")
        step.wait()
        waited_s = time.perf_counter() if plan.waited else computed_s
        output = step.combine(cpu_out)
        if clock is not None:
            clock.combined(layer)
        ended_s = time.perf_counter()
        began_s, block_began_s = self._last_end_s, self._block_started_s
        is_cached = accelerator is not None and layer < accelerator.cache.n_indexes
        after = self._counters()
        ids, launches = step.ids, step.launches
        waited = () if self._decode else plan.waited

        def event() -> LayerEvent:
            """Asked when the pass has ended, so it holds no tensor: `step` is not for it."""
            block_bytes = self.store.layouts[layer].block_bytes
            fetches = after[1] - before[1]
            tokens = [token for token in ids if token[0] >= 0]  # the others are padding
            disk = after[2]
            wait_s = disk.wait_s - before[2].wait_s
            attention_us = (block_began_s - began_s) * 1e6
            router_us = (routed_s - block_began_s) * 1e6
            plan_us = (computed_s - routed_s - cpu_s - wait_s) * 1e6
            copy_wait_us, combine_us = (waited_s - computed_s) * 1e6, (ended_s - waited_s) * 1e6
            if clock is not None:  # of these the host has only seen the plan
                spans = clock.spans(layer)
                attention_us, router_us = spans.attention_us, spans.router_us
                left_us = max(0.0, spans.experts_us - plan_us - (cpu_s + wait_s) * 1e6)
                copy_wait_us = min(
                    clock.stood_still_us(layer, [one for one, _ in launches]), left_us
                )
                combine_us = left_us - copy_wait_us
            hits_of_token = [sum(e in plan.hits for e in token) for token in tokens]
            n_hits = sum(hits_of_token)
            return LayerEvent(
                layer=layer,
                ids=tokens,
                n_hits_of_token=hits_of_token if is_cached else None,
                hits=n_hits if is_cached else 0,
                misses=sum(map(len, tokens)) - n_hits if is_cached else 0,
                fetches=fetches,
                evictions=after[0] - before[0],
                attention_us=attention_us,
                router_us=router_us,
                plan_us=plan_us,
                cpu_us=cpu_s * 1e6,
                gpu_us=sum(pending.resolve() for pending, _ in launches),
                copy_wait_us=copy_wait_us,
                combine_us=combine_us,
                cpu_bytes=len(plan.cpu) * block_bytes,
                gpu_bytes=(len(plan.hits) + len(plan.waited)) * block_bytes,
                waited_bytes=len(plan.waited) * block_bytes,
                fetch_bytes=fetches * block_bytes,
                waited=waited,
                host_hits=disk.hits - before[2].hits,
                host_misses=disk.misses - before[2].misses,
                disk_wait_us=wait_s * 1e6,
                disk_bytes=disk.n_bytes - before[2].n_bytes,
            )

        self._end_layer(layer, event, ended_s)
        return output

    def _counters(self) -> tuple[int, int, DiskCounts]:
        """The evictions, the copies begun and the disk's counts so far."""
        copies = 0, 0
        if self.accelerator is not None:
            copies = self.accelerator.cache.evictions, self.accelerator.fetcher.begun
        return *copies, replace(self.store.disk)

    def _start_decode(self, accelerator: Accelerator, step: LayerStep) -> tuple[Plan, _Copying]:
        """Plan a decode step's layer and launch its hits.

        With the plan comes what starts the copies of a group that is in host memory.
        """
        counts = _counts(step.ids)
        accelerator.collect_copies()
        slots = accelerator.cache.lookup(step.layer, list(counts))
        plan = plan_decode(
            counts, slots, accelerator.mode, accelerator.costs, accelerator.backlog_us
        )
        with self._ranges.layer(step.layer, "launch"):
            step.launch(plan.hits)
        accelerator.prefetch.observe(step.layer, plan.hits, counts)

        share_left = accelerator.share(step.layer)

        def copy(group: Sequence[int]) -> None:
            nonlocal share_left
            with self._ranges.layer(step.layer, "launch"):
                step.launch_waited([expert for expert in group if expert in plan.waited])
            missed = [expert for expert in group if expert not in plan.waited]
            share_left -= len(accelerator.fetch_background(step.layer, missed, share_left))

        return plan, copy

    def _start_prefill(self, accelerator: Accelerator, step: LayerStep) -> tuple[Plan, _Copying]:
        """Plan a prompt's layer, launch its hits, and give slots to what warms the decode cache.

        Experts that the cache is to hold after this prompt are copied to their slots, and those
        of them that the plan waits for are computed there, so that none travels twice.
        """
        accelerator.collect_copies()
        ready = accelerator.cache.ready(step.layer)
        plan = plan_prefill(
            step.counts(), ready, accelerator.mode, accelerator.costs, accelerator.backlog_us
        )
        with self._ranges.layer(step.layer, "launch"):
            step.launch(plan.hits)
            tokens = [token for token in step.ids if token[0] >= 0]
            warmed = accelerator.warm(step.layer, tokens, plan.waited)

        def copy(group: Sequence[int]) -> None:
            with self._ranges.layer(step.layer, "launch"):
                waited = [expert for expert in group if expert in plan.waited]
                step.launch_waited(waited, keep=warmed)
                # For the tokens to come: behind what is waited for.
                for expert, slot in warmed.items():
                    if expert in group and expert not in waited:
                        accelerator.fetch(step.layer, expert, slot)

        return plan, copy


def _counts(pairs: list[list[int]]) -> dict[int, int]:
    """Tokens of each chosen expert, in order of first choice; padding (-1) left out."""
    counts = Counter(expert for token in pairs for expert in token)
    counts.pop(-1, None)
    return counts
