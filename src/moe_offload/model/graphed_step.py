"""One decode step as CUDA graphs: recorded once, segment by segment, and replayed from then on.

The graphs read the tokens, their positions, the mask and the place of the new key from tensors
that stay where they are; between two of them the experts run, or a module that asks the device.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from moe_offload.experts.accelerator import Accelerator
from moe_offload.experts.dispatcher import MoeDispatcher
from moe_offload.experts.recorded import RecordedStep, StepMemory
from moe_offload.model.graph_recorder import (
    CudaRecorder,
    Rehearsal,
    without_collections,
    working_in,
)
from moe_offload.model.kv_cache import Extent, RoomyLayer, WindowLayer

_FEWEST_KEYS: Final = 512
_SPARE_KEYS: Final = 128  # at least, where keys are given room: so many steps need no other graph
_Forward = Callable[..., Any]

# Whose slots the graphs read, if any, and whether the experts' part is to be recorded.
Serves = tuple[Accelerator | None, bool]


def windows_of(cache: DynamicCache) -> set[int]:
    """The sizes of its sliding windows."""
    return {layer.sliding_window for layer in cache.layers if layer.is_sliding}


class NotRecordedError(Exception):
    """A step does what no graph can."""


class _StaticLayer(DynamicLayer):  # type: ignore[misc]  # transformers has no types
    """All the room for keys and values, [B, heads, capacity, D]; a token goes to `place`, [1]."""

    def __init__(self, like: RoomyLayer | WindowLayer, capacity: int, place: Tensor) -> None:
        super().__init__()
        self.keys, self.values = (
            held.new_empty(held.shape[0], held.shape[1], capacity, held.shape[3])
            for held in (like.keys, like.values)
        )
        self.is_initialized = True
        self.is_sliding = like.is_sliding
        self._place = place

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self._place, key_states)
        self.values.index_copy_(2, self._place, value_states)
        return self.keys, self.values


@dataclass(frozen=True)
class _ExpertsCall:
    """What lies between two graphs: the router's tensors, and the one for the experts' sum.

    `step` where that part is recorded too.
    """

    layer: int
    hidden: Tensor
    index: Tensor
    weights: Tensor
    out: Tensor
    step: RecordedStep | None

    def run(self, dispatcher: MoeDispatcher) -> None:
        dispatcher.recorded = self.step
        try:
            out = dispatcher.run(self.layer, self.hidden, self.index, self.weights)
        finally:
            dispatcher.recorded = None
        if out is not self.out:
            self.out.copy_(out)


@dataclass(frozen=True)
class _EagerCall:
    """Also between two graphs: a module that asks the device something, and its results' place."""

    module: Callable[..., Any]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    out: Any

    def run(self, _: MoeDispatcher) -> None:
        found = self.module(*self.arguments, **self.keywords)
        for place, value in zip(tree_leaves(self.out), tree_leaves(found), strict=True):
            place.copy_(value)


class GraphedStep:
    """The graphs of one batch size, and all that they read and write, which stays where it is."""

    def __init__(
        self,
        batch: int,
        capacity: int,
        mask_dtype: torch.dtype,
        options: dict[str, Any],
        serves: Serves,
        device: torch.device,
        cache_name: str,
    ) -> None:
        self.options = options
        self.memory: StepMemory | None = None  # of the experts' part, where that is recorded
        self._serves = serves
        self.capacity = capacity
        self.extent = Extent(0, is_whole=False)
        self._device = device
        self._cache_name = cache_name
        self._cache = DynamicCache()
        self._owner: Callable[[], Any] = lambda: None
        self._ids = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self._positions = torch.zeros_like(self._ids)
        self._place = torch.zeros(1, dtype=torch.int64, device=device)
        self._seen = torch.zeros(batch, 1, 1, self.capacity, dtype=torch.bool, device=device)
        self._mask_dtype = mask_dtype
        self._window = 0  # places of a layer that holds no more than a sliding window
        self._place_in_window = torch.zeros_like(self._place)
        # One for the rehearsal and the recording: cuBLAS keeps its workspace by stream.
        self._stream = torch.cuda.Stream(device)
        self._rehearsed = False
        self._asking: list[nn.Module] = []
        self._segments: list[tuple[Callable[[], None], _ExpertsCall | _EagerCall]] = []
        self._last: Callable[[], None] | None = None
        self._output: Any = None

    @property
    def is_complete(self) -> bool:
        return self._last is not None

    def fits(self, batch: int, n_held: int, options: dict[str, Any], serves: Serves) -> bool:
        """Whether these graphs serve a step behind `n_held` tokens without reading far too much."""
        too_large = self.capacity >= 4 * capacity_for(n_held)
        return (
            batch == len(self._ids)
            and n_held < self.capacity
            and not too_large
            and options == self.options
            and serves[0] is self._serves[0]
            and serves[1] == self._serves[1]
        )

    def set_inputs(self, cache: DynamicCache, n_held: int, kwargs: dict[str, Any]) -> None:
        """Put the step's inputs where the graphs read them; `cache`'s keys, unless there."""
        if self._owner() is not cache or not self.extent.is_whole:
            with or_not_recorded():
                self._take_in(cache, n_held)
        mask = kwargs.get("attention_mask")
        seen = self._seen[..., : n_held + 1]
        if mask is None:
            seen.fill_(True)
        else:
            seen.copy_(mask[:, None, None])
        self._ids.copy_(kwargs["input_ids"])
        self._positions.copy_(kwargs["position_ids"])
        self._place.fill_(n_held)
        if self._window:
            self._place_in_window.fill_(n_held % self._window)

    def _take_in(self, cache: DynamicCache, n_held: int) -> None:
        """Let `cache` lie in the memory of these graphs; one that did gets its own again first.

        It may be the same one, whose layers left with views of that memory: a crop does so.
        """
        owner = self._owner()
        if owner is not None:
            for layer in owner.layers:
                layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
        self.extent = Extent(n_held)
        self._owner = weakref.ref(cache)
        if not self._cache.layers:
            if windows := windows_of(cache):
                self._window = min(self.capacity, *windows)
            for layer in cache.layers:
                room = (self.capacity, self._place)
                if layer.is_sliding:
                    room = (self._window, self._place_in_window)
                self._cache.layers.append(_StaticLayer(layer, *room))
        for layer, static in zip(cache.layers, self._cache.layers, strict=True):
            layer.move_to(static.keys, static.values, self.extent)
        self._seen.zero_()

    def _masks(self) -> Any:
        """What attention takes: one mask, or one for each kind of layers, as transformers' own.

        Made of tensors alone, so that a graph makes them.
        """
        masks = {}
        if not all(layer.is_sliding for layer in self._cache.layers):
            masks["full_attention"] = self._as_wanted(self._seen)
        if any(layer.is_sliding for layer in self._cache.layers):
            places = torch.arange(self._window, device=self._device)
            position = self._place - (self._place - places) % self._window
            there = self._seen.index_select(3, position.clamp(min=0)) & (position >= 0)
            masks["sliding_attention"] = self._as_wanted(there)
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _as_wanted(self, seen: Tensor) -> Tensor:
        """`seen` as it is, or as what eager attention adds to scores."""
        if self._mask_dtype == torch.bool:
            return seen
        hidden = torch.full_like(seen, torch.finfo(self._mask_dtype).min, dtype=self._mask_dtype)
        return hidden.masked_fill_(seen, 0)

    def replay(self, dispatcher: MoeDispatcher) -> None:
        """The step whose inputs are set."""
        for replay, call in self._segments:
            replay()
            call.run(dispatcher)
        assert self._last is not None
        self._last()

    def record(
        self, eager: Callable[..., Any], dispatcher: MoeDispatcher, parts: Sequence[nn.Module]
    ) -> None:
        """The same by the model's own code: a rehearsal first, and the next time for good.

        `parts` are the modules without experts, which the rehearsal may find to ask the device.
        """
        recorder = CudaRecorder(self._device) if self._rehearsed else Rehearsal()
        memory = self.memory
        segments: list[tuple[Callable[[], None], _ExpertsCall | _EagerCall]] = []

        def ended() -> Callable[[], None]:
            with or_not_recorded():  # a GPU takes room for a graph when it is first replayed
                replay = recorder.end()
                replay()
            return replay

        def recorded(work: Callable[[], None]) -> Callable[[], None]:
            recorder.begin()
            work()
            return ended()

        def between(layer: int, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            step = None
            if memory is not None:
                step = dispatcher.recorded_step(memory, layer, hidden, index, weights)
            replay = ended()
            if step is not None:
                step.record(recorded)
            out = torch.empty_like(hidden) if step is None else step.out
            call = _ExpertsCall(layer, hidden, index, weights, out, step)
            call.run(dispatcher)
            segments.append((replay, call))
            recorder.begin()
            return call.out

        def rehearsed(module: nn.Module, forward: _Forward, *args: Any, **kwargs: Any) -> Any:
            try:
                return forward(*args, **kwargs)
            except RuntimeError:  # it, or a part of it, would have the host wait
                if not (recorder.is_open and _are_constant(args) and _are_constant(kwargs)):
                    raise
            recorder.end()
            with or_not_recorded():
                out = forward(*args, **kwargs)
            recorder.begin()
            self._asking.append(module)
            return out

        def asked(_: nn.Module, forward: _Forward, *args: Any, **kwargs: Any) -> Any:
            replay = ended()
            out = _cloned(forward(*args, **kwargs))
            segments.append((replay, _EagerCall(forward, args, kwargs, out)))
            recorder.begin()
            return out

        modules = (self._asking, asked) if self._rehearsed else (parts, rehearsed)
        with (
            without_collections(),
            working_in(self._stream, self._device),
            dispatcher.experts_called_by(between),
            _forwards(*modules),
        ):
            try:
                recorder.begin()
                self._output = eager(
                    input_ids=self._ids,
                    attention_mask=self._masks(),
                    position_ids=self._positions,
                    **{self._cache_name: self._cache},
                    **self.options,
                )
                last = ended()
            except Exception as error:  # whatever it is, the model's own way may do without
                if not recorder.is_open:  # the experts' own
                    raise
                raise NotRecordedError(_first_line(error)) from error
            finally:
                recorder.abandon()
        if self._rehearsed:
            self._segments, self._last = segments, last
        elif self._serves[1]:
            self.memory = _memory_for(
                [call for _, call in segments if isinstance(call, _ExpertsCall)]
            )
        self._rehearsed = True

    def output(self, cache: DynamicCache) -> Any:
        """The step's, which the next one does not change."""
        values = {name: _cloned(value) for name, value in self._output.items()}
        values[self._cache_name] = cache
        return type(self._output)(**values)


def _memory_for(calls: Sequence[_ExpertsCall]) -> StepMemory | None:
    """What such calls can hand over in; None where no memory can be pinned."""
    hidden = calls[0].hidden
    top_k = max(call.index.shape[1] for call in calls)
    memory = StepMemory(len(hidden), top_k, hidden.shape[1], hidden.dtype)
    return memory if memory.is_mapped else None


@contextmanager
def _forwards(modules: Iterable[nn.Module], call: Callable[..., Any]) -> Iterator[None]:
    """Inside, the forward of each module is `call`, told the module and its forward."""
    before = [(module, module.__dict__.get("forward")) for module in modules]
    try:
        for module, _ in before:
            module.forward = functools.partial(call, module, module.forward)
        yield
    finally:
        for module, own in before:
            del module.forward
            if own is not None:
                module.forward = own


def _are_constant(arguments: Any) -> bool:
    """Whether a replay finds in `arguments` what it should: tensors, which are overwritten."""
    return all(one is None or isinstance(one, Tensor | str) for one in tree_leaves(arguments))


@contextmanager
def or_not_recorded() -> Iterator[None]:
    """Inside, what is to be recorded may fail: for want of memory, say."""
    try:
        yield
    except RuntimeError as error:
        raise NotRecordedError(_first_line(error)) from error


def _cloned(value: Any) -> Any:
    """`value` with tensors of its own, if it holds some."""
    return tree_map_only(Tensor, torch.clone, value)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def capacity_for(n_held: int) -> int:
    """Room for keys: at most twice as many as there are, or few."""
    needed = max(_FEWEST_KEYS, n_held + _SPARE_KEYS)
    return 1 << (needed - 1).bit_length()
