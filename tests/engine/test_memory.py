"""The memory check before loading: what is counted, and which remedies are named."""

from __future__ import annotations

import pytest
import torch

from moe_offload.engine.memory import Budget, free_slot_bytes, make_budget
from moe_offload.errors import UserError

GB = 10**9


def test_memory_table_and_refusals() -> None:
    needs = {"dense_bytes": 2_000_000_000, "kv_bytes": 0, "slot_bytes": 0}
    budget = make_budget(torch.device("cpu"), expert_bytes=10**15, **needs)
    experts, *others, total, available = budget.table().splitlines()[1:]
    assert experts.split() == ["experts", "1000000.00"] and total.split() == ["total", "1000002.54"]
    assert [line.split()[-1] for line in others] == ["2.00", "0.54"]
    assert available.startswith("  available")
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


def test_what_torch_keeps_for_later_is_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that this process has let go of must not make the next one look too large."""
    kept = [20 * GB]
    monkeypatch.setattr(torch.cuda, "empty_cache", kept.clear)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (22 * GB - sum(kept), 24 * GB))
    gpu = torch.device("cuda", 0)
    needs = {"expert_bytes": 0, "kv_bytes": 0, "slot_bytes": 0}
    assert make_budget(gpu, dense_bytes=3 * GB, **needs).available["gpu"] == 22 * GB
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
    needs = {
        "dense weights": 6 * GB if kv_gb or slots_gb else 11 * GB,
        "KV cache": kv_gb * GB,
        "expert cache slots": slots_gb * GB,
    }
    budget = Budget(
        {"host": {}, "gpu": {}, memory: needs}, {"host": GB, "gpu": GB, memory: 10 * GB}
    )
    with pytest.raises(UserError) as refused:
        budget.check("bf16", context_tokens=1000)
    message = str(refused.value)
    assert all(text in message for text in named), message
    assert not any(text in message for text in unnamed), message
    assert f"of {memory} memory and 10.0 GB are available" in message
