"""The kernel that adds both sides' sums: in Triton's interpreter, and compiled for several GPUs.

Both are programs of their own, because Triton decides at its first import whether it interprets.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed: its kernels are not tested here")

import interpreted_combine

ROOT = Path(__file__).resolve().parents[2]


def run_program(program: list[str], cache: Path, interpret: str) -> str:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(ROOT / "src"), str(ROOT / "tests" / "helpers"))),
        "TRITON_CACHE_DIR": str(cache),
        "TRITON_INTERPRET": interpret,
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, *program],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_both_sums_are_added_and_rounded_once(tmp_path: Path) -> None:
    errors = json.loads(run_program([interpreted_combine.__file__], tmp_path, "1"))
    assert len(errors) == 32
    for case, units in errors.items():
        # The interpreter cuts bf16 off where a GPU rounds: less than one unit in the last place.
        assert units == 0 if "float32" in case else units < 1, case


COMPILE = """
import json
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from moe_offload.kernels.triton_combine import combine_kernel, present_kernel
loads = []
for dtype in ("bf16", "fp16", "fp32"):
    for capability in (75, 80, 90):
        types = {"on_device": "*fp32", "on_host": "*fp32", "out": "*" + dtype, "n": "i32"}
        for kernel, types, constants in (
            (combine_kernel, types, {"HAS_DEVICE": True, "BLOCK": 1024}),
            (present_kernel, {**types, "present": "*i32"}, {"BLOCK": 1024}),
        ):
            names = {**types, **dict.fromkeys(constants, "constexpr")}
            source = ASTSource(kernel, {n: names[n] for n in kernel.arg_names}, constants)
            binary = compile(source, target=GPUTarget("cuda", capability, 32))
            assert binary.asm["cubin"]
            loads.append(binary.asm["ptx"].count("ld.global.cv"))
print(json.dumps(loads))
"""


def test_it_compiles_and_reads_the_host_past_the_caches(tmp_path: Path) -> None:
    """A cache may still hold what lay there in the layer before."""
    loads = json.loads(run_program(["-c", COMPILE], tmp_path, "0"))
    assert len(loads) == 18 and all(loads)
