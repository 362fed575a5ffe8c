"""What a run records must add up, and a replay of its routing must find the same hits."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from against_transformers import greedy, prepared
from tiny_models import CONFIGS, build_model, write_hub

from moe_offload.checkpoint.prepared import read_manifest
from moe_offload.config import CacheOptions, ModelOptions
from moe_offload.engine import calibration, loading, probes
from moe_offload.engine import engine as engine_module
from moe_offload.engine.calibration import MachineCosts, predicted_step_us
from moe_offload.engine.engine import Engine
from moe_offload.engine.loading import load_engine
from moe_offload.engine.timing import Steadiness
from moe_offload.errors import UserError
from moe_offload.experts import dispatcher
from moe_offload.experts.cache import ExpertCache, make_policy
from moe_offload.experts.costs import CostModel, SideCost
from moe_offload.experts.fetcher import Copy
from moe_offload.experts.layer import LayerStep
from moe_offload.experts.plan import plan_decode
from moe_offload.experts.recorder import Recorder
from moe_offload.machine.hardware import Cache, read_hardware
from moe_offload.model.dummy import ForcedRouting
from moe_offload.model.generation import cache_argument
from moe_offload.model.loader import PreparedModel
from moe_offload.report.files import ReportPaths, RunInfo, write_reports
from moe_offload.report.summary import summarize
from moe_offload.simulation.replay import replay
from moe_offload.simulation.trace_files import read_trace
from moe_offload.simulation.traces import RoutingPass
from moe_offload.simulation.workload import even_workload

PROMPT = [5, 17, 40, 8, 22, 71, 9]
N_TOKENS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("measures")
    config = CONFIGS["mixtral"](num_hidden_layers=4, num_local_experts=8)
    return prepared(write_hub(build_model(config), root / "source"), root / "prepared", "--hf")


def open_engine(folder: Path, recorder: Recorder, **options: object) -> Engine:
    return load_engine(
        PreparedModel(read_manifest(folder)),
        ModelOptions(folder, device="cpu"),
        CacheOptions(**options),  # type: ignore[arg-type]
        recorder,
    )


def finish_copies_at_once(engine: Engine) -> None:
    """Every copy ends before the next layer's lookup."""
    assert engine.accelerator is not None
    fetcher, poll = engine.accelerator.fetcher, engine.accelerator.fetcher.poll

    def wait_and_poll() -> list[Copy]:
        for copy in fetcher._in_flight:
            copy.ready.synchronize()
        return poll()

    fetcher.poll = wait_and_poll  # type: ignore[method-assign]


@pytest.mark.parametrize("policy", ["FIFO", "LRU", "RANDOM", "LFU", "LFRU"])
@pytest.mark.parametrize(
    ("n_indexes", "n_ways", "quota", "cpu_us"),
    [(4, 3, 64, 1e9), (2, 2, 64, 0.0), (3, 1, 2, 0.0), (3, 1, 2, 1e9)],
)
def test_a_replay_finds_the_same_hits(
    policy: str,
    n_indexes: int,
    n_ways: int,
    quota: int,
    cpu_us: float,
    folder: Path,
    run_folder: Path,
) -> None:
    """`cpu_us` an expert: whether prompts wait for copies is not left to this machine's speed."""
    recorder = Recorder()
    options = {"n_indexes": n_indexes, "n_ways": n_ways, "policy": policy, "quota": quota}
    with open_engine(folder, recorder, **options) as engine:
        assert engine.accelerator is not None
        assert engine.accelerator.costs is not None
        engine.accelerator.costs = replace(engine.accelerator.costs, cpu=SideCost(0.0, cpu_us, 0.0))
        finish_copies_at_once(engine)
        greedy(engine.model, [PROMPT], N_TOKENS)
        greedy(engine.model, [PROMPT[:3]], N_TOKENS)
        evictions = engine.accelerator.cache.evictions
    write_reports(recorder, ReportPaths.in_folder(), RunInfo(), summarize(recorder))

    # The CSV counts a prompt's experts; the record has its tokens one by one.
    passes, last = [], -1
    decode = recorder.pass_table()["decode"]
    for event in recorder.layer_events():
        if event.pass_index != last:
            last = event.pass_index
            passes.append(("decode" if decode[last] else "prefill", [], []))
        passes[-1][1].append(tuple(tuple(token) for token in event.ids))
        passes[-1][2].append(event.waited)
    trace = [
        RoutingPass(phase, tuple(ids), waited=tuple(waited))  # type: ignore[arg-type]
        for phase, ids, waited in passes
    ]
    replayed = replay(
        trace,
        ExpertCache(n_indexes, n_ways, make_policy(policy)),
        quota=quota,
        keep_layers=True,
    )
    with Path("cache.csv").open() as file:
        rows = list(csv.reader(file))[1:]
    found = [[int(cell) for cell in row[1 : 1 + n_indexes]] for row in rows]
    assert found == replayed.hits_by_layer
    assert replayed.evictions == evictions
    is_prompt = ~decode
    assert sum(sum(row) for row, prompt in zip(found, is_prompt, strict=True) if not prompt) > 0
    # The second prompt finds what the first left, the first an empty cache.
    assert [sum(row) > 0 for row, prompt in zip(found, is_prompt, strict=True) if prompt] == [
        False,
        True,
    ]

    # And the written choices are those that were made.
    written = read_trace(Path("expert_choices.csv"))
    assert [one.ids for one in written.passes if one.phase == "decode"] == [
        one.ids for one in trace if one.phase == "decode"
    ]


@pytest.mark.parametrize("prompts", [[PROMPT], [PROMPT, PROMPT[2:]]], ids=["one", "batch"])
@pytest.mark.parametrize("prefetch", ["off", "next-layer"])
@pytest.mark.parametrize("miss_policy", ["cpu", "fetch", "auto"])
def test_counts_and_bytes_are_conserved(
    miss_policy: str, prefetch: str, prompts: list[list[int]], folder: Path
) -> None:
    recorder = Recorder()
    options = {"n_indexes": 3, "n_ways": 2, "policy": "LRU"}
    options |= {"miss_policy": miss_policy, "prefetch": prefetch}
    with open_engine(folder, recorder, **options) as engine:
        assert engine.accelerator is not None
        greedy(engine.model, prompts, N_TOKENS)
        fetcher = engine.accelerator.fetcher
        fetcher.drain()
        copies = fetcher.copies
        hits, misses = engine.accelerator.cache.hits, engine.accelerator.cache.misses
        block_bytes = engine.store.layouts[0].block_bytes
        assert engine.costs is not None
        predicted_us = predicted_step_us(recorder, engine.costs.model)
        assert engine.predicted_step_us(recorder) is None  # an emulated accelerator's
    table = recorder.layer_table()
    decode = table[recorder.pass_table()["decode"][table["pass_index"]]]
    cached = decode[decode["layer"] < 3]
    assert (cached["hits"] + cached["misses"] == 2 * cached["n_tokens"]).all()
    assert (decode[decode["layer"] == 3]["hits"] == 0).all()
    n_chosen = int((cached["hits"] + cached["misses"]).sum())
    assert n_chosen == 2 * 3 * len(prompts) * (N_TOKENS - 1)
    if len(prompts) == 1:
        assert hits == cached["hits"].sum() and hits + misses == n_chosen
    assert hits + misses <= n_chosen  # distinct experts of a batch
    assert int(table["fetch_bytes"].sum()) == copies * block_bytes
    assert int(table["fetches"].sum()) == copies
    # Every chosen expert was read once, on one side.
    ids = iter(recorder.layer_events())
    for row, event in zip(table, ids, strict=True):
        distinct = {expert for token in event.ids for expert in token if expert >= 0}
        assert row["cpu_bytes"] + row["gpu_bytes"] == len(distinct) * block_bytes
    # A hit saves its bytes; an expert that was waited for saves nothing.
    saved_bytes = summarize(recorder).saved_bytes
    assert saved_bytes == hits * block_bytes
    assert int((decode["gpu_bytes"] - decode["waited_bytes"]).sum()) == saved_bytes
    read_bytes = int(decode["cpu_bytes"].sum() + decode["gpu_bytes"].sum())
    waited_bytes = int(decode["waited_bytes"].sum())
    if miss_policy != "auto":  # which of the two it was is decided by the machine's speed
        assert waited_bytes == (read_bytes - saved_bytes if miss_policy == "fetch" else 0)
    # A step that waits for copies is predicted to take at least as long as they do.
    assert predicted_us is not None
    n_waited = waited_bytes / block_bytes / (N_TOKENS - 1)
    assert predicted_us >= n_waited * engine.costs.model.copy_us(shared=False)


SLEEPS_MS = {"attention": 4, "router": 5, "plan": 6, "cpu": 7, "wait": 8, "combine": 9}
HEAD_MS, N_STEPS = 20, 7


@pytest.mark.parametrize("miss_policy", ["cpu", "fetch"])
def test_the_parts_explain_a_step(
    miss_policy: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every part is made slow by as much as is known, and the steps are timed out here as well."""
    recorder = Recorder()
    head_s: list[float] = []

    def slow(name: str) -> None:
        time.sleep(SLEEPS_MS[name] / 1e3)

    def slowed(name: str, function: Callable[..., object]) -> Callable[..., object]:
        def run(*arguments: object, **options: object) -> object:
            slow(name)
            return function(*arguments, **options)

        return run

    def head_starts(*_: object) -> None:
        head_s.append(-time.perf_counter())
        time.sleep(HEAD_MS / 1e3)

    def head_ends(*_: object) -> None:
        head_s[-1] += time.perf_counter()

    options = {"n_indexes": 4, "n_ways": 2, "quota": 0, "miss_policy": miss_policy}
    with open_engine(folder, recorder, **options) as engine, torch.inference_mode():
        monkeypatch.setattr(dispatcher, "plan_decode", slowed("plan", plan_decode))
        for name, method in (("cpu", "compute_on_cpu"), ("wait", "wait"), ("combine", "combine")):
            function = slowed(name, getattr(LayerStep, method))
            monkeypatch.setattr(LayerStep, method, function)
        for layer, site in zip(engine.model.model.layers, engine.sites, strict=True):
            layer.self_attn.register_forward_pre_hook(lambda *_: slow("attention"))
            site.block.gate.register_forward_pre_hook(lambda *_: slow("router"))
        engine.model.lm_head.register_forward_pre_hook(head_starts)
        engine.model.lm_head.register_forward_hook(head_ends)
        past = engine.model(torch.tensor([PROMPT]), use_cache=True).past_key_values
        cache = {cache_argument(engine.model): past}
        wall_s = []
        for token in range(N_STEPS):
            started_s = time.perf_counter()
            engine.model(torch.tensor([[token]]), **cache)
            wall_s.append(time.perf_counter() - started_s)
    table = recorder.layer_table()[4:]  # without the prompt
    # Waiting is for copies where a layer waited for any, else for hits: part of combining.
    waited = table["waited_bytes"] > 0
    assert waited.any() == (miss_policy == "fetch")
    expected_ms = {part: np.full(len(table), ms) for part, ms in SLEEPS_MS.items()}
    wait_ms = expected_ms.pop("wait")
    expected_ms["copy_wait"] = wait_ms * waited
    expected_ms["combine"] += wait_ms * ~waited
    for part, ms in expected_ms.items():
        assert (table[f"{part}_us"] >= ms * 1e3 * 0.999).all(), part  # float32
    layers_us = sum(table[f"{part}_us"].astype(np.float64) for part in expected_ms)
    parts_s = layers_us.reshape(N_STEPS, 4).sum(axis=1) / 1e6 + np.array(head_s[1:])
    explained = parts_s / np.array(wall_s)
    assert (explained <= 1.001).all()  # no time was counted twice
    assert np.median(explained) > 0.95
    # The summary's and the CSV's remainder is the head.
    steps = recorder.pass_table()["duration_s"][1:]
    assert np.median(parts_s / steps) > 0.95
    parts_ms = summarize(recorder).parts_ms
    assert parts_ms["rest"] >= HEAD_MS
    assert sum(parts_ms.values()) == pytest.approx(steps.mean() * 1e3)


def test_padding_is_never_routed(folder: Path) -> None:
    recorder = Recorder()
    with open_engine(folder, recorder) as engine, torch.inference_mode():
        ids = torch.tensor([[0, 0, 0, 5, 17], [5, 17, 40, 8, 22]])
        mask = torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]])
        engine.model(ids, attention_mask=mask)
    assert recorder.pass_table()["n_tokens"].tolist() == [7]
    for event in recorder.layer_events():
        assert len(event.ids) == 7
        assert all(expert >= 0 for token in event.ids for expert in token)


def test_warming_leaves_the_last_tokens_experts(folder: Path) -> None:
    recorder = Recorder()
    with open_engine(folder, recorder, n_indexes=4, n_ways=2, policy="LRU") as engine:
        assert engine.accelerator is not None
        finish_copies_at_once(engine)
        with torch.inference_mode():
            engine.model(torch.tensor([PROMPT]))
        engine.accelerator.collect_copies()
        last = {event.layer: set(event.ids[-1]) for event in recorder.layer_events()}
        for layer, experts in last.items():
            assert set(engine.accelerator.cache.ready(layer)) == experts


def test_layer_outputs_are_their_own_memory(folder: Path) -> None:
    """A hook may keep what a layer gave: the next layer must not write over it."""
    with open_engine(folder, Recorder()) as engine, torch.no_grad():
        kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        for site in engine.sites:
            module = engine.model.get_submodule(site.experts_path)
            module.register_forward_hook(
                lambda _, arguments, output: kept.append((output, output.clone()))
            )
        engine.model(torch.tensor([PROMPT]))
        with torch.inference_mode():
            engine.model(torch.tensor([PROMPT]))
        engine.model(torch.tensor([PROMPT[:2]]))
    assert len(kept) == 3 * 4
    assert all(torch.equal(output, copy) for output, copy in kept)


def test_an_aborted_pass_leaves_nothing(folder: Path) -> None:
    recorder = Recorder()
    with open_engine(folder, recorder) as engine, torch.inference_mode():
        handle = engine.sites[2].block.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.model(torch.tensor([PROMPT]))
        handle.remove()
        engine.model(torch.tensor([PROMPT[:3]]))
    assert recorder.layer_table()["n_tokens"].tolist() == [3] * 4
    assert len(recorder.expert_ids()) == 4 * 3 * 2


@pytest.mark.parametrize("interrupted", [False, True])
def test_calibrating_leaves_the_cached_experts_in_their_slots(
    interrupted: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "_STEP_BUDGET_S", 0.01)
    with open_engine(folder, Recorder(), n_indexes=4, n_ways=8) as engine, torch.inference_mode():
        assert engine.accelerator is not None
        cache, fetcher = engine.accelerator.cache, engine.accelerator.fetcher

        def logits() -> torch.Tensor:
            past = engine.model(torch.tensor([PROMPT]), use_cache=True).past_key_values
            name = cache_argument(engine.model)
            return torch.cat(
                [engine.model(torch.tensor([[t]]), **{name: past}).logits[0] for t in PROMPT]
            )

        logits()
        finish_copies_at_once(engine)
        logits()  # all that these tokens choose is there now
        hits = cache.hits
        expected = logits()
        n_hits, hits = cache.hits - hits, cache.hits
        assert n_hits == len(PROMPT) * 4 * 2
        held = {layer: cache.ready(layer) for layer in range(4)}
        if interrupted:
            monkeypatch.setattr(calibration, "plain_read_gbps", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                engine.calibrate(again=True)
        else:
            engine.calibrate(again=True)
        assert {layer: cache.ready(layer) for layer in range(4)} == held
        for layer, slots in held.items():
            for expert, slot in slots.items():
                assert torch.equal(fetcher.slots[slot], engine.store.block(layer, expert))
        assert torch.equal(logits(), expected)
        assert cache.hits - hits == n_hits


def test_plans_follow_a_new_calibration_and_a_trial_does_not_count_it(
    folder: Path, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_engine(
        folder, Recorder(), n_indexes=2, n_ways=2, policy="LRU", miss_policy="auto"
    ) as engine:
        accelerator = engine.accelerator
        assert accelerator is not None and accelerator.trial is not None
        greedy(engine.model, [PROMPT], N_TOKENS)
        counted: list[float] = []
        monkeypatch.setattr(accelerator.trial, "record", counted.append)
        old = accelerator.costs
        engine.calibrate(again=True)
        assert engine.costs is not None
        assert accelerator.costs is engine.costs.model and accelerator.costs is not old
        assert counted == []  # its steps leave the experts out
        greedy(engine.model, [PROMPT], N_TOKENS)
        assert counted


def test_calibrating_leaves_forced_routing_where_it_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_engine(folder, Recorder()) as engine:
        routing = ForcedRouting(even_workload(4, 8, 2).generate(9, 0, 3), 4, 8, 2)
        engine.dispatcher.forced_routing = routing
        monkeypatch.setattr(routing, "begin_pass", lambda *_: pytest.fail("the trace went on"))
        engine.decode_step()
        assert engine.dispatcher.forced_routing is routing


@pytest.mark.parametrize(
    ("cache_bytes", "is_limit"), [(0, True), (1 << 14, True), (1 << 30, False)]
)
def test_experts_in_the_cpus_cache_are_not_held_against_memory(
    cache_bytes: int, is_limit: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches = (Cache(3, "Unified", cache_bytes, 1),)
    monkeypatch.setattr(
        engine_module, "read_hardware", lambda **_: replace(read_hardware(), caches=caches)
    )
    with open_engine(folder, Recorder()) as engine:
        assert engine.cpu_limit_gbps is None
        engine.calibrate()
        assert engine.costs is not None
        assert engine.cpu_limit_gbps == (engine.costs.read_gbps if is_limit else None)
        lines = "\n".join(engine.costs.describe(engine.experts_in_memory))
        assert ("no measure of memory" in lines) or is_limit


def test_a_busy_machine_is_said_at_once_and_noted(folder: Path) -> None:
    said: list[str] = []
    looked: list[float | None] = []

    def look(alone_us: Callable[[], float | None]) -> str:
        looked.append(alone_us())
        return "busy"

    model = CostModel(
        SideCost(5, 100, 10), SideCost(5, 20, 1), 1, 10, 5, 1.5, 4096, 50, step_us=700
    )
    with open_engine(folder, Recorder()) as engine:
        engine.say, engine._busy = said.append, SimpleNamespace(look=look)  # type: ignore[assignment]
        engine.follow_prompts([3, 4])
        engine.costs = MachineCosts(model, 25.0, Steadiness(0.0, 0.0))
        engine.follow_prompts([3, 4])
        assert engine.dispatcher.prompt == 3
        assert engine.notes.count("busy") == 2
    # Two sequences of two experts each, in four layers.
    assert looked == [None, 700 + 4 * (50 + 5 + 4 * 110)]
    assert said == ["busy", "busy"]


@pytest.mark.parametrize(
    ("wanted", "n_gpus", "found"),
    [
        *[("auto", 0, "cpu"), ("cpu", 2, "cpu"), ("auto", 2, "cuda:1"), ("cuda", 2, "cuda:1")],
        *[("cuda:0", 2, "cuda:0"), ("cuda:1", 2, "cuda:1")],
        ("cuda:2", 2, "expected --device cuda:0 to cuda:1, the GPUs that torch sees, found cuda:2"),
        ("cuda:0", 0, "--device cuda:0 was asked for and torch sees no GPU"),
    ],
)
def test_one_of_several_gpus(
    wanted: str, n_gpus: int, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`cuda` alone is the current one, here the second."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: n_gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    if " " in found:
        with pytest.raises(UserError, match=found):
            loading.choose_device(wanted)
    else:
        assert loading.choose_device(wanted) == torch.device(found)


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "cpu:0", ""])
def test_a_device_that_is_none(device: str) -> None:
    with pytest.raises(UserError, match="expected --device as one of auto, cuda, cuda:N, cpu"):
        ModelOptions(model_path=Path("m"), device=device)
