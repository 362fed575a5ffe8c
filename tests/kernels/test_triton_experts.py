"""The Triton kernels without a GPU: run in Triton's interpreter, compiled for several GPUs.

Both are programs of their own, because Triton decides at its first import whether it interprets.
Skipped where Triton is not installed; `experts/test_slots.py` runs the kernels on a GPU.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed: its kernels are not tested here")

import compiled_kernels
import interpreted_kernels
import torch
from expert_cases import Case, random_blocks

ROOT = Path(__file__).resolve().parents[2]


def run_program(module, cache: Path, *arguments: str, **variables: str) -> list[dict]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(ROOT / "src"), str(ROOT / "tests" / "helpers"))),
        "TRITON_CACHE_DIR": str(cache),
        "OMP_NUM_THREADS": "1",
        **variables,
    }
    done = subprocess.run(
        [sys.executable, module.__file__, *arguments],
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
    assert row["tile_error"] < 1e-5
    assert row["nan_tokens"] == [0] * (0 in row["hit_tokens"])


OLDEST, *BETWEEN, NEWEST = compiled_kernels.CAPABILITIES


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((OLDEST, NEWEST), id="oldest-newest"),
        pytest.param(tuple(BETWEEN), id="between", marks=pytest.mark.nightly),
    ],
)
def compiled(request, tmp_path_factory) -> list[dict]:
    rows = run_program(
        compiled_kernels, tmp_path_factory.mktemp("triton"), *map(str, request.param),
        TRITON_INTERPRET="0",
    )  # fmt: skip
    assert {row["capability"] for row in rows} == set(request.param)
    return rows


def test_kernels_compile_for_every_gpu_generation(compiled):
    assert all(row["cubin_bytes"] > 0 for row in compiled)


def test_a_programs_tiles_fit_every_gpus_shared_memory(compiled):
    for row in compiled:
        limit = compiled_kernels.SHARED_LIMIT_BYTES[row["capability"]]
        assert row["shared_bytes"] <= limit, row


def test_no_register_is_spilled(compiled):
    """The tiles of two formats keep eight bytes of a thread elsewhere."""
    assert [row for row in compiled if row["stack_bytes"] > 8 * ("tiles" in row["kernel"])] == []


def test_weights_are_loaded_sixteen_bytes_at_a_time(compiled):
    """What keeps the kernels at memory speed: pointer arithmetic the compiler can vectorise."""
    narrow = [row["kernel"] for row in compiled if row["widest_load_bytes"] < 16]
    assert [name for name in narrow if "tiles" not in name] == []


def test_no_sum_depends_on_which_program_comes_first(compiled):
    """A prompt gives the same bits each time."""
    assert [row["kernel"] for row in compiled if row["is_atomic"]] == []


def test_tiles_use_the_tensor_cores(compiled):
    rows = [row for row in compiled if "tiles" in row["kernel"] and row["capability"] >= 80]
    assert rows and all(row["uses_tensor_cores"] for row in rows)


class Launches:
    """Stands for a kernel: notes what Triton would compile for each launch, and runs nothing."""

    def __init__(self, kernel, variants: set) -> None:
        self.kernel, self.variants = kernel, variants

    def __getitem__(self, grid):
        def launch(*values, **constants) -> None:
            assert constants.pop("enable_fp_fusion", self.kernel.fn.__name__ == "take_slots_kernel")
            constants.pop("num_warps", None)
            named = dict(zip(self.kernel.arg_names, values, strict=False)) | constants
            varying = {p.name for p in self.kernel.params if p.do_not_specialize}
            constant = {p.name for p in self.kernel.params if p.is_constexpr}
            assert set(named) == set(self.kernel.arg_names)
            key = [
                (name, value if name in constant else specialised(value, name in varying))
                for name, value in sorted(named.items())
            ]
            self.variants.add((self.kernel.fn.__name__, *key))

        return launch


def specialised(value: object, only_its_type: bool) -> object:
    """Triton's rule: a pointer's type and alignment; an integer's width, and being 1 or 16n."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, int):
        width = 32 if -(2**31) <= value < 2**31 else 64
        return (width,) if only_its_type else (width, value == 1, value % 16 == 0)
    return type(value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("weight_format", ["bf16", "int8", "int4", "mxfp4", "fp8"])
@pytest.mark.parametrize("kind", ["silu", "module"])
def test_nothing_is_compiled_after_the_warm_up(monkeypatch, kind, weight_format, dtype):
    from moe_offload.kernels import triton_experts, triton_tiles

    variants: set = set()
    for module, names in (
        (triton_experts, ("first_kernel", "second_kernel", "unpack_kernel", "unpack_fp8_kernel")),
        (triton_experts, ("take_slots_kernel",)),
        (triton_tiles, ("first_tiles_kernel", "second_tiles_kernel", "add_pairs_kernel")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, Launches(getattr(module, name), variants))
    case = Case(weight_format, 64, 48, kind, has_bias=True, n_experts=40)
    blocks = random_blocks(case.layout(), case.n_experts)
    triton = triton_experts.TritonExperts(
        case.layout(), case.activation(), blocks, case.act_module()
    )
    tiles = triton_tiles.TiledExperts(triton)
    triton.warm_up(dtype)
    tiles.warm_up(dtype)
    compiled, n_launches = set(variants), 0
    assert compiled
    for n_tokens, top_k in ((1, 1), (1, 2), (1, 4), (1, 8), (2, 8), (3, 6), (8, 8), (32, 16)):
        for base in (-1, 0, 15, 39):
            slots = [base] * (n_tokens * top_k)
            hidden = torch.randn(n_tokens, 64, dtype=dtype)
            weights = torch.rand(n_tokens, top_k)
            triton.grouped(hidden, slots, weights.to(dtype))
            triton.grouped_by(hidden, torch.tensor(slots, dtype=torch.int32), weights)
            n_launches += 1
    for slot, n_tokens in ((0, 1), (1, 16), (39, 500)):
        triton.expert(slot, torch.randn(n_tokens, 64, dtype=dtype))
    for groups in ([(0, 0, 70)], [(7, 16, 1)], [(1, 3, 5), (39, 8, 500)]):
        n_tokens, pairs = 260, torch.arange(520) % 520
        hidden = torch.randn(n_tokens, 64, dtype=dtype)
        weights, out = torch.rand(n_tokens, 2), torch.zeros(n_tokens, 64)
        tiles.add(hidden, groups, pairs, weights, out)
    assert variants == compiled
    assert n_launches > len(compiled)


def test_what_pairs_give_before_it_is_added_up_takes_bounded_memory(monkeypatch):
    from moe_offload.kernels import triton_experts, triton_tiles

    n_rows: list[int] = []

    class Noting(Launches):
        def __getitem__(self, grid):
            def launch(*values, **_) -> None:
                named = dict(zip(self.kernel.arg_names, values, strict=False))
                if "each" in named:
                    n_rows.append(len(named["each"]))

            return launch

    for name in ("first_tiles_kernel", "second_tiles_kernel", "add_pairs_kernel"):
        monkeypatch.setattr(triton_tiles, name, Noting(getattr(triton_tiles, name), set()))
    monkeypatch.setattr(triton_tiles, "_PAIRS_BYTES", 4 * 64 * 100)
    case = Case("bf16", 64, 48, n_experts=5)
    blocks = random_blocks(case.layout(), case.n_experts)
    tiles = triton_tiles.TiledExperts(
        triton_experts.TritonExperts(case.layout(), case.activation(), blocks)
    )
    starts = (0, 60, 100, 110, 260)  # the fourth alone is more than fits
    groups = [
        (slot, first, end - first)
        for slot, (first, end) in enumerate(itertools.pairwise((*starts, 270)))
    ]
    hidden, weights = torch.randn(135, 64), torch.rand(135, 2)
    tiles.add(hidden, groups, torch.arange(270), weights, torch.zeros(135, 64))
    assert n_rows == [100, 10, 150, 10]


def test_in_decode_the_slots_are_not_sent():
    from moe_offload.kernels import triton_experts

    case = Case("bf16", 32, 16, n_experts=300)
    triton = triton_experts.TritonExperts(
        case.layout(), case.activation(), torch.zeros(300, case.layout().block_bytes).byte()
    )
    slots = [299, -1, 0, 7, 4, 5, 16, -1]
    in_words, (memory, *words) = triton._slot_arguments(slots)
    assert in_words and memory is triton._no_slots
    found = [(words[p // 4] >> 15 * (p % 4) & 32767) - 1 for p in range(8)]
    assert found == slots
    in_words, (memory, *_) = triton._slot_arguments(range(32))
    assert not in_words and memory.tolist() == list(range(32))
