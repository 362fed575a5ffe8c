"""Decode steps and prompts as on a GPU, without one: every operand on one device, no hidden wait.

`pretended_gpu` marks tensors and looks at every call; what CUDA would refuse raises there. The text
must be the CPU's. A decode step's layer may make one copy to the host, wait once for it, and make
at most one copy back beside those of experts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from against_transformers import greedy, prepared
from pretended_gpu import EVENTS_APART_MS, GPU, GpuTensor, Seen, WrongDeviceError, pretended_gpu
from tiny_models import CONFIGS, build_model, write_hub

from moe_offload.checkpoint.prepared import read_manifest
from moe_offload.config import CacheOptions, ModelOptions
from moe_offload.engine import probes
from moe_offload.engine.engine import Engine
from moe_offload.engine.loading import load_engine
from moe_offload.experts.fetcher import ExpertFetcher
from moe_offload.experts.layer import LayerStep
from moe_offload.experts.recorder import Recorder
from moe_offload.experts.slots import GpuExperts
from moe_offload.model.loader import PreparedModel

N_TOKENS = 6
LONG = [(7 * i + 3) % 60 for i in range(100)]  # above the pairs that one launch names
BATCHES = [[[5, 17, 40, 8, 22, 71]], [[5, 17, 40, 8, 22, 71], [9, 33, 12]], [LONG]]
CACHED: dict[str, Any] = {"n_indexes": 2, "n_ways": 2, "policy": "LRU"}
SETTINGS: dict[str, dict[str, Any]] = {
    "no cache": {},
    "paper": CACHED,
    "fetch on demand": {"miss_policy": "fetch"},
    "prefetch": {**CACHED, "miss_policy": "fetch", "prefetch": "next-layer"},
    "auto": {"auto": True, "miss_policy": "auto", "memory_gb": 0.001},
}
MODELS = ("mixtral", "phimoe", "qwen3_moe", "gpt_oss", "deepseek_v3")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    root = tmp_path_factory.mktemp("device-placement")
    made = {}
    for name, weight_format in (*((name, "fp32") for name in MODELS), ("mixtral", "int4")):
        source = root / name
        if not source.exists():
            write_hub(build_model(CONFIGS[name]()), source)
        flags = ("--hf", "--expert-dtype", weight_format)
        made[name, weight_format] = prepared(source, root / f"{name}-{weight_format}", *flags)
    return made


@pytest.fixture(autouse=True)
def _short_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "_STEP_BUDGET_S", 0.01)


def generate(folder: Path, device: str, options: dict[str, Any], watch: Any = None) -> list[Any]:
    """The tokens of each batch; `watch(engine)` may look at the run."""
    tokens = []
    with load_engine(
        PreparedModel(read_manifest(folder)),
        ModelOptions(folder, device=device),
        CacheOptions(**options),
        Recorder(),
    ) as engine:
        if watch is not None:
            watch(engine)
        for batch in BATCHES:
            tokens.append(greedy(engine.model, batch, N_TOKENS))
    return tokens


def watch_layers(engine: Engine, seen: Seen) -> list[tuple[int, list[int]]]:
    """Holds every layer from now on to one wait; fills with (its tokens, bytes of each copy to the
    GPU) of each decode step's layer.

    The copies of experts, which go on in a stream of their own, are left out.
    """
    dispatcher, found = engine.dispatcher, []
    run = dispatcher.run

    def watching(layer: int, hidden: Any, *routing: Any) -> Any:
        seen.clear()
        out = run(layer, hidden, *routing)
        block_bytes = engine.store.layouts[0].block_bytes
        others = [n_bytes for n_bytes in seen.to_gpu if n_bytes != block_bytes]
        assert seen.waits == ["stream"], "the host waits for more than its input"
        assert len(seen.to_host) == (dispatcher.recorded is None)  # else a graph's own copy
        if dispatcher._decode:
            found.append((len(hidden), others))
        return out

    dispatcher.run = watching  # type: ignore[method-assign]
    return found


def run_on_pretence(
    folder: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, current: int = 0
) -> tuple[list[Any], list[tuple[int, list[int]]]]:
    """The tokens, and what `watch_layers` found; `current` is the current device once loaded."""
    layers: list[tuple[int, list[int]]] = []
    with pretended_gpu(monkeypatch) as seen:

        def watch(engine: Engine) -> None:
            nonlocal layers
            assert engine.device == GPU
            assert all(isinstance(p, GpuTensor) for p in engine.model.parameters())
            layers = watch_layers(engine, seen)
            seen.current = current

        tokens = generate(folder, "cuda", options, watch)
        assert seen.elsewhere == []
    assert len(layers) > 3 * N_TOKENS
    return tokens, layers


@pytest.mark.parametrize(
    ("name", "weight_format", "setting"),
    [
        *(("mixtral", "fp32", setting) for setting in SETTINGS),
        *((name, "fp32", "paper") for name in MODELS[1:]),
        ("mixtral", "int4", "paper"),
    ],
)
def test_all_operands_are_on_one_device_and_the_host_waits_once_a_layer(
    name: str,
    weight_format: str,
    setting: str,
    folders: dict[tuple[str, str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = folders[name, weight_format]
    expected = generate(folder, "cpu", {})
    found, layers = run_on_pretence(folder, SETTINGS[setting], monkeypatch)
    if weight_format == "fp32":  # else the two sides round differently
        assert found == expected
    for n_tokens, copies in layers:
        # A batch's pairs are sent where torch computes the hits: few enough to go with the launch.
        assert len(copies) <= 1 + (n_tokens > 1)


@pytest.mark.parametrize(("weight_format", "current"), [("fp32", 0), ("fp32", 1), ("int4", 1)])
def test_triton_kernels_are_given_the_gpus_tensors_and_decode_sends_it_nothing(
    weight_format: str,
    current: int,
    folders: dict[tuple[str, str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The kernels are stood in for: what is held is all that surrounds them.

    Whatever decode would send would queue behind experts in the card's one copy engine.
    """
    pytest.importorskip("triton", reason="Triton is not installed")
    from moe_offload.kernels import triton_combine, triton_experts, triton_tiles

    launched = set()
    read_host = "combine_kernel", "present_kernel", "take_slots_kernel"

    class StandIn:
        def __init__(self, kernel: Any) -> None:
            self.arguments: list[str] = kernel.arg_names
            self.name: str = kernel.fn.__name__

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            assert all(0 < size < 1 << 31 for size in grid)
            assert all(size < 1 << 16 for size in grid[1:])

            def launch(*values: Any, **constants: Any) -> None:
                assert torch.cuda.current_device() == GPU.index
                for value in values:
                    if isinstance(value, torch.Tensor) and not isinstance(value, GpuTensor):
                        assert self.name in read_host and GpuTensor.seen.is_pinned(value)
                named = dict(zip(self.arguments, values, strict=False))
                named.get("out", named.get("middle")).zero_()
                launched.add(self.name)

            return launch

    for name in ("first_kernel", "second_kernel", "take_slots_kernel", "unpack_kernel"):
        monkeypatch.setattr(triton_experts, name, StandIn(getattr(triton_experts, name)))
    for name in ("first_tiles_kernel", "second_tiles_kernel", "add_pairs_kernel"):
        monkeypatch.setattr(triton_tiles, name, StandIn(getattr(triton_tiles, name)))
    for name in ("combine_kernel", "present_kernel"):
        monkeypatch.setattr(triton_combine, name, StandIn(getattr(triton_combine, name)))
    folder = folders["mixtral", weight_format]
    _, layers = run_on_pretence(folder, CACHED, monkeypatch, current)
    assert {tuple(copies) for _, copies in layers} == {()}
    # To unpack weights is for experts of more tokens than these; it was warmed up.
    unpacking = {"unpack_kernel"} if weight_format == "int4" else set()
    assert launched == unpacking | {
        "first_kernel", "second_kernel", "first_tiles_kernel", "second_tiles_kernel",
        "add_pairs_kernel", *read_host,
    }  # fmt: skip


@pytest.mark.parametrize("graphs", ["off", "auto"])
def test_a_gpus_time_is_told_by_its_own_clock(
    graphs: Any, folders: dict[tuple[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host meets what it launched when it waits for the routing; its clock says nothing of it.

    In s of a clock that stands still else: attention 30, the router 20, each wait for a copy 11,
    each expert 5, adding up 70. Code in a graph is not run again: there the first two take nothing.
    """
    folder = folders["mixtral", "fp32"]
    with pretended_gpu(monkeypatch) as seen:

        def taking(seconds: float, method: Any) -> Any:
            def run(*args: Any) -> Any:
                result = method(*args)
                awaits = method is not wait_ready or result
                seen.clock_ms += 1e3 * seconds if awaits else 0
                return result

            return run

        wait_ready = ExpertFetcher.wait_ready
        monkeypatch.setattr(ExpertFetcher, "wait_ready", taking(11, wait_ready))
        monkeypatch.setattr(GpuExperts, "_expert", taking(5, GpuExperts._expert))
        monkeypatch.setattr(LayerStep, "_sum", taking(70, LayerStep._sum))
        with load_engine(
            PreparedModel(read_manifest(folder)),
            ModelOptions(folder, device="cuda", cuda_graphs=graphs),
            CacheOptions(n_indexes=2, n_ways=4, miss_policy="fetch"),
            Recorder(),
        ) as engine:
            for site in engine.sites:
                layer = engine.model.get_submodule(site.experts_path.rsplit(".", 2)[0])
                layer.register_forward_pre_hook(taking(30, lambda *_: None))
                site.block.register_forward_pre_hook(taking(20, lambda *_: None))
            greedy(engine.model, [BATCHES[0][0]], 2 * N_TOKENS)
            recorder = engine.dispatcher.recorder
    table, events = recorder.layer_table(), list(recorder.layer_events())
    # Behind a rehearsal: in the pass that is recorded, that code runs before the graph does.
    is_recorded = (table["pass_index"] == 2) & (graphs == "auto")
    is_replayed = (table["pass_index"] > 2) & (graphs == "auto")
    close = {"rtol": 0, "atol": 100 * EVENTS_APART_MS * 1e3}
    assert np.allclose(
        table["attention_us"], np.select([is_recorded, is_replayed], [50e6, 0], 30e6), **close
    )
    assert np.allclose(table["router_us"], np.where(is_recorded | is_replayed, 0, 20e6), **close)
    n_experts = np.array([len({e for token in one.ids for e in token}) for one in events])
    n_waited = table["waited_bytes"] // engine.store.layouts[0].block_bytes
    assert np.allclose(table["gpu_us"], 5e6 * n_experts, **close)
    assert np.allclose(table["copy_wait_us"], 11e6 * n_waited, **close)
    assert {0, 1} <= set(n_waited.tolist())
    experts_us = sum(table[name] for name in ("plan_us", "cpu_us", "copy_wait_us", "combine_us"))
    assert np.allclose(experts_us, 70e6 + 5e6 * n_experts + 11e6 * n_waited, **close)


def test_the_pretence_refuses_and_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretended_gpu(monkeypatch) as seen:
        here, there = torch.ones(4, 4), torch.ones(4, 4, device="cuda")
        assert (there @ there).device == GPU
        with pytest.raises(WrongDeviceError, match="one operand"):
            there + here
        with pytest.raises(WrongDeviceError, match="address"):
            there.data_ptr()
        assert seen.waits == []
        assert there.sum().item() == 16
        there[there > 0].sum()
        assert seen.waits == ["item", "indexed by a mask, whose sum is read"]
        seen.clear()
        big = torch.ones(1 << 15).to("cuda", non_blocking=True)
        assert seen.to_gpu == [1 << 17]
        assert seen.waits == ["non_blocking copy of 131072 bytes, pinned False"]
        seen.clear()
        torch.empty(1 << 15, pin_memory=True).copy_(big, non_blocking=True)
        assert (seen.to_host, seen.waits) == ([1 << 17], [])
        there.cpu()
        assert seen.waits == ["blocking copy of 64 bytes, pinned False"]
