"""Entry point of check.py: a prepared folder's answers against transformers' own model."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_offload.checkpoint.folders import require_prepared
from moe_offload.commands.arguments import ArgumentParser, a_path
from moe_offload.config import POLICIES, CacheOptions, ModelOptions
from moe_offload.errors import UserError
from moe_offload.machine.terminal import say

EXIT_WRONG, EXIT_USER_ERROR = 1, 2
TEXTS = (
    "Explain in two sentences why the sky is blue.",
    "def fibonacci(n):",
    "Write a short letter to a friend who has moved to another city.",
)


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="check.py",
        description="Compare this tool's answers with those of transformers' own model, layer by "
        "layer, and name what differs. Exit code 0: right, 1: wrong.",
    )
    parser.add_argument("--model-path", type=a_path, required=True, help="the prepared folder")
    parser.add_argument(
        "--source",
        type=a_path,
        help="the checkpoint it was prepared from, to compare every weight with "
        "(default: where that was, if it is still there)",
    )
    parser.add_argument("--max-tokens", type=int, default=16, help="per text (default 16)")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--cache-nblocks", type=int, default=0, help="cache indexes N")
    parser.add_argument("--cache-nways", type=int, default=0, help="ways M")
    parser.add_argument("--cache-replace-policy", choices=POLICIES, default="FIFO")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 right, 1 wrong, 2 a mistake of the user's."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        options = build_parser().parse_args(argv)
        require_prepared(options.model_path)
        if options.max_tokens < 1:
            raise UserError(f"expected --max-tokens of at least 1, found {options.max_tokens}")
        cache = CacheOptions(
            n_indexes=options.cache_nblocks,
            n_ways=options.cache_nways,
            policy=options.cache_replace_policy,
        )
        return _check(options, cache)
    except KeyboardInterrupt:
        say("interrupted: no verdict")
        return 130
    except (UserError, OSError) as error:
        if "--debug" in argv:
            traceback.print_exc()
        say(f"error: {error}")
        return EXIT_USER_ERROR


def _check(options: Any, cache: CacheOptions) -> int:
    from moe_offload.engine.check import check_engine  # torch: seconds
    from moe_offload.engine.engine import load_engine, open_prepared
    from moe_offload.model.tokenization import load_tokenizer

    model = ModelOptions(model_path=options.model_path, device=options.device)
    source = open_prepared(model)
    tokenizer = load_tokenizer(options.model_path, source.config.model_type)
    with load_engine(source, model, cache) as engine:
        for note in engine.notes:
            say(note)
        where: Path | None = options.source
        if where is None and Path(source.manifest.source).is_dir():
            where = Path(source.manifest.source)
        prompts = [tokenizer.encode(text, raw=False) for text in TEXTS]
        result = check_engine(engine, prompts, options.max_tokens, where)
    for line in result.lines():
        print(line)
    return 0 if result.is_right else EXIT_WRONG
