"""Checks on what a model's configuration says, before anything is built or loaded from it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any

from transformers import GenerationConfig, PretrainedConfig

from moe_offload.errors import UserError

_STOP_IDS = ("eos_token_id", "bos_token_id", "pad_token_id")


@contextmanager
def transformers_told(task: str, remedy: str) -> Iterator[None]:
    """UserError for whatever transformers raises in here: it has many kinds for a bad config."""
    try:
        yield
    except Exception as error:
        said = f"it does not know {error}" if isinstance(error, KeyError) else str(error).strip()
        said = said.partition("\n\n")[0]  # an essay may follow the first paragraph
        reason = shorten(said, 160, placeholder=" ...").rstrip(".:") or type(error).__name__
        raise UserError(f"transformers cannot {task}: {reason}; {remedy}") from error


def experts_per_token(config: PretrainedConfig) -> int | None:
    """The most experts that a router chooses for a token; None where the config does not say.

    The field may be a list, one number per layer (Hunyuan).
    """
    top_k = getattr(config.get_text_config(), "num_experts_per_tok", None)
    return max(top_k) if isinstance(top_k, list) else top_k


def require_experts_per_token(
    config: PretrainedConfig, n_experts: int, path: Path, remedy: str
) -> None:
    """UserError when a router is to choose more experts than a layer's `n_experts`, or none."""
    top_k = experts_per_token(config)
    if top_k is not None and not 1 <= top_k <= n_experts:
        raise UserError(
            f"expected num_experts_per_tok of 1 to {n_experts} in {path}, found {top_k}; {remedy}"
        )


def require_generation_config(found: dict[str, Any], path: Path, remedy: str) -> None:
    """UserError for generation defaults that transformers or our own loop cannot use."""
    for name in _STOP_IDS:
        value = found.get(name)
        ids = value if isinstance(value, list) else [value]
        if value is not None and not all(type(one) is int and one >= 0 for one in ids):
            raise UserError(
                f"expected {name} in {path} as a token id or a list of them, found {value!r}; "
                f"{remedy}"
            )
    with transformers_told(f"use the generation defaults in {path}", remedy):
        GenerationConfig.from_dict(dict(found))
