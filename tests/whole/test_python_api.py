"""A loaded model is a real transformers model: generate(), streamers, processors."""

from __future__ import annotations

import importlib.util
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from against_transformers import eager, prepared
from tiny_models import CONFIGS, build_model, write_hub, write_mixtral_with_tokenizer
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from moe_offload.engine.loading import load_model
from moe_offload.errors import UserError
from moe_offload.experts.recorder import Recorder
from moe_offload.report.summary import format_summary, summarize


class Collector(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


class Forbid(LogitsProcessor):
    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, self.token] = float("-inf")
        return scores


PAGE = Path(__file__).resolve().parents[2] / "docs" / "PYTHON_API.md"


def test_the_page_works_from_top_to_bottom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each block after those before it, all in one program; the harness's where it is installed."""
    source = write_mixtral_with_tokenizer(tmp_path / "source")
    folder = prepared(source, tmp_path / "prepared", "--hf")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {}
    for block in blocks:
        if "lm_eval" in block and importlib.util.find_spec("lm_eval") is None:
            continue
        exec(block.replace("path/to/prepared/model", str(folder)), names)
    assert "TPOT: median" in capsys.readouterr().out
    assert (tmp_path / "run1" / "run.json").is_file()
    assert "path/to/prepared/model" in blocks[0] and "close()" in blocks[-1]


def test_a_model_without_its_experts_is_not_saved(folder: Path, tmp_path: Path) -> None:
    model = load_model(folder, device="cpu")
    with pytest.raises(UserError, match="copy the prepared folder"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    model.engine.close()


def test_threads_take_turns(tmp_path: Path) -> None:
    """Passes of another length and phase in between change nobody's tokens."""
    source = write_hub(build_model(CONFIGS["mixtral"]()), tmp_path / "source")
    folder = prepared(source, tmp_path / "prepared", "--hf", "--expert-dtype", "fp32")
    model = load_model(folder, device="cpu", cache_nblocks=2, cache_nways=2)
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    prompts = [torch.randint(3, 90, (1 + n % 2, 5 + 7 * n)) for n in range(4)]

    def answer(ids: torch.Tensor) -> list[list[int]]:
        return model.generate(ids, attention_mask=torch.ones_like(ids), **settings).tolist()

    expected = [answer(ids) for ids in prompts]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(answer, prompts)) == expected
    with pytest.raises(Exception, match="input"):
        model(labels=None)
    assert answer(prompts[0]) == expected[0]  # a pass that failed has ended
    model.engine.close()


@pytest.mark.parametrize("cache", [{}, {"cache_nblocks": 2, "cache_nways": 2}])
def test_generate_with_a_streamer(cache: dict[str, int], tmp_path: Path) -> None:
    source = write_hub(build_model(CONFIGS["mixtral"]()), tmp_path / "source")
    folder = prepared(source, tmp_path / "prepared", "--hf", "--expert-dtype", "fp32")
    model, reference = load_model(folder, device="cpu", **cache), eager(source, torch.float32)
    ids = torch.tensor([[5, 9, 33, 71], [0, 0, 12, 40]])
    mask = (ids > 0).long()
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = reference.generate(ids, attention_mask=mask, **settings)
    assert torch.equal(model.generate(ids, attention_mask=mask, **settings), expected)

    streamer = Collector()
    single = model.generate(ids[:1], attention_mask=mask[:1], streamer=streamer, **settings)
    assert streamer.ended
    assert streamer.tokens == single[0].tolist()

    first = int(expected[0, 4])
    processors = LogitsProcessorList([Forbid(first)])
    other = model.generate(
        ids[:1], attention_mask=mask[:1], logits_processor=processors, **settings
    )
    assert first not in other[0, 4:].tolist()
    assert model.num_parameters() < reference.num_parameters()  # its experts are not in the module
    model.engine.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("model")
    source = write_hub(build_model(CONFIGS["mixtral"]()), root / "source")
    return prepared(source, root / "prepared", "--hf")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": "text"}, "{path} is damaged (Manifest.config: expected dict, found 'text')"),
        ({"config": None}, "config: expected dict, found None"),
        ({"config": [1]}, "config: expected dict, found [1]"),
        ({"config.model_type": ["mixtral"]}, "it finds no"),
        ({"config.hidden_size": "abc"}, "transformers cannot use the config in {path}"),
        ({"config.eos_token_id": "x"}, "transformers cannot use the config in {path}"),
        ({"config.max_position_embeddings": "x"}, "transformers cannot use the config in {path}"),
        ({"config.max_position_embeddings": None}, "transformers cannot use the config in {path}"),
        ({"config.hidden_size": -128}, "transformers cannot build the model"),
        ({"config.hidden_act": "zzz"}, "transformers cannot build the model"),
        ({"config.rope_parameters": {"rope_type": "zzz"}}, "transformers cannot"),
        ({"config.num_experts_per_tok": 99}, "expected num_experts_per_tok of 1 to 4 in {path}"),
        ({"config.sliding_window": -1}, "expected sliding_window of 1 to 1099511627776 in {path}"),
        ({"config.sliding_window": 2**70}, "in {path}, found 1180591620717411303424"),
        ({"config.num_experts_per_tok": 0}, "of 1 to 4 in {path}, found 0"),
        ({"model_dtype": "bogus"}, "one of bfloat16, float32, found 'bogus'"),
        ({"model_dtype": 7}, "found 7"),
        ({"model_dtype": ["float32"]}, "found ['float32']"),
        ({"weight_format": "int4"}, "{path} does not fit its model"),
        ({"weight_format": {}}, "Manifest.weight_format: expected one of fp32, bf16, int8"),
        ({"dense_format": 4}, "Manifest.dense_format: expected one of"),
        ({"generation_config": 7}, "Manifest.generation_config: expected dict"),
        ({"generation_config": [1]}, "found [1]"),
        ({"generation_config": {"eos_token_id": "abc"}}, "expected eos_token_id in {path}"),
        ({"generation_config": {"eos_token_id": [2, None]}}, "found [2, None]"),
        ({"generation_config": {"cache_implementation": 7}}, "use the generation defaults"),
        ({"packed_weights": [{"name": 1, "bits": 8, "n_rows": 1, "n_columns": 1}]}, "is damaged"),
        ({"created_with": 7}, "{path} is damaged"),
        ({"moe_layers": []}, "{path} is damaged"),
        ({"moe_layers.0.n_experts": "4"}, "{path} is damaged"),
        ({"moe_layers.0.data_offset_bytes": 4095}, "its header does not match the manifest"),
        ({"moe_layers.0.layout.hidden_size": 64}, "{path} does not fit its model"),
        ({"moe_layers.0.layout.fields": 3}, "{path} is damaged"),
        ({"dense.0.bytes": "many"}, "{path} is damaged"),
        ({"dense.0.tensors.0.offset_bytes": 1 << 40}, "header does not match the manifest"),
        ({"dense.0.tensors.0.shape": ["a"]}, "{path} is damaged"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_a_manifest_that_means_nothing_is_a_sentence(
    changes: dict[str, Any], message: str, folder: Path, tmp_path: Path
) -> None:
    for shard in folder.glob("*.safetensors"):
        (tmp_path / shard.name).symlink_to(shard)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["checksum"]  # as a person would who edits it on purpose
    for place, value in changes.items():
        *parents, last = (int(part) if part.isdigit() else part for part in place.split("."))
        holder: Any = manifest
        for parent in parents:
            holder = holder[parent]
        holder[last] = value
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError) as refused:
        load_model(tmp_path, device="cpu")
    assert message.format(path=path) in str(refused.value)
    assert "\n" not in str(refused.value)
    assert "weights_preprocessor.py --force" in str(refused.value) or "newer" in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "tpu"}, "expected --device as one of auto, cuda, cuda:N, cpu, found 'tpu'"),
        ({"device": ""}, "found ''"),
        ({"device": torch.device("cpu")}, "found device"),
        ({"miss_policy": "zzz"}, "expected --miss-policy as one of cpu, fetch, auto"),
        ({"prefetch": "zzz"}, "expected --prefetch as one of off, next-layer"),
        ({"cache_nblocks": 2.5}, "expected --cache-nblocks as a whole number, found 2.5"),
        ({"cache_nways": "2"}, "expected --cache-nways as a whole number, found '2'"),
        ({"cache_nblocks": True}, "found True"),
        ({"quota": "a"}, "expected --cache-quota as a whole number, found 'a'"),
        ({"cache_replace_policy": "zzz"}, "FIFO, LRU, RANDOM, LFU, LFRU, found 'zzz'"),
        (
            {"cache_replace_policy": None},
            "--cache-replace-policy as one of FIFO, LRU, RANDOM, LFU, LFRU, found None",
        ),
        ({"auto": True, "memory_gb": float("nan")}, "as a finite number or None, found nan"),
        ({"auto": 1}, "expected --cache-auto as True or False, found 1"),
        ({"trace": "file"}, "expected --trace as a pathlib.Path or None, found 'file'"),
        ({"seed": 2**64}, "--seed of at most 18446744073709551615, found 18446744073709551616"),
        ({"cache_ways": 2}, "trace as settings of load_model, found cache_ways"),
        ({"n_indexes": 2}, "found n_indexes"),
    ],
)
def test_settings_are_checked_before_the_folder(settings: dict[str, Any], message: str) -> None:
    cache = {"cache_nblocks": 2, "cache_nways": 2} if "auto" not in settings else {}
    with pytest.raises(UserError) as refused:
        load_model("no such folder", **(cache | settings))
    assert message in str(refused.value)
    assert str(refused.value).startswith("expected ")


def test_a_bare_generate_has_a_whole_summary(tmp_path: Path) -> None:
    source = write_hub(build_model(CONFIGS["mixtral"]()), tmp_path / "source")
    model = load_model(prepared(source, tmp_path / "prepared", "--hf"), device="cpu")
    recorder = model.engine.dispatcher.recorder = Recorder()
    model.engine.decode_step()  # as a calibration does: no sequence of the run
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ids = torch.tensor([[5, 9, 33], [8, 12, 40]])
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, **settings)
    model.generate(torch.tensor([[7]]), max_new_tokens=4, **settings)  # a prompt of one token
    model.engine.close()

    passes = recorder.pass_table()
    assert passes["decode"].tolist() == [False, *[True] * 5, False, *[True] * 3]
    assert passes["n_sequences"].tolist() == [2] * 6 + [1] * 4
    assert recorder.token_table()["prompt"].tolist() == [0, 1] * 6 + [2] * 4
    summary = summarize(recorder)
    assert (summary.prompt_tokens, summary.generated_tokens) == (7, 2 * 5 + 3)
    assert len(summary.ttft_s) == 3
    assert summary.tpot_median_s is not None
    # Sampling lies between the passes, so a token takes at least as long as its pass.
    assert summary.generation_s >= passes["duration_s"][passes["decode"]].sum()
    assert "TPOT: median" in format_summary(summary)
