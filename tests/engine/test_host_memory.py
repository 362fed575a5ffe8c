"""Experts on disk: the text is the same whatever host memory holds, and what a budget means."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from against_transformers import greedy, prepared
from tiny_models import CONFIGS, build_model, write_hub

from moe_offload.checkpoint.prepared import read_manifest
from moe_offload.config import POLICIES, CacheOptions, ModelOptions
from moe_offload.engine import memory
from moe_offload.engine.engine import Engine
from moe_offload.engine.loading import load_engine
from moe_offload.errors import UserError
from moe_offload.experts.cache import ways_within
from moe_offload.experts.disk_tier import DiskTier
from moe_offload.experts.recorder import Recorder
from moe_offload.model.loader import PreparedModel

PROMPTS = [[5, 17, 40, 8, 22, 71], [9, 33, 12]]
N_TOKENS = 10
N_EXPERTS = 8  # of each of two layers, top-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("host-memory")
    source = write_hub(build_model(CONFIGS["qwen3_moe"]()), root / "source")
    return prepared(source, root / "prepared", "--hf", "--expert-dtype", "fp32")


def open_engine(
    folder: Path,
    n_ways: int | None,
    policy: str = "LFRU",
    cache: CacheOptions | None = None,
    warm_start: Path | None = None,
) -> tuple[Engine, Recorder]:
    """With host memory for `n_ways` experts of each layer."""
    source, recorder = PreparedModel(read_manifest(folder)), Recorder()
    each_bytes = sum(layout.block_bytes for layout in source.layouts)
    gb = None if n_ways is None else (n_ways + 0.5) * each_bytes / 1e9
    model = ModelOptions(
        folder, device="cpu", host_memory_gb=gb, host_policy=policy, warm_start=warm_start
    )
    return load_engine(source, model, cache or CacheOptions(), recorder), recorder


def settings() -> Iterator[tuple[int, str, dict[str, Any], int]]:
    """(ways, policy, cache options, batch): every budget with every cache, the rest by turns."""
    caches: list[dict[str, Any]] = [
        {},
        {"miss_policy": "fetch"},
        {"n_indexes": 1, "n_ways": 2},
        {"n_indexes": 2, "n_ways": 1, "prefetch": "next-layer"},
        {"n_indexes": 2, "n_ways": 3, "miss_policy": "fetch", "policy": "LRU"},
        {"n_indexes": 2, "n_ways": 5, "prefetch": "next-layer", "quota": 1},
        {"n_indexes": 2, "n_ways": 8, "miss_policy": "auto"},
    ]
    turns = zip(itertools.cycle(POLICIES), itertools.cycle((1, 2, 2)), strict=False)
    for n_ways, cache in itertools.product((1, 2, 3, 4, 5, 7), caches):
        policy, batch = next(turns)
        yield n_ways, policy, cache, batch


@dataclass
class Answers:
    texts: list[list[int]]
    recorder: Recorder


def answers(
    folder: Path, n_ways: int | None, policy: str, cache: dict[str, Any], batch: int
) -> Answers:
    engine, recorder = open_engine(folder, n_ways, policy, CacheOptions(**cache))
    with engine:
        batches = [PROMPTS] if batch == 2 else [[prompt] for prompt in PROMPTS]
        texts = [text for one in batches for text in greedy(engine.model, one, N_TOKENS)]
    return Answers(texts, recorder)


def test_the_text_is_the_same_whatever_host_memory_holds(folder: Path) -> None:
    expected = {batch: answers(folder, None, "LFRU", {}, batch).texts for batch in (1, 2)}
    tried = list(settings())
    assert len(tried) >= 40
    for n_ways, policy, cache, batch in tried:
        found = answers(folder, n_ways, policy, cache, batch)
        assert found.texts == expected[batch], (n_ways, policy, cache, batch)
        layers = found.recorder.layer_table()
        assert layers["host_misses"].sum() > 0
        # The bytes arrived when somebody asked for them; the last ones too.
        block_bytes = read_manifest(folder).moe_layers[0].layout.block_bytes
        assert layers["disk_bytes"].sum() >= layers["host_misses"].sum() * block_bytes
        assert (layers["disk_wait_us"] >= 0).all()


def test_a_budget_that_holds_all_experts_is_no_tier(folder: Path) -> None:
    for n_ways in (None, N_EXPERTS):
        engine, _ = open_engine(folder, n_ways)
        with engine:
            assert not isinstance(engine.store, DiskTier)


def test_a_budget_without_room_for_an_expert_of_each_layer_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"room for at least one expert of each layer in --host"):
        open_engine(folder, 0)


def test_what_does_not_fit_free_memory_stays_on_disk_and_one_line_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = PreparedModel(read_manifest(folder))
    each_bytes = sum(layout.block_bytes for layout in source.layouts)
    kv_bytes = memory.kv_cache_bytes(source.config, 4096, source.dtype.itemsize)
    others = source.dense_bytes + kv_bytes + memory._WORKSPACE_BYTES
    monkeypatch.setattr(memory, "available_bytes", lambda: others + 3 * each_bytes)
    engine, _ = open_engine(folder, None)
    with engine:
        assert isinstance(engine.store, DiskTier)
        assert engine.store.cache.n_ways == 3
        lines = [note for note in engine.notes if "host memory holds" in note]
        assert lines == [
            "host memory holds 3 of 8 experts of each layer, for 0.0 GB are free for them; the "
            "others are read from disk when they are needed"
        ]
        assert engine.describe()["host_nways"] == 3


def test_a_warm_start_loads_the_favourites_before_the_first_prompt(
    folder: Path, tmp_path: Path
) -> None:
    counts = tmp_path / "expert_counts.csv"
    counts.write_text("Layer,Expert,Count\n0,1,3\n0,5,9\n0,2,7\n1,6,4\n")
    engine, _ = open_engine(folder, 2, warm_start=counts)
    with engine:
        assert isinstance(engine.store, DiskTier)
        held = [sorted(engine.store.cache.ready(layer)) for layer in range(2)]
        assert held == [[2, 5], [6]]
    engine, _ = open_engine(folder, None, warm_start=counts)
    with engine:
        assert any("all experts are in host memory" in note for note in engine.notes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Layer,Expert,Count\n0,1,x\n", "of whole numbers in .*, found others in line 2"),
        ("Layer,Expert\n0,1\n", "expected columns Layer, Expert and Count"),
        ("", "expected columns Layer, Expert and Count"),
        ("Layer,Expert,Count\n0,8,1\n", "found layer 0, expert 8 in .*: give this model's own"),
        (None, "cannot read .*: No such file"),
    ],
)
def test_a_file_of_other_counts_is_a_sentence(
    folder: Path, tmp_path: Path, text: str | None, message: str
) -> None:
    counts = tmp_path / "counts.csv"
    if text is not None:
        counts.write_text(text)
    with pytest.raises(UserError, match=message):
        open_engine(folder, 2, warm_start=counts)


def test_the_calibration_and_the_prediction_know_the_disk(folder: Path) -> None:
    engine, recorder = open_engine(folder, 2)
    with engine:
        engine.calibrate(again=True)
        assert engine.costs is not None
        disk = engine.costs.model.disk
        assert disk is not None
        assert f"disk: {disk.gbps:.2f} GB/s of experts" in "\n".join(engine.costs.describe())
        greedy(engine.model, [PROMPTS[0]], N_TOKENS)
        predicted_us = engine.predicted_step_us(recorder)
        assert predicted_us is not None
        misses = int(recorder.layer_table()["host_misses"][2:].sum())  # without the prompt
        block_bytes = engine.source.layouts[0].block_bytes
        n_steps = N_TOKENS - 1
        assert misses > 0
        assert predicted_us * n_steps > misses * block_bytes / disk.gbps / 1e3


def test_what_is_left_of_a_budget_is_places_between_layers(folder: Path) -> None:
    engine, _ = open_engine(folder, 3)  # and a half: one block
    with engine:
        assert isinstance(engine.store, DiskTier)
        assert [len(engine.store.memory.blocks(layer)) for layer in range(2)] == [3, 3]
        assert len(engine.store._spare) == 1
        texts = greedy(engine.model, PROMPTS, N_TOKENS)
        assert [len(engine.store.cache.ready(layer)) for layer in range(2)] == [3, 3]
    assert texts == answers(folder, None, "LFRU", {}, 2).texts


@pytest.mark.parametrize("room", range(5, 21))
def test_what_is_left_beside_those_holds_more_of_the_first_layers(room: int) -> None:
    ways = ways_within(room * 10 + 9, [10] * 5, [4] * 5)
    assert sum(ways) == room and ways == sorted(ways, reverse=True) and ways[0] - ways[-1] <= 1
