"""Logits and greedy tokens against transformers' own eager model, for every architecture.

Each tiny checkpoint goes through the real preprocessor and the real loader.

Tolerances. fp32: both sides sum the same products in another order; with sums of at most
S = 100 terms over two or three layers the relative error stays below S * 2**-24 * layers, and
1e-5 of the largest logit is asserted. bf16: transformers rounds each expert's intermediate values
to bf16 (2**-9 relative each), ours stay in fp32; over `n` layers with some six roundings each a
token's logits may differ by sqrt(6 * n) * 2**-9 of their own norm, and four times that is allowed.
A router at a near tie may choose another expert after such a rounding, which is a jump and not an
error; so three quarters of the tokens, in short separate texts, must keep the tolerance.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from against_transformers import N_TOKENS, eager, greedy, prepared, prompt_ids
from tiny_models import CONFIGS, build_model, nemotron_h, write_fused, write_hub, write_native
from torch import Tensor
from transformers import PreTrainedModel

from moe_offload.engine.loading import load_model

LAYOUTS = {"hub": write_hub, "fused": write_fused}


def with_the_same_fp32_logits(
    source: Path, tmp_path: Path
) -> tuple[PreTrainedModel, PreTrainedModel, Tensor]:
    """transformers' model, ours, and the token ids over which their logits were found equal."""
    folder = prepared(source, tmp_path / "prepared", "--hf", "--expert-dtype", "fp32")
    theirs, ours = eager(source, torch.float32), load_model(folder, device="cpu")
    ids = prompt_ids(theirs.config.vocab_size, 24)
    with torch.inference_mode():
        expected, found = theirs(ids).logits, ours(ids).logits
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    return theirs, ours, ids


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_fp32_matches_transformers(name: str, layout: str, tmp_path: Path) -> None:
    source = LAYOUTS[layout](build_model(CONFIGS[name]()), tmp_path / "source")
    theirs, ours, ids = with_the_same_fp32_logits(source, tmp_path)
    prompts = [ids[0].tolist(), ids[0, :9].tolist(), ids[0, :17].tolist()]
    singles = []
    for prompt in prompts:
        full = theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=N_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        singles.append(full[0, len(prompt) :].tolist())
    assert [greedy(ours, [prompt])[0] for prompt in prompts] == singles
    assert greedy(ours, prompts) == singles  # left-padded, in one batch


@pytest.mark.parametrize("name", CONFIGS)
def test_bf16_matches_transformers(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]()
    source = write_hub(build_model(config, dtype=torch.bfloat16), tmp_path / "source")
    folder = prepared(source, tmp_path / "prepared", "--hf")
    theirs, ours = eager(source, torch.bfloat16), load_model(folder, device="cpu")
    ids = prompt_ids(config.vocab_size, 6, n_prompts=16)
    with torch.inference_mode():
        expected, found = theirs(ids).logits.float(), ours(ids).logits.float()
    tolerance = 4 * (6 * config.num_hidden_layers) ** 0.5 * 2**-9
    errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert (errors <= tolerance).float().mean() >= 0.75


def test_gateless_experts_match(tmp_path: Path) -> None:
    source = write_hub(build_model(nemotron_h()), tmp_path / "source")
    with_the_same_fp32_logits(source, tmp_path)


def test_native_twin_gives_the_same_logits(tmp_path: Path) -> None:
    model = build_model(CONFIGS["mixtral"]())
    hub = prepared(
        write_hub(model, tmp_path / "hub"), tmp_path / "a", "--hf", "--expert-dtype", "fp32"
    )
    native = prepared(
        write_native(model, tmp_path / "native"), tmp_path / "b", "--expert-dtype", "fp32"
    )
    ids = prompt_ids(model.config.vocab_size, 24)
    with torch.inference_mode():
        expected = load_model(hub, device="cpu")(ids).logits
        found = load_model(native, device="cpu")(ids).logits
    assert torch.equal(found, expected)
