"""A cache that is chosen or cut says so, and what it says can be typed in again."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from against_transformers import prepared
from tiny_models import CONFIGS, build_model, write_hub
from written_trace import write_trace

from moe_offload.checkpoint.block import block_layout
from moe_offload.checkpoint.prepared import read_manifest
from moe_offload.commands.arguments import build_parser, parse_config
from moe_offload.config import CacheOptions, ModelOptions
from moe_offload.engine import setup
from moe_offload.engine.calibration import Calibration, MachineCosts
from moe_offload.engine.engine import Engine
from moe_offload.engine.loading import load_engine
from moe_offload.engine.timing import Steadiness
from moe_offload.errors import UserError
from moe_offload.experts.costs import CostModel, SideCost
from moe_offload.model.loader import PreparedModel
from moe_offload.simulation.tuning import CacheChoice
from moe_offload.simulation.workload import even_workload


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cache-auto")
    source = write_hub(build_model(CONFIGS["mixtral"]()), root / "hub")
    return prepared(source, root / "prepared", "--hf", "--expert-dtype", "fp32")


def load(folder: Path, options: CacheOptions) -> Engine:
    return load_engine(
        PreparedModel(read_manifest(folder)), ModelOptions(folder, device="cpu"), options
    )


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("cpu_us", [1000.0, 1.0], ids=["slow CPU", "fast CPU"])
def test_the_line_chooses_the_same_cache_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpu_us: float, traced: bool
) -> None:
    def costs(calibration: Calibration, *_: object) -> MachineCosts:
        block_bytes = calibration.store.layouts[0].block_bytes
        cpu, gpu = SideCost(1.0, cpu_us, 1.0), SideCost(1.0, 10.0, 1.0)
        gbps = block_bytes / 100e3  # 100 us a copy
        model = CostModel(cpu, gpu, 0.0, gbps, gbps, 1.0, block_bytes, 10.0)
        return MachineCosts(model, 10.0, Steadiness(0.0, 0.0))

    monkeypatch.setattr(Calibration, "costs", costs)
    trace = tmp_path / "routing.jsonl"
    routing = even_workload(2, 4, 2).generate(9, 0, 20)
    write_trace(trace, routing.info, routing.passes)
    options = CacheOptions(
        auto=True,
        trace=trace if traced else None,
        memory_gb=0.0001,
        miss_policy="auto",
        prefetch="next-layer",
        quota=5,
        emulate_pcie_gbps=12.5,
        seed=3,
    )
    with load(folder, options) as engine:
        (line,) = [note for note in engine.notes if note.startswith("--cache-auto chose: ")]
        found = engine.describe()
        has_accelerator = engine.accelerator is not None
    assert has_accelerator == (cpu_us > 100)
    flags = re.fullmatch(r"--cache-auto chose: ([^(]*) \(.*\)", line)
    assert flags is not None
    assert ("--seed 3" in line) == has_accelerator
    command = ["--model-path", str(folder), "--prompt", "x", "--max-tokens", "1"]
    again = parse_config(build_parser().parse_args([*command, *flags[1].split()])).cache
    if has_accelerator:
        expected = replace(
            options,
            auto=False,
            memory_gb=None,
            trace=None,
            n_indexes=found["cache_nblocks"],
            n_ways=found["cache_nways"],
            policy=again.policy,
        )
        assert again == expected
    with load(folder, again) as engine:
        assert engine.describe() == found


def test_over_a_disk_the_run_s_own_policy_of_host_memory_is_simulated(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def choose(*arguments: object) -> CacheChoice:
        asked.append(arguments[-3:-1])
        return CacheChoice(CacheOptions(policy="LRU"), 1.0, "made up")

    monkeypatch.setattr(setup, "choose_cache", choose)
    options = ModelOptions(folder, device="cpu", host_memory_gb=0.0001, host_policy="RANDOM")
    source = PreparedModel(read_manifest(folder))
    with load_engine(source, options, CacheOptions(auto=True, memory_gb=0.0001)) as engine:
        assert asked == [(engine.store.memory.n_experts, "RANDOM")]


def test_not_one_slot_is_a_sentence() -> None:
    with pytest.raises(UserError, match="not even one expert fits"):
        setup._shrunk(CacheOptions(n_indexes=2, n_ways=2), 0, [])


@pytest.mark.parametrize(
    ("hidden_size", "n_experts", "expected"),
    [(4096, 8, 2), (2048, 128, 57), (64, 128, 128), (64, 1, 2)],
)
def test_a_calibration_takes_more_slots_than_a_gpus_cache_holds(
    hidden_size: int, n_experts: int, expected: int
) -> None:
    """Experts of Mixtral's size, of 4.7 MB as Qwen3's, and tiny ones: of those, all there are."""
    layout = block_layout("bf16", hidden_size, {4096: 14336, 2048: 384, 64: 32}[hidden_size])
    source = SimpleNamespace(layouts=[layout], n_experts=[n_experts])
    n_slots = setup.slots_to_measure(source)  # type: ignore[arg-type]
    assert n_slots == expected
    assert n_slots * layout.block_bytes >= 256 << 20 or n_slots == max(2, n_experts)
