"""A manifest that is whole and consistent, but of another model, is refused before any loading."""

from __future__ import annotations

import copy
import json
import random
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from against_transformers import greedy
from safetensors.torch import load_file, save_file

from moe_offload.checkpoint.block import block_layout
from moe_offload.checkpoint.safetensors_file import read_header
from moe_offload.commands import prepare
from moe_offload.engine.loading import load_model
from moe_offload.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fit")
    model = tiny_models.build_model(tiny_models.qwen2_moe())
    source = tiny_models.write_hub(model, root / "source")
    paths = ["--input-path", str(source), "--output-path", str(root / "out"), "--hf"]
    assert prepare.main([*paths, "--expert-dtype", "int8", "--dense-dtype", "int4"]) == 0
    return root / "out"


def changed(folder: Path, to: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The folder with another manifest, without the checksum that would betray the change."""
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["checksum"]
    change(manifest)
    for path in folder.iterdir():
        if path.name != "manifest.json" and not (to / path.name).exists():
            (to / path.name).symlink_to(path)
    (to / "manifest.json").write_text(json.dumps(manifest))
    return to


def tensor_of(manifest: dict[str, Any], end: str) -> dict[str, Any]:
    tensors = manifest["dense"][0]["tensors"]
    return next(tensor for tensor in tensors if tensor["name"].endswith(end))


def other_sizes(manifest: dict[str, Any]) -> None:
    """The layout of experts of half the width and twice the hidden size: the same bytes."""
    for layer in manifest["moe_layers"]:
        old = layer["layout"]
        new = asdict(block_layout("int8", old["hidden_size"] * 2, old["intermediate_size"] // 2))
        new |= {"block_bytes": old["block_bytes"]}
        layer["layout"] = new


def swapped_files(manifest: dict[str, Any]) -> None:
    one, two = manifest["moe_layers"]
    for key in ("file", "header_checksum", "block_checksums"):
        one[key], two[key] = two[key], one[key]


def swapped_modules(manifest: dict[str, Any]) -> None:
    one, two = manifest["moe_layers"]
    one["module"], two["module"] = two["module"], one["module"]


def swapped_names(manifest: dict[str, Any]) -> None:
    one = tensor_of(manifest, "0.input_layernorm.weight")
    two = tensor_of(manifest, "1.input_layernorm.weight")
    one["name"], two["name"] = two["name"], one["name"]


def one_layer_twice(manifest: dict[str, Any]) -> None:
    manifest["moe_layers"][1] = copy.deepcopy(manifest["moe_layers"][0])


def as_float16(manifest: dict[str, Any]) -> None:
    tensor_of(manifest, "model.norm.weight")["dtype"] = "float16"


def overlapping(manifest: dict[str, Any]) -> None:
    tensor_of(manifest, "model.norm.weight")["offset_bytes"] += 64


def other_bits(manifest: dict[str, Any]) -> None:
    manifest["packed_weights"][0]["bits"] = 8


def packed_norm(manifest: dict[str, Any]) -> None:
    manifest["packed_weights"][0]["name"] = "model.norm.weight"


def packed_elsewhere(manifest: dict[str, Any]) -> None:
    manifest["packed_weights"][0]["name"] = "model.nowhere.weight"


def fewer_experts(manifest: dict[str, Any]) -> None:
    for layer in manifest["moe_layers"]:
        layer["n_experts"] -= 1
        layer["block_checksums"].pop(0)
        layer["data_offset_bytes"] += layer["layout"]["block_bytes"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_sizes, "are of other number or sizes"),
        (swapped_files, "is damaged ('experts-00001.safetensors', not experts-00000"),
        (swapped_modules, "expected experts in 2 layers from model.layers.0.mlp.experts on"),
        (swapped_names, "the header of dense.safetensors says otherwise"),
        (one_layer_twice, "is damaged"),
        (lambda m: m["moe_layers"].pop(), "expected experts in 2 layers"),
        (lambda m: m["moe_layers"].clear(), "is damaged (no experts)"),
        (fewer_experts, "corrupt: the checksum of its header"),
        (lambda m: m["moe_layers"][0]["block_checksums"].pop(), "not one checksum per expert"),
        (lambda m: m["moe_layers"][0].update(data_offset_bytes=-4096), "header"),
        (lambda m: m["moe_layers"][0]["layout"].update(block_bytes=1 << 60), "header"),
        (lambda m: m.update(weight_format="bf16"), "are of other number or sizes"),
        (lambda m: m["config"].update(num_experts=12), "are of other number or sizes"),
        (lambda m: m["config"].update(hidden_size=64), "of other number or sizes"),
        (lambda m: m["config"].update(num_hidden_layers=4), "transformers cannot use the config"),
        (lambda m: m["config"].update(num_hidden_layers=10**9), "num_hidden_layers of 1 to 1000"),
        (lambda m: m["config"].update(vocab_size=95), "is packed as no weight of the model"),
        (as_float16, "the header of dense.safetensors says otherwise"),
        (overlapping, "is damaged"),
        (other_bits, "is packed as no weight of the model"),
        (packed_norm, "is packed as no weight of the model"),
        (packed_elsewhere, "does not fit its model"),
        (lambda m: m.update(packed_weights=[]), "which the model does not have"),
        (lambda m: m.update(dense_format="int8"), "is packed as no weight of the model"),
        (lambda m: m.update(dense_format="bf16"), "is packed as no weight of the model in bf16"),
        (lambda m: m.update(model_dtype="float32"), "a model in float32 with dense weights in"),
        (lambda m: m["moe_layers"][0].update(file="../out/experts-00000.safetensors"), "damaged"),
        (lambda m: m["dense"][0].update(file="/dev/zero"), "is damaged"),
    ],
)
def test_another_models_manifest_is_refused(
    change: Callable[[dict[str, Any]], None], message: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as refused:
        load_model(changed(folder, tmp_path, change), device="cpu")
    assert message in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.ones(32).half()}),
            "expected model.norm.weight of shape [32] in torch.bfloat16, found [32] in torch.float",
        ),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.ones(2, 16).bfloat16()}),
            "expected model.norm.weight of shape [32] in torch.bfloat16, found [2, 16] in",
        ),
        (lambda tensors: tensors.update(extra=torch.ones(3)), "a tensor which the model does not"),
        (lambda tensors: tensors.pop("lm_head.weight.scale"), "it lacks 'lm_head.weight.scale'"),
    ],
)
def test_a_shard_of_another_model_is_refused_though_the_manifest_agrees(
    change: Callable[[dict[str, torch.Tensor]], object], message: str, folder: Path, tmp_path: Path
) -> None:
    tensors = load_file(folder / "dense.safetensors")
    change(tensors)
    shard = tmp_path / "dense.safetensors"

    def agree(manifest: dict[str, Any]) -> None:
        save_file(tensors, shard)
        entries = [asdict(entry) for entry in read_header(shard)]
        header = shard.read_bytes()[: entries[0]["offset_bytes"]]
        manifest["dense"][0] |= {
            "bytes": shard.stat().st_size,
            "header_checksum": zlib.crc32(header),
            "tensors": [{**entry, "checksum": 0} for entry in entries],
        }

    changed(folder, tmp_path, agree)
    with pytest.raises(UserError) as refused:
        load_model(tmp_path, device="cpu")
    assert message in str(refused.value)


def test_also_where_asserts_are_off(folder: Path, tmp_path: Path) -> None:
    """`python -O` must not reach a kernel with sizes that are not the model's."""
    program = (
        "import sys\n"
        "from moe_offload import load_model\n"
        "from moe_offload.errors import UserError\n"
        "try: load_model(sys.argv[1], device='cpu')\n"
        "except UserError as error: print(error)\n"
    )
    changed(folder, tmp_path, other_sizes)
    done = subprocess.run(
        [sys.executable, "-O", "-c", program, str(tmp_path)],
        cwd=ROOT / "src",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "of other number or sizes" in done.stdout, done.stderr


def test_what_was_prepared_fits(folder: Path, tmp_path: Path) -> None:
    model = load_model(changed(folder, tmp_path, lambda _: None), device="cpu")
    model.engine.close()


def test_a_manifest_with_a_flipped_bit_is_damaged(folder: Path, tmp_path: Path) -> None:
    """Wherever the bit is: a name, a size, a checksum, a value of the config."""
    whole = (folder / "manifest.json").read_bytes()
    for path in folder.iterdir():
        if path.name != "manifest.json":
            (tmp_path / path.name).symlink_to(path)
    said = json.loads(whole)
    for position in range(0, len(whole), len(whole) // 60):
        flipped = bytearray(whole)
        flipped[position] ^= 1
        try:
            if json.loads(flipped) == said:  # a blank became another blank
                continue
        except ValueError:
            pass
        (tmp_path / "manifest.json").write_bytes(flipped)
        with pytest.raises(UserError):
            load_model(tmp_path, device="cpu")


def test_a_changed_value_with_the_checksum_left_is_damaged(folder: Path, tmp_path: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["checksum"] != zlib.crc32(b"")
    manifest["config"]["rms_norm_eps"] = 0.1
    changed(folder, tmp_path, lambda _: None)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="its checksum does not match"):
        load_model(tmp_path, device="cpu")


def test_a_config_does_not_say_what_a_pass_returns(folder: Path, tmp_path: Path) -> None:
    asked = {"return_dict": False, "output_hidden_states": "all", "output_attentions": True}
    model = load_model(changed(folder, tmp_path, lambda m: m["config"].update(asked)), device="cpu")
    found = model(torch.tensor([[5, 9, 33]]))
    model.engine.close()
    assert found.logits.shape == (1, 3, 96)
    assert found.hidden_states is None and found.attentions is None


VALUES: list[Any] = [
    *(None, True, False, -1, 0, 1, 2**31, 2**63, 2**70, -(2**70), 0.5, 1e308, -1e308),
    *(float("nan"), float("inf"), "", "x", "0", "../../etc/passwd", "/dev/zero", "\0", "\ud800"),
    *("A" * 5000, [], {}, [[]], [None], ["a"] * 10, {"__float__": "Infinity"}, {"__float__": "x"}),
]


def places(value: Any) -> Iterator[tuple[Any, ...]]:
    """Where everything inside a JSON value is, as keys and positions from the outside in."""
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield (key,)
            yield from ((key, *inner) for inner in places(value[key]))


@pytest.mark.parametrize("n_cases", [60, pytest.param(4000, marks=pytest.mark.nightly)])
def test_a_manifest_of_random_values_runs_or_is_a_sentence(
    n_cases: int, folder: Path, tmp_path: Path
) -> None:
    """Any value anywhere, checksum left out: as a person's edit, or another program's."""
    chance = random.Random(14)
    manifest = json.loads((folder / "manifest.json").read_text())
    by_kind: dict[tuple[Any, ...], list[tuple[Any, ...]]] = {}
    for place in places(manifest):  # a tensor's fields are not to drown the config's
        kind = tuple("#" if isinstance(key, int) else key for key in place)
        by_kind.setdefault(kind, []).append(place)
    kinds = sorted(by_kind)
    n_refused = 0
    for case in range(n_cases):
        *parents, last = place = chance.choice(by_kind[kinds[chance.randrange(len(kinds))]])
        value = chance.choice(VALUES)

        def put(manifest: dict[str, Any]) -> None:
            holder: Any = manifest
            for key in parents:  # noqa: B023 (called at once)
                holder = holder[key]
            holder[last] = value  # noqa: B023

        changed(folder, tmp_path, put)
        try:
            model = load_model(tmp_path, device="cpu")
            try:
                assert len(greedy(model, [[5, 9, 33]], 2)[0]) == 2
            finally:
                model.engine.close()
        except UserError as error:
            n_refused += 1
            assert "\n" not in str(error), (case, place, value)
        except Exception as error:
            raise AssertionError(f"case {case}: {place} := {value!r:.60}") from error
    assert n_refused > n_cases // 2
