"""Entry point of check.py: a prepared folder's answers against transformers' own model."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from moe_offload.commands.arguments import (
    ArgumentParser,
    a_path,
    add_flags,
    chosen,
    require_model,
    run_command,
)
from moe_offload.commands.imports import importing
from moe_offload.config import CacheOptions, ModelOptions, require_range
from moe_offload.machine.terminal import say, show

EXIT_WRONG = 1
MOST_TOKENS = 1000  # per text: the logits of all are compared at once
TEXTS = (
    "Explain in two sentences why the sky is blue.",
    "def fibonacci(n):",
    "Write a short letter to a friend who has moved to another city.",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 right, 1 wrong, 2 a mistake of the user's."""
    parser = ArgumentParser(
        prog="check.py",
        description="Compare this tool's answers with those of transformers' own model, layer by "
        "layer, and name what differs. Exit code 0: right, 1: wrong.",
    )
    add_flags(parser, ModelOptions, "model_path", "device", "host_memory_gb")
    parser.add_argument(
        "--source",
        type=a_path,
        help="the checkpoint it was prepared from, to compare every weight with "
        "(default: where that was, if it is still there)",
    )
    parser.add_argument("--max-tokens", type=int, default=16, help="per text (default 16)")
    add_flags(parser, CacheOptions, "n_indexes", "n_ways", "policy")
    return run_command(parser, _check, argv)


def _check(arguments: Namespace) -> int:
    model = chosen(ModelOptions, vars(arguments))
    cache = chosen(CacheOptions, vars(arguments))
    require_range("--max-tokens", arguments.max_tokens, 1, MOST_TOKENS)
    assert model.model_path is not None  # there are no random weights to check
    require_model(model)
    with importing():
        from moe_offload.engine.check import check_engine
        from moe_offload.engine.loading import load_engine, open_prepared
        from moe_offload.model.generation import context_length, require_fitting
        from moe_offload.model.tokenization import load_tokenizer

    source = open_prepared(model)
    tokenizer = load_tokenizer(model.model_path, source.config.model_type)
    prompts = [tokenizer.encode(text, raw=False) for text in TEXTS]
    for prompt in prompts:
        require_fitting(prompt, source.config, "a text of the check")
    room = (context_length(source.config) or math.inf) - max(map(len, prompts))
    n_tokens = int(min(arguments.max_tokens, room))
    with load_engine(source, model, cache) as engine:
        for note in engine.notes:
            say(note)
        where: Path | None = arguments.source
        if where is None and Path(source.manifest.source).exists():
            where = Path(source.manifest.source)
        result = check_engine(engine, prompts, n_tokens, where)
    with suppress(BrokenPipeError):  # nobody reads it; the exit code tells it too
        show("\n".join(result.lines()))
    return 0 if result.is_right else EXIT_WRONG
