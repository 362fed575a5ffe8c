"""What experts see in a sample text, and a folder that was prepared for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
import torch
from against_transformers import eager, prepared
from torch import Tensor

from moe_offload.checkpoint.prepared import read_block, read_manifest
from moe_offload.checkpoint.source import open_source
from moe_offload.commands import check, prepare
from moe_offload.kernels.oracle import experts_forward
from moe_offload.model import sample_text
from moe_offload.model.sample_text import read_sample, windows_of
from moe_offload.model.tokenization import load_tokenizer

TEXT = "A mixture of experts sends each token to a few of them. " * 20


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    return tiny_models.write_mixtral_with_tokenizer(tmp_path / "hub")


@pytest.mark.parametrize("build", [tiny_models.mixtral, tiny_models.gpt_oss])
def test_the_inputs_are_those_of_transformers(build, tmp_path: Path) -> None:
    folder = tiny_models.write_hub(tiny_models.build_model(build()), tmp_path / "hub")
    model = eager(folder, torch.float32)
    ids = torch.randint(3, 60, (2, 16), generator=torch.Generator().manual_seed(0))
    expected: list[tuple[Tensor, ...]] = []
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            module.register_forward_hook(lambda _, inputs, __: expected.append(inputs))
    with torch.inference_mode():
        model(ids)
    found = read_sample(open_source(folder, True, torch.float32), ids)
    assert len(found) == len(expected) > 1
    for layer, (hidden, index, _) in zip(found, expected, strict=True):
        assert torch.allclose(layer.hidden, hidden, rtol=1e-4, atol=1e-5)
        assert torch.equal(layer.index.sort().values, index.sort().values)


def test_an_expert_with_few_tokens_gets_others(hub: Path) -> None:
    ids = torch.randint(3, 60, (4, 128), generator=torch.Generator().manual_seed(0))
    for layer in read_sample(open_source(hub, True, torch.float32), ids):
        for expert in range(8):
            n_own = int((layer.index == expert).any(dim=1).sum())
            inputs = layer.of_expert(expert)
            if n_own >= sample_text.FEWEST_INPUTS:
                assert len(inputs) == n_own
            else:
                assert len(inputs) >= sample_text.FEWEST_INPUTS


def test_windows_cover_a_text() -> None:
    windows = windows_of(range(100_000))
    assert windows.shape == (sample_text.N_WINDOWS, sample_text.WINDOW)
    assert windows[0, 0] == 0 and windows[-1, -1] == 99_999
    assert windows_of(range(100)).tolist() == [list(range(100))]


def test_int4_for_a_text_changes_its_experts_outputs_less(
    hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text"
    text.write_text(TEXT)
    flags = ("--hf", "--expert-dtype", "int4")
    plain = prepared(hub, tmp_path / "plain", *flags)
    suited = prepared(hub, tmp_path / "suited", *flags, "--calibration-text", str(text))
    again = prepared(hub, tmp_path / "again", *flags, "--calibration-text", str(text))
    source = open_source(hub, True, torch.bfloat16)
    tokenizer = load_tokenizer(suited, source.config.model_type)
    ids = windows_of(tokenizer.encode(TEXT, raw=True))
    exact = read_manifest(prepared(hub, tmp_path / "fp32", "--hf", "--expert-dtype", "fp32"))
    for position, layer in enumerate(read_sample(source, ids)):
        outputs = []
        for manifest in (exact, read_manifest(plain), read_manifest(suited)):
            stored = manifest.moe_layers[position]
            block = torch.empty(stored.layout.block_bytes, dtype=torch.uint8)
            out = torch.zeros(layer.hidden.shape)
            for expert in range(stored.n_experts):
                read_block(stored, expert, block)
                weights = torch.ones(layer.index.shape)
                hidden, site = layer.hidden.float(), layer.site
                out += experts_forward(
                    stored.layout, {expert: block}, hidden, layer.index, weights,
                    site.activation, site.act_module,
                )  # fmt: skip
            outputs.append(out)
        expected, by_rounding, by_text = outputs
        assert (by_text - expected).norm() < 0.8 * (by_rounding - expected).norm()
    assert contents(suited) == contents(again)
    assert "calibration_text" in read_manifest(suited).created_with
    capsys.readouterr()
    assert check.main(["--model-path", str(suited), "--device", "cpu"]) == 0
    assert "rounded for a calibration text" in capsys.readouterr().out


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("experts-*")}


@pytest.mark.parametrize(
    ("text", "flags", "expected"),
    [
        (TEXT, ("--expert-dtype", "bf16"), "--calibration-text rounds int4, found --expert-dtype"),
        ("Too short.", ("--expert-dtype", "int4"), "tokens, expected at least 128"),
        (None, ("--expert-dtype", "int4"), "No such file"),
    ],
)
def test_a_text_that_cannot_serve(
    text: str | None, flags: tuple[str, ...], expected: str, hub: Path, tmp_path: Path, capsys
) -> None:
    path = tmp_path / "text"
    if text is not None:
        path.write_text(text)
    paths = ["--input-path", str(hub), "--output-path", str(tmp_path / "out")]
    assert prepare.main([*paths, "--hf", *flags, "--calibration-text", str(path)]) == 2
    message = capsys.readouterr().err
    assert expected in message and message.count("\n") == 1


def test_another_text_is_another_folder(hub: Path, tmp_path: Path, capsys) -> None:
    text = tmp_path / "text"
    text.write_text(TEXT)
    flags = ["--input-path", str(hub), "--output-path", str(tmp_path / "out"), "--hf"]
    flags += ["--expert-dtype", "int4"]
    assert prepare.main([*flags, "--calibration-text", str(text)]) == 0
    assert prepare.main([*flags, "--calibration-text", str(text)]) == 0
    assert prepare.main(flags) == 2
    assert "--calibration-text" in capsys.readouterr().err
