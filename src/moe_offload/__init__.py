"""Mixture-of-Experts language models on machines whose GPU cannot hold them.

`from moe_offload import load_model, load_tokenizer` is the Python door (docs/PYTHON_API.md). Both
are imported when they are asked for: importing a wing loads nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from moe_offload.engine.loading import load_model
    from moe_offload.model.tokenization import load_tokenizer

__all__ = ["VERSION", "load_model", "load_tokenizer"]

# As `--version` prints it and prepared folders record it; pyproject.toml reads it from here.
VERSION: Final = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "load_model":
        from moe_offload.engine.loading import load_model

        return load_model
    if name == "load_tokenizer":
        from moe_offload.model.tokenization import load_tokenizer

        return load_tokenizer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
