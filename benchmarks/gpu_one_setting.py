"""One setting of `gpu_check.py` on a loaded model: its speed, and whether it is right; a row."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu_models import Setting
from moe_offload.config import GenerationOptions
from moe_offload.engine.calibration import UNSTEADY
from moe_offload.engine.engine import Engine
from moe_offload.experts.dispatcher import MoeDispatcher
from moe_offload.experts.recorder import NullRecorder, Recorder
from moe_offload.experts.slots import Pending
from moe_offload.kernels.oracle import experts_forward
from moe_offload.model.dummy import ForcedRouting
from moe_offload.model.generation import cache_argument, generate_batch
from moe_offload.model.kv_cache import make_cache
from moe_offload.report.summary import summarize
from moe_offload.simulation.replay import bound_us

PROMPT_TOKENS = 32
PROMPT_LENGTHS = (512, 4096)
_WARM_UP_PROMPT = 64
_PROMPTS_SHARE = 3  # of a setting's time for decoding: four settings have prompts
LEAST_STEPS = 4
CHECKED_STEPS = 6  # two of them may be to record graphs
_CHECKED_LAYERS = 4  # the last of those that are watched: torch's bf16 is slow on some CPUs
# Relative norms. Of the logits: the sides round bf16 differently. int4's is wider: an H100 gave
# 0.063 in 32 layers of Mixtral, 2.2 times bf16's, as layers differ by 3 times bf16's, within their
# own limit; the CPU's integer products round activations to 8 bits, a GPU does not.
LOGIT_TOLERANCE = {"bf16": 0.05, "int8": 0.05, "int4": 0.08, "mxfp4": 0.05, "fp8": 0.05}
# Of one layer's output.
LAYER_TOLERANCE = {"bf16": 0.02, "int8": 0.03, "int4": 0.05, "mxfp4": 0.05, "fp8": 0.03}


@dataclass(frozen=True)
class Row:
    """One setting of one shape; times and rates of decoding at batch 1, over `steps` steps.

    The experts of `stored_layers` are in memory, and serve all `layers`. `prompts_tokens_per_s` is
    by a prompt's length, where long ones were measured. `between_us` is the median of the host's
    time from the end of a layer's experts to the next one's, `replayed` the steps by CUDA graphs,
    `parts_ms` a mean step's parts, as a run's summary has them.
    """

    shape: str
    layers: int
    stored_layers: int
    weight_format: str
    setting: str
    routing: str
    cache: str
    computed_by: str
    steps: int
    tokens_per_s: float
    step_ms: float
    predicted_ms: float | None
    bound_ms: float
    percent_of_bound: float
    hit_percent: float
    fetched_gb: float
    prefetch_recall_percent: float | None
    prefetch_wasted_gb: float | None
    cpu_read_gbps: float | None
    hit_gbps: float | None
    copy_gbps: float | None
    hits_slowed: float | None
    between_us: float
    replayed: int
    parts_ms: dict[str, float]
    prefill_tokens_per_s: float
    prompts_tokens_per_s: dict[int, float]
    layer_error: float
    logit_error: float | None
    correct: bool
    notes: list[str]


def print_row(row: Row) -> None:
    logit_error = "     -" if row.logit_error is None else f"{row.logit_error:.4f}"
    recall = ""
    if row.prefetch_recall_percent is not None:
        recall = (
            f"  recall {row.prefetch_recall_percent:.1f}%, "
            f"{row.prefetch_wasted_gb:.2f} GB fetched ahead for nothing"
        )
    print(
        f"{row.shape:14} {row.weight_format:5} {row.setting:24} {row.routing:6} {row.cache:>8} "
        f"{row.tokens_per_s:8.2f} tok/s {row.step_ms:9.3f} ms x{row.steps:<3}"
        f" hits {row.hit_percent:5.1f}%  moved {row.fetched_gb:7.2f} GB "
        f"{row.percent_of_bound:4.0f}% of bound  between {row.between_us:.0f} us  "
        f"errors: layer {row.layer_error:.4f} "
        f"logits {logit_error} {'ok' if row.correct else 'WRONG'}{recall}",
        flush=True,
    )
    if row.hit_gbps is not None:
        slowed = "" if row.hits_slowed is None else f", slowed {row.hits_slowed:.2f} x"
        print(f"{'':21}hits {row.hit_gbps:.0f} GB/s{slowed}, copies {row.copy_gbps:.1f} GB/s")
    parts = ", ".join(f"{name} {ms:.1f}" for name, ms in row.parts_ms.items())
    print(f"{'':21}parts of a step, ms: {parts}")
    for n_tokens, speed in row.prompts_tokens_per_s.items():
        print(f"{'':21}a prompt of {n_tokens} tokens: {speed:.1f} tokens/s", flush=True)
    for note in row.notes:
        if not note.startswith(UNSTEADY):  # of every row, and in the report
            print(f"{'':21}{note}", flush=True)


# A layer in one decode step, on the host: its number, its hidden, ids and weights, and its output.
Sample = tuple[int, Tensor, Tensor, Tensor, Tensor]


@contextmanager
def _calling(dispatcher: MoeDispatcher, run: Callable[..., Tensor]) -> Iterator[None]:
    """Inside, a layer's experts are called by `run`."""
    dispatcher.run = run  # type: ignore[method-assign]
    try:
        yield
    finally:
        del dispatcher.run  # type: ignore[method-assign]


@contextmanager
def watched(engine: Engine) -> Iterator[list[Sample]]:
    """Inside, the first and the last MoE layer of each decode step are kept."""
    dispatcher, samples = engine.dispatcher, []
    run, watched_layers = dispatcher.run, {0, engine.store.n_layers - 1}

    def watching(layer: int, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out = run(layer, hidden, index, weights)
        if len(hidden) == 1 and layer in watched_layers:
            if dispatcher.forced_routing is not None:
                index, weights = dispatcher.forced_routing.choose(layer, index, weights)
            samples.append((layer, hidden.cpu(), index.cpu(), weights.cpu(), out.cpu()))
        return out

    with _calling(dispatcher, watching):
        yield samples


def set_up(engine: Engine, setting: Setting) -> None:
    """Serve misses as `setting` says; what is changed lasts as long as its slots do."""
    if engine.graphs is not None:
        engine.graphs.enabled = setting.graphs
        engine.graphs.records_experts = setting.records_hits
    engine.use_cache(setting.cache)  # with the costs of steps such as the setting's
    if engine.accelerator is None:
        return
    gpu = engine.accelerator.gpu

    def waited_for(start: Callable[..., Pending]) -> Callable[..., Pending]:
        def launch_and_wait(*arguments: Any) -> Pending:
            pending = start(*arguments)
            pending.end.synchronize()
            return pending

        return launch_and_wait

    if not setting.overlap:
        gpu.launch = waited_for(gpu.launch)  # type: ignore[method-assign]
        gpu.replay = waited_for(gpu.replay)  # type: ignore[method-assign]
    if not setting.tiles:
        gpu._tiles = None


@contextmanager
def timed_between(engine: Engine) -> Iterator[list[float]]:
    """Fills with the time from one layer's experts to the next one's, us, in decode steps."""
    dispatcher = engine.dispatcher
    run, between_us, ended_s = dispatcher.run, [0.0], 0.0

    def timed(layer: int, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        nonlocal ended_s
        if layer and len(hidden) == 1:
            between_us.append(1e6 * (time.perf_counter() - ended_s))
        out = run(layer, hidden, index, weights)
        ended_s = time.perf_counter()
        return out

    with _calling(dispatcher, timed):
        yield between_us


def hits_slowed(recorder: Recorder) -> float | None:
    """What a hit takes in layers that start copies, over what it takes in others."""
    layers = recorder.layer_table()
    layers = layers[layers["hits"] > 0]
    each_us = layers["gpu_us"] / layers["hits"]
    copying = layers["fetches"] > 0
    if copying.all() or not copying.any():
        return None
    return float(np.median(each_us[copying]) / np.median(each_us[~copying]))


def layer_error(engine: Engine, samples: Sequence[Sample]) -> float:
    """The largest relative error of the last samples against the torch oracle."""
    errors = []
    for layer, hidden, index, weights, out in samples[-_CHECKED_LAYERS:]:
        layout, site = engine.store.layouts[layer], engine.sites[layer]
        blocks = {e: engine.store.block(layer, e) for e in index.unique().tolist()}
        expected = experts_forward(
            layout, blocks, hidden, index, weights.float(), site.activation, site.act_module
        )
        errors.append(float((out.float() - expected).norm() / expected.norm()))
    return max(errors)


def start_trace_over(engine: Engine) -> None:
    routing = engine.dispatcher.forced_routing
    if isinstance(routing, ForcedRouting):
        routing.next_token = 0


@torch.inference_mode()
def logits(engine: Engine, ids: list[int]) -> Tensor:
    """Logits [T, vocabulary] of a prompt pass and of some decode steps after it.

    The steps are those of `generate`, so that graphs serve them where they serve a text.
    """
    start_trace_over(engine)
    cache = make_cache(engine.model.config, len(ids) + CHECKED_STEPS)
    shared = {"use_cache": True, cache_argument(engine.model): cache}
    inputs = torch.tensor([ids], device=engine.device)
    positions = torch.arange(len(ids) + CHECKED_STEPS, device=engine.device)[None]
    prompt = engine.model(input_ids=inputs, position_ids=positions[:, : len(ids)], **shared)
    found = [prompt.logits[0]]
    for step in range(CHECKED_STEPS):
        place = len(ids) + step
        output = engine.model(
            input_ids=inputs[:, step : step + 1],
            attention_mask=None,
            position_ids=positions[:, place : place + 1],
            logits_to_keep=1,
            **shared,
        )
        found.append(output.logits[0])
    return torch.cat(found).float().cpu()


@contextmanager
def eager(engine: Engine) -> Iterator[None]:
    """Inside, no step is replayed by graphs."""
    enabled = engine.graphs is not None and engine.graphs.enabled
    if engine.graphs is not None:
        engine.graphs.enabled = False
    yield
    if engine.graphs is not None:
        engine.graphs.enabled = enabled


@dataclass(frozen=True)
class Measured:
    """The record of the steps after the warm-up; `fetched_ahead` were hits by prefetching."""

    recorder: Recorder
    prefill_s: float
    fetched_ahead: int


def measure(
    engine: Engine, ids: list[int], warm_up: int, n_steps: int, budget_s: float, patient: bool
) -> Measured:
    """Generate; fewer steps where they do not fit `budget_s`, and with `patient` a full warm-up."""
    start_trace_over(engine)
    recorder, prefill_s, steps, used = Recorder(), 0.0, 0, 0
    began_s = time.monotonic()
    measuring_since: int | None = None
    for record, _ in generate_batch(
        engine.model, [ids], GenerationOptions(max_tokens=1 + warm_up + n_steps)
    ):
        prefill_s, steps = record.token_times_s[0], len(record.ids) - 1
        elapsed_s = time.monotonic() - began_s
        if measuring_since is None:
            impatient = not patient and steps and elapsed_s > budget_s / 3
            if steps >= warm_up or impatient:
                measuring_since, used = steps, _used_of_prefetched(engine)
                engine.dispatcher.recorder = recorder
            continue
        recorder.token(0, record.token_times_s[-1], time.time())
        measured = steps - measuring_since
        if measured >= n_steps or (measured >= LEAST_STEPS and elapsed_s > budget_s):
            break
    engine.dispatcher.recorder = NullRecorder()
    return Measured(recorder, prefill_s, _used_of_prefetched(engine) - used)


@torch.inference_mode()
def prompt_speeds(engine: Engine, budget_s: float) -> dict[int, float]:
    """Tokens/s of prompts of `PROMPT_LENGTHS` that the context and `budget_s` hold.

    A short one warms up. A longer one is begun if it is expected to end in time: reading or copying
    the experts takes as long for many tokens as for few, their arithmetic does not; in between.
    """
    context = engine.source.config.get_text_config().max_position_embeddings
    took_s: dict[int, float] = {}
    for n_tokens in (n for n in (_WARM_UP_PROMPT, *PROMPT_LENGTHS) if n <= context):
        left_s = budget_s - sum(took_s.values())
        if took_s and max(took_s.values()) * (n_tokens / max(took_s)) ** 0.5 > left_s:
            break
        start_trace_over(engine)
        ids = torch.arange(n_tokens, device=engine.device)[None] % engine.source.config.vocab_size
        began_s = time.monotonic()
        engine.model(input_ids=ids, use_cache=True, logits_to_keep=1)  # ends with a synchronisation
        took_s[n_tokens] = time.monotonic() - began_s
    return {n: n / took_s[n] for n in PROMPT_LENGTHS if n in took_s}


def _used_of_prefetched(engine: Engine) -> int:
    return 0 if engine.accelerator is None else engine.accelerator.prefetch.used


def bound_step_us(engine: Engine, measured: Measured) -> float:
    """The least time of a decode step for the hits that this setting's cache had."""
    assert engine.costs is not None
    costs = engine.costs.model
    layers = measured.recorder.layer_table()
    n_steps = int(measured.recorder.pass_table()["decode"].sum())
    hits = (int(layers["hits"].sum()) - measured.fetched_ahead) / n_steps
    misses = int((layers["n_tokens"] * layers["top_k"]).sum()) / n_steps - hits
    n_layers = engine.store.n_layers
    if engine.accelerator is None:  # no bus to share the misses with
        cpu_us = costs.cpu.one_us(1)
        return costs.step_us + n_layers * costs.dense_us_per_layer + misses * cpu_us
    return bound_us(costs, n_layers, hits, misses)


def prompt_ids(engine: Engine) -> list[int]:
    """The text before the decode steps."""
    n = min(1000, engine.source.config.vocab_size)
    return [(7 * i + 3) % n for i in range(PROMPT_TOKENS)]


def cpu_logits(engine: Engine, routing: ForcedRouting) -> Tensor:
    """What the settings' are held against: of an engine without a cache, eager."""
    assert engine.accelerator is None
    engine.dispatcher.forced_routing = routing
    with eager(engine):
        return logits(engine, prompt_ids(engine))


def run_setting(
    engine: Engine,
    shape: str,
    setting: Setting,
    routing: ForcedRouting,
    reference: Tensor,
    n_steps: int,
    budget_s: float,
) -> Row:
    """Measure one setting and check its layers and, with forced routing, its logits."""
    engine.notes.clear()
    engine.dispatcher.forced_routing = routing if setting.forced else None
    set_up(engine, setting)
    engine.calibrate()
    assert engine.costs is not None
    ids = prompt_ids(engine)
    patient = setting.cache.miss_policy == "auto"
    replayed = 0 if engine.graphs is None else engine.graphs.replayed
    with timed_between(engine) as between_us:
        measured = measure(engine, ids, setting.warm_up_steps, n_steps, budget_s, patient)
    if engine.graphs is not None:
        replayed = engine.graphs.replayed - replayed
    with watched(engine) as samples:
        found = logits(engine, ids)
    error = layer_error(engine, samples)
    speeds = prompt_speeds(engine, _PROMPTS_SHARE * budget_s) if setting.prompts else {}
    logit_error = None
    if setting.forced:
        logit_error = float((found - reference).norm() / reference.norm())
    recorder = measured.recorder
    summary = summarize(recorder)
    assert summary.step_ms is not None
    bound_ms = bound_step_us(engine, measured) / 1e3
    predicted_us = engine.predicted_step_us(recorder)
    stats = None
    if engine.accelerator is not None and engine.accelerator.prefetch.chosen:
        stats = engine.accelerator.prefetch
    cache, costs = engine.describe(), engine.costs.model
    hit_us = costs.gpu.one_us(1) if engine.accelerator else 0.0  # 0 too where all is launching
    return Row(
        shape=shape,
        layers=engine.store.n_layers,
        stored_layers=engine.store.n_stored,
        weight_format=engine.source.weight_format,
        setting=setting.name,
        routing="forced" if setting.forced else "model",
        cache=f"{cache['cache_nblocks']} x {cache['cache_nways']}",
        computed_by=cache["accelerator"] or cache["cpu_kernels"],
        steps=int(recorder.pass_table()["decode"].sum()),
        tokens_per_s=1e3 / summary.step_ms,
        step_ms=summary.step_ms,
        predicted_ms=None if predicted_us is None else predicted_us / 1e3,
        bound_ms=bound_ms,
        percent_of_bound=100 * bound_ms / summary.step_ms,
        hit_percent=summary.decode_hits.per_expert_percent,
        fetched_gb=summary.fetched_bytes / 1e9,
        prefetch_recall_percent=None if stats is None else 100 * stats.recall,
        prefetch_wasted_gb=None if stats is None else stats.wasted_bytes / 1e9,
        cpu_read_gbps=summary.cpu_read_gbps,
        hit_gbps=costs.block_bytes / hit_us / 1e3 if hit_us > 0 else None,
        copy_gbps=costs.copy_gbps if engine.accelerator else None,
        hits_slowed=hits_slowed(recorder),
        between_us=statistics.median(between_us),
        replayed=replayed,
        parts_ms=summary.parts_ms,
        prefill_tokens_per_s=PROMPT_TOKENS / measured.prefill_s,
        prompts_tokens_per_s=speeds,
        layer_error=error,
        logit_error=logit_error,
        correct=bool(found.isfinite().all())
        and error <= LAYER_TOLERANCE[engine.source.weight_format]
        and (logit_error is None or logit_error <= LOGIT_TOLERANCE[engine.source.weight_format]),
        notes=engine.notes + engine.learnt(),
    )
