"""The simulator against the engine: the same hits, pass by pass and layer by layer."""

import csv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from against_transformers import greedy, prepared
from tiny_models import CONFIGS, build_model, write_hub
from written_trace import write_trace

from moe_offload.checkpoint.prepared import read_manifest
from moe_offload.config import CacheOptions, ModelOptions
from moe_offload.engine.engine import Engine
from moe_offload.engine.loading import load_engine
from moe_offload.experts.cache import POLICIES, ExpertCache, make_policy
from moe_offload.experts.costs import CostModel, SideCost
from moe_offload.experts.fetcher import Copy
from moe_offload.experts.recorder import Recorder
from moe_offload.model.loader import PreparedModel
from moe_offload.report.files import (
    ReportPaths,
    RunInfo,
    recorded_routing,
    write_reports,
)
from moe_offload.report.summary import summarize
from moe_offload.simulation.replay import Timeline, replay
from moe_offload.simulation.trace_files import read_trace
from moe_offload.simulation.traces import Trace

PROMPTS = [[5, 17, 40, 8, 22, 71], [9, 33, 12], [3, 3, 90, 14]]
N_TOKENS = 12


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("simulated-hits")
    source = write_hub(build_model(CONFIGS[request.param]()), root / "hub")
    folder = prepared(source, root / "prepared", "--hf")
    options = ModelOptions(folder, device="cpu")
    with load_engine(PreparedModel(read_manifest(folder)), options, CacheOptions()) as engine:
        yield engine


# A GPU on a fast bus: prompts are computed there, every expert copied for it.
FAST_BUS = CostModel(
    cpu=SideCost(0, 1000, 1000),
    gpu=SideCost(0, 1, 0.01),
    copy_call_us=1,
    copy_gbps=100,
    copy_gbps_shared=100,
    cpu_shared_factor=1,
    block_bytes=1000,
    dense_us_per_layer=0,
)
SLOW_BUS = replace(FAST_BUS, copy_call_us=1e6)


def run(
    engine: Engine,
    options: CacheOptions,
    batches: list[list[list[int]]],
    costs: CostModel = SLOW_BUS,
    told: Callable[[list[Copy]], list[Copy]] = list,
) -> Recorder:
    """Generate with copies that end before the next layer begins.

    Each layer hears of what `told` makes of those that ended since the last: all of them.
    """
    engine.use_cache(options)
    accelerator = engine.accelerator
    assert accelerator is not None
    accelerator.costs = costs
    fetcher = accelerator.fetcher
    poll = fetcher.poll

    def poll_when_done() -> list[Copy]:
        fetcher.poll = poll  # drain() itself polls
        try:
            return told(fetcher.drain())
        finally:
            fetcher.poll = poll_when_done

    fetcher.poll = poll_when_done
    recorder = engine.dispatcher.recorder = Recorder()
    for batch in batches:
        greedy(engine.model, batch, N_TOKENS)
    return recorder


def through_the_csv(
    recorder: Recorder, n_experts: int, folder: Path
) -> tuple[Trace, list[list[int]]]:
    """(expert_choices.csv as our reader takes it, cache.csv's hits by pass and layer)."""
    routing = recorded_routing(recorder, "tiny", n_experts, synthetic=False)
    paths = ReportPaths.in_folder(folder)
    write_reports(recorder, paths, RunInfo(), summarize(recorder), routing)
    with (folder / "cache.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    n_layers = sum(name.startswith("Block_") for name in header)
    hits = [[int(cell) for cell in row[1 : 1 + n_layers]] for row in rows]
    return read_trace(folder / "expert_choices.csv"), hits


def by_night(daily: bool, *values: object) -> Any:
    """A case, for the nightly run unless `daily`: settings are crossed that are tried alone."""
    return pytest.param(*values, marks=[] if daily else [pytest.mark.nightly])


BATCHED_AND_WAITS = [
    by_night(batched == waits, batched, waits)
    for batched in (False, True)
    for waits in (False, True)
]
POLICY_AND_SIZE = [
    by_night(policy == "LRU" or size == (2, 3, 64), policy, *size)
    for policy in sorted(POLICIES)
    for size in [(1, 2, 64), (2, 1, 64), (2, 3, 0), (2, 3, 1), (2, 3, 64), (2, 8, 64)]
]


@pytest.mark.parametrize(("batched", "waits"), BATCHED_AND_WAITS)
@pytest.mark.parametrize(("policy", "n_indexes", "n_ways", "quota"), POLICY_AND_SIZE)
def test_the_expert_choices_of_a_run_replay_its_cache_csv(
    engine, policy, n_indexes, n_ways, quota, batched, waits, tmp_path: Path
):
    """Row by row, with routing.jsonl beside the CSV: the prompts warm the cache as they did."""
    options = CacheOptions(n_indexes=n_indexes, n_ways=n_ways, policy=policy, quota=quota)
    batches = [PROMPTS, PROMPTS[:2]] if batched else [[prompt] for prompt in PROMPTS]
    recorder = run(engine, options, batches, FAST_BUS if waits else SLOW_BUS)
    trace, hits = through_the_csv(recorder, engine.store.n_experts[0], tmp_path)
    cache = ExpertCache(n_indexes, min(n_ways, trace.n_experts), make_policy(policy))
    result = replay(trace.passes, cache, quota, keep_layers=True)
    n_layers = len(hits[0])
    assert [row + [0] * (n_layers - len(row)) for row in result.hits_by_layer] == hits
    assert sum(map(sum, hits)) > 0 or quota == 0
    table = recorder.layer_table()
    assert result.fetches == table["fetches"].sum()
    assert result.evictions == table["evictions"].sum()
    write_trace(tmp_path / "copy.jsonl", trace.info, trace.passes)
    assert read_trace(tmp_path / "copy.jsonl").passes == trace.passes


def test_without_the_prompts_the_replay_is_another(engine, tmp_path: Path):
    """What routing.jsonl is for: the CSV alone cannot say how a prompt warmed the cache."""
    options = CacheOptions(n_indexes=2, n_ways=3, policy="LRU")
    recorder = run(engine, options, [[PROMPTS[0]]])
    _, hits = through_the_csv(recorder, engine.store.n_experts[0], tmp_path)
    (tmp_path / "routing.jsonl").unlink()
    bare = read_trace(tmp_path / "expert_choices.csv")
    result = replay(bare.passes, ExpertCache(2, 3, make_policy("LRU")), keep_layers=True)
    assert result.hits_by_layer[1] == [0, 0] != hits[1]


def engine_hits(recorder: Recorder) -> list[list[int]]:
    """Hits of each pass and cached layer; a prompt's are not counted."""
    rows: list[list[int]] = [[] for _ in recorder.pass_table()]
    for event in recorder.layer_events():
        if event.n_hits_of_token is not None:
            rows[event.pass_index].append(event.hits)
    return rows


@pytest.mark.parametrize("quota", [0, 64])
@pytest.mark.parametrize("batched", [False, True])
def test_hits_equal_the_engines_where_prompts_wait_for_copies(
    engine, quota, batched, tmp_path: Path
):
    """What a prompt copies to compute is kept without a charge to the quota."""
    options = CacheOptions(n_indexes=2, n_ways=3, policy="LRU", quota=quota)
    batches = [PROMPTS] if batched else [[prompt] for prompt in PROMPTS]
    recorder = run(engine, options, batches, FAST_BUS)
    assert engine.accelerator is not None
    trace = through_a_file(recorder, engine, tmp_path)
    assert any(trace.passes[0].waited)
    result = replay(trace.passes, ExpertCache(2, 3, make_policy("LRU")), quota, keep_layers=True)
    assert result.hits_by_layer == engine_hits(recorder)
    assert result.evictions == recorder.layer_table()["evictions"].sum()
    copies = recorder.layer_table()["fetches"].sum()
    assert result.fetches == copies > engine.accelerator.cache.admissions, "some are not kept"
    # The first token after the prompt finds experts in the last layer as well as in the first.
    assert all(engine_hits(recorder)[1])


class Looks(Timeline):
    """No clock: each layer finds what had arrived when the run's own layer looked."""

    def __init__(self, looks: list[list[int]]) -> None:
        super().__init__(SLOW_BUS)
        self._looks = iter(looks)

    def arrived(self) -> list[int]:
        return next(self._looks)


def run_late(engine: Engine, options: CacheOptions) -> tuple[Recorder, list[list[int]]]:
    """Generate with copies that are reported up to six layers after they ended, in their order.

    Returns the slots that each layer was told of, too.
    """
    looks: list[list[int]] = []
    waiting: list[tuple[int, Copy]] = []  # until which look

    def late(ended: list[Copy]) -> list[Copy]:
        for copy in ended:
            earliest = waiting[-1][0] if waiting else 0
            waiting.append((max(earliest, len(looks) + 5 * len(looks) % 7), copy))
        told = [copy for until, copy in waiting if until <= len(looks)]
        del waiting[: len(told)]
        looks.append([copy.slot for copy in told])
        return told

    recorder = run(engine, options, [[prompt] for prompt in PROMPTS], told=late)
    return recorder, looks


@pytest.mark.parametrize(
    ("policy", "n_indexes", "n_ways", "quota"),
    [
        by_night(policy == "LRU" or size == (2, 3, 64), policy, *size)
        for policy in ("FIFO", "LRU", "LFU")
        for size in [(1, 2, 1), (1, 2, 64), (2, 3, 1), (2, 3, 64), (2, 8, 1), (2, 8, 64)]
    ],
)
def test_late_copies_hit_exactly_as_in_the_engine(
    engine, policy, n_indexes, n_ways, quota, tmp_path: Path
):
    """Told when the copies arrived, the replay has the engine's hits: only time is modelled."""
    options = CacheOptions(n_indexes=n_indexes, n_ways=n_ways, policy=policy, quota=quota)
    recorder, looks = run_late(engine, options)
    trace = through_a_file(recorder, engine, tmp_path)

    def cache() -> ExpertCache:
        return ExpertCache(n_indexes, min(n_ways, trace.n_experts), make_policy(policy))

    result = replay(trace.passes, cache(), quota, Looks(looks), keep_layers=True)
    assert result.hits_by_layer == engine_hits(recorder)
    assert result.fetches == recorder.layer_table()["fetches"].sum()
    assert result.evictions == recorder.layer_table()["evictions"].sum()
    instant = replay(trace.passes, cache(), quota)
    assert instant.decode.hits != result.decode.hits  # so that late is not as good as at once


def through_a_file(recorder: Recorder, engine: Engine, folder: Path) -> Trace:
    """The run's routing, written and read as JSON lines."""
    trace = recorded_routing(recorder, "tiny", engine.store.n_experts[0], synthetic=False)
    write_trace(folder / "routing.jsonl", *trace)
    return read_trace(folder / "routing.jsonl")
