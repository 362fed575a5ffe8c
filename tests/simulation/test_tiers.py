"""Host memory over a disk, simulated: the engine's hits, and times that can be checked by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from against_transformers import greedy, prepared
from tiny_models import CONFIGS, build_model, write_hub

from moe_offload.checkpoint.prepared import read_manifest
from moe_offload.commands import simulate
from moe_offload.config import CacheOptions, ModelOptions
from moe_offload.engine.loading import load_engine
from moe_offload.experts.costs import CostModel, DiskCost, SideCost
from moe_offload.experts.disk_tier import DiskTier
from moe_offload.experts.recorder import Recorder
from moe_offload.model.loader import PreparedModel
from moe_offload.report.files import recorded_routing
from moe_offload.simulation.tiers import bound_tokens_per_s, replay_tiers
from moe_offload.simulation.traces import Routing, RoutingPass, Trace, TraceInfo
from moe_offload.simulation.tuning import tune

COSTS = CostModel(
    cpu=SideCost(0, 100, 0),
    gpu=SideCost(0, 10, 0),
    copy_call_us=0,
    copy_gbps=1e3,
    copy_gbps_shared=1e3,
    cpu_shared_factor=1,
    block_bytes=1_000_000,
    dense_us_per_layer=50,
    step_us=7,
    disk=DiskCost(gbps=1.0, latency_us=20),  # 1000 us for a block
)


def made(*tokens: tuple[int, ...]) -> Trace:
    """One layer of 4 experts."""
    passes = [RoutingPass("decode", ((one,),)) for one in tokens]
    return Trace(TraceInfo("made", 1, len(tokens[0]), 4), Routing(passes))


def test_times_by_hand() -> None:
    result = replay_tiers(made((0, 1), (0, 1), (0, 2), (1, 2)), [2], "LRU", COSTS)
    assert (result.hits, result.misses) == (4, 4)
    in_memory, one_read, two_reads = 200, 1020 + 100, 2020 + 100
    experts_us = [two_reads, in_memory, one_read, one_read]
    assert result.decode_us == 4 * 57 + sum(experts_us)
    assert result.disk_us == 2020 + 1020 + 1020
    assert result.waited_us == sum(us - 200 for us in experts_us)


def test_slots_of_a_gpu_take_their_hits_from_host_memory() -> None:
    trace = made(*[(0, 1)] * 5)
    result = replay_tiers(
        trace, [2], "LRU", COSTS, CacheOptions(n_indexes=1, n_ways=2, policy="LRU")
    )
    assert (result.gpu_hits, result.hits, result.misses) == (8, 0, 2)
    assert result.decode_us == 5 * 57 + 2120 + 4 * 20


def test_a_slot_is_for_the_expert_that_arrives_first() -> None:
    slot = CacheOptions(n_indexes=1, n_ways=1, policy="LRU", quota=1)
    in_the_files_order = replay_tiers(made((1, 0), (0, 2)), [2], "LRU", COSTS, slot)
    assert in_the_files_order.gpu_hits == 1
    behind_what_is_there = made((3, 2), (2, 3), (0, 3), (3, 1))  # 2 has the slot, 3 is in memory
    assert replay_tiers(behind_what_is_there, [2], "LRU", COSTS, slot).gpu_hits == 2


def test_no_policy_beats_the_bound() -> None:
    trace = made(*[(t % 4, (t * t + 1) % 4) for t in range(1, 40, 2)])
    for n_ways in (1, 2, 3, 4):
        best = bound_tokens_per_s(trace, n_ways, COSTS)
        for policy in ("FIFO", "LRU", "LFU", "LFRU", "RANDOM"):
            assert replay_tiers(trace, [n_ways], policy, COSTS).tokens_per_s <= best


def test_the_engine_has_the_same_hits(tmp_path: Path) -> None:
    source = write_hub(build_model(CONFIGS["qwen3_moe"]()), tmp_path / "hub")
    folder = prepared(source, tmp_path / "prepared", "--hf")
    model = PreparedModel(read_manifest(folder))
    each_bytes = sum(layout.block_bytes for layout in model.layouts)
    for n_ways, policy in ((4, "LRU"), (5, "LFRU"), (6, "FIFO")):
        recorder, gb = Recorder(), (n_ways + 0.5) * each_bytes / 1e9
        options = ModelOptions(folder, device="cpu", host_memory_gb=gb, host_policy=policy)
        with load_engine(model, options, CacheOptions(), recorder) as engine:
            assert isinstance(engine.store, DiskTier)
            engine.store.trial = None  # the simulator does not read ahead
            greedy(engine.model, [[5]], 24)  # a longer prompt's evictions depend on timing
        info, passes = recorded_routing(recorder, "m", 8, synthetic=False)
        result = replay_tiers(Trace(info, Routing(passes)), [n_ways] * 2, policy, COSTS)
        layers = recorder.layer_table()[2:]  # without the prompt
        assert result.misses > 0
        assert (result.hits, result.misses) == (
            layers["host_hits"].sum(),
            layers["host_misses"].sum(),
        )


def test_the_command_answers_and_says_what_it_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--model", "olmoe-1b-7b", "--host-memory-gb", "4"]
    hardware = Path(__file__).parents[2] / "hardware"
    machine = ["--hardware", str(hardware / "rtx4090.yaml")]
    assert simulate.main([*model, *machine, "--disk-gbps", "7"]) == 0
    out = capsys.readouterr().out
    assert "host memory: 4 GB for 12.9 GB of experts: 19 of 64 of each layer, LFRU" in out
    assert "GB are read from disk a token" in out
    for lacking, message in (
        (model, "--host-memory-gb needs --hardware and --model"),
        ([*model, *machine], "--host-memory-gb needs the disk's speed"),
        ([*model[:3], "0.1", *machine, "--disk-gbps", "7"], "one expert of each layer, 0.201 GB"),
        ([*model, *machine, "--disk-gbps", "0"], "expected --disk-gbps of at least 0.001, found 0"),
    ):
        assert simulate.main(lacking) == 2
        assert message in capsys.readouterr().err


def test_tuning_over_a_disk_replays_both_memories(capsys: pytest.CaptureFixture[str]) -> None:
    trace = made(*[(t % 4, (t * t + 1) % 4) for t in range(1, 40, 2)])
    for policy in ("LFRU", "FIFO"):
        room = 2 * COSTS.block_bytes
        points = tune(trace, room, {"bf16": COSTS}, host_bytes=room, host_policy=policy)
        assert {point.host_ways for point in points} == {2}
        for one in points:
            found = replay_tiers(trace, [2], policy, COSTS, one.cache)
            assert one.tokens_per_s == found.tokens_per_s
    assert tune(trace, 0, {"bf16": COSTS}, host_bytes=COSTS.block_bytes - 1) == []
    hardware = str(Path(__file__).parents[2] / "hardware" / "rtx4090.yaml")
    command = ["--model", "olmoe-1b-7b", "--hardware", hardware, "--tune", "--disk-gbps", "7"]
    command += ["--expert-dtype", "bf16", "--memory-gb", "1", "--host-memory-gb"]
    assert simulate.main([*command, "4"]) == 0
    out = capsys.readouterr().out
    assert "format  host   N    M policy" in out
    assert "bf16      19" in out
    assert simulate.main([*command, "0.1"]) == 2
    assert "at least one expert of each layer, found 0.1" in capsys.readouterr().err
    command.remove("--disk-gbps")
    command.remove("7")
    assert simulate.main([*command, "4"]) == 2
    assert "--host-memory-gb needs the disk's speed" in capsys.readouterr().err
    assert simulate.main([*command, "13"]) == 0  # all of 12.9 GB fits: no disk is asked
    assert "bf16      64" in capsys.readouterr().out
