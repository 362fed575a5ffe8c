"""The text must not depend on any cache setting: a generated matrix against the run without one.

In fp32 greedy tokens are identical. In bf16, int8 and int4 the two sides round differently (the
CPU's kernels keep fp32 between their passes, and quantise activations to int8 for integer
products), so logits agree within a tolerance, and tokens until the first near tie: a step whose
two best logits are closer than what that tolerance allows two roundings to move them.

On the emulated accelerator every hit is computed by another implementation, on another thread,
from bytes that a background copy put into a slot; so equal tokens and logits show that directory,
copies and computation agree.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from against_transformers import greedy, prepared
from tiny_models import CONFIGS, build_model, write_hub
from torch import Tensor

from moe_offload.checkpoint.prepared import read_manifest
from moe_offload.config import CacheOptions, ModelOptions
from moe_offload.engine import setup
from moe_offload.engine.loading import load_engine
from moe_offload.experts.recorder import Recorder
from moe_offload.model.dummy import ForcedRouting
from moe_offload.model.loader import PreparedModel
from moe_offload.simulation.workload import even_workload

POLICIES = ("FIFO", "LRU", "RANDOM", "LFU", "LFRU")
N_TOKENS = 10
# mixtral: 2 layers of 4 experts, top-2.  qwen3_moe: 2 layers of 8 experts, top-4 (above M = 1, 2).
SIZES = {"mixtral": ((1, 1), (1, 4), (2, 1), (2, 2), (2, 3)), "qwen3_moe": ((1, 2), (2, 1), (2, 9))}
TOLERANCE = {"fp32": 1e-5, "bf16": 0.02, "int8": 0.03, "int4": 0.05}  # of the logits' norm
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


@dataclass
class Run:
    """Greedy tokens of two prompts one by one and as a batch, each step's logits, the events."""

    tokens: list[list[int]]
    logits: list[Tensor]
    recorder: Recorder

    def certain(self, tolerance: float) -> list[int]:
        """How many tokens of each text are decided by more than rounding could move."""
        counts = []
        for logits in self.logits:
            best = logits.topk(2, dim=-1).values
            # Either run may move either logit by the tolerance times the logits' typical size.
            movable = 4 * tolerance * logits.norm(dim=-1) / logits.shape[-1] ** 0.5
            close = (best[:, 0] - best[:, 1] <= movable).nonzero().flatten().tolist()
            counts.append(close[0] if close else len(logits))
        return counts


def run(folder: Path, options: CacheOptions) -> Run:
    """Generate with `options`. Below fp32, routing is fixed: a router near a tie would jump."""
    result = Run([], [], Recorder())
    source = PreparedModel(read_manifest(folder))
    with load_engine(
        source, ModelOptions(folder, device="cpu"), options, result.recorder
    ) as engine:
        if source.weight_format != "fp32":
            top_k = source.config.num_experts_per_tok
            shape = (engine.store.n_layers, engine.store.n_experts[0], top_k)
            trace = even_workload(*shape, overlap=0.4).generate(64, 0, 16)
            engine.dispatcher.forced_routing = ForcedRouting(trace, *shape)
        steps: list[Tensor] = []
        engine.model.register_forward_hook(
            lambda module, args, output: steps.append(output.logits[:, -1].float())
        )
        for batch in ([PROMPTS[0]], [PROMPTS[1]], PROMPTS):
            steps.clear()
            result.tokens += greedy(engine.model, batch, N_TOKENS)
            result.logits += torch.stack(steps, dim=1).unbind()
    return result


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


# The other half of these pairs: nightly.
OFTEN = [("mixtral", "fp32"), ("qwen3_moe", "bf16"), ("mixtral", "int8"), ("qwen3_moe", "int4")]


@pytest.mark.parametrize(
    ("name", "weight_format"),
    [
        pytest.param(*pair, marks=() if pair in OFTEN else pytest.mark.nightly)
        for pair in itertools.product(SIZES, ("fp32", "bf16", "int8", "int4"))
    ],
)
def test_settings_do_not_change_the_text(
    name: str, weight_format: str, folders: dict[tuple[str, str], Path]
) -> None:
    folder = folders[name, weight_format]
    reference, tolerance = run(folder, CacheOptions()), TOLERANCE[weight_format]
    certain = reference.certain(tolerance if weight_format != "fp32" else 0.0)
    assert max(certain) > 0
    tried = 0
    for model, fmt, options in settings():
        if (model, fmt) != (name, weight_format):
            continue
        found = run(folder, CacheOptions(**options))
        for i, n in enumerate(certain):
            assert found.tokens[i][:n] == reference.tokens[i][:n], options
            same = min(n + 1, N_TOKENS)  # these logits follow the same tokens in both runs
            error = (found.logits[i][:same] - reference.logits[i][:same]).norm()
            assert error <= tolerance * reference.logits[i][:same].norm(), options
        table = found.recorder.layer_table()
        decode = found.recorder.pass_table()["decode"][table["pass_index"]]
        cached = table[decode & (table["layer"] < options["n_indexes"])]
        assert len(cached)
        assert (cached["hits"] + cached["misses"] == cached["n_tokens"] * cached["top_k"]).all()
        tried += 1
    assert tried >= 24


@pytest.mark.parametrize(
    ("n_slots", "shape"),
    [(56, (14, 4)), (60, (14, 4)), (55, (13, 4)), (44, (11, 4)), (40, (10, 4)), (9, (9, 1))],
)
def test_slots_that_do_not_fit_cost_little_more_than_themselves(
    n_slots: int, shape: tuple[int, int]
) -> None:
    notes: list[str] = []
    fitted = setup._shrunk(CacheOptions(n_indexes=14, n_ways=4), n_slots, notes)
    assert (fitted.n_indexes, fitted.n_ways) == shape
    said = f"the cache is {shape[0]} x {shape[1]} for lack of memory"
    assert notes == ([] if n_slots >= 56 else [said])
