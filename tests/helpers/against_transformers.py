"""A prepared folder and transformers' own eager model of the same checkpoint, to compare them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from moe_offload.commands import prepare
from moe_offload.model.generation import generate_batch, make_sampler

N_TOKENS = 32


def prepared(source: Path, folder: Path, *flags: str) -> Path:
    assert prepare.main(["--input-path", str(source), "--output-path", str(folder), *flags]) == 0
    return folder


def eager(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    ).eval()


def prompt_ids(vocabulary: int, length: int, n_prompts: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, vocabulary, (n_prompts, length), generator=generator)


def greedy(model: PreTrainedModel, prompts: list[list[int]]) -> list[list[int]]:
    sampler = make_sampler(0.0, 1.0, 0, model.device)
    records = {}
    for record, _ in generate_batch(
        model, prompts, max_tokens=N_TOKENS, sampler=sampler, eos_ids=frozenset()
    ):
        records[record.prompt] = record
    return [records[i].ids for i in range(len(prompts))]
