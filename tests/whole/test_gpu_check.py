"""The GPU machine's one command, on the emulated accelerator at a toy's size."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import yaml
from pretended_gpu import pretended_gpu
from pretended_kernels import pretend_kernels
from tiny_models import TINY_SHAPE

from benchmarks import gpu_check, gpu_measurements, gpu_models, gpu_one_setting, gpu_tests
from benchmarks.gpu_one_setting import Row, print_row
from moe_offload.checkpoint.block import block_layout
from moe_offload.config import CacheOptions, ModelOptions
from moe_offload.engine import calibration, probes
from moe_offload.engine.loading import load_engine
from moe_offload.engine.timing import Steadiness
from moe_offload.errors import UserError
from moe_offload.experts import layer as layer_module
from moe_offload.experts.recorder import LayerEvent, Recorder
from moe_offload.machine import hardware
from moe_offload.simulation import shapes as shapes_module

ON_CPU = ["--device", "cpu", "--parts", "models"]
SETTINGS = [one.name for one in gpu_models.settings("tiny", 1, 1, 1.0)]


@pytest.fixture
def tiny_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    shapes = tmp_path / "shapes.yaml"
    shapes.write_text(yaml.safe_dump({"tiny": TINY_SHAPE}))
    monkeypatch.setattr(shapes_module, "SHAPES_FILE", shapes)
    monkeypatch.setattr(gpu_check, "MODELS", (("tiny", "bf16"),))
    monkeypatch.setattr(probes, "_STEP_BUDGET_S", 0.01)
    return "tiny"


def check(tmp_path: Path, *flags: str) -> tuple[int, dict]:
    report = tmp_path / "report.json"
    code = gpu_measurements.main(
        [*ON_CPU, "--tokens", "6", "--layers", "3", "--json", str(report), *flags]
    )
    return code, json.loads(report.read_text())


def test_every_setting_is_measured_and_right(tiny_shape, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_one_setting, "PROMPT_LENGTHS", (80, 120, 4096))  # the context holds 128
    code, report = check(tmp_path, "--memory-gb", "0.0001")
    rows = {(row["setting"], row["routing"]): row for row in report["rows"]}
    assert list(rows) == [
        ("cpu only", "forced"),
        ("paper", "forced"),
        ("paper, hits launched", "forced"),
        ("paper, serial", "forced"),
        ("--cache-auto", "forced"),
        ("fetch on demand", "forced"),
        ("next-layer prefetch", "model"),
        ("paper, no graphs", "forced"),
        ("paper, quota 4", "forced"),
        ("paper, one by one", "forced"),
        ("fetch, cached", "model"),
        ("paper, auto misses", "forced"),
        ("fetch on demand, cached", "forced"),
    ]
    assert code == 0
    assert report["skipped"] == []
    for row in rows.values():
        assert row["correct"]
        assert row["steps"] == 6
        assert 0 < row["layer_error"] < 0.02
        assert row["bound_ms"] > 0
        assert row["between_us"] > 0
        assert (row["hit_gbps"] is not None) == ("accelerator" in row["computed_by"])
        assert row["percent_of_bound"] == pytest.approx(100 * row["bound_ms"] / row["step_ms"])
        with_prompts = row["setting"] in (
            "cpu only", "paper", "fetch on demand", "paper, one by one",
        )  # fmt: skip
        speeds = row["prompts_tokens_per_s"]
        assert set(speeds) <= ({"80", "120"} if with_prompts else set())
        assert "80" in speeds or not with_prompts
        assert all(speed > 0 for speed in speeds.values())
        assert (row["logit_error"] is None) == (row["routing"] == "model")
    # Nothing is in a cache that is not there, whoever computed it.
    assert rows["fetch on demand", "forced"]["hit_percent"] == 0
    n_pairs = 6 * 3 * 2
    block_gb = TINY_BLOCK_BYTES / 1e9
    assert rows["fetch on demand", "forced"]["fetched_gb"] == pytest.approx(n_pairs * block_gb)
    (line,) = [n for n in rows["paper, auto misses", "forced"]["notes"] if "miss policy" in n]
    assert "kept" in line, "the trial had no verdict before the measurement"
    prefetching = rows["next-layer prefetch", "model"]
    assert 0 <= prefetching["prefetch_recall_percent"] <= 100
    assert prefetching["prefetch_wasted_gb"] >= 0
    printed = capsys.readouterr().out
    assert "--cache-auto chose" in printed
    assert "WRONG" not in printed


def test_a_prompt_that_does_not_end_in_time_is_not_begun(tiny_shape, monkeypatch):
    monkeypatch.setattr(gpu_one_setting, "PROMPT_LENGTHS", (80, 120))
    source = gpu_models.open_source(tiny_shape, "bf16", None)
    options = ModelOptions(None, device="cpu", dummy_shape=tiny_shape)
    with load_engine(source, options, CacheOptions()) as engine:
        recorder = engine.dispatcher.recorder = Recorder()
        assert gpu_one_setting.prompt_speeds(engine, 0.0) == {}
        assert recorder.pass_table()["n_tokens"].tolist() == [64]  # to warm up
        assert list(gpu_one_setting.prompt_speeds(engine, 1e9)) == [80, 120]


def watched_waits(seen, waits):
    """A setting's run that notes whether a layer of a replayed step waited for its hits."""

    def run(engine, shape, setting, *more):
        waits[setting.name] = 0
        set_up = gpu_one_setting.set_up

        def watched(engine, setting):
            set_up(engine, setting)
            if engine.accelerator is None:
                return
            replay = engine.accelerator.gpu.replay

            def noted(*launch):
                seen.waits.clear()
                pending = replay(*launch)
                waits[setting.name] += seen.waits == ["event"]
                return pending

            engine.accelerator.gpu.replay = noted

        gpu_one_setting.set_up = watched
        try:
            return run_setting(engine, shape, setting, *more)
        finally:
            gpu_one_setting.set_up = set_up

    run_setting = gpu_measurements.run_setting
    return run


def test_every_setting_runs_on_a_gpu_of_pretence(tiny_shape, tmp_path, monkeypatch, capsys):
    report = tmp_path / "report.json"
    flags = ["--device", "cuda", "--parts", "models", "--tokens", "4", "--memory-gb", "0.0001"]
    with pretended_gpu(monkeypatch) as seen:
        pretend_kernels(monkeypatch, seen)
        monkeypatch.setattr(gpu_measurements, "run_setting", watched_waits(seen, waits := {}))
        code = gpu_measurements.main([*flags, "--json", str(report)])
    # Hits that a graph computes are waited for as well where nothing is to overlap.
    assert waits["paper, serial"] and not waits["paper"] and not waits["paper, hits launched"]
    document = json.loads(report.read_text())
    assert [row["setting"] for row in document["rows"]] == SETTINGS
    assert all(row["correct"] for row in document["rows"])
    assert (code, document["skipped"]) == (0, [])
    assert document["card"].keys() == {"card_copy_gbps", "link_gbps"}
    for row in document["rows"]:
        assert (row["replayed"] > 0) == (row["setting"] != "paper, no graphs")
        assert ("cuda:0" in row["computed_by"]) == (
            row["setting"] not in ("cpu only", "--cache-auto")
        )


TINY_N_EXPERTS = TINY_SHAPE["num_experts"]
TINY_BLOCK_BYTES = 8192  # 3 * 32 * 24 weights of bf16, rounded up to pages


def test_a_wrong_layer_is_found(tiny_shape, tmp_path, monkeypatch, capsys):
    """Experts on the accelerator come out a tenth too large: only the CPU's setting is right."""
    combine = layer_module.LayerStep.combine

    def wrong(self, cpu_out):
        self._outs[:] = [out * 1.1 for out in self._outs]
        return combine(self, cpu_out)

    monkeypatch.setattr(layer_module.LayerStep, "combine", wrong)
    code, report = check(tmp_path)
    assert code == 1
    right = {row["setting"] for row in report["rows"] if row["correct"]}
    assert "cpu only" in right
    assert "fetch on demand" not in right
    assert "WRONG" in capsys.readouterr().out


def test_named_settings_alone_are_measured(tiny_shape, tmp_path):
    named = ["cpu only", "paper, quota 4"]
    code, report = check(tmp_path, "--settings", *named)
    assert code == 0 and report["skipped"] == []
    assert [row["setting"] for row in report["rows"]] == named
    assert tuple(SETTINGS) == gpu_check.SETTINGS


def test_loading_and_pinning_are_measured(tiny_shape, tmp_path, monkeypatch):
    """Of what memory holds, and with a page cache that holds the file: in no more than there is."""
    monkeypatch.setattr(gpu_measurements, "mixtral_layout", lambda: block_layout("bf16", 256, 512))
    code, report = check(tmp_path, "--parts", "memory", "--pin-gb", "0.1")
    assert code == 0 and report["rows"] == report["skipped"] == []
    loading, pinning = report["memory"]["loading"], report["memory"]["pinning"]
    layer_bytes = 8 * block_layout("bf16", 256, 512).block_bytes
    assert loading["loaded_bytes"] == pinning["bytes"] == int(1e8 / layer_bytes) * layer_bytes
    assert min(loading["first_gbps"], loading["again_gbps"], loading["plain_gbps"]) > 0
    assert 0.9 < pinning["peak_over_bytes"] < 1.2
    assert pinning["refused"] is None


@pytest.mark.parametrize(("n_tests", "n_parts"), [(64, 12), (5, 3), (2, 3)])
def test_each_test_is_in_one_processs_share(n_tests, n_parts):
    kept, left = [], []
    hook = SimpleNamespace(pytest_deselected=lambda items: left.append(len(items)))
    for part in range(n_parts):
        items, share = list(range(n_tests)), f"{part}/{n_parts}"
        config = SimpleNamespace(hook=hook, getoption=lambda _, share=share: share)
        gpu_tests.pytest_collection_modifyitems(config, items)
        assert len(items) + left[-1] == n_tests
        kept += items
    assert kept == list(range(n_tests))


def test_kernels_alone_are_measured_each_way(tiny_shape, monkeypatch):
    """The kernels and the card's clock are stood in for: what is held is all around them."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from benchmarks import gpu_kernels
    from moe_offload.kernels import triton_experts, triton_tiles

    class Nothing:
        def __getitem__(self, grid):
            assert all(size > 0 for size in grid)
            return lambda *_, **__: None

    class TooLarge:
        def __getitem__(self, grid):
            raise RuntimeError("out of resource: shared memory")

    for module in (triton_experts, triton_tiles):
        for name in [one for one in vars(module) if one.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Nothing())
    monkeypatch.setattr(gpu_kernels, "_device_us", lambda work: (work(), 500.0)[1])
    monkeypatch.setattr(gpu_kernels, "_recorded", lambda work: work)
    monkeypatch.setattr(gpu_kernels, "_SLOTS_BYTES", 1e5)
    monkeypatch.setattr(gpu_kernels, "DECODED", (("tiny", "int4", (1, 2)), ("tiny", "fp8", (2,))))
    monkeypatch.setattr(gpu_kernels, "PROMPTED", (("tiny", "bf16"),))
    monkeypatch.setattr(gpu_kernels, "N_TOKENS", (16,))
    rows = list(gpu_kernels.kernel_rows("cpu"))
    decoded = [row for row in rows if "hits" in row]
    assert len(decoded) == 6 * 2 + 4
    assert all(row["gbps"] > 0 and row["us"] == 500 / 16 for row in decoded)
    prompted = [row["way"] for row in rows if "tokens" in row]
    assert prompted == ["tiles of 64 x 64", "tiles of 128 x 64", "tiles of 128 x 128", "cuBLAS"]
    monkeypatch.setattr(triton_tiles, "first_tiles_kernel", TooLarge())
    *failed, last = [row for row in gpu_kernels.kernel_rows("cpu") if "tokens" in row]
    assert all("shared memory" in row["error"] for row in failed) and last["tflops"] > 0


def test_out_of_time_is_said(tiny_shape, tmp_path, capsys):
    code, report = check(tmp_path, "--minutes", "0")
    assert code == 1
    assert report["rows"] == []
    assert report["skipped"] == [f"tiny bf16 {name} (out of time)" for name in SETTINGS]
    assert "not measured: tiny bf16 cpu only (out of time)" in capsys.readouterr().out


def test_a_setting_ends_when_its_time_is_up(tiny_shape, tmp_path, monkeypatch):
    budgets = []
    measure = gpu_one_setting.measure

    def hurried(engine, ids, warm_up, n_steps, budget_s, patient):
        budgets.append(budget_s)
        return measure(engine, ids, warm_up, 1000, 0.0, patient)

    monkeypatch.setattr(gpu_one_setting, "measure", hurried)
    code, report = check(tmp_path)
    assert code == 0
    assert {row["steps"] for row in report["rows"]} == {gpu_one_setting.LEAST_STEPS}
    # Half of an equal share of what is left to the settings, the rest is for all else.
    assert len(budgets) == len(SETTINGS)
    for number, budget_s in enumerate(budgets):
        assert 0 < budget_s <= 60 * 7 / (len(SETTINGS) - number) / 2


@pytest.mark.parametrize("n_stored", [2, 3])
def test_a_cgroups_memory_decides_how_many_layers_are_in_memory(tiny_shape, monkeypatch, n_stored):
    room = (n_stored + 0.5) * TINY_N_EXPERTS * TINY_BLOCK_BYTES / gpu_models.HOST_MEMORY_SHARE
    monkeypatch.setattr(hardware, "_limits", lambda *_: iter([(int(room) + 100, 100)]))
    source = gpu_models.open_source(tiny_shape, "bf16", None)
    assert (source.n_stored_layers, len(source.layouts)) == (n_stored, 3)
    monkeypatch.setattr(hardware, "_limits", lambda *_: iter([(1000, 0)]))
    with pytest.raises(UserError, match="one layer of tiny needs"):
        gpu_models.open_source(tiny_shape, "bf16", None)


@pytest.mark.parametrize("name", dict.fromkeys(name for name, _ in gpu_check.MODELS))
def test_a_model_has_all_layers_and_few_of_them_in_memory(name):
    source = gpu_models.open_source(name, "bf16", None, 40e9)
    layer_bytes = source.layouts[0].block_bytes * source.n_experts[0]
    assert len(source.layouts) == {"qwen3-30b-a3b": 48, "gpt-oss-20b": 24}.get(name, 32)
    assert 0 < source.n_stored_layers * layer_bytes <= 16e9
    n, m = gpu_models.PAPER_CACHE[name]
    assert n <= len(source.layouts)
    assert (n * m + 2) * source.layouts[0].block_bytes + source.dense_bytes < 24.5e9


def test_a_model_that_has_had_its_time_leaves_the_lesser_settings_out(
    tiny_shape, tmp_path, monkeypatch
):
    def slow(*arguments):
        time.sleep(0.05)
        return run_setting(*arguments)

    run_setting = gpu_measurements.run_setting
    monkeypatch.setattr(gpu_measurements, "run_setting", slow)
    monkeypatch.setattr(gpu_check, "MODELS", (("tiny", "bf16"),))
    source = gpu_models.open_source("tiny", "bf16", None)
    arguments = gpu_check.parse(["--device", "cpu", "--tokens", "4", "--shapes", "mixtral-8x7b"])
    report = gpu_measurements.Report(None, [("tiny", "bf16")])
    # A thousandth of the ten minutes is this model's.
    gpu_measurements.run_shape(source, "tiny", arguments, time.monotonic() + 600, 6000, report)
    core = SETTINGS[: gpu_models.N_CORE_SETTINGS]
    assert [row.setting for row in report.rows] == core
    assert report.skipped == [
        f"tiny bf16 {name} (out of time)" for name in SETTINGS if name not in core
    ]


def test_the_report_names_the_gpu_in_use(tiny_shape, tmp_path, monkeypatch):
    device = torch.device("cuda", 1)
    named = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: Properties(f"of-{d}"))
    monkeypatch.setattr(gpu_measurements, "choose_device", lambda wanted: device)
    read = gpu_measurements.read_hardware
    monkeypatch.setattr(
        gpu_measurements, "read_hardware", lambda gpu_uuid: named.append(gpu_uuid) or read()
    )
    check(tmp_path, "--minutes", "0")
    assert named == ["GPU-of-cuda:1"]


@dataclass
class Properties:
    uuid: str


class OneStep:
    """An engine of two layers, as far as the bound looks at it."""

    def __init__(self, accelerated: bool) -> None:
        from moe_offload.experts.costs import CostModel, SideCost

        model = CostModel(SideCost(5, 100, 10), SideCost(5, 20, 1), 0, 10, 5, 1.5, 1000_000, 50)
        self.costs = calibration.MachineCosts(model, 10.0, Steadiness(0.0, 0.0))
        self.accelerator = object() if accelerated else None
        self.store = type("Store", (), {"n_layers": 2})()


def one_step(hits: int) -> Recorder:
    recorder = Recorder()
    recorder.begin_pass("decode", 1, 0)
    for layer in range(2):
        recorder.layer(LayerEvent(layer, [[0, 1]], [hits], hits, 2 - hits, gpu_bytes=2_000_000))
    recorder.end_pass(1.0)
    return recorder


@pytest.mark.parametrize(
    ("accelerated", "hits", "ahead", "expected_us"),
    [
        (False, 0, 0, 2 * 50 + 4 * 110),
        (True, 2, 0, 2 * 50 + 4 * 21),  # all in the cache
        # Waited for, or fetched ahead: 540 of CPU and dense work shared with a bus of 100 a copy.
        (True, 0, 0, (100 + 4 * 110) / (1 + 110 / 100)),
        (True, 2, 4, (100 + 4 * 110) / (1 + 110 / 100)),
    ],
)
def test_copies_that_were_waited_for_are_no_free_hits(accelerated, hits, ahead, expected_us):
    measured = gpu_one_setting.Measured(one_step(hits), 1.0, ahead)
    assert gpu_one_setting.bound_step_us(OneStep(accelerated), measured) == pytest.approx(
        expected_us
    )


def test_without_a_gpu_it_says_so(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu_check.main(["--json", str(tmp_path / "report.json")]) == 2
    assert "--device cpu" in capfd.readouterr().err
    assert not (tmp_path / "report.json").exists()


def test_the_report_on_disk_has_every_row_as_it_comes(tiny_shape, tmp_path, monkeypatch):
    seen = []

    def look(row):
        report = json.loads((tmp_path / "report.json").read_text())
        assert report["rows"][-1]["setting"] == row.setting
        assert len(report["rows"]) + len(report["skipped"]) == len(SETTINGS)
        seen.append(report["ended"])

    monkeypatch.setattr(gpu_measurements, "print_row", look)
    code, report = check(tmp_path)
    assert (code, report["ended"]) == (0, gpu_check.COMPLETE)
    assert seen == [gpu_check.RUNNING] * len(SETTINGS)


def test_a_row_is_printed_with_its_own_notes_only(capsys):
    costs = replace(OneStep(True).costs, steadiness=Steadiness(0.9, 0.0))
    values = dict.fromkeys((one.name for one in fields(Row)), 0)
    (note,) = costs.notes()
    values |= {"prompts_tokens_per_s": {512: 300.0}, "parts_ms": {"cpu": 12.0}}
    print_row(Row(**values | {"notes": [note, "4 of 8 cache slots fit"]}))
    assert "varied" in note
    out = capsys.readouterr().out
    assert "4 of 8 cache slots fit" in out and "varied" not in out
    assert "a prompt of 512 tokens: 300.0 tokens/s" in out


def test_a_setting_that_fails_leaves_the_others_alone(tiny_shape, tmp_path, monkeypatch, capsys):
    logits = gpu_one_setting.logits

    def broken(engine, ids):
        if engine.accelerator is not None and engine.accelerator.mode == "fetch":
            raise RuntimeError("no such kernel")
        return logits(engine, ids)

    monkeypatch.setattr(gpu_one_setting, "logits", broken)
    code, report = check(tmp_path)
    assert code == 1
    failed = [name for name in SETTINGS if "fetch" in name]
    reason = "RuntimeError('no such kernel')"
    assert report["skipped"] == [f"tiny bf16 {name} ({reason})" for name in failed]
    assert [row["setting"] for row in report["rows"]] == [n for n in SETTINGS if n not in failed]
    assert reason in capsys.readouterr().out


@pytest.mark.parametrize(("n_bytes", "n_stored"), [(0.1, 1), (1, 1), (2.5, 2), (9, 3)])
def test_time_for_loading_decides_how_many_layers_are_in_memory(tiny_shape, n_bytes, n_stored):
    most_bytes = n_bytes * TINY_N_EXPERTS * TINY_BLOCK_BYTES
    source = gpu_models.open_source(tiny_shape, "bf16", 3, most_bytes)
    assert (source.n_stored_layers, len(source.layouts)) == (n_stored, 3)


# Two rows, then `THEN` in the third setting, with a process of its own beside it.
MEASURING = """
import os, signal, subprocess, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import yaml
from tiny_models import TINY_SHAPE
from moe_offload.engine import probes
from moe_offload.simulation import shapes as shapes_module
from benchmarks import gpu_check, gpu_measurements, gpu_one_setting

shapes_module.SHAPES_FILE = Path({folder!r}, "shapes.yaml")
shapes_module.SHAPES_FILE.write_text(yaml.safe_dump(dict(tiny=TINY_SHAPE)))
gpu_check.MODELS = (("tiny", "bf16"),)
probes._STEP_BUDGET_S = 0.01
measure, calls = gpu_one_setting.measure, []

def third_time(*arguments):
    calls.append(1)
    if len(calls) == 3 and not Path({folder!r}, "child").exists():
        child = subprocess.Popen(["sleep", "1000"])
        Path({folder!r}, "child.part").write_text(str(child.pid))
        os.replace(Path({folder!r}, "child.part"), Path({folder!r}, "child"))
        {then}
    return measure(*arguments)

gpu_one_setting.measure = third_time
gpu_measurements.is_usable = lambda device: False
sys.exit(gpu_measurements.main())
"""


def is_over(pid: int) -> bool:
    """Whether a process that was killed ends: it may take a moment, and nobody may reap it."""
    for _ in range(1000):
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize(
    ("then", "reason"),
    [
        ("time.sleep(1000)", None),
        ("os.kill(os.getpid(), signal.SIGKILL)", "killed by signal 9"),
        ("raise RuntimeError('an illegal address')", "RuntimeError('an illegal address')"),
    ],
)
def test_what_was_measured_is_kept_however_it_ends(tmp_path, monkeypatch, capsys, then, reason):
    """And where it died of a setting the others are measured by another process."""
    script, child = tmp_path / "measuring.py", tmp_path / "child"
    tests = str(Path(__file__).parents[1] / "helpers")
    script.write_text(MEASURING.format(tests=tests, folder=str(tmp_path), then=then))
    monkeypatch.setattr(gpu_check, "MEASURING", (str(script),))
    wait = subprocess.Popen.wait

    def until_it_hangs(self, timeout=None):
        """The limit is over as soon as the third setting hangs, however fast this machine is."""
        while not child.exists() and self.poll() is None:
            time.sleep(0.01)
        return wait(self, 0 if "sleep" in then else None)

    monkeypatch.setattr(subprocess.Popen, "wait", until_it_hangs)
    flags = [*ON_CPU, "--tokens", "6", "--layers", "3"]
    code = gpu_check.main([*flags, "--json", str(tmp_path / "report.json")])
    assert code == 1
    report = json.loads((tmp_path / "report.json").read_text())
    third = f"tiny bf16 {SETTINGS[2]}"
    if reason is None:
        ended = "ended at the time limit"
        assert [row["setting"] for row in report["rows"]] == SETTINGS[:2]
        assert report["skipped"] == [f"tiny bf16 {name}" for name in SETTINGS[2:]]
        assert report["ended"] == ended
        assert f"{ended}; not measured: {third}" in capsys.readouterr().out
    else:
        others = [*SETTINGS[:2], *SETTINGS[3:]]
        assert [row["setting"] for row in report["rows"]] == others
        assert all(row["correct"] for row in report["rows"])
        assert report["skipped"] == [f"{third} ({reason})"]
        assert report["ended"] == gpu_check.COMPLETE
    assert report["hardware"]["cpu"]
    assert is_over(int(child.read_text()))


def test_the_time_limit_ends_what_takes_longer():
    assert gpu_check.run_limited(["sleep", "1000"], 0.01) == (1, "ended at the time limit")
    assert gpu_check.run_limited([sys.executable, "-c", "raise SystemExit(3)"], 60) == (3, None)
    # What the imports took counts as well: there may be nothing left.
    assert gpu_check.run_limited(["sleep", "1000"], -1) == (1, "ended at the time limit")
