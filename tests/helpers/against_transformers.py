"""A prepared folder and transformers' own eager model of the same checkpoint, to compare them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from moe_offload.commands import prepare
from moe_offload.config import GenerationOptions
from moe_offload.model.generation import generate_batch

N_TOKENS = 32


def prepared(source: Path, folder: Path, *flags: str) -> Path:
    assert prepare.main(["--input-path", str(source), "--output-path", str(folder), *flags]) == 0
    return folder


def eager(
    folder: Path, dtype: torch.dtype, model_class: Any = AutoModelForCausalLM
) -> PreTrainedModel:
    return model_class.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    ).eval()


def prompt_ids(vocabulary: int, length: int, n_prompts: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, vocabulary, (n_prompts, length), generator=generator)


def greedy(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], n_tokens: int = N_TOKENS
) -> list[list[int]]:
    """The ids that our loop generates for a batch of prompts, none of which ends it."""
    steps = generate_batch(model, prompts, GenerationOptions(max_tokens=n_tokens))
    records = {record.prompt: record for record, _ in steps}
    return [records[i].ids for i in range(len(prompts))]
