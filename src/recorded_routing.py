"""A run's routing as a trace: what its simulation starts from.

Unlike expert_choices.csv, which mirrors the reference and leaves prompts out, this keeps the
prompts' choices too, and which experts a prompt copied to the GPU, so that a replay warms the cache
as the run did.
"""

from __future__ import annotations

from recorder import Recorder
from traces import RoutingPass, Trace, TraceInfo


def recorded_trace(recorder: Recorder, model: str, n_experts: int, synthetic: bool) -> Trace:
    """Return every pass that `recorder` holds, in order; padding tokens are left out.

    `synthetic` marks routing that no model chose, as in runs on random weights.
    """
    passes = recorder.pass_table()
    layers: list[list[tuple[tuple[int, ...], ...]]] = [[] for _ in passes]
    waited: list[list[tuple[int, ...]]] = [[] for _ in passes]
    for event in recorder.layer_events():
        tokens = (tuple(token) for token in event.ids if min(token, default=-1) >= 0)
        layers[event.pass_index].append(tuple(tokens))
        waited[event.pass_index].append(event.waited)
    info = TraceInfo(
        model,
        n_layers=max(map(len, layers), default=0),
        top_k=max((len(token) for one in layers for of in one for token in of), default=0),
        n_experts=n_experts,
        synthetic=synthetic,
    )
    return Trace(
        info,
        tuple(
            RoutingPass(
                "decode" if row["decode"] else "prefill",
                tuple(ids),
                int(row["prompt"]),
                tuple(copied) if any(copied) else (),
            )
            for row, ids, copied in zip(passes, layers, waited, strict=True)
        ),
    )
