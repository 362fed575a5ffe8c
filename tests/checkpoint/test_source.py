"""Every bad input ends in one sentence and exit code 2, before anything is written."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
import torch
from refusals import refusal
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Llama4TextConfig, LlamaConfig, PreTrainedModel

from moe_offload.checkpoint.conversion import FLAGS, ExpertsModule, find_experts
from moe_offload.checkpoint.prepared import read_manifest, verify
from moe_offload.checkpoint.source import SourceCheckpoint
from moe_offload.commands import prepare
from moe_offload.errors import UserError


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_models.build_model(tiny_models.mixtral())


@pytest.fixture
def hub(model: PreTrainedModel, tmp_path: Path) -> Path:
    return tiny_models.write_hub(model, tmp_path / "source", "20KB")


def test_missing_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "nowhere"
    assert f"expected a model folder at {missing}, found nothing" in refusal(
        capsys, missing, "--hf"
    )
    missing.write_text("")
    assert "found a file" in refusal(capsys, missing)
    assert not (tmp_path / "out").exists()


def test_wrong_kind_of_folder(
    model: PreTrainedModel, hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "run again with --hf" in refusal(capsys, hub)
    native = tiny_models.write_native(model, tmp_path / "native")
    assert "run again without --hf" in refusal(capsys, native, "--hf")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no params.json and no config.json" in refusal(capsys, empty)
    assert "no config.json" in refusal(capsys, empty, "--hf")


def test_truncated_and_missing_shards_are_named(
    hub: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = sorted(hub.glob("model-*.safetensors"))[3]
    whole = shard.read_bytes()
    for length in (0, 5, 100, len(whole) - 1):
        shard.write_bytes(whole[:length])
        assert f"{shard} is truncated" in refusal(capsys, hub, "--hf")
    shard.write_bytes(whole[:8] + b"x" * (len(whole) - 8))
    assert f"{shard} is truncated, damaged or no safetensors file" in refusal(capsys, hub, "--hf")
    shard.unlink()
    assert f"{shard} is missing" in refusal(capsys, hub, "--hf")


def test_truncated_bin_is_named(
    model: PreTrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_models.write_bin(model, tmp_path / "bin", n_shards=2)
    shard = folder / "pytorch_model-00002-of-00002.bin"
    shard.write_bytes(shard.read_bytes()[:-500])
    assert f"{shard} is truncated" in refusal(capsys, folder, "--hf")
    torch.save({"f": print}, shard)
    assert "more than weights" in refusal(capsys, folder, "--hf")
    torch.save([1, 2], shard)
    assert "holds a list" in refusal(capsys, folder, "--hf")


def test_index_and_files_disagree(hub: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = hub / "model.safetensors.index.json"
    name = "model.layers.1.self_attn.q_proj.weight"
    shard = hub / json.loads(index.read_text())["weight_map"][name]
    save_file({k: v for k, v in load_file(shard).items() if k != name}, shard)
    assert f"tensor {name} is missing: {index.name} places it in {shard}" in refusal(
        capsys, hub, "--hf"
    )
    index.write_text("{}")
    assert "index.json is damaged" in refusal(capsys, hub, "--hf")
    index.unlink()
    message = refusal(capsys, hub, "--hf")
    assert "holds 9 files of weights such as model-00001" in message and "no index" in message
    (hub / "manifest.json").write_text("{}")
    message = refusal(capsys, hub, "--hf")
    assert "give the folder it was prepared from as --input-path" in message


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("model.norm.weight", "model.norm.weight"),
        ("model.layers.0.self_attn.k_proj.weight", "model.layers.0.self_attn.k_proj.weight"),
        (
            "model.layers.1.block_sparse_moe.experts.2.w3.weight",
            "model.layers.1.block_sparse_moe.experts.2.w3.weight",
        ),
        (
            "model.layers.0.block_sparse_moe.experts.3.w2.weight",
            "model.layers.0.block_sparse_moe.experts.3.w2.weight",
        ),
    ],
)
def test_missing_tensor_is_named(
    name: str,
    shown: str,
    model: PreTrainedModel,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tiny_models.write_hub(model, tmp_path / "one")
    state = load_file(folder / "model.safetensors")
    del state[name]
    save_file(state, folder / "model.safetensors")
    assert f"tensor {shown} is missing" in refusal(capsys, folder, "--hf")


def test_several_missing_tensors_are_counted(
    model: PreTrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_models.write_hub(model, tmp_path / "one")
    state = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in state.items() if "self_attn.q_proj" not in name}
    save_file(kept, folder / "model.safetensors")
    first = "tensor model.layers.0.self_attn.q_proj.weight and 1 more are missing"
    assert first in refusal(capsys, folder, "--hf")


def test_wrong_shapes(
    model: PreTrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_models.write_hub(model, tmp_path / "one")
    state = load_file(folder / "model.safetensors")
    expert = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    save_file({**state, expert: torch.ones(3, 32)}, folder / "model.safetensors")
    assert "do not fit together" in refusal(capsys, folder, "--hf")
    save_file({**state, "model.norm.weight": torch.ones(3)}, folder / "model.safetensors")
    message = refusal(capsys, folder, "--hf")
    assert "model.norm.weight" in message and "needs (32,), found (3,)" in message


def test_two_tensors_for_one_place_are_refused(
    model: PreTrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_models.write_hub(model, tmp_path / "one")
    state = load_file(folder / "model.safetensors")
    twin = {"norm.weight": state["model.norm.weight"] + 1}  # the base model's name for the same
    save_file({**state, **twin}, folder / "model.safetensors")
    said = refusal(capsys, folder, "--hf")
    assert "norm.weight are both the model's model.norm.weight" in said


def test_unused_tensors_are_mentioned(
    model: PreTrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_models.write_hub(model, tmp_path / "one")
    state = load_file(folder / "model.safetensors")
    rotary = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}  # old ones: ignored
    save_file({**state, **rotary, "extra.bias": torch.ones(1)}, folder / "model.safetensors")
    paths = ["--input-path", str(folder), "--output-path", str(tmp_path / "out"), "--hf"]
    assert prepare.main(paths) == 0
    assert "no place for 1 tensors of the checkpoint, such as extra.bias" in capsys.readouterr().err


def test_dense_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    dense = tiny_models.build_model(LlamaConfig(**sizes, num_attention_heads=2))
    folder = tiny_models.write_hub(dense, tmp_path / "llama")
    assert "no Mixture-of-Experts model" in refusal(capsys, folder, "--hf")


def test_experts_without_the_convention(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = Llama4TextConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        intermediate_size_mlp=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
    )
    with torch.device("cpu"):
        llama4 = AutoModelForCausalLM.from_config(config)
    folder = tiny_models.write_fused(llama4, tmp_path / "llama4")
    message = refusal(capsys, folder, "--hf")
    assert "Llama4TextExperts" in message and "lacks the flag has_gate" in message


class Experts(nn.Module):
    """A stand-in for an experts module of some later architecture."""

    def __init__(self, **changes: object) -> None:
        super().__init__()
        flags = dict(zip(FLAGS, (True, False, False, True), strict=True))
        for name, value in {**flags, **changes}.items():
            setattr(self, name, value)
        self.gate_up_proj = nn.Parameter(torch.empty(4, 12, 8))
        self.down_proj = nn.Parameter(torch.empty(4, 8, 6))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"has_post_expert_norm": True}, "has the flag has_post_expert_norm"),
        ({"has_bias": True}, "has_bias=True promise down_proj, down_proj_bias"),
        ({"has_gate": False}, "has_gate=False"),
        ({"is_transposed": True}, "is_transposed=True"),
        ({"norm": nn.Parameter(torch.ones(4))}, "down_proj, gate_up_proj, norm"),
    ],
)
def test_unsupported_flag_is_named(changes: dict[str, object], message: str) -> None:
    holder = nn.ModuleDict({"experts": Experts(**changes)})
    with pytest.raises(UserError, match="not supported") as refused:
        find_experts(holder)
    assert message in str(refused.value)
    assert [module.name for module in find_experts(nn.ModuleDict({"x": Experts()}))] == ["x"]


@pytest.mark.parametrize("depth", [0, -1, 1001, 10**9, 1e300])
def test_a_depth_that_no_model_has(
    depth: float, hub: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = hub / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": depth}))
    assert "expected num_hidden_layers of 1 to 1000" in refusal(capsys, hub, "--hf")


@pytest.mark.parametrize("window", [0, -1])
def test_a_window_of_nothing(window: int, hub: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = hub / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sliding_window": window}))
    assert "expected sliding_window of 1 to " in refusal(capsys, hub, "--hf")


def test_folders_that_are_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is called what it is, with what to do."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"")
    assert "a LoRA adapter, not a model: merge it" in refusal(capsys, folder, "--hf")
    (folder / "adapter_config.json").unlink()
    (folder / "mixtral.Q4_K_M.gguf").write_bytes(b"GGUF")
    assert "truncated, damaged or no GGUF file" in refusal(capsys, folder, "--hf")


@pytest.mark.parametrize("name", ["config.json", "model-00002-of-00009.safetensors"])
def test_a_clone_without_lfs_is_named(
    name: str, hub: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (hub / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 12\n")
    message = refusal(capsys, hub, "--hf")
    assert f"{hub / name} is a git-lfs pointer" in message and "git lfs pull" in message


@pytest.mark.parametrize("weight", ["layers.0.mlp.experts", "layers.1.self_attn", "lm_head"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_weights_that_are_not_finite(
    weight: str, value: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in fp16 copies that overflowed: the model would answer with nothing, or nonsense."""
    model = tiny_models.build_model(tiny_models.mixtral(), dtype=torch.float16)
    name, parameter = next(pair for pair in model.named_parameters() if weight in pair[0])
    with torch.no_grad():
        parameter.view(-1)[-3] = value
    folder = tiny_models.write_hub(model, tmp_path / "source")
    message = refusal(capsys, folder, "--hf")
    assert "infinite or not a number" in message and "use the model's bf16" in message
    assert name in message or "expert 3 in model.layers.0.mlp.experts" in message


def test_a_pipe_in_the_place_of_a_file(hub: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("config.json", "generation_config.json", "model-00002-of-00009.safetensors"):
        whole = (hub / name).read_bytes()
        (hub / name).unlink()
        os.mkfifo(hub / name)
        assert f"expected a file at {hub / name}" in refusal(capsys, hub, "--hf")
        (hub / name).unlink()
        (hub / name).write_bytes(whole)


def test_a_source_that_changes_while_it_is_read(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half of the shards would be of the new weights, with checksums that are right."""
    shard = sorted(hub.glob("model-*.safetensors"))[-1]
    reader = SourceCheckpoint.weights_reader

    def rewritten(
        source: SourceCheckpoint, module: ExpertsModule
    ) -> Callable[[int], dict[str, Tensor]]:
        os.utime(shard, ns=(1, 1))
        return reader(source, module)

    with monkeypatch.context() as patch:
        patch.setattr(SourceCheckpoint, "weights_reader", rewritten)
        assert "changed while they were prepared" in refusal(capsys, hub, "--hf")
    paths = ["--input-path", str(hub), "--output-path", str(tmp_path / "out"), "--hf"]
    assert prepare.main(paths) == 0
    verify(read_manifest(tmp_path / "out"))


@pytest.mark.parametrize("held", ["config.json", "params.json", "model.safetensors"])
@pytest.mark.parametrize("force", [[], ["--force"]])
def test_another_models_folder_is_not_written_to(
    held: str, force: list[str], hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "other"
    output.mkdir()
    (output / held).write_text('{"model_type": "another"}')
    assert f"holds another model ({held})" in refusal(capsys, hub, "--hf", *force, output=output)
    assert [path.name for path in output.iterdir()] == [held]
    assert (output / held).read_text() == '{"model_type": "another"}'


def test_nor_to_a_checkpoint_that_was_prepared_in_its_own_folder(
    hub: Path, model: PreTrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tiny_models.write_hub(model, tmp_path / "other")
    before = (other / "config.json").read_bytes()
    assert prepare.main(["--input-path", str(other), "--output-path", str(other), "--hf"]) == 0
    paths = ["--input-path", str(hub), "--output-path", str(other), "--hf", "--force"]
    assert prepare.main(paths) == 2
    assert "holds another model (model.safetensors)" in capsys.readouterr().err
    assert (other / "config.json").read_bytes() == before
    verify(read_manifest(other))


def test_fp8_tensors_without_a_quantisation_config(
    model: PreTrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_models.write_hub(model, tmp_path / "one")
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"] = state["lm_head.weight"].to(torch.float8_e4m3fn)
    save_file(state, folder / "model.safetensors")
    message = refusal(capsys, folder, "--hf")
    assert "lm_head.weight" in message and "unquantised" in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.json is damaged"),
        ("[" * 100_000, "config.json is damaged"),
        ("[1]", "found list"),
        ('{"quantization_config": "fp8"}', "is quantised with an unknown method"),
        ('{"model_type": "no_such_model"}', "transformers cannot use"),
        ('{"model_type": "bert"}', "holds no weights"),
    ],
)
def test_bad_config(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text(text)
    assert message in refusal(capsys, folder, "--hf")


@pytest.mark.parametrize("top_k", [0, 99, -1])
def test_more_experts_per_token_than_there_are(
    top_k: int, hub: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = hub / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_experts_per_tok": top_k}))
    expected = f"expected num_experts_per_tok of 1 to 4 in {path}, found {top_k}"
    assert expected in refusal(capsys, hub, "--hf")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "expected a JSON object in {path}, found list"),
        ("{", "{path} is damaged"),
        ('{"eos_token_id": "abc"}', "expected eos_token_id in {path} as a token id or a list"),
        ('{"eos_token_id": [1, -2]}', "found [1, -2]"),
        ('{"cache_implementation": 7}', "cannot use the generation defaults in {path}"),
    ],
)
def test_bad_generation_defaults(
    text: str, message: str, hub: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = hub / "generation_config.json"
    path.write_text(text)
    assert message.format(path=path) in refusal(capsys, hub, "--hf")


@pytest.mark.parametrize("content", [b"", b"junk", b"version https://git-lfs.github.com/spec/v1"])
@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_a_tokenizer_that_no_run_could_read(
    name: str, content: bytes, hub: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (hub / name).write_bytes(content)
    assert f"{hub / name} is" in refusal(capsys, hub, "--hf")
    assert not (hub.parent / "out").exists()


@pytest.mark.parametrize(
    "text", ['{"moe": 3}', '{"moe": {"num_experts": 4}}', "[]", '{"moe": {}}', "[" * 100_000]
)
def test_bad_native_parameters(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "params.json").write_text(text)
    assert f"{folder / 'params.json'}" in refusal(capsys, folder)


@pytest.mark.parametrize("model_type", ["foreign", None, "../evil"])
def test_custom_code_is_never_run(
    model_type: str | None,
    hub: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nor asked about: whoever answers y to a question of transformers would run it."""
    path = hub / "config.json"
    config = json.loads(path.read_text())
    config |= {"model_type": model_type, "auto_map": {"AutoConfig": "evil.Config"}}
    path.write_text(json.dumps(config))
    (hub / "evil.py").write_text(f"open({str(hub / 'ran')!r}, 'w')")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\ny\ny\n"))
    message = refusal(capsys, hub, "--hf")
    assert "code of a checkpoint is never run" in message
    assert not (hub / "ran").exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_attention_from_the_hub_is_never_fetched(
    key: str, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A config may name an attention kernel of someone's repository: it is code."""
    path = hub / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: "someone/kernel"}))
    fetched: list[object] = []
    monkeypatch.setattr(
        "transformers.modeling_utils.lazy_import_flash_attention", lambda *a, **_: fetched.append(a)
    )
    monkeypatch.setattr(
        "transformers.integrations.hub_kernels.load_and_register_attn_kernel",
        lambda *a, **_: fetched.append(a),
    )
    monkeypatch.setattr(
        "transformers.modeling_utils.load_and_register_attn_kernel",
        lambda *a, **_: fetched.append(a),
        raising=False,
    )
    paths = ["--input-path", str(hub), "--output-path", str(tmp_path / "out"), "--hf"]
    assert prepare.main(paths) == 0
    assert fetched == []


def test_ties_that_the_weights_contradict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tied = tiny_models.build_model(tiny_models.granitemoe())
    folder = tiny_models.write_bin(tied, tmp_path / "source")
    state = tiny_models.hub_state_dict(tied)
    state["lm_head.weight"] = state["model.embed_tokens.weight"] + 1
    torch.save(state, folder / "pytorch_model.bin")
    assert "tie_word_embeddings" in refusal(capsys, folder, "--hf")


def test_unwritable_output(hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for output, reason in (
        (tmp_path / "file", "a file is where a folder should be"),
        (tmp_path / "file" / "below", "a file is where a folder should be"),
        (Path("/proc/prepared"), "No such file or directory"),
    ):
        message = refusal(capsys, hub, "--hf", output=output)
        assert message == f"error: cannot write {output}: {reason}; choose another --output-path\n"


def test_foreign_manifest_is_not_ours_to_replace(
    hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "manifest.json").write_text('{"name": "a web application"}')
    paths = ["--input-path", str(hub), "--output-path", str(output), "--hf"]
    for flags in ([], ["--force"]):
        assert prepare.main([*paths, *flags]) == 2
        assert f"{output / 'manifest.json'}" in capsys.readouterr().err
    assert "web application" in (output / "manifest.json").read_text()


def test_other_format_version(
    hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    paths = ["--input-path", str(hub), "--output-path", str(output), "--hf"]
    assert prepare.main(paths) == 0
    path = output / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 99}))
    assert prepare.main(paths) == 2
    message = capsys.readouterr().err
    assert "format version 99" in message and "--force" in message
    assert prepare.main([*paths, "--force"]) == 0


def test_debug_shows_the_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = ["--input-path", str(tmp_path / "no"), "--output-path", str(tmp_path), "--debug"]
    assert prepare.main(paths) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--input-path", "x"],
        ["--expert-dtype", "fp16"],
        ["--input-path", "", "--output-path", "x"],
    ],
)
def test_usage(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare.main(flags) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ") and lines[0].endswith("see --help")
