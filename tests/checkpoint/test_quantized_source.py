"""A quantised checkpoint is read as the numbers that its bytes mean, and kept exact if it can."""

from __future__ import annotations

from pathlib import Path

import pytest
import quantised_checkpoints
import torch
from against_transformers import eager, greedy, prepared, prompt_ids
from cpu_oracle import unpack_block
from quantised_checkpoints import SOURCES
from torch import Tensor

from moe_offload.checkpoint.prepared import read_block, read_manifest
from moe_offload.engine.engine import load_model


def experts_of(folder: Path) -> list[dict[str, Tensor]]:
    """Every expert's matrices in fp32, layer by layer."""
    found = []
    for layer in read_manifest(folder).moe_layers:
        for expert in range(layer.n_experts):
            block = torch.empty(layer.layout.block_bytes, dtype=torch.uint8)
            read_block(layer, expert, block)
            found.append(unpack_block(layer.layout, block))
    return found


@pytest.mark.parametrize("name", SOURCES)
def test_source(name: str, tmp_path: Path) -> None:
    """fp32: logits and greedy tokens of transformers' model of the dequantised weights.

    The format that is chosen holds the same numbers bit for bit, or is bf16.
    """
    source, plain = quantised_checkpoints.write(name, tmp_path)
    exact = prepared(source, tmp_path / "fp32", "--hf", "--expert-dtype", "fp32")
    theirs, ours = eager(plain, torch.float32), load_model(exact, device="cpu")
    ids = prompt_ids(theirs.config.vocab_size, 24)
    with torch.inference_mode():
        expected, found = theirs(ids).logits, ours(ids).logits
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    tokens = theirs.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert greedy(ours, ids.tolist(), 8) == tokens[:, 24:].tolist()
    ours.engine.close()

    chosen = prepared(source, tmp_path / "auto", "--hf")
    assert read_manifest(chosen).weight_format == SOURCES[name].becomes
    for kept, wanted in zip(experts_of(chosen), experts_of(exact), strict=True):
        for field, numbers in wanted.items():
            if SOURCES[name].becomes == "bf16" and "bias" not in field:
                numbers = numbers.bfloat16().float()
            assert torch.equal(kept[field], numbers), field
