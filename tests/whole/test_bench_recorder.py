"""The recorder's benchmark, as far as it depends on the release of transformers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from benchmarks import bench_recorder
from moe_offload.config import CacheOptions


class TakesCache(nn.Module):
    config = None

    def forward(self, input_ids: Tensor, cache: object = None) -> None:
        assert cache is not None


class TakesPastKeyValues(nn.Module):
    config = None

    def forward(self, input_ids: Tensor, past_key_values: object = None) -> None:
        assert past_key_values is not None


class Engine:
    """Serves `model` to the benchmark, and nothing else of it."""

    accelerator = None

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.dispatcher = nn.Module()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("model", [TakesCache, TakesPastKeyValues])
def test_the_cache_is_passed_by_this_releases_name(
    model: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[dict[str, object]] = []
    served = model()
    served.register_forward_pre_hook(
        lambda _, args, kwargs: passes.append(kwargs), with_kwargs=True
    )
    monkeypatch.setattr(bench_recorder, "DummyModel", lambda options: None)
    monkeypatch.setattr(bench_recorder, "DynamicCache", lambda config: "kept")
    monkeypatch.setattr(bench_recorder, "_routing", lambda source: None)
    monkeypatch.setattr(bench_recorder, "load_engine", lambda *_: Engine(served))
    row = bench_recorder._share_of_step(CacheOptions(), n_blocks=20)
    assert row["plain_ms"] > 0
    assert len(passes) == 1 + 6 * 25
    assert all("kept" in kwargs.values() for kwargs in passes)
    assert torch.equal(passes[-1]["input_ids"], torch.tensor([[5]]))  # type: ignore[call-overload]
