"""What the recorder costs: `PYTHONPATH=src python3 benchmarks/bench_recorder.py [--json FILE]`.

Prints the median cost of one `Recorder.layer` call in microseconds (best of the repeats beside it)
for one decode token at several top-k, with all durations known and with three that the device still
holds, for the null recorder, and per token of a 512-token prefill, with the bytes kept per event.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from recorder import NullRecorder, Recorder


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


def _layer_call(
    recorder: Recorder | NullRecorder, top_k: int, n_tokens: int, on_device: bool
) -> Callable[[], None]:
    ids = [[(t + k) % 128 for k in range(top_k)] for t in range(n_tokens)]
    hits = [1] * n_tokens
    device = _FinishedEvents() if on_device else 12.5

    def call() -> None:
        recorder.layer(
            layer=3,
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

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows to this file")
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
        n_calls = 20000 if n_tokens == 1 else 500
        median_us, best_us = _call_us(_layer_call(recorder, top_k, n_tokens, on_device), n_calls)
        rows.append({"case": name, "median_us": median_us, "best_us": best_us})
        print(f"{name:36} {median_us:8.2f} us per layer (best {best_us:.2f})")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
