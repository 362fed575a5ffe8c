"""What is measured is what a run pays: no set-up, nothing from a cache, the head once a token."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_offload.checkpoint.block import block_layout
from moe_offload.engine import calibration
from moe_offload.engine.calibration import (
    MachineCosts,
    copier,
    cpu_runner,
    dense_costs,
    gpu_runner,
    machine_costs,
    predicted_step_us,
)
from moe_offload.engine.timing import CalibrationCache, Steadiness
from moe_offload.experts.costs import CostModel, SideCost
from moe_offload.experts.recorder import LayerEvent, Recorder
from moe_offload.experts.store import ExpertStore
from moe_offload.machine.hardware import read_hardware

LAYOUT = block_layout("bf16", 16, 8)
N_LAYERS, N_EXPERTS = 2, 4
N_BLOCKS = N_LAYERS * N_EXPERTS
MODEL = CostModel(
    SideCost(5, 100, 10), SideCost(5, 20, 1), 1, 10, 5, 1.5, LAYOUT.block_bytes, 50, step_us=700
)


@pytest.fixture
def store() -> Iterator[ExpertStore]:
    """Every block holds its number, layer by layer."""
    filled = ExpertStore([LAYOUT] * N_LAYERS, [N_EXPERTS] * N_LAYERS)
    for layer, expert in itertools.product(range(N_LAYERS), range(N_EXPERTS)):
        filled.block(layer, expert).fill_(layer * N_EXPERTS + expert)
    yield filled
    filled.close()


@pytest.mark.parametrize(("n_layers", "expected"), [(4, (30.0, 1000.0)), (1, (1030.0, 0.0))])
def test_the_head_is_a_steps_and_not_a_layers(
    n_layers: int, expected: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a modelled clock where every third step is disturbed: a mean would see it."""
    blocks = [nn.Identity() for _ in range(n_layers)]
    now_s, steps = 0.0, 0

    def step() -> None:
        nonlocal now_s, steps
        steps += 1
        slow = 10 if steps % 3 == 0 else 1
        for block in blocks:
            block(torch.zeros(1))
            now_s += 30e-6 * slow
        now_s += 1000e-6 * slow

    def experts() -> None:
        nonlocal now_s
        now_s += 5.0

    monkeypatch.setattr("moe_offload.engine.calibration.time.perf_counter", lambda: now_s)
    monkeypatch.setattr(calibration, "_STEP_BUDGET_S", 0.0)
    assert dense_costs(step, blocks, experts) == pytest.approx(expected)
    assert not any(block._forward_pre_hooks for block in blocks)


def test_a_calls_operands_are_at_hand(store: ExpertStore) -> None:
    given: list[tuple[int, ...]] = []
    chosen: list[int] = []

    class Cpu:
        def run(self, hidden, pointers, mask, index, weights, out):
            given.append(tuple(t.data_ptr() for t in (hidden, mask, weights, out)))
            chosen.extend(pointers[index.flatten()].tolist())

    run: Callable[[tuple[int, ...]], None] = cpu_runner(store, Cpu(), torch.float32)  # type: ignore[arg-type]
    for _ in range(2 * N_BLOCKS):
        run((1,))
    assert len(set(given)) <= N_LAYERS  # a layer's mask
    assert chosen[:N_BLOCKS] == chosen[N_BLOCKS:] and len(set(chosen)) == N_BLOCKS


@dataclass
class Gpu:
    """An accelerator that computes nothing and remembers what it was asked."""

    n_slots: int
    launched: list[list[int]]
    device = torch.device("cpu")

    def __post_init__(self) -> None:
        self.slots = torch.zeros(self.n_slots, LAYOUT.block_bytes, dtype=torch.uint8)

    def launch(self, hidden: Tensor, slots: list[int], weights: Tensor, _: object) -> Gpu:
        assert len(hidden) == len(slots) == len(weights)
        self.launched.append(slots)
        return self

    def result(self) -> None: ...


@pytest.mark.parametrize("n_slots", [3, 5, 11])
def test_the_accelerators_slots_are_all_used_in_turn(store: ExpertStore, n_slots: int) -> None:
    gpu: Any = Gpu(n_slots, [])
    with gpu_runner(store, gpu, torch.float32) as run:
        assert gpu.slots[:, 0].tolist() == [
            slot % (N_LAYERS * N_EXPERTS) for slot in range(n_slots)
        ]
        for _ in range(n_slots):
            run((1, 2))
    assert {len(set(slots)) for slots in gpu.launched} == {2}
    used = [slot for slots in gpu.launched for slot in dict.fromkeys(slots)]
    assert used == [i % n_slots for i in range(2 * n_slots)]


def test_copies_read_every_block_in_turn(store: ExpertStore) -> None:
    gpu: Any = Gpu(3, [])
    seen = []
    with copier(store, gpu, None) as copy:
        for n_bytes in (LAYOUT.block_bytes, 16) * (N_BLOCKS // 2):
            copy(n_bytes)
            seen.append(int(gpu.slots[2, 0]))
    assert seen == list(range(N_BLOCKS))


def test_a_step_is_predicted_with_one_head() -> None:
    recorder = Recorder()
    for hits in ([2, 0], [1, 1]):
        recorder.begin_pass("decode", 1, 0)
        for layer, n_hits in enumerate(hits):
            gpu_bytes, cpu_bytes = (n * LAYOUT.block_bytes for n in (n_hits, 2 - n_hits))
            moved = {"gpu_bytes": gpu_bytes, "cpu_bytes": cpu_bytes}
            recorder.layer(LayerEvent(layer, [[0, 1]], [n_hits], n_hits, 2 - n_hits, **moved))
        recorder.end_pass(1.0)
    # Layers of 2 hits, of 2 misses, and twice of one each; MODEL's one token costs 110 and 21.
    layers_us = (50 + 5 + 42) + (50 + 5 + 220) + 2 * (50 + 115)
    assert predicted_step_us(recorder, MODEL) == pytest.approx(layers_us / 2 + 700)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"read_gbps": -3.0},
        {"read_gbps": float("nan")},
        {"read_gbps": 10**400},
        {"model": {"copy_gbps": 0}},
        {"model": {"copy_call_us": -1.0}},
        {"model": {"block_bytes": 1}},
        {"model": {"step_us": float("inf")}},
        {"model": {"cpu_shared_factor": 0.2}},
        {"model": {"cpu": {"call_us": -5.0}}},
        {"model": {"cpu": {"few": [[1, 1e300]]}}},
        {"model": {"cpu": {"token_us": "fast"}}},
        {"steadiness": None},
        {"unknown": 1},
    ],
    ids=lambda change: json.dumps(change)[:40],
)
def test_a_kept_calibration_is_believed_unless_no_machine_has_it(
    change: dict[str, Any], store: ExpertStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = MachineCosts(MODEL, 25.0, Steadiness(0.01, 0.0))
    cache = CalibrationCache(tmp_path)
    monkeypatch.setattr(calibration, "CalibrationCache", lambda: cache)
    monkeypatch.setattr(calibration, "_measure", lambda *_: replace(kept, read_gbps=99.0))
    hardware = replace(read_hardware(), isa=())

    class Cpu:
        description, suits_onednn = "none", False

        def with_onednn(self, n_tokens: int | None) -> Cpu:
            return self

    def costs() -> MachineCosts:
        return machine_costs(
            store, Cpu(), None, lambda: None, [], hardware, dtype=torch.float32, dense="none"
        )  # type: ignore[arg-type]

    assert costs().read_gbps == 99.0  # nothing was kept: measured
    (path,) = tmp_path.iterdir()
    document = json.loads(path.read_text())
    document["calibration"] = merged(asdict(kept), change)
    path.write_text(json.dumps(document))
    assert costs() == (kept if not change else replace(kept, read_gbps=99.0))


def merged(data: Any, change: Any) -> Any:
    if not isinstance(change, dict):
        return change
    return {**data, **{key: merged(data.get(key), value) for key, value in change.items()}}
