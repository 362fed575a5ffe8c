"""The wheel, installed away from the checkout: commands, kernels, shapes and the Python door."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PIP = (sys.executable, "-m", "pip", "-q", "--disable-pip-version-check")


def run(command: list[str | Path], folder: Path, **variables: str) -> str:
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env=os.environ | variables, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the wheel was installed into, without what it depends on."""
    folder = tmp_path_factory.mktemp("installed")
    copy = folder / "checkout"
    shutil.copytree(ROOT / "src", copy / "src", ignore=shutil.ignore_patterns("__pycache__"))
    named = [ROOT / name for name in ("pyproject.toml", "README.md", "LICENSE")]
    for path in (*named, *ROOT.glob("requirements*.txt")):
        shutil.copy(path, copy)
    flags = ("--no-deps", "--no-build-isolation")
    run([*PIP, "wheel", *flags, "-w", str(folder), str(copy)], folder)
    (wheel,) = folder.glob("*.whl")
    run([*PIP, "install", "--no-deps", "--target", str(folder / "target"), str(wheel)], folder)
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in tops if not name.endswith(".dist-info")} == {"moe_offload"}
    return folder / "target"


def test_commands_answer(installed: Path, tmp_path: Path) -> None:
    for name in (
        "moe-run",
        "moe-prepare",
        "moe-check",
        "moe-serve",
        "moe-simulate",
        "moe-plots",
        "moe-patterns",
    ):
        command = [installed / "bin" / name, "--help"]
        assert "usage: " in run(command, tmp_path, PYTHONPATH=str(installed))


def test_a_run_builds_its_kernels_in_the_users_cache(installed: Path, tmp_path: Path) -> None:
    """Random weights of a small published shape: all that a real run needs but a checkpoint."""
    cache = tmp_path / "cache"
    text = run(
        [
            *(installed / "bin" / "moe-run", "--dummy-weights", "deepseek-v2-lite"),
            *("--dummy-layers", "2", "--max-tokens", "2", "--device", "cpu"),
        ],
        tmp_path,
        PYTHONPATH=str(installed),
        XDG_CACHE_HOME=str(cache),
    )
    assert "PERFORMANCE BREAKDOWN" in text
    assert list(cache.glob("moe-cpu-gpu-inference/cpu_experts-*.so"))
    assert not list(installed.rglob("*.so"))


def test_the_python_door(installed: Path, tmp_path: Path) -> None:
    code = (
        "from moe_offload import load_model, load_tokenizer\n"
        "print(load_model.__module__, load_tokenizer.__module__)\n"
    )
    out = run([sys.executable, "-c", code], tmp_path, PYTHONPATH=str(installed))
    assert out == "moe_offload.engine.loading moe_offload.model.tokenization\n"
