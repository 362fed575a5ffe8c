"""A run's routing as a trace: what its simulation starts from.

Of a prompt expert_choices.csv holds what the cache learns of it; this holds every token's choices,
and which experts a prompt copied to the GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import numpy as np

from moe_offload.experts.recorder import Recorder
from moe_offload.simulation.traces import RoutingPass, Trace, TraceInfo, trace_lines


def recorded_trace(recorder: Recorder, model: str, n_experts: int, synthetic: bool) -> Trace:
    """Return every pass that `recorder` holds, in order.

    `synthetic` marks routing that no model chose, as in runs on random weights.
    """
    info = _recorded_info(recorder, model, n_experts, synthetic)
    return Trace(info, tuple(_recorded_passes(recorder)))


def routing_lines(recorder: Recorder, model: str, n_experts: int, synthetic: bool) -> Iterator[str]:
    """The lines of the trace's file, made one pass at a time: a night's trace is never held."""
    info = _recorded_info(recorder, model, n_experts, synthetic)
    yield from trace_lines(info, _recorded_passes(recorder))


def _recorded_info(recorder: Recorder, model: str, n_experts: int, synthetic: bool) -> TraceInfo:
    layers = recorder.layer_table()
    n_layers = np.bincount(layers["pass_index"], minlength=1)
    return TraceInfo(
        model,
        n_layers=int(n_layers.max()),
        top_k=int(layers["top_k"].max(initial=0)),
        n_experts=n_experts,
        synthetic=synthetic,
    )


def _recorded_passes(recorder: Recorder) -> Iterator[RoutingPass]:
    by_pass = groupby(recorder.layer_events(), key=lambda event: event.pass_index)
    index, events = next(by_pass, (-1, iter(())))
    for number, one in enumerate(recorder.pass_table()):
        ids: list[tuple[tuple[int, ...], ...]] = []
        waited: list[tuple[int, ...]] = []
        if number == index:
            for event in events:
                ids.append(tuple(map(tuple, event.ids)))
                waited.append(event.waited)
            index, events = next(by_pass, (-1, iter(())))
        yield RoutingPass(
            "decode" if one["decode"] else "prefill",
            tuple(ids),
            int(one["prompt"]),
            tuple(waited) if any(waited) else (),
        )
