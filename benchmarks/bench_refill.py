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
from moe_offload.engine.engine import load_engine, open_prepared
from moe_offload.model import generation
from moe_offload.model.generation import Request, generate
from moe_offload.model.tokenization import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-path", type=Path, default=ROOT / "build" / "demo" / "prepared")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--n-prompts", type=int, default=32)
    parser.add_argument("--longest", type=int, default=128, help="answers have 8 to so many tokens")
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

        def rate(batch_size: int, refilled: bool) -> float:
            """Tokens per second of all prompts, none of which ends early."""
            with patch.object(generation, "can_refill", lambda _: refilled):
                started = time.perf_counter()
                n_tokens = sum(1 for _ in generate(engine.model, requests, batch_size))
                return n_tokens / (time.perf_counter() - started)

        found: dict[str, list[float]] = {"one at a time": [], "whole batches": [], "refilled": []}
        for _ in range(arguments.rounds):
            found["one at a time"].append(rate(1, True))
            found["whole batches"].append(rate(arguments.batch_size, False))
            found["refilled"].append(rate(arguments.batch_size, True))
    for name, rates in found.items():
        middle = statistics.median(rates)
        print(f"{name}: {middle:.1f} tok/s (of {', '.join(f'{one:.1f}' for one in rates)})")


if __name__ == "__main__":
    main()
