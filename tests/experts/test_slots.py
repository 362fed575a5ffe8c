"""The accelerator's side of a layer: slot memory, launches, order against copies, failures."""

from __future__ import annotations

import ctypes
import gc
import os
import random
import sys
import threading
import time
import types
import weakref

import pytest
import torch
from expert_cases import Case, random_blocks
from torch import Tensor

from moe_offload.checkpoint.block import Activation, block_layout
from moe_offload.experts.fetcher import HostFetcher, make_fetcher
from moe_offload.experts.slots import GpuExperts, Group

FORMATS = ("fp32", "bf16", "int8", "int4")
CUDA = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here"),
]


class Rig:
    """An accelerator with its slots filled, and a fetcher for them."""

    def __init__(self, case: Case, device: str = "cpu", fetcher_hook=None, **options) -> None:
        self.case = case
        self.blocks = random_blocks(case.layout(), case.n_experts)
        self.gpu = GpuExperts(
            case.layout(),
            case.activation(),
            case.n_experts,
            device,
            case.act_module(),
            **options,
        )
        self.gpu.slots.copy_(self.blocks)
        self.fetcher = (
            HostFetcher(self.gpu.slots, before_copy=fetcher_hook)
            if device == "cpu"
            else make_fetcher(device, self.gpu.slots)
        )

    def launch(self, hidden: Tensor, slots: Tensor, weights: Tensor):
        device, pairs = self.gpu.device, slots.flatten().tolist()
        return self.gpu.launch(hidden.to(device), pairs, weights.to(device), self.fetcher)

    def close(self) -> None:
        self.fetcher.close()
        self.gpu.close()


@pytest.fixture
def rig():
    rigs = []

    def make(*args, **options) -> Rig:
        rigs.append(Rig(*args, **options))
        return rigs[-1]

    yield make
    for made in rigs:
        made.close()


SMALL = Case("fp32", 32, 24, n_tokens=1, top_k=2)
CASES = [
    *(Case(f, 64, 48, n_tokens=t) for f in FORMATS for t in (1, 5)),
    *(Case(f, 37, 29, "clamped_swiglu", has_bias=True) for f in FORMATS),
    Case("bf16", 20, 12, "relu2", has_gate=False, n_tokens=9, top_k=6, n_experts=3),
    Case("int8", 20, 12, "module", n_tokens=2),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_launch_gives_the_weighted_sum_of_its_hits(rig, case):
    hidden, slots, weights = case.routing()
    made = rig(case)
    out = made.launch(hidden, slots, weights).result()
    assert out.dtype == torch.float32
    torch.testing.assert_close(
        out, case.oracle(made.blocks, hidden, slots, weights), rtol=1e-5, atol=1e-5
    )


def test_bf16_is_computed_as_the_model_would(rig):
    case = Case("bf16", 64, 48, n_tokens=2)
    hidden, slots, weights = case.routing()
    made = rig(case)
    out = made.launch(hidden.bfloat16(), slots, weights.bfloat16()).result()
    assert out.dtype == torch.float32
    expected = case.oracle(made.blocks, hidden.bfloat16(), slots, weights.bfloat16().float())
    torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-2)


def test_without_hits_the_sum_is_zero(rig):
    hidden, slots, weights = SMALL.routing()
    out = rig(SMALL).launch(hidden, torch.full_like(slots, -1), weights).result()
    assert torch.equal(out, torch.zeros_like(hidden))


@pytest.mark.parametrize("weight_format", ["fp32", "int4"])
def test_launches_by_expert_give_the_same_as_one_by_pair(rig, weight_format):
    case = Case(weight_format, 32, 24, n_tokens=50, top_k=3, n_experts=6)
    hidden, slots, weights = case.routing()
    made, out = rig(case), torch.zeros(50, 32)
    by_slot, first = torch.argsort(slots.flatten()), (slots < 0).sum()
    groups = {}
    for slot in range(6):
        groups[slot] = Group(slot, int(first), int((slots == slot).sum()))
        first = first + groups[slot].n
    for of_launch in ((4,), (0, 5)):
        chosen = [groups[slot] for slot in of_launch]
        pending = made.gpu.launch_groups(hidden, chosen, by_slot, weights, made.fetcher, out)
        assert pending.result() is out
    ours = slots.where((slots == 4) | (slots == 0) | (slots == 5), -1)
    torch.testing.assert_close(
        out, case.oracle(made.blocks, hidden, ours, weights), rtol=1e-5, atol=1e-5
    )


def test_a_result_is_the_callers_own_in_its_mode(rig):
    """An inference tensor would be refused by the caller's later in-place or recorded work."""
    made = rig(SMALL)
    hidden, slots, weights = SMALL.routing()
    assert not made.launch(hidden, slots.clamp(min=0), weights).result().is_inference()
    with torch.inference_mode():
        hidden = hidden * 1
        assert made.launch(hidden, slots.clamp(min=0), weights).result().is_inference()


def test_the_caller_runs_on_while_the_accelerator_computes(rig):
    gate, hits = threading.Event(), []

    def before_compute(n_hits: int) -> None:
        hits.append(n_hits)
        gate.wait()

    made = rig(SMALL, before_compute=before_compute)
    hidden, _, weights = SMALL.routing()
    pending = made.launch(hidden, torch.tensor([[2, -1]]), weights)
    assert not pending.end.query()
    gate.set()
    assert pending.result().abs().sum() > 0
    assert hits == [1]
    assert pending.resolve() > 0


def test_an_error_in_the_computation_reaches_the_caller_and_later_launches_work(rig):
    errors = [ValueError("injected")]

    def before_compute(n_hits: int) -> None:
        if errors:
            raise errors.pop()

    made = rig(SMALL, before_compute=before_compute)
    hidden, slots, weights = SMALL.routing()
    failing = made.launch(hidden, slots, weights)
    fine = made.launch(hidden, slots, weights)
    with pytest.raises(ValueError, match="injected"):
        failing.result()
    assert not failing.copy_failed
    torch.testing.assert_close(fine.result(), SMALL.oracle(made.blocks, hidden, slots, weights))


def test_a_failed_copy_leaves_the_work_out_and_says_so(rig):
    def before_copy(slot: int) -> None:
        raise OSError("injected")

    made = rig(SMALL, fetcher_hook=before_copy)
    hidden, _, weights = SMALL.routing()
    slots, out = torch.tensor([[1, 3]]), torch.zeros(1, 32)
    made.fetcher.fetch(3, made.blocks[0])
    pair = torch.tensor([1])
    group = [Group(3, 0, 1)]
    pending = made.gpu.launch_groups(hidden, group, pair, weights, made.fetcher, out)
    with pytest.raises(OSError, match="injected"):
        pending.result()
    assert pending.copy_failed
    assert (out == 0).all(), "a shared output holds garbage"
    assert [c.slot for c in made.fetcher.poll()] == [3]
    with pytest.raises(OSError, match="injected"):
        made.launch(hidden, slots, weights).result()


def test_a_launch_waits_for_its_copies_and_evictions_for_the_launch(rig):
    """An expert is fetched, computed and evicted without any pause of the host."""
    made = rig(SMALL, fetcher_hook=lambda slot: time.sleep(0.002))
    slow = rig(
        SMALL,
        fetcher_hook=lambda slot: time.sleep(0.002),
        before_compute=lambda n_hits: time.sleep(0.004),
    )
    hidden, _, weights = SMALL.routing()
    for each in (made, slow):
        launched = []
        for expert in (0, 1, 2, 3, 2, 1, 0):
            each.fetcher.fetch(0, made.blocks[expert])
            launched.append((expert, each.launch(hidden, torch.tensor([[0, -1]]), weights)))
        for expert, pending in launched:
            expected = SMALL.oracle(made.blocks, hidden, torch.tensor([[expert, -1]]), weights)
            torch.testing.assert_close(pending.result(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weight_format", ["fp32", "int4"])
def test_soak_against_the_oracle(rig, weight_format):
    """Random fetches, evictions and launches; every output is compared."""
    case = Case(weight_format, 16, 16, n_tokens=1, top_k=2, n_experts=12)
    made = rig(case, fetcher_hook=lambda slot: time.sleep(0.0001))
    rng, resident = random.Random(3), dict(enumerate(range(12)))
    hidden, _, weights = case.routing()
    waiting = []
    for _ in range(600):
        if rng.random() < 0.4:
            slot, expert = rng.randrange(12), rng.randrange(12)
            made.fetcher.fetch(slot, made.blocks[expert])
            resident[slot] = expert
        slots = rng.sample(range(12), 2)
        pending = made.launch(hidden, torch.tensor([slots]), weights)
        waiting.append((pending, [resident[slot] for slot in slots]))
        if len(waiting) > 3:
            pending, experts = waiting.pop(0)
            expected = case.oracle(made.blocks, hidden, torch.tensor([experts]), weights)
            torch.testing.assert_close(pending.result(), expected, rtol=1e-5, atol=1e-5)
    made.fetcher.drain()


def test_closing_finishes_what_was_launched(rig):
    made = rig(SMALL, before_compute=lambda n_hits: time.sleep(0.01))
    hidden, slots, weights = SMALL.routing()
    launched = [made.launch(hidden, slots, weights) for _ in range(3)]
    made.close()
    expected = SMALL.oracle(made.blocks, hidden, slots, weights)
    for pending in launched:
        torch.testing.assert_close(pending.result(), expected)


def test_a_launch_kept_for_its_timing_does_not_keep_its_output(rig):
    made = rig(SMALL)
    hidden, slots, weights = SMALL.routing()
    pending = made.launch(hidden, slots, weights)
    out = weakref.ref(pending.result())
    gc.collect()
    assert out() is None
    assert pending.resolve() > 0


# --- slot memory ----------------------------------------------------------------------------------

LAYOUT = block_layout("bf16", 16, 16)


@pytest.mark.skipif(sys.platform != "linux", reason="mincore is Linux's")
def test_an_emulated_accelerators_memory_is_there_from_the_start():
    page = os.sysconf("SC_PAGE_SIZE")
    gpu = GpuExperts(block_layout("bf16", 1024, 2048), Activation("silu"), 8, "cpu")
    start = gpu.slots.data_ptr() // page * page
    n_pages = (gpu.slots.data_ptr() + gpu.slots.nbytes - start) // page
    resident = (ctypes.c_ubyte * n_pages)()
    mincore = ctypes.CDLL(None).mincore
    assert mincore(ctypes.c_void_p(start), ctypes.c_size_t(n_pages * page), resident) == 0
    assert n_pages > 20_000
    assert all(state & 1 for state in resident)
    gpu.close()


def accelerator(monkeypatch: pytest.MonkeyPatch, n_slots: int, allocate) -> GpuExperts:
    monkeypatch.setattr("moe_offload.experts.slots._allocate_bytes", allocate)
    gpu = GpuExperts(LAYOUT, Activation("silu"), n_slots, "cpu")
    gpu.close()
    return gpu


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("can't allocate memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
@pytest.mark.parametrize(
    ("wanted", "room", "found"),
    [(58, 57, 57), (58, 20, 20), (58, 1, 1), (8, 8, 8), (2, 1, 1), (3, 0, 0), (0, 0, 0)],
)
def test_as_many_slots_are_made_as_fit(monkeypatch, error, wanted, room, found):
    held = weakref.WeakSet()

    def allocate(n_slots, block_bytes, device):
        if n_slots + sum(len(slots) for slots in held) > room:
            raise error
        slots = torch.empty(n_slots, block_bytes, dtype=torch.uint8)
        held.add(slots)
        return slots

    gpu = accelerator(monkeypatch, wanted, allocate)
    assert gpu.n_slots == found
    assert gpu.slots.shape == (found, LAYOUT.block_bytes)
    if found < wanted:
        (notice,) = gpu.notices
        assert notice.startswith(f"out of memory on cpu: {found} of {wanted} cache slots")
    else:
        assert gpu.notices == []


def test_other_allocation_errors_are_not_swallowed(monkeypatch):
    def allocate(n_slots, block_bytes, device):
        raise RuntimeError("CUDA error: no kernel image is available")

    with pytest.raises(RuntimeError, match="no kernel image"):
        accelerator(monkeypatch, 4, allocate)


def test_what_computes_the_hits_is_described(rig):
    assert rig(SMALL).gpu.description == "emulated accelerator (one CPU thread), torch kernels"


@pytest.mark.parametrize("absent", [True, False], ids=["absent", "broken"])
def test_torch_takes_over_where_triton_cannot_run(rig, monkeypatch, absent):
    class Broken:
        def __init__(self, *_):
            pass

        def warm_up(self, *_):
            raise RuntimeError("Failed to find C compiler\nPlease specify via CC")

    module = None if absent else types.SimpleNamespace(TritonExperts=Broken)
    monkeypatch.setitem(sys.modules, "moe_offload.kernels.triton_experts", module)
    tiles = types.SimpleNamespace(TiledExperts=Broken, runs_tiles=lambda device: True)
    monkeypatch.setitem(sys.modules, "moe_offload.kernels.triton_tiles", tiles)
    gpu = rig(SMALL).gpu
    gpu._use_triton_if_it_runs(torch.bfloat16)
    assert gpu._kernels is None and gpu._tiles is None
    (notice,) = gpu.notices
    reason = (
        "import of moe_offload.kernels.triton_experts halted"
        if absent
        else "Failed to find C compiler"
    )
    assert notice.startswith(f"Triton kernels cannot run ({reason}")
    assert notice.endswith("): torch computes the hits, slower")
    with pytest.raises((ImportError, RuntimeError)):
        gpu._use_triton()
        gpu._kernels.warm_up()


def test_what_fails_in_the_kernels_for_prompts_is_theirs_alone(rig, monkeypatch):
    class Works:
        def __init__(self, *_):
            pass

        def warm_up(self, *_): ...

    class TooLarge(Works):
        def warm_up(self, *_):
            raise RuntimeError("out of resource: shared memory\nRequired: 120000")

    for name, module in (
        ("triton_experts", types.SimpleNamespace(TritonExperts=Works)),
        (
            "triton_tiles",
            types.SimpleNamespace(TiledExperts=TooLarge, runs_tiles=lambda device: True),
        ),
    ):
        monkeypatch.setitem(sys.modules, f"moe_offload.kernels.{name}", module)
    gpu = rig(SMALL).gpu
    monkeypatch.setattr(gpu, "_warm_up_sum", lambda dtype: None)
    gpu._use_triton_if_it_runs(torch.bfloat16)
    assert isinstance(gpu._kernels, Works) and gpu._tiles is None
    assert gpu.notices == [
        "Triton's kernels for prompts cannot run (out of resource: shared memory): their experts "
        "are computed one by one, slower"
    ]


# --- on a GPU -------------------------------------------------------------------------------------


class TestCuda:
    pytestmark = CUDA

    CASES = (
        *(Case(f, 256, 192, n_tokens=t) for f in FORMATS for t in (1, 5, 40)),
        *(Case(f, 130, 70, "clamped_swiglu", has_bias=True) for f in FORMATS),
        *(Case("int8", 128, 64, kind) for kind in ("gelu", "gelu_tanh", "relu", "relu2", "module")),
        Case("int4", 2048, 768, n_tokens=1, top_k=8, n_experts=16),
    )

    @pytest.mark.parametrize("kernels", ["auto", "torch"])
    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
    def test_a_launch_agrees_with_the_cpu_oracle(self, rig, case, kernels):
        hidden, slots, weights = case.routing()
        made = rig(case, "cuda")
        if kernels == "torch":
            made.gpu._kernels = None
        out = made.launch(hidden, slots, weights).result().cpu()
        expected = case.oracle(made.blocks, hidden, slots, weights)
        torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)
        out = made.launch(hidden.bfloat16(), slots, weights.bfloat16()).result().cpu()
        torch.testing.assert_close(out, expected, rtol=5e-2, atol=1e-1)

    def test_triton_kernels_run_where_triton_is_installed(self, rig):
        """Else every other test here would be of torch alone, and pass."""
        pytest.importorskip("triton")
        made = rig(Case("int4", 64, 48), "cuda")
        assert made.gpu.notices == []
        assert made.gpu.description.endswith("Triton kernels")

    @pytest.mark.parametrize("weight_format", ["bf16", "int8", "int4", "mxfp4", "fp8"])
    def test_launches_by_expert_agree_with_the_cpu_oracle(self, rig, weight_format):
        """Of 1,300 tokens each through cuBLAS, of 80 each in tiles, several and one by one."""
        for n_tokens in (2600, 160):
            case = Case(weight_format, 256, 192, n_tokens=n_tokens, top_k=4, n_experts=8)
            hidden, slots, weights = case.routing()
            made = rig(case, "cuda")
            by_slot = torch.argsort(slots.flatten()).to("cuda")
            counts = torch.bincount(slots.flatten() + 1, minlength=9).tolist()
            groups = [Group(slot, sum(counts[: slot + 1]), counts[slot + 1]) for slot in range(8)]
            expected = case.oracle(made.blocks, hidden.bfloat16().float(), slots, weights)
            for launches in ([groups], [[group] for group in groups]):
                out = torch.zeros(n_tokens, 256, device="cuda")
                for chosen in launches:
                    made.gpu.launch_groups(
                        hidden.bfloat16().to("cuda"), chosen, by_slot, weights.to("cuda"),
                        made.fetcher, out,
                    ).result()  # fmt: skip
                error = (out.cpu() - expected).norm() / expected.norm()
                assert error < 0.02

    def test_fetch_compute_and_evict_without_a_pause_of_the_host(self, rig):
        case = Case("bf16", 512, 512, n_tokens=1, top_k=1, n_experts=8)
        made = rig(case, "cuda")
        hidden, _, weights = case.routing()
        blocks, launched = made.blocks.pin_memory(), []
        for step in range(64):
            made.fetcher.fetch(0, blocks[step % 8])
            launched.append((step % 8, made.launch(hidden, torch.tensor([[0]]), weights)))
        for expert, pending in launched:
            expected = case.oracle(made.blocks, hidden, torch.tensor([[expert]]), weights)
            torch.testing.assert_close(pending.result().cpu(), expected, rtol=1e-3, atol=1e-3)
            assert pending.resolve() > 0

    def test_a_device_that_runs_out_of_memory_has_fewer_slots(self):
        """Of the part that is this process's: other tests may run beside it."""
        layout = block_layout("bf16", 4096, 14336)
        wanted = torch.cuda.mem_get_info()[1] // layout.block_bytes
        torch.cuda.set_per_process_memory_fraction(0.1)
        try:
            gpu = GpuExperts(layout, Activation("silu"), wanted, "cuda")
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        assert 0 < gpu.n_slots < wanted
        assert "cache slots" in gpu.notices[0]


def test_slots_made_in_inference_mode_can_be_written_outside_it():
    with torch.inference_mode():
        gpu = GpuExperts(LAYOUT, Activation("silu"), 2, "cpu")
    gpu.slots[1].copy_(torch.ones(LAYOUT.block_bytes, dtype=torch.uint8))
    assert gpu.slots.sum() == LAYOUT.block_bytes
    gpu.close()
