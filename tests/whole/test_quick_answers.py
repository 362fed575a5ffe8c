"""What needs no model is answered without torch and transformers, which take seconds to import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moe_offload.checkpoint.folders import FORMAT_VERSION

ROOT = Path(__file__).resolve().parents[2]
RUN = ("--prompt", "x", "--max-tokens", "4")
DUMMY = ("--dummy-weights", "mixtral-8x7b", *RUN)
FILES = ["bare", "file", "later"]  # of the folder that all commands are started in
# A program and its arguments, the exit code, and a part of what is said.
COMMANDS: list[tuple[Any, int, str]] = [
    ("main.py --help", 0, "usage: main.py"),
    ("main.py --version", 0, "CPU kernels: "),
    ("main.py --no-such-flag", 2, "unrecognized arguments"),
    ("main.py", 2, "missing: --model-path DIR, --prompt TEXT or --prompt-path FILE, --max-"),
    ("main.py --prompt x", 2, "missing: --model-path DIR, --max-tokens N; --help has"),
    (("main.py", "--model-path", "none", *RUN), 2, "found nothing"),
    (("main.py", "--model-path", ".", *RUN), 2, "nor a model to prepare"),
    (("main.py", "--model-path", "later", *RUN), 2, "format version 999"),
    (("main.py", "--model-path", "bare", *RUN), 2, "bare holds no tokenizer"),
    (("main.py", *DUMMY, "--cpu-isa", "mmx"), 2, "found 'mmx'"),
    (("main.py", *DUMMY, "--cpu-affinity", "9999"), 2, "found 9999"),
    (("main.py", *DUMMY, "--attention", "xformers", "--device", "cpu"), 2, "--attention sdpa"),
    (("main.py", *DUMMY, "--dummy-layers", "33"), 2, "from 1 to 32"),
    (("main.py", *DUMMY, "--routing-trace", "none"), 2, "expected a routing trace at none"),
    (("main.py", *DUMMY, "--cache-nways", "4"), 2, "both positive or both 0"),
    (("main.py", *DUMMY, "--output-dir", "file/below"), 2, "cannot write results"),
    (("main.py", *DUMMY[:2], "--prompt-path", "none", *RUN[2:]), 2, "cannot read the prompt"),
    ("main.py --show-calibration --dummy-weights gpt-9", 2, "found 'gpt-9'"),
    ("prepare.py --help", 0, "usage: weights_preprocessor.py"),
    ("prepare.py --version", 0, "weights_preprocessor.py "),
    ("prepare.py --input-path none --output-path out", 2, "found nothing"),
    ("prepare.py --input-path . --output-path out --hf", 2, "it has no config.json"),
    (
        "prepare.py --input-path . --output-path out --expert-dtype int8 --calibration-text x",
        2,
        "--calibration-text rounds int4",
    ),
    (
        "prepare.py --input-path . --output-path out --expert-dtype int4 --calibration-text x",
        2,
        "cannot read x",
    ),
    ("simulator.py --help", 0, "usage: simulator.py"),
    ("simulator.py none", 2, "expected a routing trace at none"),
    ("check.py --help", 0, "usage: check.py"),
    ("check.py --model-path none", 2, "found nothing"),
    ("check.py --model-path none --max-tokens 1001", 2, "--max-tokens of at most 1000, found"),
    ("serve.py --help", 0, "usage: serve.py"),
    ("check.py --model-path bare", 2, "bare holds no tokenizer"),
    ("serve.py --model-path none", 2, "found nothing"),
    ("serve.py --model-path bare", 2, "bare holds no tokenizer"),
    ("plots.py --help", 0, "usage: plots.py"),
    ("patterns.py --help", 0, "usage: patterns.py"),
]
# All commands one after the other, each as Python would run its file.
PROGRAM = """
import contextlib, io, json, os, runpy, sys
answers = []
for program, *arguments in json.load(sys.stdin):
    sys.argv = [program, *arguments]
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            runpy.run_path(program, run_name="__main__")
        except SystemExit as end:
            code = end.code
    slow = sorted({"torch", "transformers"} & sys.modules.keys())
    answers.append([code, said.getvalue(), slow, sorted(os.listdir())])
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("folder")
    (folder / "file").touch()
    for name, version in (("bare", FORMAT_VERSION), ("later", 999)):
        (folder / name).mkdir()
        (folder / name / "manifest.json").write_text(json.dumps({"format_version": version}))
    split = [one.split() if isinstance(one, str) else one for one, _, _ in COMMANDS]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps([(str(ROOT / "src" / one[0]), *one[1:]) for one in split]),
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},  # a file that Python runs has its own
        check=True,
    )
    return dict(zip(map(str, split), json.loads(done.stdout), strict=True))


@pytest.mark.parametrize(("command", "code", "expected"), COMMANDS)
def test_torch_is_not_imported(
    command: str | tuple[str, ...], code: int, expected: str, answers: dict[str, Any]
) -> None:
    key = command.split() if isinstance(command, str) else command
    found_code, said, slow, files = answers[str(key)]
    assert (found_code, slow, files) == (code, [], FILES)
    assert expected in said
