"""The run's own decisions: the miss trial, the guess of the next layer, the memory check."""

from __future__ import annotations

import pytest
import torch
from tiny_models import CONFIGS, build_model
from torch import nn

from moe_offload.checkpoint.conversion import find_experts
from moe_offload.engine.memory import Budget, Need, free_slot_bytes, make_budget
from moe_offload.errors import UserError
from moe_offload.experts.accelerator import PrefetchStats
from moe_offload.experts.layer import HostHandoff
from moe_offload.experts.plan import MissTrial
from moe_offload.kernels.oracle import apply_activation, probe_activation


@pytest.mark.parametrize(("costs_s", "cpu_s", "kept"), [(1.0, 2.0, "costs"), (2.0, 1.0, "cpu")])
def test_the_trial_keeps_the_faster(costs_s: float, cpu_s: float, kept: str) -> None:
    trial = MissTrial()
    modes = []
    for _ in range(100):
        modes.append(trial.mode)
        trial.record(costs_s if trial.mode == "costs" else cpu_s)
    assert {"costs", "cpu"} <= set(modes[:36])
    assert set(modes[36:]) == {kept}
    assert trial.line.startswith("miss policy auto: kept ")


def test_an_unfinished_trial_says_so() -> None:
    trial = MissTrial()
    trial.record(1.0)
    assert "undecided after 1" in trial.line


def test_prefetch_statistics() -> None:
    stats = PrefetchStats(block_bytes=100)
    stats.guess(1, [3, 4])
    stats.fetch(slot=8, layer=1, expert=3)
    stats.fetch(slot=9, layer=1, expert=4)
    stats.observe(1, {3: 8}, [3, 5])
    assert (stats.recall, stats.used, stats.wasted_bytes) == (0.5, 1, 100)
    stats.observe(1, {3: 8}, [3, 5])  # no guess was made for this step
    assert (stats.chosen, stats.used) == (2, 1)


def test_memory_table_and_refusals() -> None:
    needs = {"dense_bytes": 2_000_000_000, "kv_bytes": 0, "slot_bytes": 0}
    budget = make_budget(torch.device("cpu"), expert_bytes=10**15, **needs)
    assert "experts" in budget.table()
    with pytest.raises(UserError, match="--expert-dtype int4"):
        budget.check("int8", 100)
    with pytest.raises(UserError, match="use fewer --dummy-layers, or use --dummy-format int4"):
        budget.check("int8", 100, dummy=True)
    with pytest.raises(UserError, match="available: use fewer --dummy-layers, or close other"):
        budget.check("int4", 100, dummy=True)  # no format is smaller
    with pytest.raises(UserError, match="a machine with more memory"):
        budget.check("int4", 100)
    nothing = {"dense_bytes": 0, "kv_bytes": 0, "slot_bytes": 0}
    make_budget(torch.device("cpu"), expert_bytes=0, **nothing).check("bf16", 100)


GB = 10**9


def test_what_torch_keeps_for_later_is_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that this process has let go of must not make the next one look too large."""
    kept = [20 * GB]
    monkeypatch.setattr(torch.cuda, "empty_cache", kept.clear)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (22 * GB - sum(kept), 24 * GB))
    gpu = torch.device("cuda", 0)
    needs = {"expert_bytes": 0, "kv_bytes": 0, "slot_bytes": 0}
    assert make_budget(gpu, dense_bytes=3 * GB, **needs).gpu_bytes == 22 * GB
    kept.append(20 * GB)
    assert 21 * GB < free_slot_bytes(gpu, kv_bytes=GB // 10) < 22 * GB


@pytest.mark.parametrize("memory", ["host", "gpu"])
@pytest.mark.parametrize(
    ("kv_gb", "slots_gb", "named", "unnamed"),
    [
        # Of 10 GB, weights take 6: 4 are left for 1000 tokens and the slots.
        (8, 0, ["--max-tokens or --batch-size (500 of the 1000 tokens"], ["--cache-nblocks"]),
        (0, 8, ["--cache-nblocks or --cache-nways"], ["--max-tokens"]),
        (3, 2, ["--max-tokens or --batch-size (666 of", "--cache-nblocks"], []),
        (3, 5, ["--cache-nblocks or --cache-nways"], ["--max-tokens"]),
        (9, 9, ["a smaller cache and a smaller --max-tokens"], ["--batch-size"]),
        (0, 0, [], ["--max-tokens", "--cache"]),
    ],
)
def test_remedies_name_only_what_helps(
    memory: str, kv_gb: int, slots_gb: int, named: list[str], unnamed: list[str]
) -> None:
    needs = (
        Need("dense weights", memory, 6 * GB if kv_gb or slots_gb else 11 * GB),
        Need("KV cache", memory, kv_gb * GB),
        Need("expert cache slots", memory, slots_gb * GB),
    )
    other = 10**6 * GB
    room = {"host_bytes": 10 * GB, "gpu_bytes": other}
    if memory == "gpu":
        room = {"host_bytes": other, "gpu_bytes": 10 * GB}
    with pytest.raises(UserError) as refused:
        Budget(needs, **room).check("bf16", context_tokens=1000)
    message = str(refused.value)
    assert all(text in message for text in named), message
    assert not any(text in message for text in unnamed), message
    assert f"of {memory} memory and 10.0 GB are available" in message


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "granitemoe"])
def test_the_probe_names_the_fused_activation(name: str) -> None:
    model = build_model(CONFIGS[name]())
    experts = model.get_submodule(find_experts(model)[0].name)
    activation, own = probe_activation(experts)
    assert activation.kind == ("clamped_swiglu" if name == "gpt_oss" else "silu")
    first = torch.randn(7, 20) * 3
    expected = apply_activation(first, activation, has_gate=True)
    torch.testing.assert_close(own(first), expected)


def test_an_unknown_gate_stays_the_models_own() -> None:
    class Experts(nn.Module):
        has_gate = True
        is_concatenated = True

        def _apply_gate(self, first: torch.Tensor) -> torch.Tensor:
            gate, up = first.chunk(2, dim=-1)
            return torch.tanh(gate) * up

    activation, own = probe_activation(Experts())
    assert activation.kind == "module"
    assert torch.equal(own(torch.tensor([[0.5, 2.0]])), torch.tanh(torch.tensor([[0.5]])) * 2)


def test_nothing_moves_on_the_cpu() -> None:
    hidden, index = torch.randn(3, 4), torch.zeros(3, 2, dtype=torch.int64)
    moved = HostHandoff().to_host(hidden, index)
    assert moved[0].data_ptr() == hidden.data_ptr()
    assert moved[1].data_ptr() == index.data_ptr()
