"""Entry point of check.py: a prepared folder's answers against transformers' own model."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from moe_offload.checkpoint.folders import require_prepared
from moe_offload.commands.arguments import ArgumentParser, a_path, add_flags, chosen, run_command
from moe_offload.config import CacheOptions, GenerationOptions, ModelOptions
from moe_offload.machine.terminal import say, show

EXIT_WRONG = 1
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
    n_tokens = GenerationOptions(arguments.max_tokens).max_tokens
    assert model.model_path is not None  # there are no random weights to check
    require_prepared(model.model_path)
    from moe_offload.engine.check import check_engine  # torch: seconds
    from moe_offload.engine.engine import load_engine, open_prepared
    from moe_offload.model.tokenization import load_tokenizer

    source = open_prepared(model)
    tokenizer = load_tokenizer(model.model_path, source.config.model_type)
    with load_engine(source, model, cache) as engine:
        for note in engine.notes:
            say(note)
        where: Path | None = arguments.source
        if where is None and Path(source.manifest.source).exists():
            where = Path(source.manifest.source)
        prompts = [tokenizer.encode(text, raw=False) for text in TEXTS]
        result = check_engine(engine, prompts, n_tokens, where)
    with suppress(BrokenPipeError):  # nobody reads it; the exit code tells it too
        show("\n".join(result.lines()))
    return 0 if result.is_right else EXIT_WRONG
