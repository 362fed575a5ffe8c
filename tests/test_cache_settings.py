"""The text must not depend on any cache setting: a generated matrix against the run without one.

On the emulated accelerator every hit is computed by another implementation, on another thread,
from bytes that a background copy put into a slot; so equal tokens and logits show that directory,
copies and computation agree.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_parity import prepared
from tiny_models import CONFIGS, build_model, write_hub
from torch import Tensor

from config import CacheOptions, ModelOptions
from checkpoint import read_manifest
from engine import load_engine
from generation import generate_batch, make_sampler
from model_loader import PreparedModel
from recorder import Recorder

POLICIES = ("FIFO", "LRU", "RANDOM", "LFU", "LFRU")
N_TOKENS = 10
# mixtral: 2 layers of 4 experts, top-2.  qwen3_moe: 2 layers of 8 experts, top-4 (above M = 1, 2).
SIZES = {"mixtral": ((1, 1), (1, 4), (2, 1), (2, 2), (2, 3)), "qwen3_moe": ((1, 2), (2, 1), (2, 9))}
PROMPTS = [[5, 17, 40, 8, 22, 71], [9, 33, 12]]


def settings() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(model, weight format, cache options), every value of each with every other's by turns."""
    turns = zip(
        itertools.cycle(POLICIES),
        itertools.cycle((64, 0, 1)),
        itertools.cycle(("off", "next-layer", "off", "next-layer", "off", "off", "next-layer")),
        strict=False,
    )
    for _ in range(4):
        for name, weight_format, miss_policy in itertools.product(
            SIZES, ("fp32", "bf16", "int8", "int4"), ("cpu", "fetch", "auto")
        ):
            for n_indexes, n_ways in SIZES[name]:
                policy, quota, prefetch = next(turns)
                yield (
                    name,
                    weight_format,
                    {
                        "n_indexes": n_indexes,
                        "n_ways": n_ways,
                        "policy": policy,
                        "quota": quota,
                        "miss_policy": miss_policy,
                        "prefetch": prefetch,
                    },
                )


def run(folder: Path, options: CacheOptions) -> tuple[list[list[int]], Tensor, Recorder]:
    """Greedy tokens of two prompts one by one and as a batch, and the logits of a third text."""
    recorder = Recorder()
    source = PreparedModel(read_manifest(folder))
    with load_engine(source, ModelOptions(folder, device="cpu"), options, recorder) as engine:
        sampler = make_sampler(0.0, 1.0, 0, engine.device)
        tokens = []
        for batch in ([PROMPTS[0]], [PROMPTS[1]], PROMPTS):
            records = {
                record.prompt: record
                for record, _ in generate_batch(
                    engine.model,
                    batch,
                    max_tokens=N_TOKENS,
                    sampler=sampler,
                    eos_ids=frozenset(),
                )
            }
            tokens += [records[i].ids for i in sorted(records)]
        with torch.inference_mode():
            logits = engine.model(torch.tensor([PROMPTS[0]])).logits.float()
    return tokens, logits, recorder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    root = tmp_path_factory.mktemp("cache-settings")
    made = {}
    for name in SIZES:
        source = write_hub(build_model(CONFIGS[name]()), root / name)
        for weight_format in ("fp32", "bf16", "int8", "int4"):
            made[name, weight_format] = prepared(
                source,
                root / f"{name}-{weight_format}",
                "--hf",
                "--expert-dtype",
                weight_format,
            )
    return made


@pytest.mark.parametrize("weight_format", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("name", SIZES)
def test_settings_do_not_change_the_text(
    name: str, weight_format: str, folders: dict[tuple[str, str], Path]
) -> None:
    folder = folders[name, weight_format]
    tokens, logits, _ = run(folder, CacheOptions())
    tolerance = {"fp32": 1e-5, "bf16": 0.05, "int8": 0.05, "int4": 0.05}[weight_format]
    tried = 0
    for model, fmt, options in settings():
        if (model, fmt) != (name, weight_format):
            continue
        found_tokens, found_logits, recorder = run(folder, CacheOptions(**options))
        assert (found_logits - logits).norm() <= tolerance * logits.norm(), options
        if weight_format == "fp32":
            assert found_tokens == tokens, options
        table = recorder.layer_table()
        decode = recorder.pass_table()["decode"][table["pass_index"]]
        cached = table[decode & (table["layer"] < options["n_indexes"])]
        assert (cached["hits"] + cached["misses"] == cached["n_tokens"] * cached["top_k"]).all()
        tried += 1
    assert tried >= 24
