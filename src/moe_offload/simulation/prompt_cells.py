"""What a prompt chose in one layer, as a cell of expert_choices.csv: `5:12* 3:7`.

Each expert that the prompt chose once, those of its last token first and then back, with the
number of its tokens that chose it; `*` marks an expert that the prompt copied to the GPU to compute
it there. That is all that the cache learns of a prompt, in a fraction of the prompt's own size.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

_ENTRY = re.compile(r"(\d+):([1-9]\d*)(\*?)")


def prompt_cell(seen: Iterable[tuple[int, int]], waited: Collection[int]) -> str:
    """The cell of (expert, number of tokens) pairs, the last token's first."""
    return " ".join(f"{expert}:{n}{'*' * (expert in waited)}" for expert, n in seen)


def read_prompt_cell(cell: str) -> tuple[tuple[tuple[int, int], ...], tuple[int, ...]]:
    """The (expert, number of tokens) pairs and the copied experts; ValueError with a bad entry."""
    seen, waited = [], []
    for entry in cell.split():
        match = _ENTRY.fullmatch(entry)
        if match is None:
            raise ValueError(entry)
        seen.append((int(match[1]), int(match[2])))
        if match[3]:
            waited.append(int(match[1]))
    return tuple(seen), tuple(waited)
