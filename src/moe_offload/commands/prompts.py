"""Prompts from the command line or a file, one per line."""

from __future__ import annotations

from itertools import cycle, islice
from pathlib import Path

from moe_offload.config import PromptOptions
from moe_offload.errors import UserError

_LARGEST_FILE_BYTES = 64 << 20  # a million long prompts; more is a wrong file


def read_prompts(options: PromptOptions) -> list[str]:
    """The prompts to run, in order; more than the file has cycles through it.

    A line ends at a line feed, a carriage return or both, and keeps its spaces; lines without text
    are skipped. UserError for an empty prompt, and for a file that is missing,
    empty, binary or too large to be a list of prompts.
    """
    if options.prompt is not None:
        if not options.prompt.strip():
            raise UserError("the prompt is empty: give --prompt some text")
        return [options.prompt] * (options.n_prompts or 1)
    assert options.path is not None
    lines = _lines(options.path)
    return list(islice(cycle(lines), options.n_prompts or len(lines)))


def _lines(path: Path) -> list[str]:
    try:
        size = path.stat().st_size
        if size > _LARGEST_FILE_BYTES:
            raise UserError(
                f"{path} has {size / 1e6:.0f} MB, expected a text file of prompts of at most "
                f"{_LARGEST_FILE_BYTES / 1e6:.0f} MB: split it"
            )
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read the prompt file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not a UTF-8 text file (byte {error.start}): expected one prompt per line"
        ) from error
    if "\0" in text:
        raise UserError(f"{path} is a binary file: expected text, one prompt per line")
    lines = [line for line in text.split("\n") if line.strip()]  # reading made all ends that
    if not lines:
        raise UserError(f"{path} holds no prompt: expected one per line")
    return lines
