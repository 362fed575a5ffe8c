"""How many greedy answers change with the batch size, here and in transformers' own model.

`PYTHONPATH=src python3 benchmarks/bench_batches.py PREPARED SOURCE [--batch-size B] [--json FILE]`

PREPARED is a prepared folder, SOURCE the checkpoint that it was prepared from. Both models answer
the same prompts (prompts.txt, then lines of Python's own help) through the same loop, alone and in
batches. Where bf16 rounds a sum otherwise, the nearer of two tokens may change, and with it the
rest of the answer: what is counted is rounding, and transformers' count is what it costs anyway.
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from moe_offload.config import GenerationOptions
from moe_offload.engine.loading import load_model
from moe_offload.model.generation import generate_batch, stop_ids
from moe_offload.model.tokenization import load_tokenizer

PROMPTS = Path(__file__).parents[1] / "prompts.txt"


def some_prompts(n: int) -> list[str]:
    lines = [line for line in PROMPTS.read_text().splitlines() if line]
    for topic in sorted(pydoc_data.topics.topics):
        text = pydoc_data.topics.topics[topic].splitlines()
        lines += [line.strip() for line in text if 30 <= len(line.strip()) <= 76][3:40:9]
    return lines[:n]


def answers(
    model: PreTrainedModel, prompts: list[list[int]], batch_size: int, n_tokens: int
) -> list[list[int]]:
    """The token ids of each prompt's greedy answer."""
    options, found = GenerationOptions(n_tokens), {}
    for first in range(0, len(prompts), batch_size):
        batch = prompts[first : first + batch_size]
        ends = stop_ids(model, frozenset())
        for record, _ in generate_batch(model, batch, options, eos_ids=ends, first_prompt=first):
            found[record.prompt] = record.ids
        print(f"  {len(found)} of {len(prompts)}", end="\r", file=sys.stderr)
    return [found[number] for number in range(len(prompts))]


def changed(some: list[list[int]], others: list[list[int]]) -> int:
    return sum(one != other for one, other in zip(some, others, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prepared", type=Path)
    parser.add_argument("source", type=Path)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--n-prompts", type=int, default=40)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    ours = load_model(arguments.prepared, device="cpu")
    tokenizer = load_tokenizer(arguments.prepared, ours.config.model_type)
    prompts = [tokenizer.encode(text, raw=False) for text in some_prompts(arguments.n_prompts)]
    sizes = {"alone": 1, "batch": arguments.batch_size}
    mine = {name: answers(ours, prompts, sizes[name], arguments.max_tokens) for name in sizes}
    ours.engine.close()
    theirs_model = AutoModelForCausalLM.from_pretrained(arguments.source, dtype=ours.dtype).eval()
    theirs = {
        name: answers(theirs_model, prompts, sizes[name], arguments.max_tokens) for name in sizes
    }
    result = {
        "prompts": len(prompts),
        "dtype": str(ours.dtype).removeprefix("torch."),
        "batch_size": arguments.batch_size,
        "max_tokens": arguments.max_tokens,
        "threads": torch.get_num_threads(),
        "here, alone against batch": changed(mine["alone"], mine["batch"]),
        "transformers, alone against batch": changed(theirs["alone"], theirs["batch"]),
        "here against transformers, alone": changed(mine["alone"], theirs["alone"]),
    }
    print(json.dumps(result, indent=1))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
