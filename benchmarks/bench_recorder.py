"""What the recorder costs: `PYTHONPATH=src python3 benchmarks/bench_recorder.py [--json FILE]`.

Prints the median cost of one layer event, its packing included, in microseconds (best of the
repeats beside it) for one decode token at several top-k, for the null recorder, and
for a 512-token prefill. Then what recording
adds to the decode layers of the smallest published shape (Qwen3-30B-A3B in int4, the fewest expert
bytes of all), with and without a cache, without the head, whose time would hide it: recorded and
unrecorded steps of one engine in turns, and the time that passes inside the recorder.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from moe_offload.config import CacheOptions, ModelOptions
from moe_offload.engine.loading import load_engine
from moe_offload.experts.accelerator import Accelerator
from moe_offload.experts.recorder import LayerEvent, NullRecorder, Recorder
from moe_offload.model.dummy import DummyModel, ForcedRouting
from moe_offload.model.generation import cache_argument
from moe_offload.simulation.traces import Routing, RoutingPass, Trace, TraceInfo

SHAPE, N_LAYERS = "qwen3-30b-a3b", 4
N_WAYS, N_MISSES = 16, 4  # of each layer's 128 experts, and of a token's 8
N_PASS_LAYERS = 32


def _call_us(body: Callable[[], None], n_calls: int, n_repeats: int = 15) -> tuple[float, float]:
    costs = []
    for _ in range(n_repeats):
        start = time.perf_counter()
        for _ in range(n_calls):
            body()
        costs.append((time.perf_counter() - start) / n_calls * 1e6)
    return statistics.median(costs), min(costs)


def _pass_call(recorder: Recorder | NullRecorder, top_k: int, n_tokens: int) -> Callable[[], None]:
    ids = [[(t + k) % 128 for k in range(top_k)] for t in range(n_tokens)]
    hits = [1] * n_tokens

    def call() -> None:
        recorder.begin_pass("decode", n_tokens, 0)
        for layer in range(N_PASS_LAYERS):
            event = LayerEvent(
                layer=layer,
                ids=ids,
                n_hits_of_token=hits,
                hits=n_tokens,
                misses=n_tokens * (top_k - 1),
                fetches=1,
                evictions=1,
                attention_us=12.5,
                router_us=20.0,
                plan_us=5.0,
                cpu_us=200.0,
                gpu_us=12.5,
                copy_wait_us=0.0,
                combine_us=12.5,
                cpu_bytes=9437184,
                gpu_bytes=9437184,
                waited_bytes=0,
                fetch_bytes=9437184,
            )
            recorder.layer(event)
        recorder.end_pass(0.1)

    return call


class _Timed(Recorder):
    """Adds up what recording takes of real steps, its own clock included.

    From the question whether anything records until a layer's facts are kept, and all that happens
    as a pass begins and ends.
    """

    def __init__(self) -> None:
        super().__init__()
        self.inside_s = 0.0

    def begin_pass(self, *which: Any) -> None:
        self._time(super().begin_pass, *which)

    def end_pass(self, *duration: Any) -> None:
        self._time(super().end_pass, *duration)

    def _time(self, call: Callable[..., None], *arguments: Any) -> None:
        started_s = time.perf_counter()
        call(*arguments)
        self.inside_s += time.perf_counter() - started_s


class _TimedRecorder(_Timed):
    @property
    def enabled(self) -> bool:
        self._since_s = time.perf_counter()
        return True

    def at_end(self, event: Callable[[], LayerEvent]) -> None:
        super().at_end(event)
        self.inside_s += time.perf_counter() - self._since_s


class _TimedNullRecorder(_Timed, NullRecorder):
    """What of that `--no-record` takes as well."""


def _routing(source: DummyModel) -> ForcedRouting:
    """Tokens of which each layer's cache, once filled, misses N_MISSES experts, always others."""
    draw = random.Random(0)
    n_experts, top_k = source.n_experts[0], source.top_k

    def choose() -> tuple[int, ...]:
        hits = draw.sample(range(N_WAYS), top_k - N_MISSES)
        return (*hits, *draw.sample(range(N_WAYS, n_experts), N_MISSES))

    passes = Routing(
        RoutingPass("decode", tuple((choose(),) for _ in range(N_LAYERS))) for _ in range(509)
    )
    info = TraceInfo("benchmark", N_LAYERS, top_k, n_experts, synthetic=True)
    return ForcedRouting(Trace(info, passes), N_LAYERS, n_experts, top_k)


def _fill_cache(accelerator: Accelerator) -> None:
    """Every slot gets an expert, and keeps it: no step copies anything.

    The accelerator then computes nothing: a GPU's arithmetic would not take these cores.
    """
    for layer in range(accelerator.cache.n_indexes):
        for expert in range(accelerator.cache.n_ways):
            slot = accelerator.cache.admit(layer, expert)
            if slot is not None:
                accelerator.fetch(layer, expert, slot)
    with accelerator.lending_slots():  # waits for the copies
        accelerator.quota = 0
    nothing = torch.zeros(1, accelerator.gpu.layout.hidden_size)
    accelerator.gpu._forward = lambda *_: nothing  # type: ignore[method-assign]


def _share_of_step(options: CacheOptions, n_blocks: int) -> dict[str, float]:
    """What recording adds to a step: by comparing steps, and by the time inside the recorders.

    A block is two recorded and two plain steps in turns, recorded ones outside and inside by
    turns, then one of either kind whose recorder is timed. All have the same hits and misses and
    none copies an expert. `added` is the mean of the logarithm of the recorded steps' times less
    that of the plain ones', `inside` the difference of the timed recorders, as a share of the plain
    steps. Blocks are averaged without the tenth at either end; ranges are bootstrapped.
    """
    model_options = ModelOptions(
        None, device="cpu", dummy_shape=SHAPE, dummy_layers=N_LAYERS, dummy_format="int4"
    )
    source = DummyModel(model_options)
    plain, recorder = NullRecorder(), Recorder()
    timed, timed_plain = _TimedRecorder(), _TimedNullRecorder()
    with load_engine(source, model_options, options) as engine, torch.inference_mode():
        engine.dispatcher.forced_routing = _routing(source)
        engine.model.lm_head = torch.nn.Identity()
        name = cache_argument(engine.model)
        prompt = DynamicCache(config=engine.model.config)
        engine.model(input_ids=torch.tensor([list(range(1, 17))]), **{name: prompt})
        if engine.accelerator is not None:
            _fill_cache(engine.accelerator)
        token = torch.tensor([[5]])

        def step_us(which: Recorder, cache: object) -> float:
            engine.dispatcher.recorder = which
            started_s = time.perf_counter()
            engine.model(input_ids=token, **{name: cache})
            return (time.perf_counter() - started_s) * 1e6

        plain_us: list[float] = []
        added: list[float] = []
        inside_us: list[float] = []
        for number in range(n_blocks + 5):
            cache = copy.deepcopy(prompt)  # every block attends to as many tokens
            outside = number % 2 == 1
            order = (recorder, plain) if outside else (plain, recorder)
            times_us = [step_us(which, cache) for which in (*order, *reversed(order))]
            first, second, third, fourth = map(math.log, times_us)
            ratio = (first - second - third + fourth) / 2
            timed.inside_s = timed_plain.inside_s = 0.0
            for which in (timed, timed_plain):
                step_us(which, cache)
            if number >= 5:  # the first ones warm up
                plain_us += times_us[1:3] if outside else times_us[::3]
                added.append(ratio if outside else -ratio)
                inside_us.append((timed.inside_s - timed_plain.inside_s) * 1e6)
    step = statistics.median(plain_us)
    row = {"plain_ms": step / 1e3, "inside_us": _trimmed_mean(inside_us)}
    for figure, values in (("added", added), ("inside", [us / step for us in inside_us])):
        for part, value in zip(("", "_low", "_high"), _with_range(values), strict=True):
            row[f"{figure}{part}_percent"] = 100 * value
    return row


def _with_range(values: Sequence[float]) -> tuple[float, float, float]:
    """The trimmed mean, and between which values 95% of its bootstrap repeats lie."""
    draw = random.Random(0)
    repeats = sorted(_trimmed_mean(draw.choices(values, k=len(values))) for _ in range(400))
    return _trimmed_mean(values), repeats[10], repeats[-11]


def _trimmed_mean(values: Sequence[float]) -> float:
    cut = len(values) // 10
    return statistics.fmean(sorted(values)[cut : len(values) - cut])


def _range(row: dict[str, float], what: str) -> str:
    return (
        f"{row[f'{what}_percent']:+.2f}% (95%: {row[f'{what}_low_percent']:+.2f} to "
        f"{row[f'{what}_high_percent']:+.2f}%)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--blocks", type=int, default=1000, help="of six whole steps")
    args = parser.parse_args()
    rows: list[dict[str, object]] = []
    cases = [
        ("decode, top-2", Recorder(), 2, 1),
        ("decode, top-8", Recorder(), 8, 1),
        ("decode, top-8, --no-record", NullRecorder(), 8, 1),
        ("prefill of 512 tokens, top-8", Recorder(), 8, 512),
    ]
    for name, recorder, top_k, n_tokens in cases:
        n_calls = 600 if n_tokens == 1 else 15
        one_pass = _pass_call(recorder, top_k, n_tokens)
        median_us, best_us = (us / N_PASS_LAYERS for us in _call_us(one_pass, n_calls))
        rows.append({"case": name, "median_us": median_us, "best_us": best_us})
        print(f"{name:36} {median_us:8.2f} us per layer (best {best_us:.2f})")
    for name, options in (
        ("no cache", CacheOptions()),
        (f"emulated {N_LAYERS} x {N_WAYS}", CacheOptions(n_indexes=N_LAYERS, n_ways=N_WAYS)),
    ):
        row = _share_of_step(options, args.blocks)
        rows.append({"case": f"share of a decode step, {name}", **row})
        print(
            f"{N_LAYERS} decode layers of {SHAPE}, int4, {name}: {row['plain_ms']:.3f} ms; "
            f"recording adds {_range(row, 'added')}, "
            f"{row['inside_us']:.0f} us inside the recorder are {_range(row, 'inside')}"
        )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
