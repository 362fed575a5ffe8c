"""main.py as a user meets it: what a run prints and leaves, and one sentence for every mistake."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from against_transformers import prepared
from tiny_models import write_mixtral_with_tokenizer

from moe_offload.checkpoint.prepared import MANIFEST_NAME
from moe_offload.commands import check, generate
from moe_offload.commands.arguments import build_parser, parse_config
from moe_offload.commands.measure import calibration_options
from moe_offload.engine.engine import Engine
from moe_offload.model.generation import generate as generate_all
from moe_offload.simulation import shapes as shapes_module
from moe_offload.simulation.trace_files import read_trace

ROOT = Path(__file__).resolve().parents[2]
REPORTS = (
    *("out.csv", "cache.csv", "expert_choices.csv", "token_gen_time.csv", "cpu_freq_avg.csv"),
    *("expert_counts.csv", "run.json"),
)


def by_name(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    source = write_mixtral_with_tokenizer(folder / "hub", max_position_embeddings=64)
    return prepared(source, folder / "prepared", "--hf")


def run(*arguments: object) -> int:
    return generate.main([str(argument) for argument in arguments])


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one sentence of a refused run: on stderr, exit code 2, nothing on stdout."""
    capsys.readouterr()
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "Traceback" not in err
    return lines[0]


def test_prints_the_reference_summary(
    model: Path, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--model-path", model, "--prompt", "Hello there", "--max-tokens", 6) == 0
    out = capsys.readouterr().out
    start = out.index("====================\nPERFORMANCE BREAKDOWN\n\nPROMPT EVALUATION:\n")
    summary = out[start:]
    positions = [
        summary.index(text)
        for text in (
            "token count: ",
            "total time in sec(s): ",
            "throughput: ",
            "TOKEN GENERATION:\n",
            "In-n-Outs\nAVG seqlen: ",
            "seqlens: [",
            "PROMPT:\nHello there\nRESPONSE:\n",
            "Cache hit 1: ",
            "\n Cache hit 2: ",
        )
    ]
    assert positions == sorted(positions)
    assert {path.name for path in run_folder.iterdir()} == set(REPORTS)


def test_an_answer_that_the_context_cut_short_is_told(
    model: Path, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = run_folder / "prompts.txt"
    prompts.write_text("Hello\nHello there\n")
    arguments = ("--model-path", model, "--prompt-path", prompts, "--max-tokens")
    assert run(*arguments, 100) == 0  # of a context of 64
    assert "2 of 2 answers end where the model's context is full" in capsys.readouterr().out
    assert run(*arguments, 4) == 0
    assert "context is full" not in capsys.readouterr().out


def test_batches_of_prompts_and_responses(model: Path, run_folder: Path) -> None:
    prompts = run_folder / "prompts.txt"
    prompts.write_text("One\n\nTwo words\n  Three words here \n", encoding="utf-8")
    for batch_size in (1, 2):
        path = run_folder / f"responses-{batch_size}.jsonl"
        code = run(
            *("--model-path", model, "--prompt-path", prompts, "--n-prompts", 5),
            *("--max-tokens", 4, "--batch-size", batch_size, "--hide-resp"),
            *("--responses-jsonl", path, "--output-dir", run_folder / f"run-{batch_size}"),
        )
        assert code == 0
        trace = read_trace(run_folder / f"run-{batch_size}" / "routing.jsonl")
        n_prompt_passes = sum(one.phase == "prefill" for one in trace.passes)
        assert n_prompt_passes == (5 if batch_size == 1 else 3)
    single, batched = (
        sorted(map(json.loads, path.read_text().splitlines()), key=lambda line: line["index"])
        for path in sorted(run_folder.glob("responses-*.jsonl"))
    )
    assert [line["prompt"] for line in single] == [
        *("One", "Two words", "  Three words here ", "One", "Two words")
    ]
    assert all(line["generated_tokens"] == 4 for line in single + batched)
    assert [line["prompt"] for line in batched] == [line["prompt"] for line in single]


def test_a_failure_leaves_what_was_done(
    model: Path, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails_on_the_second(*arguments: object, **options: object) -> object:
        for step in generate_all(*arguments, **options):  # type: ignore[arg-type]
            if step[0].prompt == 1:
                raise RuntimeError("injected")
            yield step

    monkeypatch.setattr("moe_offload.commands.conversations.generate", fails_on_the_second)
    (run_folder / "prompts").write_text("One\nTwo\n")
    with pytest.raises(RuntimeError, match="injected"):
        run("--model-path", model, "--prompt-path", "prompts", "--max-tokens", 3)
    document = json.loads((run_folder / "run.json").read_text())
    assert document["status"] == "failed"
    assert document["summary"]["generated_tokens"] == 2


def test_hidden_responses_stay_hidden(
    model: Path, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("--model-path", model, "--prompt", "Hello", "--max-tokens", 3, "--hide-resp")
    assert "RESPONSE" not in capsys.readouterr().out


def test_without_recording_only_the_summary_is_left(
    model: Path,
    run_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompts: list[int] = []
    monkeypatch.setattr(Engine, "calibrate_for", lambda _, n_tokens: prompts.append(n_tokens))
    run("--model-path", model, "--prompt", "Hi", "--raw-prompt", "--max-tokens", 3, "--no-record")
    assert len(prompts) == 1 and prompts[0] > 0  # a long one may be worth a calibration
    out = capsys.readouterr().out
    assert "TOKEN GENERATION:\ntoken count: 2\n" in out
    assert "Cache hit" not in out, "nothing counted the hits, and 0.0 would be a lie"
    assert "columns" not in out, "there is no file that could have them"
    assert not any(run_folder.iterdir())


def test_what_a_run_cannot_do_is_said_and_responses_may_go_beside_the_reports(
    model: Path, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--output-dir", "new", "--responses-jsonl", "new/r.jsonl", "--nvtx", "--device", "cpu")
    assert run("--model-path", model, "--prompt", "Hi", "--max-tokens", 2, *flags) == 0
    captured = capsys.readouterr()
    assert captured.err.count("--nvtx without a GPU") == 1
    assert "--nvtx without a GPU" not in captured.out, "what was said is not said again"
    assert (run_folder / "new" / "r.jsonl").exists()


def test_sampling_repeats_with_its_seed(model: Path, run_folder: Path) -> None:
    texts = []
    for number, seed in enumerate((1, 1, 2)):
        path = run_folder / f"r{number}.jsonl"
        run(
            *("--model-path", model, "--prompt", "Hello", "--max-tokens", 8, "--hide-resp"),
            *("--temperature", 2.0, "--top-p", 0.95, "--seed", seed, "--responses-jsonl", path),
        )
        texts.append(json.loads(path.read_text())["response"])
    assert texts[0] == texts[1] != texts[2]


def test_raw_prompt_has_no_template(model: Path, run_folder: Path) -> None:
    lengths = []
    for flags in ((), ("--raw-prompt",)):
        path = run_folder / f"r{len(flags)}.jsonl"
        run(
            *("--model-path", model, "--prompt", "Hello", "--max-tokens", 1, "--hide-resp"),
            *("--responses-jsonl", path, *flags),
        )
        lengths.append(json.loads(path.read_text())["prompt_tokens"])
    assert lengths[1] < lengths[0]


# What is wrong with a command, and with one that has a prompt and --max-tokens.
BAD_COMMANDS = [
    ("--prompt x", "missing: --max-tokens N; --help has examples"),
    ("--max-tokens 4", "missing: --prompt TEXT or --prompt-path FILE;"),
    ("--prompt x --prompt-path f --max-tokens 4", "found both"),
    ("--prompt '  ' --max-tokens 4", "the prompt is empty"),
    ("--prompt x --max-tokens -3", "--max-tokens of at least 1, found -3"),
    ("--prompt x --max-tokens many", "invalid int value: 'many'"),
    (f"--prompt '{'word ' * 80}' --max-tokens 4", "the model's context holds 64"),
    ("--prompt-path no-such-file --max-tokens 4", "No such file"),
]
BAD_FLAGS = [
    ("--top-p 0", "--top-p above 0, found 0"),
    ("--temperature -1", "--temperature of at"),
    ("--batch-size 0", "--batch-size of at least"),
    (f"--batch-size 1{'0' * 400}", "--batch-size of at most"),
    ("--n-prompts 0", "--n-prompts of at least 1"),
    ("--n-prompts 1000000000", "--n-prompts of at most 10000000, found 1000000000"),
    ("--cache-nblocks -1", "found -1"),
    ("--cache-nblocks 2", "both positive"),
    ("--cache-quota -1", "--cache-quota of at"),
    ("--no-such-flag", "unrecognized arguments"),
    ("--device cuda", "torch sees no GPU"),
    ("--attention xformers", "needs an NVIDIA GPU"),
    ("--cpu-isa 6502", "6502"),
    ("--cpu-affinity a-b", "such as 0-7,16"),
    ("--cpu-affinity 900-999,1022", "900-999,1022"),
    ("--prefetch next-layer", "expected a cache"),
    ("--miss-policy auto", "expected a cache"),
    ("--emulate-pcie-gbps 3", "expected a cache"),
    ("--top-p 0.5", "--temperature above 0"),
    ("--top-k 5", "above 0 for --top-k"),
    ("--min-p 2", "--min-p of at most 1, found 2.0"),
    ("--repetition-penalty 0", "above 0, found 0"),
    ("--stop ''", "--stop as a text that is not"),
    ("--system y --raw-prompt", "found both"),
    ("--resume", "--resume needs --responses-jsonl"),
    ("--shard 1/2", "--shard needs --prompt-path"),
    ("--ray local", "--ray needs --prompt-path and --responses-jsonl"),
    ("--dummy-layers 2", "needs --dummy-weights"),
    ("--cache-auto --trace none", "none"),
    ("--responses-jsonl .", "it is a folder"),
    ("--seed 18446744073709551616", "found 18446744073709551616"),
    ("--seed -9223372036854775809", "--seed of at least"),
    ("--temperature inf", "finite number, found inf"),
    ("--temperature nan", "finite number, found nan"),
    ("--cache-memory-gb -1", "above 0, found -1.0"),
    ("--cache-memory-gb 1", "expected --cache-auto"),
    ("--no-record --output-dir r", "found both"),
    ("--no-record --breakdown-csv r", "both"),
    ("--no-record --cachehit-csv r", "both"),
    ("--responses-jsonl no/r", "found no no: make"),
]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    BAD_COMMANDS + [(f"--prompt x --max-tokens 4 {flags}", what) for flags, what in BAD_FLAGS],
)
def test_bad_arguments(
    arguments: str,
    expected: str,
    model: Path,
    run_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if expected == "torch sees no GPU" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert expected in refused(capsys, "--model-path", model, *shlex.split(arguments))
    assert not any(run_folder.iterdir()), "a refused run leaves nothing"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "holds no prompt"),
        (b"\n \n\t\n", "holds no prompt"),
        (b"\xff\xfe\x00\x01\x80", "not a UTF-8 text file"),
        (b"text\0more", "binary file"),
    ],
)
def test_bad_prompt_files(
    content: bytes,
    expected: str,
    model: Path,
    run_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (run_folder / "prompts").write_bytes(content)
    arguments = ("--model-path", model, "--prompt-path", "prompts", "--max-tokens", 4)
    assert expected in refused(capsys, *arguments)


def test_huge_prompt_file(
    model: Path, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (run_folder / "prompts").open("wb") as file:
        file.truncate(65 << 20)  # sparse: takes no room
    arguments = ("--model-path", model, "--prompt-path", "prompts", "--max-tokens", 4)
    assert "split it" in refused(capsys, *arguments)


def test_a_check_ends_where_the_context_does(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check.main(["--model-path", str(model), "--max-tokens", "1000"]) == 0
    n_tokens = re.search(r"answers: .* of (\d+) tokens", capsys.readouterr().out)
    assert n_tokens is not None and 0 < int(n_tokens[1]) < 3 * 64


def test_missing_and_unprepared_folders(
    model: Path, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--prompt", "x", "--max-tokens", 4)
    assert "found nothing" in refused(capsys, "--model-path", run_folder / "none", *arguments)
    unprepared = refused(capsys, "--model-path", model.parent / "hub", *arguments)
    assert "python3 weights_preprocessor.py --input-path" in unprepared
    assert "--hf" in unprepared
    (run_folder / "empty").mkdir()
    message = refused(capsys, "--model-path", run_folder / "empty", *arguments)
    assert "nor a model to prepare" in message and "weights_preprocessor" not in message
    assert "an empty text" in refused(capsys, "--model-path", "", *arguments)


def _damaged(model: Path, folder: Path) -> Path:
    return Path(shutil.copytree(model, folder / "damaged"))


def test_damaged_folders(model: Path, run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--prompt", "x", "--max-tokens", 4)

    folder = _damaged(model, run_folder / "a")
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    manifest["format_version"] = 99
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    assert "format version 99" in refused(capsys, "--model-path", folder, *arguments)

    folder = _damaged(model, run_folder / "b")
    with (folder / "experts-00001.safetensors").open("r+b") as file:
        file.truncate(5000)
    message = refused(capsys, "--model-path", folder, *arguments)
    assert "experts-00001.safetensors" in message
    assert "truncated" in message

    folder = _damaged(model, run_folder / "c")
    with (folder / "experts-00000.safetensors").open("r+b") as file:
        file.seek(-4096, os.SEEK_END)
        file.write(b"\x55")
    message = refused(capsys, "--model-path", folder, *arguments)
    assert "experts-00000.safetensors" in message
    assert "checksum" in message

    folder = _damaged(model, run_folder / "d")
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    manifest["dense"][0]["tensors"].pop()
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    message = refused(capsys, "--model-path", folder, *arguments)
    assert f"{folder / MANIFEST_NAME} is damaged" in message

    folder = _damaged(model, run_folder / "e")
    (folder / "tokenizer.model").unlink()
    message = refused(capsys, "--model-path", folder, *arguments)
    assert "copy the model's tokenizer files there" in message
    assert len(message) < len(str(folder)) + 220, "a library's essay is cut short"


def test_unwritable_output(
    model: Path, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_folder / "file").write_text("in the way")
    arguments = ("--model-path", model, "--prompt", "x", "--max-tokens", 4)
    for flag, path in (
        ("--output-dir", "file/below"),
        ("--output-dir", "file"),
        ("--breakdown-csv", "file/out.csv"),
        ("--cachehit-csv", "file/cache.csv"),
        ("--responses-jsonl", "file/below.jsonl"),
    ):
        message = refused(capsys, *arguments, flag, path)
        assert "cannot write results" in message
        assert f"choose another {flag}" in message
        assert ("--no-record" in message) == (flag != "--responses-jsonl")


def test_every_result_has_a_file_of_its_own(
    model: Path, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Found out before the run: after it, a result would be lost, or the prompts."""
    (run_folder / "folder").mkdir()
    (run_folder / "prompts").write_text("Hello\n")
    (run_folder / "link").symlink_to("prompts")
    os.link(run_folder / "prompts", run_folder / "hard")
    (run_folder / "experts").symlink_to(model / "experts-00000.safetensors")
    before = sorted(run_folder.iterdir())
    arguments = ("--model-path", model, "--prompt-path", "prompts", "--max-tokens", 4)
    for flags, expected in (
        (("--breakdown-csv", "folder"), "it is a folder; name a file with --breakdown-csv"),
        (("--cachehit-csv", "folder"), "it is a folder; name a file with --cachehit-csv"),
        (("--responses-jsonl", "folder"), "it is a folder; name a file with --responses-jsonl"),
        (("--breakdown-csv", "/dev/full"), "it is a device or pipe, not a file"),
        (("--breakdown-csv", "x", "--cachehit-csv", "./x"), "another file with --cachehit-csv"),
        (("--cachehit-csv", "expert_choices.csv"), "another file with --cachehit-csv"),
        (("--responses-jsonl", "run.json"), "another file with --responses-jsonl"),
        (("--responses-jsonl", "link"), "the prompts are read from link"),
        (("--responses-jsonl", "hard"), "the prompts are read from hard, the same file as prompts"),
        (("--breakdown-csv", model / "manifest.json"), "the model is read from"),
        (("--responses-jsonl", model / "tokenizer.model"), "the model is read from"),
        (("--cachehit-csv", "experts"), "the model is read from experts, the same file as"),
        (("--breakdown-csv", "prompts"), "the prompts are read from prompts"),
    ):
        assert expected in refused(capsys, *arguments, *flags)
        assert sorted(run_folder.iterdir()) == before
    assert (run_folder / "prompts").read_text() == "Hello\n"


def test_dummy_weights_are_checked_before_loading(
    run_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe_offload.commands.run.load_engine", None)
    arguments = ("--dummy-weights", "mixtral-8x7b", "--max-tokens", 4)
    message = refused(capsys, *arguments, "--dummy-layers", 1, "--routing-trace", "none")
    assert "routing trace at none, found none that can be read (No such file" in message
    assert "from 1 to 32, for" in refused(capsys, *arguments, "--dummy-layers", 33)
    message = refused(capsys, *("--dummy-weights", "deepseek-v2-lite"), *arguments[2:],
                      "--dummy-layers", 1)  # fmt: skip
    assert "--dummy-layers from 2 to 27, for deepseek-v2-lite has experts from layer 2" in message


def test_memory_is_checked_before_loading(
    model: Path,
    run_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = ("--model-path", model, "--prompt", "x", "--max-tokens", 4)
    monkeypatch.setattr("moe_offload.engine.memory.available_bytes", lambda: 1 << 20)
    assert "--expert-dtype int8" in refused(capsys, *arguments)
    # Weights and workspace fit, the KV cache of 8192 sequences does not.
    monkeypatch.setattr("moe_offload.engine.memory.available_bytes", lambda: 560_000_000)
    message = refused(capsys, *arguments[:-1], 60, "--batch-size", 8192)
    assert "use a smaller --max-tokens or --batch-size (" in message
    fitting, asked = map(int, re.findall(r"\((\d+) of the (\d+) tokens of prompts", message)[0])
    assert 0 < fitting < asked <= 64 * 8192


@pytest.mark.parametrize("flags", [("--prompt", "x", "--max-tokens", 4), ("--show-calibration",)])
def test_gpu_memory_that_ends_is_a_sentence(
    model: Path,
    run_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flags: tuple[object, ...],
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB.")

    monkeypatch.setattr("moe_offload.commands.run.load_engine", full)
    monkeypatch.setattr("moe_offload.commands.measure.load_engine", full)
    message = refused(capsys, "--model-path", model, *flags)
    assert message == "error: CUDA out of memory. Tried to allocate 2 GiB."


def test_an_interruption_keeps_what_was_done(model: Path, run_folder: Path) -> None:
    """SIGTERM; a SIGHUP is that of a closed terminal, Ctrl-C comes to this process, below."""
    prompts = run_folder / "prompts.txt"
    prompts.write_text("\n".join(f"prompt {i}" for i in range(500)))
    process = subprocess.Popen(
        [
            *(sys.executable, ROOT / "src" / "main.py", "--model-path", model),
            *("--prompt-path", prompts, "--max-tokens", "20", "--hide-resp"),
            *("--responses-jsonl", "responses.jsonl"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=run_folder,
    )
    responses = run_folder / "responses.jsonl"
    deadline_s = time.monotonic() + 120
    while not (responses.exists() and responses.read_text().count("\n") >= 3):
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "Traceback" not in err
    lines = [json.loads(line) for line in responses.read_text().splitlines()]
    assert 3 <= len(lines) < 500
    assert all(line["stop"] != "interrupted" for line in lines[:-1])
    assert "PERFORMANCE BREAKDOWN" in out
    n_finished = sum(line["stop"] != "interrupted" for line in lines)
    (said,) = [line for line in err.splitlines() if line.startswith("interrupted")]
    assert said.startswith(f"interrupted (SIGTERM): {n_finished} of 500 prompts finished; ")
    for path in (*REPORTS, "responses.jsonl"):
        assert path in said
        assert (run_folder / path).exists()
    assert not list(run_folder.glob(".*")), "no temporary file is left"
    assert json.loads((run_folder / "run.json").read_text())["status"] == "interrupted"
    assert len(by_name(run_folder / "out.csv")) > 3


# A run as main.py does it, on the terminal that is its stdin: argument 1 says whether that is its
# controlling terminal, whose end is a SIGHUP. After its fourth token it waits while `stalled` is
# there.
ON_A_TERMINAL = """
import fcntl, os, pathlib, sys, termios, time
if sys.argv[1] == "controlling":
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from moe_offload.commands import conversations, generate
from moe_offload.model.generation import generate as generate_all
def stalling(*arguments, **options):
    for number, step in enumerate(generate_all(*arguments, **options), start=1):
        yield step
        if number == 4:
            stalled = pathlib.Path("stalled")
            stalled.touch()
            while stalled.exists():
                time.sleep(0.02)
conversations.generate = stalling
sys.exit(generate.main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    ("terminal", "code", "status", "n_tokens", "stop"),
    [("controlling", 129, "interrupted", 4, "interrupted"), ("other", 0, "completed", 9, "length")],
)
def test_a_closed_terminal_costs_no_evidence(
    model: Path, run_folder: Path, terminal: str, code: int, status: str, n_tokens: int, stop: str
) -> None:
    ours, its = os.openpty()
    process = subprocess.Popen(
        [
            *(sys.executable, "-c", ON_A_TERMINAL, terminal, "--model-path", model),
            *("--prompt", "x", "--max-tokens", "9", "--responses-jsonl", "responses.jsonl"),
        ],
        stdin=its,
        stdout=its,
        stderr=its,
        cwd=run_folder,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        start_new_session=True,
    )
    os.close(its)
    deadline_s = time.monotonic() + 120
    while not (run_folder / "stalled").exists():
        assert process.poll() is None, os.read(ours, 1 << 16)
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    os.close(ours)
    if terminal == "other":
        (run_folder / "stalled").unlink()
    assert process.wait(timeout=60) == code
    assert json.loads((run_folder / "run.json").read_text())["status"] == status
    (line,) = map(json.loads, (run_folder / "responses.jsonl").read_text().splitlines())
    assert (line["stop"], line["generated_tokens"]) == (stop, n_tokens)
    assert len(by_name(run_folder / "token_gen_time.csv")) == n_tokens - 1


@pytest.mark.parametrize("n_kills", [1, pytest.param(12, marks=pytest.mark.nightly)])
def test_a_killed_run_is_resumed(n_kills: int, model: Path, run_folder: Path) -> None:
    """SIGKILL, and half a line as a full disk leaves it: the end has each answer once."""
    chance = random.Random(14)
    prompts, answers = run_folder / "prompts.txt", run_folder / "answers.jsonl"
    prompts.write_text("\n".join(f"prompt {i}" for i in range(60 * n_kills)))
    arguments = ("--model-path", model, "--prompt-path", prompts, "--max-tokens", 12, "--no-record")
    flags = ("--hide-resp", "--resume", "--responses-jsonl")
    done = b""
    for _ in range(n_kills):
        process = subprocess.Popen(
            [sys.executable, ROOT / "src" / "main.py", *map(str, (*arguments, *flags, answers))],
            stderr=subprocess.PIPE,
            text=True,
            cwd=run_folder,
        )
        deadline_s = time.monotonic() + 120
        n_wanted = done.count(b"\n") + 3
        while not (answers.exists() and answers.read_bytes().count(b"\n") >= n_wanted):
            assert process.poll() is None, process.stderr and process.stderr.read()
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
        time.sleep(chance.random() / 10)
        process.kill()
        process.communicate(timeout=60)
        before, done = done, answers.read_bytes()
        done = done[: done.rindex(b"\n") + 1]
        assert done.startswith(before), "what was finished stays as it was"
        assert n_wanted <= done.count(b"\n") < 60 * n_kills
        with answers.open("ab") as file:
            file.write(b'{"index": 59, "prom')
    assert run(*arguments, *flags, answers) == 0
    assert answers.read_bytes().startswith(done), "what was finished stays as it was"
    assert run(*arguments, *flags, run_folder / "whole.jsonl", "--batch-size", 7) == 0
    found, whole = (
        sorted(
            (line["index"], line["prompt"], line["response"])
            for line in map(json.loads, path.read_text().splitlines())
        )
        for path in (answers, run_folder / "whole.jsonl")
    )
    assert [index for index, _, _ in found] == list(range(60 * n_kills))
    assert [one[:2] for one in found] == [one[:2] for one in whole]
    finished = answers.read_bytes()
    assert run(*arguments, *flags, answers) == 0
    assert answers.read_bytes() == finished, "there is nothing left to do"


def test_a_resumed_run_keeps_the_reports_of_the_first_part(model: Path, run_folder: Path) -> None:
    (run_folder / "p").write_text("One\nTwo\n")
    arguments = ("--model-path", model, "--prompt-path", "p", "--max-tokens", 4, "--hide-resp")
    arguments += ("--responses-jsonl", "a.jsonl")
    assert run(*arguments) == 0
    first = {path.name: path.read_bytes() for path in run_folder.glob("*.csv")}
    answers = run_folder / "a.jsonl"
    answers.write_text(answers.read_text().splitlines(keepends=True)[0])
    assert run(*arguments, "--resume") == 0
    assert {name: (run_folder / name).read_bytes() for name in first} == first
    assert len(list(run_folder.glob("*.partial.csv"))) == len(first) > 3


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_resumed_run_samples_as_a_whole_one(
    batch_size: int, model: Path, run_folder: Path
) -> None:
    (run_folder / "p").write_text("One\nOne\nTwo\nTwo\n")
    arguments = ("--model-path", model, "--prompt-path", "p", "--max-tokens", 6, "--no-record")
    arguments += ("--temperature", 1.5, "--batch-size", batch_size, "--hide-resp")
    assert run(*arguments, "--responses-jsonl", "whole.jsonl") == 0
    whole = (run_folder / "whole.jsonl").read_text().splitlines(keepends=True)
    by_index = {json.loads(line)["index"]: json.loads(line)["response"] for line in whole}
    assert len(set(by_index.values())) == 4, "one text, two samples"
    (run_folder / "half.jsonl").write_text("".join(whole[:2]))
    assert run(*arguments, "--responses-jsonl", "half.jsonl", "--resume") == 0
    resumed = map(json.loads, (run_folder / "half.jsonl").read_text().splitlines())
    assert {line["index"]: line["response"] for line in resumed} == by_index


def test_answers_are_never_truncated(
    model: Path, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--model-path", model, "--prompt", "Hi", "--max-tokens", 3, "--no-record")
    arguments += ("--responses-jsonl", "answers.jsonl")
    assert run(*arguments) == 0
    before = (run_folder / "answers.jsonl").read_bytes()
    assert "go on with them by --resume" in refused(capsys, *arguments)
    changed = [4 if one == 3 else one for one in arguments]
    message = refused(capsys, *changed, "--resume")
    assert "was answered with max_tokens 3, now it is 4" in message
    assert (run_folder / "answers.jsonl").read_bytes() == before
    assert "--resume needs --responses-jsonl" in refused(capsys, *arguments[:-2], "--resume")


def test_lines_that_cannot_be_answered_leave_the_others(
    model: Path, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_folder / "p.jsonl").write_text(
        '{"prompt": "One", "id": "first"}\n'
        '{"prompt": broken\n'
        f'{{"prompt": "{"word " * 80}"}}\n'
        '{"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}\n'
    )
    arguments = ("--model-path", model, "--prompt-path", "p.jsonl", "--max-tokens", 4)
    assert run(*arguments, "--responses-jsonl", "a.jsonl") == 2
    out, err = capsys.readouterr()
    assert "line 2 of p.jsonl is not JSON" in err
    assert "line 3 of p.jsonl has" in err and "the model's context holds 64" in err
    assert "error: 2 lines of p.jsonl could not be answered" in err
    assert "left out" not in out, "what was said is not said again"
    notes = json.loads((run_folder / "run.json").read_text())["notes"]
    assert [note.partition(" of ")[0] for note in notes if note.startswith("left out")] == [
        "left out: line 2",
        "left out: line 3",
    ]
    lines = list(map(json.loads, (run_folder / "a.jsonl").read_text().splitlines()))
    assert [(line["index"], line.get("id")) for line in lines] == [(0, "first"), (3, None)]
    assert [line["generated_tokens"] for line in lines] == [4, 2]
    assert lines[1]["messages"] == [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize("shard", [None, "1/2"])
def test_wrong_requests_have_their_lines_where_none_is_left(
    shard: str | None, model: Path, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def request(custom_id: str, n: int) -> str:
        body = {"messages": [{"role": "user", "content": "Hi"}], "n": n}
        return json.dumps({"custom_id": custom_id, "url": "/v1/chat/completions", "body": body})

    lines = [request("a", 2), request("b", 3)]
    flags: tuple[object, ...] = ()
    if shard is not None:  # the right one is the other shard's
        lines, flags = [request("a", 2), request("right", 1), request("b", 3)], ("--shard", shard)
    (run_folder / "p.jsonl").write_text("\n".join(lines))
    arguments = ("--model-path", model, "--prompt-path", "p.jsonl", "--max-tokens", 4, *flags)
    answers = run_folder / "a.jsonl"
    for resume in ((), ("--resume",)):
        message = refused(capsys, *arguments, "--responses-jsonl", answers, *resume)
        assert "no prompt of p.jsonl can be answered (left out, see above)" in message
        found = list(map(json.loads, answers.read_text().splitlines()))
        statuses = [(line["custom_id"], line["response"]["status_code"]) for line in found]
        assert statuses == [("a", 400), ("b", 400)], "each once"
        assert "n is served only as 1" in found[0]["response"]["body"]["error"]["message"]
    assert "no prompt of p" in refused(capsys, *arguments), "also without a file of answers"


def test_a_long_line_of_a_text_file_leaves_the_others(
    model: Path, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_folder / "p").write_text("One\n\n\n" + "word " * 80 + "\nTwo\n")
    flags = ("--max-tokens", 2, "--no-record", "--responses-jsonl", "a.jsonl")
    assert run("--model-path", model, "--prompt-path", "p", *flags) == 2
    assert "line 4 of p has" in capsys.readouterr().err
    lines = list(map(json.loads, (run_folder / "a.jsonl").read_text().splitlines()))
    assert [line["prompt"] for line in lines] == ["One", "Two"]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_quiet_prints_the_responses_alone(
    batch_size: int, model: Path, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_folder / "p").write_text("One\nTwo words\nThree\n")
    flags = ("--max-tokens", 3, "--no-record", "--quiet", "--batch-size", batch_size)
    arguments = ("--model-path", model, "--prompt-path", "p", *flags)
    assert run(*arguments, "--responses-jsonl", "a.jsonl") == 0
    out, err = capsys.readouterr()
    lines = sorted(
        map(json.loads, (run_folder / "a.jsonl").read_text().splitlines()),
        key=lambda line: line["index"],
    )
    assert out == "".join(line["response"] + "\n" for line in lines)
    assert "loading" not in err and "wrote" not in err


def test_a_stop_text_ends_the_answer_before_it(
    model: Path, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(*flags: object) -> tuple[str, dict[str, Any]]:
        path = run_folder / f"a{len(list(run_folder.iterdir()))}.jsonl"
        arguments = ("--model-path", model, "--prompt", "Hello", "--max-tokens", 12, "--quiet")
        assert run(*arguments, "--no-record", "--responses-jsonl", path, *flags) == 0
        return capsys.readouterr().out, json.loads(path.read_text())

    whole, line = answer()
    text = line["response"]
    assert (line["stop"], whole) == ("length", text + "\n")
    stop = text[len(text) // 2 : len(text) // 2 + 4]
    shown, line = answer("--stop", "never said", "--stop", stop)
    assert line["response"] == text[: text.index(stop)]
    assert (line["stop"], shown) == ("stop", line["response"] + "\n")
    assert line["generated_tokens"] < 12


def test_on_a_terminal_the_answer_stands_once(model: Path, run_folder: Path) -> None:
    ours, its = os.openpty()
    process = subprocess.Popen(
        [
            *(sys.executable, ROOT / "src" / "main.py", "--model-path", model, "--no-record"),
            *("--prompt", "Hello", "--max-tokens", "6", "--responses-jsonl", "a.jsonl"),
        ],
        stdin=subprocess.DEVNULL,
        stdout=its,
        stderr=subprocess.PIPE,
        cwd=run_folder,
    )
    os.close(its)
    seen = b""
    with contextlib.suppress(OSError):  # the end of a terminal
        while piece := os.read(ours, 1 << 16):
            seen += piece
    os.close(ours)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0
    response = json.loads((run_folder / "a.jsonl").read_text())["response"]
    out = seen.decode().replace("\r\n", "\n")
    assert out.count(response) == 1
    assert out.startswith(f"PROMPT:\nHello\nRESPONSE:\n{response}\n")
    assert "PERFORMANCE BREAKDOWN" in out
    assert err.decode().startswith("loading "), "something is said before the libraries load"


def test_an_interruption_before_the_first_token_is_said(
    model: Path,
    run_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def killed(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("moe_offload.commands.run.load_engine", killed)
    before = signal.getsignal(signal.SIGTERM)
    assert run("--model-path", model, "--prompt", "x", "--max-tokens", 4) == 143
    assert signal.getsignal(signal.SIGTERM) == before
    err = capsys.readouterr().err
    said = "interrupted (SIGTERM) before any token: no file was written"
    assert err.splitlines()[-1] == said
    assert not any(run_folder.iterdir())


def test_a_second_signal_does_not_tear_the_reports(
    model: Path,
    run_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Impatient fingers: further signals come while the results are written."""
    begun: list[bool] = []

    def interrupted_later(*arguments: object, **options: object) -> object:
        begun.append(True)
        for number, step in enumerate(generate_all(*arguments, **options)):  # type: ignore[arg-type]
            if number == 3:
                os.kill(os.getpid(), signal.SIGINT)
            yield step

    def impatient(descriptor: int) -> None:
        if begun:  # a calibration is kept on disk too, before the first token
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("moe_offload.commands.conversations.generate", interrupted_later)
    monkeypatch.setattr("os.fsync", impatient)
    flags = ("--max-tokens", 9, "--output-dir", "run")
    assert run("--model-path", model, "--prompt", "x", *flags) == 130
    assert "\ninterrupted (Ctrl-C): 0 of 1 prompts finished; " in capsys.readouterr().err
    names = {path.name for path in (run_folder / "run").iterdir()}
    assert names == {*REPORTS, "routing.jsonl"}
    assert len(by_name(run_folder / "run" / "token_gen_time.csv")) == 2


def test_an_answer_without_its_last_token_is_no_finished_one(
    model: Path, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Ctrl-C when the step has ended a prompt and its last text is not told yet."""

    def interrupted_at_the_end(*arguments: object, **options: object) -> object:
        for step in generate_all(*arguments, **options):  # type: ignore[arg-type]
            if step[0].stop == "length":
                raise KeyboardInterrupt
            yield step

    monkeypatch.setattr("moe_offload.commands.conversations.generate", interrupted_at_the_end)
    flags = ("--max-tokens", 4, "--responses-jsonl", "answers.jsonl")
    assert run("--model-path", model, "--prompt", "x", *flags) == 130
    (answer,) = map(json.loads, (run_folder / "answers.jsonl").read_text().splitlines())
    assert answer["stop"] == "interrupted"


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_signal_while_the_engine_closes_changes_nothing_that_is_said(
    model: Path,
    run_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    interrupted: bool,
) -> None:
    close = Engine.close

    def signalled_later(*arguments: object, **options: object) -> object:
        for number, step in enumerate(generate_all(*arguments, **options)):  # type: ignore[arg-type]
            if interrupted and number == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            yield step

    def signalled(engine: Engine) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        close(engine)

    monkeypatch.setattr("moe_offload.commands.conversations.generate", signalled_later)
    monkeypatch.setattr(Engine, "close", signalled)
    flags = ("--prompt", "x", "--max-tokens", 9)
    assert run("--model-path", model, *flags) == (143 if interrupted else 0)
    said = capsys.readouterr().err.splitlines()[-1]
    start = "interrupted (SIGTERM): 0 of 1 prompts finished; what was done is in "
    assert said.startswith(start if interrupted else "wrote ")
    status = json.loads((run_folder / "run.json").read_text())["status"]
    assert status == ("interrupted" if interrupted else "completed")


@pytest.mark.parametrize("streamed", [False, True])
def test_a_reader_that_goes_away_costs_no_evidence(
    model: Path, run_folder: Path, monkeypatch: pytest.MonkeyPatch, streamed: bool
) -> None:
    """As in `main.py ... | head -0`: text or summary has no reader, the files are written."""
    arguments = ("--model-path", model, "--prompt", "x", "--max-tokens", "30")
    arguments += ("--responses-jsonl", "responses.jsonl")
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "w") as nobody:
        if streamed:  # in a process of its own, which has nothing to say when it ends either
            done = subprocess.run(
                [sys.executable, ROOT / "src" / "main.py", *arguments],
                stdout=nobody,
                stderr=subprocess.PIPE,
                text=True,
                cwd=run_folder,
                check=False,
            )
            assert done.returncode == 2
            assert "Traceback" not in done.stderr
            assert "Exception ignored" not in done.stderr
        else:
            monkeypatch.setattr(sys, "stdout", nobody)
            assert run(*arguments, "--hide-resp") == 2
    assert {path.name for path in run_folder.iterdir()} == {*REPORTS, "responses.jsonl"}
    status = json.loads((run_folder / "run.json").read_text())["status"]
    assert status == ("interrupted" if streamed else "completed")
    (response,) = map(json.loads, (run_folder / "responses.jsonl").read_text().splitlines())
    assert response["stop"] == ("interrupted" if streamed else "length")
    passes = by_name(run_folder / "out.csv")
    assert len(passes) == response["generated_tokens"]
    assert (len(passes) < 30) == streamed


def test_the_machine_is_calibrated_without_a_model(
    run_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = calibration_options(
        parse_config(build_parser().parse_args(["--show-calibration"])).model
    )
    assert (shapes.dummy_shape, shapes.dummy_layers) == ("mixtral-8x7b", 2)
    real = shapes_module.known_shapes()
    small = {**real["deepseek-v2-lite"], "hidden_size": 128, "moe_intermediate_size": 64}
    small |= {"intermediate_size": 128, "vocab_size": 96}
    monkeypatch.setattr(shapes_module, "known_shapes", lambda: {"deepseek-v2-lite": small})
    assert run("--show-calibration", "--dummy-weights", "deepseek-v2-lite") == 0
    out = capsys.readouterr().out
    for text in ("CPU: ", "ISA: ", "GPU: ", "memory, plain read: ", "GB/s", "while measuring: "):
        assert text in out
    (measured,) = re.findall("measured on 1 MoE layer of deepseek-v2-lite.*", out)
    assert measured.count(" threads") == 1
    assert "accelerator and copies: not measured" in out
    assert "inf" not in out.replace("information", "")
    assert not any(run_folder.iterdir())
    flags = ("--cache-nblocks", 1, "--cache-nways", 2)
    assert run("--show-calibration", "--dummy-weights", "deepseek-v2-lite", *flags) == 0
    assert re.search(r"copies to the accelerator: [\d.]+ GB/s alone", capsys.readouterr().out)


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert "transformers" in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit_info:
        run("--help")
    assert exit_info.value.code == 0
    assert "--cache-nblocks" in capsys.readouterr().out
