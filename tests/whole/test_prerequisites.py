"""A Python without the packages is told so in one sentence, by every entry point."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

from moe_offload.prerequisites import PACKAGES, ROOT, complaint, missing_packages

import pytest

ENTRY_POINTS = (
    "src/main.py",
    "weights_preprocessor.py",
    "src/check.py",
    "src/serve.py",
    "src/simulator.py",
    "src/plots.py",
    "src/patterns.py",
)


@pytest.mark.parametrize("program", ENTRY_POINTS)
def test_a_bare_python_is_answered_by_one_sentence(program: str) -> None:
    """`-S` hides the installed packages, as a Python outside of .venv would."""
    if program == "weights_preprocessor.py":
        program = "src/prepare.py"  # which it starts with the same Python
    done = subprocess.run(
        [sys.executable, "-S", str(ROOT / program), "--help"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: expected the packages of requirements.txt, found ")
    assert "torch, transformers" in line
    assert "activate" in line


def test_the_remedy_is_what_this_folder_needs(tmp_path: Path) -> None:
    assert "run `make setup`" in complaint(["torch"], tmp_path)
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.touch()
    assert f"start it with {python}" in complaint(["torch"], tmp_path)


def test_every_requirement_is_looked_for() -> None:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    required = {re.split(r"[\[<>=]", line)[0] for line in lines if line and line[0] != "#"}
    distributions = packages_distributions()
    found = {"protobuf" if name == "google.protobuf" else "" for name in PACKAGES}
    found |= {one for name in PACKAGES for one in distributions.get(name, [])}
    normal = {name.lower().replace("_", "-") for name in found}
    assert {name.lower() for name in required} <= normal
    assert missing_packages() == []
