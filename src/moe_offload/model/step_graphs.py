"""Decode steps on a GPU whose launches between two layers' experts are one CUDA graph each.

Between two calls of experts a layer's norms, attention and router are some fifty launches, which
Python and the driver need longer for than a GPU for the work. What they launch depends on nothing
but the batch's size and the room for keys, so it is recorded once and replayed: a graph reads the
tokens, their positions, the mask and the place of the new key from tensors that stay where they
are, and hands over and takes back the experts' part in such tensors too. Of the
experts, whose work is the host's as well, the part that is the GPU's is recorded where it can be
(`experts/recorded.py`), in two more graphs a layer; else they run as ever, between two graphs.

The first step with a new shape is a rehearsal: eager, from the static tensors, with an error where
the host would wait for the device, as no graph can. The second is recorded, segment by segment, as
transformers' own code runs. A module that asks the device something (a rotary embedding whose
numbers depend on the text's length) runs eagerly between two graphs, like the experts. Models whose
steps cannot be recorded stay eager, and a note says why.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from moe_offload.experts.dispatcher import MoeDispatcher, MoeExperts
from moe_offload.model.generation import cache_argument
from moe_offload.model.graphed_step import (
    GraphedStep,
    NotRecordedError,
    capacity_for,
    or_not_recorded,
    windows_of,
)
from moe_offload.model.kv_cache import RoomyLayer, WindowLayer, make_cache

_KNOWN: Final = frozenset(
    {"input_ids", "attention_mask", "position_ids", "use_cache", "logits_to_keep", "return_dict"}
)


def why_eager(model: PreTrainedModel) -> str | None:
    """What keeps a model's decode steps from being recorded; None where nothing is known to."""
    if not model._supports_default_dynamic_cache() or not all(
        _is_movable(layer) for layer in make_cache(model.config, 1).layers
    ):
        return "not all of its layers keep keys of all tokens or of a window's"
    if len(windows_of(make_cache(model.config, 1))) > 1:
        return "its sliding windows are of several sizes"
    if model.config._attn_implementation not in ("sdpa", "eager"):
        return f"its attention is {model.config._attn_implementation}"
    return None


def _is_movable(layer: Any) -> bool:
    return type(layer) is RoomyLayer or (type(layer) is WindowLayer and not layer.record_past)


class StepGraphs:
    """Serves `model`'s decode steps by graphs from `attach` on; everything else stays eager.

    One shape at a time, where no gradients are kept. Drive it inside the dispatcher's passes:
    attach it before the dispatcher. `say` hears once why steps stay eager. While `enabled` is
    false, all do; while `records_experts` is, the experts are launched one by one in between.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        dispatcher: MoeDispatcher,
        device: torch.device,
        say: Callable[[str], None],
    ) -> None:
        self.enabled = True
        self.records_experts = True
        self._is_refused = False
        self.replayed = 0  # steps, since `forget`
        self._dispatcher = dispatcher
        self._device = device
        self.say = say
        self._cache_name = cache_argument(model)
        self._known = {*_KNOWN, self._cache_name}
        self._recorded: GraphedStep | None = None
        self._eager: Callable[..., Any]
        if (reason := why_eager(model)) is not None:
            self._give_up(reason)

    def attach(self, model: PreTrainedModel) -> None:
        """Let `model` take its decode steps through here."""
        self._eager = model.forward
        self._uses_floats = model.config._attn_implementation == "eager"
        self._parts = [
            module
            for module in model.modules()
            if not any(isinstance(part, MoeExperts) for part in module.modules())
        ]

        @functools.wraps(self._eager)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._forward(*args, **kwargs)

        model.forward = forward

    @property
    def is_on(self) -> bool:
        """Whether steps are served, as far as is known."""
        return self.enabled and not self._is_refused

    def forget(self) -> None:
        """Give back the memory of what is recorded."""
        self._recorded = None
        self.replayed = 0
        torch.cuda.empty_cache()

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if args or not self._is_served(kwargs):
            return self._eager(*args, **kwargs)
        cache = kwargs[self._cache_name]
        n_held = cache.get_seq_length()
        try:
            with torch.inference_mode():  # what graphs write is of this mode, whatever the caller's
                recorded = self._recorded_for(cache, n_held, kwargs)
                recorded.set_inputs(cache, n_held, kwargs)
                if not recorded.is_complete:
                    recorded.record(self._eager, self._dispatcher, self._parts)
                else:
                    recorded.replay(self._dispatcher)
                    self.replayed += 1
            recorded.extent.n_tokens += 1
        except NotRecordedError as error:
            had_experts = self._recorded is not None and self._recorded.memory is not None
            self._recorded = None
            if had_experts:  # without them the rest may do
                self.records_experts = False
                self.say(f"experts are not recorded as CUDA graphs: {error}")
            else:
                self._give_up(str(error))
            self._dispatcher.begin_pass(args, kwargs)
            return self._eager(*args, **kwargs)
        except BaseException:
            broken, self._recorded = self._recorded, None  # nobody knows how far it came
            with suppress(RuntimeError):  # what went wrong on the GPU is said already
                torch.cuda.current_stream(self._device).synchronize()
            del broken  # not before: a kernel would read slots from memory that is another's
            raise
        return recorded.output(cache)

    def _recorded_for(
        self, cache: DynamicCache, n_held: int, kwargs: dict[str, Any]
    ) -> GraphedStep:
        """The graphs for a step behind `n_held` tokens: those that are there, or empty ones."""
        batch = len(kwargs["input_ids"])
        options = {"use_cache": True, "logits_to_keep": kwargs.get("logits_to_keep", 0)}
        with_experts = self.records_experts and self._dispatcher.records_experts(batch)
        serves = self._dispatcher.accelerator if with_experts else None, with_experts
        if self._recorded is None or not self._recorded.fits(batch, n_held, options, serves):
            self._recorded = None  # its memory is free for the next one's
            capacity = min(capacity_for(n_held), cache.layers[0].max_tokens)
            mask_dtype = cache.layers[0].keys.dtype if self._uses_floats else torch.bool
            with or_not_recorded():
                self._recorded = GraphedStep(
                    batch, capacity, mask_dtype, options, serves, self._device, self._cache_name
                )
        return self._recorded

    def _is_served(self, kwargs: dict[str, Any]) -> bool:
        """Whether a pass is a decode step of a kind that is recorded."""
        cache, ids = kwargs.get(self._cache_name), kwargs.get("input_ids")
        return (
            self.is_on
            and not torch.is_grad_enabled()
            and kwargs.keys() <= self._known
            and isinstance(ids, Tensor)
            and ids.shape[1] == 1
            and isinstance(kwargs.get("position_ids"), Tensor)
            and (kwargs.get("attention_mask") is None or kwargs["attention_mask"].dim() == 2)
            and kwargs.get("use_cache", True) is True
            and kwargs.get("return_dict", True) is True
            and isinstance(cache, DynamicCache)
            and all(_is_movable(layer) and layer.is_initialized for layer in cache.layers)
            and 0 < cache.get_seq_length() < cache.layers[0].max_tokens
        )

    def _give_up(self, reason: str) -> None:
        self._is_refused = True
        self.say(f"decode steps are not recorded as CUDA graphs: {reason}")
