"""What the recorder costs: `PYTHONPATH=src python3 benchmarks/bench_recorder.py [--json FILE]`.

Prints the median cost of one layer event, its packing included, in microseconds (best of the
repeats beside it) for one decode token at several top-k, with all durations known and with three
that the device still holds, for the null recorder, and for a 512-token prefill. Then what recording
adds to the decode layers of the smallest published shape (Qwen3-30B-A3B in int4, the fewest expert
bytes of all), with and without a cache: recorded and unrecorded steps of one engine in turns,
without the head, whose time would hide it.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import DynamicCache

from config import CacheOptions, ModelOptions
from dummy_model import DummyModel, dummy_routing
from engine import load_engine
from generation import cache_argument
from recorder import NullRecorder, Recorder

SHAPE, N_LAYERS = "qwen3-30b-a3b", 2
N_PASS_LAYERS = 32


class _FinishedEvents:
    def resolve(self) -> float:
        return 12.5


def _call_us(body: Callable[[], None], n_calls: int, n_repeats: int = 15) -> tuple[float, float]:
    costs = []
    for _ in range(n_repeats):
        start = time.perf_counter()
        for _ in range(n_calls):
            body()
        costs.append((time.perf_counter() - start) / n_calls * 1e6)
    return statistics.median(costs), min(costs)


def _pass_call(
    recorder: Recorder | NullRecorder, top_k: int, n_tokens: int, on_device: bool
) -> Callable[[], None]:
    ids = [[(t + k) % 128 for k in range(top_k)] for t in range(n_tokens)]
    hits = [1] * n_tokens
    device = _FinishedEvents() if on_device else 12.5

    def call() -> None:
        recorder.begin_pass("decode", n_tokens, 0)
        for layer in range(N_PASS_LAYERS):
            recorder.layer(
                layer=layer,
                ids=ids,
                n_hits_of_token=hits,
                hits=n_tokens,
                misses=n_tokens * (top_k - 1),
                fetches=1,
                evictions=1,
                attention_us=device,
                router_us=20.0,
                plan_us=5.0,
                cpu_us=200.0,
                gpu_us=device,
                copy_wait_us=0.0,
                combine_us=device,
                cpu_bytes=9437184,
                gpu_bytes=9437184,
                waited_bytes=0,
                fetch_bytes=9437184,
            )
        recorder.end_pass(0.1)

    return call


def _share_of_step(options: CacheOptions, n_rounds: int) -> dict[str, float]:
    """Median over rounds of (recorded - plain) steps that follow each other, and its bootstrap."""
    model_options = ModelOptions(
        None, device="cpu", dummy_shape=SHAPE, dummy_layers=N_LAYERS, dummy_format="int4"
    )
    source = DummyModel(model_options)
    recorders = (NullRecorder(), Recorder())
    with load_engine(source, model_options, options) as engine, torch.inference_mode():
        engine.dispatcher.forced_routing = dummy_routing(source, None)
        engine.model.lm_head = torch.nn.Identity()
        cache = {cache_argument(engine.model): DynamicCache(config=engine.model.config)}
        engine.model(input_ids=torch.tensor([list(range(1, 17))]), **cache)
        token = torch.tensor([[5]])
        steps_us: list[tuple[float, float]] = []
        for number in range(n_rounds + 5):
            pair = [0.0, 0.0]
            for which in (0, 1) if number % 2 else (1, 0):  # neither always comes first
                engine.dispatcher.recorder = recorders[which]
                started_s = time.perf_counter()
                engine.model(input_ids=token, **cache)
                pair[which] = (time.perf_counter() - started_s) * 1e6
            steps_us.append((pair[0], pair[1]))
    pairs = steps_us[5:]
    plain_us = statistics.median(plain for plain, _ in pairs)
    added_us = [recorded - plain for plain, recorded in pairs]
    draw = random.Random(0)
    repeats = sorted(statistics.median(draw.choices(added_us, k=n_rounds)) for _ in range(400))
    return {
        "plain_ms": plain_us / 1e3,
        "added_us": statistics.median(added_us),
        "added_percent": 100 * statistics.median(added_us) / plain_us,
        "low_percent": 100 * repeats[10] / plain_us,
        "high_percent": 100 * repeats[-11] / plain_us,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--rounds", type=int, default=300, help="pairs of whole steps")
    args = parser.parse_args()
    rows: list[dict[str, object]] = []
    cases = [
        ("decode, top-2", Recorder(), 2, 1, False),
        ("decode, top-8", Recorder(), 8, 1, False),
        ("decode, top-8, 3 device durations", Recorder(), 8, 1, True),
        ("decode, top-8, --no-record", NullRecorder(), 8, 1, False),
        ("prefill of 512 tokens, top-8", Recorder(), 8, 512, False),
    ]
    for name, recorder, top_k, n_tokens, on_device in cases:
        n_calls = 600 if n_tokens == 1 else 15
        one_pass = _pass_call(recorder, top_k, n_tokens, on_device)
        median_us, best_us = (us / N_PASS_LAYERS for us in _call_us(one_pass, n_calls))
        rows.append({"case": name, "median_us": median_us, "best_us": best_us})
        print(f"{name:36} {median_us:8.2f} us per layer (best {best_us:.2f})")
    for name, options in (
        ("no cache", CacheOptions()),
        ("emulated 2 x 16", CacheOptions(n_indexes=2, n_ways=16, policy="LRU")),
    ):
        row = _share_of_step(options, args.rounds)
        rows.append({"case": f"share of a decode step, {name}", **row})
        print(
            f"{N_LAYERS} decode layers of {SHAPE}, int4, {name}: "
            f"{row['plain_ms']:.3f} ms, recording adds {row['added_us']:.1f} us "
            f"({row['added_percent']:+.2f}%, 95% of repeats within "
            f"{row['low_percent']:+.2f} and {row['high_percent']:+.2f}%)"
        )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
