"""The Triton kernels without a GPU: run in Triton's interpreter, compiled for several GPUs.

Both are programs of their own, because Triton decides at its first import whether it interprets.
Skipped where Triton is not installed; `test_gpu_experts.py` runs the kernels on a GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed: its kernels are not tested here")

import compiled_kernels
import interpreted_kernels

TESTS = Path(__file__).resolve().parent


def run_program(module, cache: Path, **variables: str) -> list[dict]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(TESTS.parent / "src"), str(TESTS))),
        "TRITON_CACHE_DIR": str(cache),
        "OMP_NUM_THREADS": "1",
        **variables,
    }
    done = subprocess.run(
        [sys.executable, module.__file__],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory) -> dict[str, dict]:
    rows = run_program(interpreted_kernels, tmp_path_factory.mktemp("triton"), TRITON_INTERPRET="1")
    return {row["case"]: row for row in rows}


@pytest.mark.parametrize("case", interpreted_kernels.CASES, ids=lambda case: case.name)
def test_kernels_agree_with_torch_in_the_interpreter(interpreted, case):
    """fp32 sums over at most 260 products of order one, in another order: 1e-5 is 80 epsilon."""
    row = interpreted[case.name]
    assert row["error"] < 1e-5
    # The many-token path and the model's own gate work in x's dtype; all else is fp32.
    in_fp32 = case.n_tokens * case.top_k <= 4 * case.n_experts and case.kind != "module"
    assert row["bf16_error"] < (1e-5 if in_fp32 else 0.1)
    assert row["expert_error"] < 1e-5
    assert row["nan_tokens"] == [0] * (0 in row["hit_tokens"])


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> list[dict]:
    return run_program(compiled_kernels, tmp_path_factory.mktemp("triton"), TRITON_INTERPRET="0")


def test_kernels_compile_for_every_gpu_generation(compiled):
    assert {row["capability"] for row in compiled} == set(compiled_kernels.CAPABILITIES)
    assert all(row["cubin_bytes"] > 0 for row in compiled)


def test_weights_are_loaded_sixteen_bytes_at_a_time(compiled):
    """What keeps the kernels at memory speed: pointer arithmetic the compiler can vectorise."""
    narrow = [row for row in compiled if row["widest_load_bytes"] < 16]
    assert narrow == []
