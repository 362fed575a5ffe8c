"""What the driver of a Ray cluster costs per prompt: workers that answer at once, and nothing else.

PYTHONPATH=src python3 benchmarks/bench_cluster.py
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moe_offload.commands.answers import Answers
from moe_offload.commands.cluster import Place, _connected, _Run
from moe_offload.commands.prompts import Prompt
from moe_offload.config import (
    CacheOptions,
    Config,
    GenerationOptions,
    ModelOptions,
    OutputOptions,
    PromptOptions,
)

PROMPT_CHARACTERS, ANSWER_CHARACTERS, PROMPT_TOKENS = 1200, 1200, 300


class Worker:
    """Answers without a model."""

    def load(self) -> str:
        return "here"

    def answer(self, encoded: Sequence[Any]) -> Iterator[tuple[int, dict[str, Any]]]:
        for prompt, _ in encoded:
            counts = {"prompt_tokens": PROMPT_TOKENS, "generated_tokens": 300}
            response = "a" * ANSWER_CHARACTERS
            yield prompt.index, {"response": response, "stop": "eos", **counts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n-prompts", type=int, default=2000)
    parser.add_argument("--n-workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    options = GenerationOptions(300)
    encoded = [
        (Prompt(n, "p" * PROMPT_CHARACTERS, options), list(range(PROMPT_TOKENS)))
        for n in range(arguments.n_prompts)
    ]
    costs_us = []
    with tempfile.TemporaryDirectory() as folder, _connected("local") as ray:
        for number in range(arguments.rounds + 1):
            output = OutputOptions(responses_jsonl=Path(folder) / str(number), quiet=True)
            model = ModelOptions(None, dummy_shape="mixtral-8x7b")
            config = Config(model, CacheOptions(), options, PromptOptions("none"), output)
            kind = ray.remote(Worker).options(num_cpus=0)
            actors = [kind.remote() for _ in range(arguments.n_workers)]
            ray.get([actor.load.remote() for actor in actors])
            places = [Place(n, kind.remote, actor) for n, actor in enumerate(actors)]
            with Answers(Path(folder) / str(number), config) as answers:
                run = _Run(ray, config, encoded, answers, places)
                started_s = time.perf_counter()
                run.work()
                seconds = time.perf_counter() - started_s
                run.close()
            if number > 0:  # the first one warms up
                costs_us.append(1e6 * seconds / arguments.n_prompts)
    spread = f"{min(costs_us):.0f} to {max(costs_us):.0f}"
    print(f"{statistics.median(costs_us):.0f} us per prompt (of {len(costs_us)}: {spread})")


if __name__ == "__main__":
    main()
