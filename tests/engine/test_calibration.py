"""What is measured is what a run pays: no set-up, nothing from a cache, the head once a token."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_offload.checkpoint.block import Activation, block_layout
from moe_offload.engine import calibration, probes
from moe_offload.engine.calibration import (
    MAX_AGE_S,
    Calibration,
    MachineCosts,
    predicted_step_us,
)
from moe_offload.engine.probes import (
    copier,
    cpu_runner,
    cublas_crossover,
    dense_costs,
    gpu_runner,
)
from moe_offload.engine.timing import Steadiness
from moe_offload.experts.costs import CostModel, SideCost
from moe_offload.experts.recorder import LayerEvent, Recorder
from moe_offload.experts.slots import GpuExperts
from moe_offload.experts.store import ExpertStore
from moe_offload.files import user_cache
from moe_offload.machine.hardware import Hardware, read_hardware

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
    dispatcher: Any = SimpleNamespace(store=SimpleNamespace(n_layers=n_layers), on_layer=[])
    now_s, steps = 0.0, 0

    def step() -> None:
        nonlocal now_s, steps
        steps += 1
        slow = 10 if steps % 3 == 0 else 1
        for _ in range(n_layers):
            dispatcher.on_layer[0]()
            now_s += 30e-6 * slow
        now_s += 1000e-6 * slow

    def experts() -> None:
        nonlocal now_s
        now_s += 5.0

    monkeypatch.setattr("moe_offload.engine.probes.time.perf_counter", lambda: now_s)
    monkeypatch.setattr(probes, "_STEP_BUDGET_S", 0.0)
    assert dense_costs(step, dispatcher, experts) == pytest.approx(expected)
    assert dispatcher.on_layer == []


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


@pytest.mark.parametrize(
    ("launch_s", "from_tokens", "tried"),
    [(0.0, 16, (1024, 256, 64, 16)), (100.0, 256, (1024, 256, 64)), (9000.0, None, (1024,))],
)
def test_a_prompts_experts_are_computed_one_by_one_where_that_is_faster(
    launch_s: float, from_tokens: int | None, tried: tuple[int, ...], monkeypatch: Any
) -> None:
    """On a clock: an expert by itself is a launch and half of what its tiles take."""
    now_s = 0.0
    gpu = GpuExperts(LAYOUT, Activation("silu"), 3, "cpu")
    add_expert = gpu._add_expert

    def alone(hidden: Tensor, slot: int, pairs: Tensor, *more: Tensor) -> None:
        nonlocal now_s
        now_s += launch_s + len(pairs) / 2
        add_expert(hidden, slot, pairs, *more)

    def tiled(hidden: Tensor, groups: list[Any], pairs: Tensor, *more: Tensor) -> None:
        nonlocal now_s
        for slot, first, n in groups:
            now_s += n
            add_expert(hidden, slot, pairs[first : first + n], *more)

    monkeypatch.setattr(gpu, "_add_expert", alone)
    gpu._tiles = SimpleNamespace(add=tiled)  # type: ignore[assignment]
    monkeypatch.setattr("moe_offload.engine.timing.time.perf_counter", lambda: now_s)
    sums: list[Tensor] = []
    launch = gpu.launch_groups

    def noted(*call: Any) -> Any:
        pending = launch(*call[:-1], torch.zeros_like(call[-1]))
        assert pending.end.synchronize() is None
        sums.append(pending.out)
        return pending

    gpu.slots.copy_(torch.randint(0, 60, gpu.slots.shape, dtype=torch.uint8))
    monkeypatch.setattr(gpu, "launch_groups", noted)
    before = gpu.cublas_tokens
    found = cublas_crossover(gpu, torch.float32)
    gpu.close()
    assert (found.from_tokens, found.tokens) == (from_tokens, tried)
    assert "cuBLAS" in str(found) and gpu.cublas_tokens == before
    for n_tokens in tried:  # both ways give every pair's part
        first, *others = [one for one in sums if len(one) == n_tokens]
        assert first.abs().sum() > 0 and others
        for other in others:
            torch.testing.assert_close(other, first)


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


def measured(read_gbps: float, is_quiet: bool = True) -> MachineCosts:
    return MachineCosts(MODEL, read_gbps, Steadiness(0.0, 0.0 if is_quiet else 1.0))


class Cpu:
    description, suits_onednn = "none", False


@pytest.fixture
def hardware() -> Hardware:
    return replace(read_hardware(), isa=())


@pytest.fixture
def quick(
    store: ExpertStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Calibration]:
    """Finds 1, 2, 3, ... GB/s, and keeps them in a folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = itertools.count(1.0)
    monkeypatch.setattr(Calibration, "_measure", lambda _: measured(next(found)))
    cpu: Any = Cpu()
    yield Calibration(store, cpu, None, lambda: None, None, torch.float32, "none")


def kept_file() -> Path:
    (path,) = user_cache().iterdir()
    return path


def rewrite(**changes: Any) -> None:
    kept_file().write_text(json.dumps(json.loads(kept_file().read_text()) | changes))


def merged(data: Any, change: Any) -> Any:
    if not isinstance(change, dict):
        return change
    return {**data, **{key: merged(data.get(key), value) for key, value in change.items()}}


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
    change: dict[str, Any], quick: Calibration, hardware: Hardware
) -> None:
    assert quick.costs(hardware).read_gbps == 1.0  # nothing was kept: measured
    kept = MachineCosts(MODEL, 25.0, Steadiness(0.01, 0.0))
    rewrite(calibration=merged(asdict(kept), change))
    assert quick.costs(hardware) == (kept if not change else measured(2.0))


def test_a_calibration_is_kept_per_hardware_and_model(
    quick: Calibration, hardware: Hardware
) -> None:
    assert [quick.costs(hardware).read_gbps for _ in range(2)] == [1.0, 1.0]
    assert quick.costs(replace(hardware, cpu="another")).read_gbps == 2.0
    assert replace(quick, dense="int8").costs(hardware).read_gbps == 3.0
    assert quick.costs(hardware, again=True).read_gbps == 4.0
    assert quick.costs(hardware).read_gbps == 4.0


@pytest.mark.parametrize(("age_s", "is_kept"), [(0.9, True), (1.1, False), (-0.1, False)])
def test_a_calibration_expires(
    age_s: float, is_kept: bool, quick: Calibration, hardware: Hardware
) -> None:
    quick.costs(hardware)
    rewrite(measured_unix_s=time.time() - age_s * MAX_AGE_S)
    assert quick.costs(hardware).read_gbps == (1.0 if is_kept else 2.0)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"measured_unix_s": "now"}', "[" * 100_000, "é" * 3, " " * (1 << 21)],
    ids=lambda text: repr(text[:20]),
)
def test_a_damaged_calibration_is_measured_anew(
    text: str, quick: Calibration, hardware: Hardware
) -> None:
    quick.costs(hardware)
    kept_file().write_text(text)
    assert quick.costs(hardware).read_gbps == 2.0


def test_what_is_no_file_is_not_read(quick: Calibration, hardware: Hardware) -> None:
    quick.costs(hardware)
    path = kept_file()
    path.unlink()
    os.mkfifo(path)  # whose reader would wait for ever
    assert quick.costs(hardware).read_gbps == 2.0


def test_a_folder_that_cannot_be_written_is_no_error(
    tmp_path: Path, quick: Calibration, hardware: Hardware, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert [quick.costs(hardware).read_gbps for _ in range(2)] == [1.0, 2.0]


def test_what_a_busy_machine_gave_is_this_processes_alone(
    quick: Calibration, hardware: Hardware, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = itertools.count(1.0)
    monkeypatch.setattr(Calibration, "_measure", lambda _: measured(next(found), is_quiet=False))
    assert [quick.costs(hardware).read_gbps for _ in range(2)] == [1.0, 1.0]
    # Asked for anew, and worse than none for the processes to come.
    assert quick.costs(hardware, again=True).read_gbps == 2.0
    assert quick.costs(hardware).read_gbps == 1.0
    monkeypatch.setattr(calibration, "_this_process", lambda: (1.0, 0.0))
    assert quick.costs(hardware).read_gbps == 3.0
