"""What the documentation says exists: flags, scripts, make targets, files behind links."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from moe_offload.commands import simulate
from moe_offload.simulation.shapes import load_shape

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")

# The reference tool's documented uses; its users' scripts must keep working.
REFERENCE_COMMANDS = [
    "python3 weights_preprocessor.py --input-path $MODEL_PATH --output-path $MODEL_PATH --hf",
    'python3 src/main.py --model-path "/path/to/your/model" --prompt "Explain quantum computing" '
    "--max-tokens 256",
    'python3 src/main.py --model-path M --prompt "..." --cache-nblocks 14 --cache-nways 4 '
    "--cache-replace-policy LRU --max-tokens 512",
    'OMP_NUM_THREADS=24 python3 src/main.py --model-path M --prompt "..." --cache-nblocks 14 '
    "--cache-nways 4 --max-tokens 1024",
    "python3 src/main.py --model-path M --prompt-path prompts.txt --n-prompts 100 --max-tokens 256",
]


@cache
def help_of(script: str) -> str:
    """The script's own --help, through the interpreter, as a user gets it."""
    # as documented: what is no door of src/ is started with PYTHONPATH=src
    path = {"PYTHONPATH": "src"} if script.startswith("benchmarks/") else {}
    run = subprocess.run(
        [sys.executable, script, "--help"], cwd=ROOT, env=os.environ | path,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, f"{script} --help exits {run.returncode}: {run.stderr}"
    return run.stdout


def flags_of(script: str) -> set[str]:
    return set(FLAG.findall(help_of(script)))


def shell_lines(page: Path) -> list[str]:
    """The lines of a page's shell blocks, continuation lines joined, comments and output gone."""
    blocks = re.findall(r"^```(?:bash|sh)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    text = "\n".join(blocks).replace("\\\n", " ")
    return [line.strip() for line in text.splitlines() if line.strip() and line[0] != "#"]


def commands() -> list[tuple[str, str]]:
    return [(page.name, line) for page in PAGES for line in shell_lines(page)]


def script_and_flags(line: str) -> tuple[str, set[str]] | None:
    """(script, flags) of a line that runs one of our scripts, else None."""
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words.pop(0)
    if len(words) < 2 or not re.fullmatch(r"(\S*/)?python3?", words[0]):
        return None
    if not words[1].endswith(".py"):
        return None
    own = words[2 : words.index("--")] if "--" in words else words[2:]  # behind it: another's
    return words[1], {word.split("=")[0] for word in own if FLAG.match(word)}


def test_flag_table_is_the_parser() -> None:
    section = (ROOT / "README.md").read_text().split("## Flags")[1].split("\n## ")[0]
    cells = re.findall(r"^\| `(--[^`]*)` \|", section, re.MULTILINE)
    in_table = {flag for cell in cells for flag in FLAG.findall(cell)}
    in_parser = flags_of("src/main.py") - {"--help"}
    assert in_table == in_parser


@pytest.mark.parametrize("command", REFERENCE_COMMANDS)
def test_reference_command_is_documented_and_parses(command: str) -> None:
    assert command in (ROOT / "README.md").read_text()
    known = script_and_flags(command)
    assert known is not None
    script, flags = known
    assert flags <= flags_of(script)


@pytest.mark.parametrize(("page", "line"), commands())
def test_documented_command_exists(page: str, line: str) -> None:
    shlex.split(line, comments=True)
    known = script_and_flags(line)
    if known is not None:
        script, flags = known
        assert (ROOT / script).is_file(), f"{page}: {script} does not exist"
        assert flags <= flags_of(script), (
            f"{page}: {script} has no {sorted(flags - flags_of(script))}"
        )
    elif line.startswith("make"):
        targets = {w for w in shlex.split(line, comments=True)[1:] if "=" not in w and w[0] != "-"}
        makefile = (ROOT / "Makefile").read_text()
        defined = set(re.findall(r"^([a-z_-]+):", makefile, re.MULTILINE))
        assert targets <= defined, f"{page}: no make target {sorted(targets - defined)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page: Path) -> None:
    text = page.read_text()
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    broken = []
    for target in targets:
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        if not linked.exists() or (
            anchor and linked.suffix == ".md" and anchor not in anchors(linked)
        ):
            broken.append(target)
    assert not broken


def anchors(page: Path) -> set[str]:
    """GitHub's anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_named_in_text_exist(page: Path) -> None:
    named = set(
        re.findall(r"`((?:src|tests|benchmarks|docs|examples)/[\w./-]+\.\w+)`", page.read_text())
    )
    missing = sorted(name for name in named if not (ROOT / name).exists())
    assert not missing


def test_random_attacks_are_as_many_as_the_page_says() -> None:
    page = (ROOT / "docs" / "RELIABILITY.md").read_text()
    rows = re.findall(r"^\| (.+?) \| (.+?) \| (.*?) ?\| `(tests/\S+\.py)` \|$", page, re.MULTILINE)
    assert len(rows) >= 7
    for attack, count, seed, test in rows:
        code = (ROOT / test).read_text().replace("_", "")
        for number in re.findall(r"\d+", f"{count} {seed}".replace(",", "")):
            assert re.search(rf"\b{number}\b", code), f"{attack}: no {number} in {test}"


def test_prompts_file_is_one_prompt_per_line() -> None:
    lines = (ROOT / "prompts.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) >= 20
    assert all(line.strip() for line in lines)
    assert len(set(lines)) == len(lines)


PC_ROW = re.compile(
    r"\| \d+ GB DDR\S+ \| [^|]+ \| (\S+) \| (\S+) \| (\w+), (\S+) GB \| (\S+) \|", re.MULTILINE
)


@pytest.mark.parametrize(
    ("hardware", "model", "expert_dtype", "size_gb", "speed"),
    PC_ROW.findall((ROOT / "README.md").read_text()),
)
def test_what_runs_on_a_pc_is_what_the_simulator_says(
    hardware: str,
    model: str,
    expert_dtype: str,
    size_gb: str,
    speed: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shape = load_shape(model)
    n_bytes = shape.n_layers * shape.n_experts * shape.block_bytes(expert_dtype)
    assert f"{n_bytes / 1e9:.1f}" == size_gb
    command = ["--model", model, "--expert-dtype", expert_dtype, "--tune"]
    assert simulate.main([*command, "--hardware", f"{ROOT}/hardware/{hardware}.yaml"]) == 0
    rows = re.findall(rf"^{expert_dtype} .* (\d+\.\d+)(?:  \*)?$", capsys.readouterr().out, re.M)
    assert f"{max(map(float, rows)):.1f}" == speed


def test_the_page_has_rows_for_pcs() -> None:
    assert len(PC_ROW.findall((ROOT / "README.md").read_text())) >= 5
