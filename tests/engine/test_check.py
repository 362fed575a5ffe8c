"""The check against transformers' own model: right folders pass, planted faults are named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from against_transformers import prepared, prompt_ids
from tiny_models import build_model, mixtral, qwen3_moe, write_hub
from torch import Tensor
from transformers import GenerationConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from moe_offload.checkpoint.prepared import checksum, read_manifest
from moe_offload.config import CacheOptions, ModelOptions
from moe_offload.engine.check import Comparison, check_engine
from moe_offload.engine.loading import load_engine
from moe_offload.errors import UserError
from moe_offload.model.loader import PreparedModel

PROMPTS = prompt_ids(64, 5, 2).tolist()
CACHE = CacheOptions(n_indexes=2, n_ways=2, policy="LRU")


@pytest.fixture(scope="module", params=["fp32", "bf16", "int8", "int4"])
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp(request.param)
    source = write_hub(build_model(mixtral(), dtype=torch.bfloat16), folder / "source")
    flags = ("--hf", "--expert-dtype", request.param)
    return source, prepared(source, folder / "prepared", *flags)


def check(folder: Path, source: Path | None, cache: CacheOptions = CACHE, **changes) -> Comparison:
    options = ModelOptions(model_path=folder, device="cpu")
    with load_engine(PreparedModel(read_manifest(folder)), options, cache) as engine:
        for name, change in changes.items():
            change(engine, name)
        return check_engine(engine, PROMPTS, 6, source)


def damaged_copy(folder: Path, to: Path, layer: int, change) -> Path:
    """A copy of a prepared folder with blocks changed by `change`, and checksums that say so."""
    shutil.copytree(folder, to)
    described = read_manifest(to).moe_layers[layer]
    data = bytearray(described.file.read_bytes())
    size = described.layout.block_bytes
    places = [slice(o, o + size) for o in map(described.block_offset_bytes, range(4))]
    blocks = [torch.frombuffer(bytearray(data[place]), dtype=torch.uint8) for place in places]
    change(described.layout, blocks)
    for place, block in zip(places, blocks, strict=True):
        data[place] = bytes(block.numpy())
    described.file.write_bytes(data)
    manifest = json.loads((to / "manifest.json").read_text())
    del manifest["checksum"]
    manifest["moe_layers"][layer]["block_checksums"][:4] = map(checksum, blocks)
    manifest["checksum"] = None  # as folders of earlier versions have none
    (to / "manifest.json").write_text(json.dumps(manifest))
    return to


def test_a_right_folder_is_right(folders) -> None:
    source, folder = folders
    for cache in (CacheOptions(), CACHE):
        found = check(folder, source, cache)
        assert found.is_right, list(found.lines())
        assert found.unlike_source == [] and found.n_tokens == 12
        assert 0 < found.largest <= found.layer_limit
        assert list(found.lines())[-1] == "verdict: right"


def test_an_architecture_with_another_router_is_right(tmp_path: Path) -> None:
    source = write_hub(build_model(qwen3_moe(), dtype=torch.bfloat16), tmp_path / "source")
    found = check(prepared(source, tmp_path / "prepared", "--hf"), source)
    assert found.is_right, list(found.lines())


@pytest.mark.parametrize("change", [{"num_hidden_layers": 1}, {"num_local_experts": 8}])
def test_a_source_of_another_model_is_a_sentence(change, folders, tmp_path: Path) -> None:
    other = write_hub(build_model(mixtral(**change), dtype=torch.bfloat16), tmp_path / "other")
    _, folder = folders
    with pytest.raises(UserError, match=f"{other} is not the checkpoint of {folder}"):
        check(folder, other)


def test_experts_that_are_called_by_keyword(folders, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self, hidden_states: Tensor) -> Tensor:
        rows = hidden_states.flatten(0, 1)
        _, weights, index = self.gate(rows)
        out = self.experts(hidden_states=rows, top_k_weights=weights, top_k_index=index)
        return out.view(hidden_states.shape)

    monkeypatch.setattr(MixtralSparseMoeBlock, "forward", forward)
    source, folder = folders
    assert check(folder, source).is_right


def test_a_checkpoints_penalties_do_not_make_it_wrong(folders) -> None:
    """Greedy tokens under a penalty are not those with the largest logits."""
    penalised = GenerationConfig(repetition_penalty=5.0, suppress_tokens=[1, 2])

    def suggest(engine, _) -> None:
        engine.model.generation_config = penalised

    source, folder = folders
    found = check(folder, source, CacheOptions(), suggest=suggest)
    assert found.is_right, list(found.lines())


def test_swapped_experts_are_named(folders, tmp_path: Path) -> None:
    source, folder = folders

    def swap(_, blocks) -> None:
        blocks[1], blocks[3] = blocks[3], blocks[1]

    copy = damaged_copy(folder, tmp_path / "copy", 1, swap)
    found = check(copy, source)
    assert found.unlike_source == [(1, 1), (1, 3)] and not found.is_right
    assert "layer 1 expert 1, layer 1 expert 3" in next(iter(found.lines()))
    assert check(copy, None).unlike_source is None  # nothing to compare with: said, not hidden


def test_a_doubled_scale_is_named(folders, tmp_path: Path) -> None:
    source, folder = folders

    def double(layout, blocks) -> None:
        name = "down_scale" if "int" in layout.weight_format else "down"
        layout.field(name).view(blocks[2]).mul_(2)

    found = check(damaged_copy(folder, tmp_path / "copy", 0, double), source)
    assert found.unlike_source == [(0, 2)]


def test_a_flipped_bit_is_named_by_the_checksum(folders, tmp_path: Path) -> None:
    source, folder = folders
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    layer = read_manifest(copy).moe_layers[1]
    data = bytearray(layer.file.read_bytes())
    data[layer.block_offset_bytes(2) + 100] ^= 1
    layer.file.write_bytes(data)
    with pytest.raises(UserError, match=r"experts-00001.*expert 2"):
        check(copy, source)


def test_weights_that_changed_in_memory_are_named(folders) -> None:
    def damage(engine, _) -> None:
        engine.store.block(1, 2).mul_(0)

    source, folder = folders
    found = check(folder, source, CacheOptions(), damage=damage)
    assert [(one.layer, one.experts) for one in found.wrong_layers] == [(1, (2,))]
    assert not found.is_right and "WRONG" in list(found.lines())[-1]


def test_a_slot_with_other_weights_is_found(folders) -> None:
    """What an eviction that comes too early does: a hit computes with what came into its slot."""

    def overwritten(engine, _) -> None:
        def overwrite(*_: object) -> None:
            engine.accelerator.gpu.slots.zero_()

        engine.model.register_forward_pre_hook(overwrite)

    source, folder = folders
    room_for_all = CacheOptions(n_indexes=2, n_ways=4)  # what is copied once is hit ever after
    found = check(folder, source, room_for_all, overwritten=overwritten)
    assert found.wrong_layers and not found.is_right
