"""What refilling a batch is worth: prompts of unlike answers, with and without it, in turn.

PYTHONPATH=src python3 benchmarks/bench_refill.py --model-path build/demo/prepared
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from pathlib import Path
from unittest.mock import patch

from moe_offload.config import CacheOptions, GenerationOptions, ModelOptions
from moe_offload.engine.loading import load_engine, open_prepared
from moe_offload.model import generation
from moe_offload.model.generation import Request, generate
from moe_offload.model.tokenization import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-path", type=Path, default=ROOT / "build" / "demo" / "prepared")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--n-prompts", type=int, default=24)
    parser.add_argument("--longest", type=int, default=96, help="answers have 8 to so many tokens")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    options = ModelOptions(model_path=arguments.model_path, device="cpu")
    source = open_prepared(options)
    tokenizer = load_tokenizer(source.folder, source.config.model_type)
    texts = (ROOT / "prompts.txt").read_text(encoding="utf-8").splitlines()
    chance = random.Random(0)
    requests = [
        Request(
            number,
            tokenizer.encode(texts[number % len(texts)], raw=False),
            GenerationOptions(chance.randint(8, arguments.longest)),
        )
        for number in range(arguments.n_prompts)
    ]
    with load_engine(source, options, CacheOptions()) as engine:

        def run(batch_size: int, refilled: bool) -> tuple[float, float]:
            """Tokens per second, and the mean time, s, after which an answer is finished."""
            finished_s = []
            with patch.object(generation, "can_refill", lambda _: refilled):
                started_s, n_tokens = time.perf_counter(), 0
                for record, _ in generate(engine.model, requests, batch_size):
                    n_tokens += 1
                    if record.stop != "interrupted":
                        finished_s.append(time.perf_counter() - started_s)
            return n_tokens / finished_s[-1], statistics.mean(finished_s)

        # one at a time takes as long as three rounds of both others, and once is enough for it
        found = {"one at a time": [run(1, True)], "whole batches": [], "refilled": []}
        for _ in range(arguments.rounds):
            found["whole batches"].append(run(arguments.batch_size, False))
            found["refilled"].append(run(arguments.batch_size, True))
    for name, runs in found.items():
        rates, means_s = zip(*runs, strict=True)
        print(
            f"{name}: {statistics.median(rates):.1f} tok/s "
            f"(of {', '.join(f'{one:.1f}' for one in rates)}), "
            f"an answer finished after {statistics.median(means_s):.1f} s on average"
        )


if __name__ == "__main__":
    main()
