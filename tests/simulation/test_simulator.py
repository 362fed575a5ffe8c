"""The simulator's command line, end to end, and its sweeps."""

import csv
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from plotted import is_drawn
from written_trace import write_trace

from moe_offload.commands import draw, simulate
from moe_offload.config import CacheOptions
from moe_offload.experts.cache import ExpertCache, make_policy
from moe_offload.simulation.machine_file import load_machine
from moe_offload.simulation.paper import paper_cells
from moe_offload.simulation.replay import replay
from moe_offload.simulation.shapes import load_shape
from moe_offload.simulation.traces import RoutingPass, TraceInfo
from moe_offload.simulation.tuning import grid, sweep
from moe_offload.simulation.workload import even_workload

ROOT = Path(__file__).resolve().parents[2]
HARDWARE = str(ROOT / "hardware" / "rtx4090.yaml")


@pytest.fixture(scope="module")
def mixtral_file(tmp_path_factory) -> str:
    """A trace of Mixtral's 32 layers."""
    path = tmp_path_factory.mktemp("mixtral") / "trace.jsonl"
    trace = even_workload(32, 8, 2, overlap=0.4).generate(12, seed=2, n_prompt_tokens=3)
    write_trace(path, trace.info, trace.passes)
    return str(path)


@pytest.fixture(scope="module")
def trace():
    return even_workload(4, 8, 2, overlap=0.4).generate(60, seed=2, n_prompt_tokens=6)


@pytest.fixture
def trace_file(tmp_path, trace) -> str:
    write_trace(tmp_path / "trace.jsonl", trace.info, trace.passes)
    return str(tmp_path / "trace.jsonl")


def printed(capsys, *arguments: str, code: int = 0) -> str:
    assert simulate.main(arguments) == code
    captured = capsys.readouterr()
    return captured.out + captured.err


def test_one_setting_prints_what_the_replay_counted(capsys, trace, trace_file):
    out = printed(
        capsys, trace_file, "--cache-nblocks", "3", "--cache-nways", "3",
        "--cache-replace-policy", "LRU",
    )  # fmt: skip
    result = replay(trace.passes, ExpertCache(3, 3, make_policy("LRU")))
    one, two = result.decode.at_least_one_percent, result.decode.at_least_two_percent
    per_expert = result.decode.per_expert_percent
    assert "SYNTHETIC routing" in out
    assert f"at least one {one:.1f}%, at least two {two:.1f}%, per expert {per_expert:.1f}%" in out
    assert f"fetches: {result.fetches}, evictions: {result.evictions}" in out
    assert "prefill hits: at least one 0.0%" in out
    assert per_expert <= float(re.search(r"optimum, with bypass: ([\d.]+)%", out)[1])


def test_a_batch_prints_the_rates_of_the_engine_and_the_optimum_in_its_own_unit(capsys, tmp_path):
    batch = RoutingPass("decode", (((0, 1), (0, 2), (3, 4)),))
    info = TraceInfo(model="batch", n_layers=1, n_experts=8, top_k=2)
    write_trace(tmp_path / "batch.jsonl", info, [batch, batch])
    out = printed(
        capsys, str(tmp_path / "batch.jsonl"), "--cache-nblocks", "1", "--cache-nways", "3",
        "--cache-replace-policy", "LRU",
    )  # fmt: skip
    # Of 12 choices 4 were there; of the 5 experts of each pass, 3 in the second.
    assert "at least one 33.3%, at least two 33.3%, per expert 33.3%" in out
    assert (
        "each expert counted once in a pass, hits: 30.0%; Belady's optimum, with bypass: 30.0%"
        in out
    )


def test_a_trace_without_prompts_says_so(capsys, tmp_path):
    path = tmp_path / "expert_choices.csv"
    flags = (str(path), "--cache-nblocks", "1", "--cache-nways", "2")
    path.write_text("Index,Block_0,Block_0\n0\n1,0,1\n")
    assert "the trace leaves prompts out" in printed(capsys, *flags)
    prompt = RoutingPass("prefill", (((0, 1),),))
    passes = [prompt, RoutingPass("decode", (((0, 1),),))]
    write_trace(tmp_path / "routing.jsonl", TraceInfo("run", 1, 2, 4), passes)
    out = printed(capsys, *flags)
    assert "leaves prompts out" not in out
    assert f"note: {tmp_path / 'routing.jsonl'} was read: it has the prompts' tokens too" in out
    assert "decode hits: at least one 100.0%" in out


def test_times_are_printed_with_a_machine(capsys, mixtral_file):
    out = printed(
        capsys, mixtral_file, "--cache-nblocks", "3", "--cache-nways", "4", "--hardware", HARDWARE,
        "--cores", "8", "--model", "mixtral-8x7b",
    )  # fmt: skip
    speed = float(re.search(r"([\d.]+) tokens/s, [\d.]+ ms a token, [\d.]+ J a token", out)[1])
    bound = float(re.search(r"full overlap\): ([\d.]+) tokens/s", out)[1])
    assert 0 < speed < bound
    assert "8 cores, PCIe 4.0" in out and "12 slots, 4.23 GB" in out
    assert re.search(r"bytes: [\d.]+ GB fetched, [\d.]+ GB read by the CPU", out)
    assert "layer_us of the hardware file, 700, makes 22.4 ms a token: with any cache at" in out


@pytest.mark.parametrize("hardware", ["rtx3080", "rtx4090", "desktop-ddr4-rtx4060"])
def test_slots_that_the_gpu_cannot_hold_are_refused(capsys, mixtral_file, hardware):
    """Up to the last slot that fits, 32 layers' dense weights and the reserve beside it."""
    path = ROOT / "hardware" / f"{hardware}.yaml"
    shape, machine = load_shape("mixtral-8x7b"), load_machine(path)
    free_bytes = machine.gpu.memory_gb * 1e9 - shape.dense_bytes() - simulate.GPU_RESERVE_BYTES
    n_slots = int(free_bytes // shape.block_bytes("bf16"))
    flags = ("--model", "mixtral-8x7b", "--hardware", str(path), "--cache-nways", "1")
    out = printed(capsys, mixtral_file, *flags, "--cache-nblocks", str(min(n_slots, 32)))
    assert "tokens/s" in out
    out = printed(capsys, mixtral_file, *flags[:-1], "8", "--cache-nblocks", "32", code=2)
    assert f"at most {n_slots} slots beside mixtral-8x7b's dense weights" in out
    assert "found 256 of 90.2 GB; choose a smaller cache or a larger GPU" in out
    out = printed(capsys, mixtral_file, "--cache-nways", "8", "--cache-nblocks", "32")
    assert "256 slots" in out  # hits alone need no GPU


def test_a_sweep_marks_what_does_not_fit(capsys, tmp_path, mixtral_file):
    out = printed(
        capsys, mixtral_file, "--sweep", "--output-dir", str(tmp_path),
        "--model", "mixtral-8x7b", "--hardware", HARDWARE,
    )  # fmt: skip
    with (tmp_path / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    block_gb = load_shape("mixtral-8x7b").block_bytes("bf16") / 1e9
    for row in rows:
        assert row["fits"] == str(int(row["slots"]) * block_gb <= 25.8 - 1.5 - 3.21)
        assert (
            bool(row["tokens_per_s"]) == bool(row["bound_tokens_per_s"]) == (row["fits"] == "True")
        )
    assert {row["fits"] for row in rows} == {"True", "False"}
    assert out.count("does not fit") == sum(row["fits"] == "False" for row in rows)
    assert "with any cache at most 44.6 tokens/s" in out
    small = tmp_path / "small.yaml"
    small.write_text(re.sub(r"memory_gb: [\d.]+", "memory_gb: 3", Path(HARDWARE).read_text()))
    out = printed(
        capsys, mixtral_file, "--sweep", "--output-dir", str(tmp_path),
        "--model", "mixtral-8x7b", "--hardware", str(small), code=2,
    )  # fmt: skip
    assert "expected a GPU that holds 8 experts beside the dense weights" in out


def test_one_index_for_all_layers_falls_off_the_cliff():
    """Each token scans all layers in one order: README's trap."""
    passes = [
        RoutingPass("decode", (tuple(tuple(8 * layer + e for e in token) for token in tokens),))
        for one in even_workload(4, 8, 2).generate(200).passes
        for layer, tokens in enumerate(one.ids)
    ]
    rates = [
        replay(passes, ExpertCache(1, ways, make_policy("LRU"))).found_percent for ways in (6, 16)
    ]
    assert rates[0] == 0 and rates[1] > 30


def test_a_traces_own_words_reach_no_terminal_as_commands(capsys, tmp_path, trace):
    info = replace(trace.info, model="m\x1b[2J", notes=("n\x1b]0;title\x07",))
    write_trace(tmp_path / "t.jsonl", info, trace.passes)
    out = printed(capsys, str(tmp_path / "t.jsonl"), "--cache-nblocks", "1", "--cache-nways", "2")
    assert "routing: m" in out and "note: n" in out
    assert "\x1b" not in out and "\x07" not in out


def test_absurd_sizes_are_cut_to_the_model(capsys, trace_file):
    much = "9" * 19
    size = ("--cache-nblocks", much, "--cache-nways", much)
    out = printed(capsys, trace_file, *size, "--cache-quota", much)
    assert "cache: 4 indexes x 8 ways" in out


def test_another_models_trace_is_refused(capsys, tmp_path):
    wide = even_workload(2, 128, 6).generate(3)
    write_trace(tmp_path / "wide.jsonl", wide.info, wide.passes)
    out = printed(
        capsys, str(tmp_path / "wide.jsonl"), "--model", "mixtral-8x7b", "--cache-nblocks", "2",
        "--cache-nways", "4", code=2,
    )  # fmt: skip
    assert "expected a trace of mixtral-8x7b, which has 32 MoE layers, top-2 of 8 experts" in out


def test_a_trace_of_fewer_layers_is_refused(capsys, trace_file):
    out = printed(
        capsys, trace_file, "--model", "mixtral-8x7b", "--hardware", HARDWARE,
        "--cache-nblocks", "2", "--cache-nways", "4", code=2,
    )  # fmt: skip
    assert "with 4, top-2 of 8; correct --model or the trace" in out


def test_a_trace_that_keeps_fewer_choices_says_so(capsys, tmp_path):
    cut = even_workload(16, 64, 6).generate(3)
    write_trace(tmp_path / "cut.jsonl", cut.info, cut.passes)
    out = printed(
        capsys, str(tmp_path / "cut.jsonl"), "--model", "olmoe-1b-7b", "--cache-nblocks", "2",
        "--cache-nways", "8",
    )  # fmt: skip
    assert "note: the trace holds 6 of each token's 8 experts in olmoe-1b-7b" in out


def test_fewer_ways_than_top_k_is_warned_of(capsys, trace_file):
    assert "warning: 1 ways" in printed(
        capsys, trace_file, "--cache-nblocks", "2", "--cache-nways", "1"
    )


def test_a_cache_larger_than_the_model_is_cut_and_said_so(capsys, trace_file):
    large = printed(capsys, trace_file, "--cache-nblocks", "9", "--cache-nways", "30")
    assert (
        "note: cache 9 x 30 cut to 4 x 8: the trace has 4 MoE layers of 8 experts" in large
        and "cache: 4 indexes x 8 ways" in large
    )
    fitting = printed(capsys, trace_file, "--cache-nblocks", "4", "--cache-nways", "8")
    assert "cut to" not in fitting
    assert large.split("\n")[-6:] == fitting.split("\n")[-6:]


def test_sweep_writes_a_table_and_a_figure(capsys, tmp_path, trace, trace_file):
    folder = tmp_path / "new" / "folder"
    printed(capsys, trace_file, "--sweep", "--output-dir", str(folder))
    with (folder / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(grid(trace)) == 3 * 4 * 5
    for row in rows:
        assert row["synthetic"] == "True"
        assert float(row["hit_expert"]) <= float(row["bound_bypass"]) + 1e-9
        if row["policy"] != "RANDOM":
            n, m = int(row["n_indexes"]), int(row["n_ways"])
            setting = CacheOptions(n, m, policy=row["policy"])
            (again,) = sweep(trace, [setting])
            assert float(row["hit_expert"]) == pytest.approx(again.hit_expert, abs=1e-3)
        assert row["tokens_per_s"] == row["bound_tokens_per_s"] == row["fits"] == ""
    assert is_drawn(folder / "sweep.png")
    assert (folder / "sweep.pdf").read_bytes().startswith(b"%PDF")
    assert "N = 4" in (folder / "sweep.svg").read_text()  # as text


def test_tune_keeps_to_the_format_that_is_asked_for(capsys):
    out = printed(
        capsys, "--model", "olmoe-1b-7b", "--tune", "--hardware", HARDWARE, "--memory-gb", "1",
        "--expert-dtype", "int8",
    )  # fmt: skip
    assert "experts in int8" in out
    assert not re.search("^(bf16|int4)", out, flags=re.M)


def test_tune_prints_a_front_and_the_flags_to_use(capsys):
    out = printed(
        capsys, "--model", "olmoe-1b-7b", "--tune", "--hardware", HARDWARE, "--memory-gb", "2",
    )  # fmt: skip
    assert re.search(r"fastest: --cache-nblocks \d+ --cache-nways \d+ --cache-replace-policy", out)
    assert len(re.findall(r"  \*$", out, flags=re.M)) >= 2
    assert "only bf16 gives" in out.lower()


def test_where_results_go_is_checked_first(capsys, tmp_path, trace_file, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    for name in ("sweep", "tune"):
        monkeypatch.setattr(simulate, name, None)  # not reached
    below = str(tmp_path / "file" / "below")
    out = printed(capsys, trace_file, "--sweep", "--output-dir", below, code=2)
    assert f"cannot write results to {below} (Not a directory): choose another --output-dir" in out
    model = ("--model", "olmoe-1b-7b")
    out = printed(capsys, "--calibrate", str(tmp_path), *model, code=2)
    assert f"a file to write, found the folder {tmp_path}" in out
    hardware = ("--hardware", str(tmp_path / "none.yaml"))
    out = printed(capsys, *model, *hardware, "--tune", code=2)
    assert "none.yaml, found none that can be read (No such file or directory)" in out
    small = tmp_path / "small.yaml"
    small.write_text(re.sub(r"memory_gb: [\d.]+", "memory_gb: 1", Path(HARDWARE).read_text()))
    out = printed(capsys, *model, "--hardware", str(small), "--tune", code=2)
    assert "GPU memory for olmoe-1b-7b's dense weights, found 1 GB" in out


def test_gpu_memory_that_ends_in_a_calibration_is_a_sentence(capsys, tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("moe_offload.commands.measure.load_engine", full)
    path = tmp_path / "machine.yaml"
    out = printed(capsys, "--calibrate", str(path), "--model", "olmoe-1b-7b", code=2)
    assert out.splitlines()[-1] == "error: CUDA out of memory"
    assert not path.exists()


def test_calibrate_writes_a_file_that_simulates(capsys, tmp_path):
    path = tmp_path / "here" / "machine.yaml"
    out = printed(capsys, "--calibrate", str(path), "--model", "olmoe-1b-7b")
    assert re.search(r"cores read [\d.]+ GB/s of experts", out)
    machine = load_machine(path)
    assert machine.cpu.gbps > 0 and machine.step_us > 0
    assert machine.cost_model(load_shape("olmoe-1b-7b"), "bf16").dense_us_per_layer > 0
    out = printed(
        capsys, "--model", "olmoe-1b-7b", "--hardware", str(path), "--cache-nblocks", "16",
        "--cache-nways", "8",
    )  # fmt: skip
    assert "tokens/s" in out and "J a token" not in out  # powers are not measured


def test_the_papers_figures():
    cells = list(paper_cells(load_machine(Path(HARDWARE))))
    speeds = [cell for cell in cells if cell.unit == "tok/s"]
    assert len(speeds) == 8 and sum(cell.fitted for cell in speeds) == 2
    for cell in speeds:
        limit = 10 if "prefetch" in cell.what else 15
        assert abs(cell.error_percent) < limit, cell
    for cell in cells:
        assert abs(cell.error_percent) < 15, cell


def test_the_papers_table_is_printed(capsys):
    out = printed(capsys, "--paper", "--hardware", HARDWARE)
    assert "SYNTHETIC" in out and out.count("fitted to it") == 4


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "expected a TRACE, or --model"),
        (["nowhere.csv"], "expected a routing trace"),
        (["--bogus"], "unrecognized arguments: --bogus"),
        (["--paper"], "--paper needs --hardware"),
        (["--calibrate", "here.yaml"], "--calibrate needs --model"),
        (
            ["--model", "mixtral-8x7b"],
            "expected --cache-nblocks and --cache-nways, found none; give them, or --sweep, --tune",
        ),
        (
            ["TRACE", "--cache-nblocks", "2"],
            "both positive or both 0, found 2 and 0",
        ),
        (
            ["TRACE", "--cache-nblocks", "2", "--cache-nways", "0"],
            "both positive or both 0, found 2 and 0\n",
        ),
        (
            ["TRACE", "--cache-nblocks", "2", "--cache-nways", "2", "--cache-quota", "-3"],
            "expected --cache-quota of at least 0, found -3\n",
        ),
        (["TRACE", "--hardware", ""], "--hardware: expected a path, found an empty text"),
        (["--model", "mixtral-8x7b", "--tune"], "--tune needs --hardware"),
        (["--model", "m"], "expected one of the shapes"),
        (["TRACE", "--expert-dtype", "int4"], "--expert-dtype needs --model"),
        (
            ["--model", "olmoe-1b-7b", "--cache-nblocks", "-1", "--cache-nways", "2"],
            "expected --cache-nblocks of at least 0, found -1\n",
        ),
        (
            ["--model", "olmoe-1b-7b", "--cache-nblocks", "2", "--cache-nways", "8",
             "--cache-replace-policy", "MRU"],
            "invalid choice: 'MRU'",
        ),
        (
            ["--model", "mixtral-8x7b", "--tune", "--hardware",
             str(ROOT / "hardware" / "rtx3080.yaml"), "--memory-gb", "-1"],
            "--memory-gb of at least 0, found -1",
        ),
        (["--model", "mixtral-8x7b", "--tune", "--hardware", HARDWARE, "--memory-gb", "nan"],
         "--memory-gb of at least 0, found nan"),
        (["--model", "mixtral-8x7b", "--tune", "--hardware", HARDWARE, "--memory-gb", "90"],
         "--memory-gb of at most 21.09135744, found 90.0"),  # 25.8 GB less dense and reserve
        (["--paper", "--hardware", str(ROOT / "hardware" / "rtx4080.yaml")],
         "found 56 of 19.7 GB; choose a smaller cache or a larger GPU"),
        (["TRACE", "--cache-nways", "-3"], "--cache-nways of at least 0, found -3"),
        (["--paper", "--hardware", HARDWARE, "--cores", "9" * 30], "expected --cores of at most"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(capsys, trace_file, arguments, sentence):
    arguments = [trace_file if argument == "TRACE" else argument for argument in arguments]
    out = printed(capsys, *arguments, code=2)
    assert sentence in out and "Traceback" not in out


def page_commands() -> list[str]:
    """The simulator's commands on the page that reproduces the paper, in its order."""
    page = (ROOT / "docs" / "REPRODUCING_THE_PAPER.md").read_text().replace("\\\n", " ")
    lines = re.findall(r"^python3 src/((?:simulator|patterns)\.py .*)$", page, flags=re.M)
    return list(dict.fromkeys(lines))


def test_the_page_has_commands():
    assert len(page_commands()) >= 8 and sum("patterns.py" in line for line in page_commands()) == 1


@pytest.mark.parametrize("line", page_commands())
def test_the_page_runs_as_it_stands(capsys, tmp_path, monkeypatch, line):
    for name in ("hardware", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    script, *arguments = shlex.split(line, comments=True)
    assert {"simulator.py": simulate.main, "patterns.py": draw.patterns}[script](arguments) == 0
    assert capsys.readouterr().out


def test_a_reader_that_has_seen_enough_is_no_error():
    command = [sys.executable, "src/simulator.py", "--model", "mixtral-8x7b", "--cache-nblocks",
               "2", "--cache-nways", "2"]  # fmt: skip
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout is not None and running.stderr is not None
        running.stdout.close()  # before it prints
        assert running.stderr.read() == ""
    assert running.returncode == 0


def test_it_needs_no_tensors_and_starts_at_once():
    code = (
        "import sys, moe_offload.commands.simulate\n"
        "sys.exit(any(m in sys.modules for m in ('torch', 'matplotlib')))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "src", check=False)
    assert done.returncode == 0
