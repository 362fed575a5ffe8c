"""The whole mechanism under load: every layer's output against the oracle, step after step.

Random routing over the real dispatcher, directory, fetcher and accelerator, with delayed, failing
and overtaking copies and a slow accelerator. Another test takes one of the two waits out and shows
that the same comparison then fails.
"""

from __future__ import annotations

import gc
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from expert_cases import random_blocks
from torch import Tensor, nn

from moe_offload.checkpoint.block import Activation, block_layout
from moe_offload.errors import UserError
from moe_offload.experts.accelerator import N_STAGING_SLOTS, Accelerator
from moe_offload.experts.cache import ExpertCache, make_policy
from moe_offload.experts.costs import CostModel, SideCost
from moe_offload.experts.dispatcher import MoeDispatcher, MoeExperts
from moe_offload.experts.fetcher import ExpertFetcher, HostFetcher, make_fetcher
from moe_offload.experts.plan import TRIAL_STEPS, Trial
from moe_offload.experts.recorder import NullRecorder, Recorder
from moe_offload.experts.slots import GpuExperts
from moe_offload.experts.store import ExpertStore
from moe_offload.kernels.cpu_experts import CpuExperts

HIDDEN, N_LAYERS, N_EXPERTS, TOP_K = 16, 3, 8, 2
LAYOUT = block_layout("fp32", HIDDEN, 16)
SILU = Activation("silu")
CUDA = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here"),
]


class Layers(nn.Module):
    """A model of MoE layers only, with a routing of its own making."""

    def __init__(
        self, dispatcher: MoeDispatcher, store: ExpertStore, seed: int, device: str
    ) -> None:
        super().__init__()
        self._device = device
        self.layers = nn.ModuleList(MoeExperts(dispatcher, i) for i in range(N_LAYERS))
        self._first = [LAYOUT.field("gate_up").view(store.blocks(i)) for i in range(N_LAYERS)]
        self._second = [LAYOUT.field("down").view(store.blocks(i)) for i in range(N_LAYERS)]
        self._rng = random.Random(seed)
        self.wrong_layers = 0
        dispatcher.attach(self, [])

    def forward(self, input_ids: Tensor) -> Tensor:
        """Compare every layer with the oracle on `input_ids` [B, S] tokens; count those wrong."""
        n_tokens = input_ids.numel()
        hidden = torch.randn(n_tokens, HIDDEN)
        for layer, experts in enumerate(self.layers):
            # Near the last choice more often than not, as real routing is: hits need locality.
            pool = range(N_EXPERTS) if self._rng.random() < 0.4 else range(layer, layer + 4)
            index = torch.tensor([self._rng.sample(pool, TOP_K) for _ in range(n_tokens)])
            weights = torch.rand(n_tokens, TOP_K)
            expected = self._oracle(layer, hidden, index, weights)
            out = experts(*(part.to(self._device) for part in (hidden, index, weights))).cpu()
            self.wrong_layers += not torch.allclose(out, expected, rtol=1e-4, atol=1e-5)
        return hidden

    def _oracle(self, layer: int, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """The formula, for all pairs at once and from the host's weights."""
        first = torch.einsum("tkrh,th->tkr", self._first[layer][index], hidden)
        gate, up = first.chunk(2, dim=-1)
        middle = torch.nn.functional.silu(gate) * up
        y = torch.einsum("tkhi,tki->tkh", self._second[layer][index], middle)
        return (y * weights[..., None]).sum(1)


class Run:
    """A dispatcher over a cache that is too small, wired as the engine wires it."""

    def __init__(
        self,
        fetcher_class: type[ExpertFetcher] = HostFetcher,
        before_copy: Callable[[int], None] | None = None,
        before_compute: Callable[[int], None] | None = None,
        n_indexes: int = N_LAYERS,
        n_ways: int = 2,
        policy: str = "LRU",
        miss_policy: str = "cpu",
        quota: int = 64,
        n_streams: int = 1,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        torch.manual_seed(seed)
        self.store = ExpertStore([LAYOUT] * N_LAYERS, [N_EXPERTS] * N_LAYERS)
        for layer in range(N_LAYERS):
            self.store.blocks(layer).copy_(random_blocks(LAYOUT, N_EXPERTS, seed=layer))
        self.gpu = GpuExperts(
            LAYOUT,
            SILU,
            n_indexes * n_ways + N_STAGING_SLOTS,
            device,
            before_compute=before_compute,
            dtype=torch.float32,
        )
        if device == "cpu":
            self.fetcher = fetcher_class(
                self.gpu.slots, before_copy=before_copy, n_streams=n_streams
            )
        else:
            assert self.store.pin() is None
            self.fetcher = make_fetcher(device, self.gpu.slots)
        self.cache = ExpertCache(n_indexes, n_ways, make_policy(policy))
        self.accelerator = Accelerator(
            self.store, self.cache, self.gpu, self.fetcher, quota, miss_policy
        )
        cpu = CpuExperts(LAYOUT, SILU, kernel="torch")
        self.dispatcher = MoeDispatcher(
            self.store, [cpu] * N_LAYERS, NullRecorder(), self.accelerator
        )
        self.model = Layers(self.dispatcher, self.store, seed, device)

    def steps(self, n: int) -> int:
        """One prompt, then `n` decode steps with a prompt now and then; the wrong layers."""
        self.steps_without_close(n)
        self.accelerator.close()
        return self.model.wrong_layers

    def steps_without_close(self, n: int) -> None:
        with torch.no_grad():
            for step in range(n):
                self.model(torch.zeros(1, 5 if step % 97 == 0 else 1, dtype=torch.int64))


def jitter(rng: random.Random, most_s: float) -> Callable[[int], None]:
    def wait(_: int) -> None:
        if rng.random() < 0.2:
            time.sleep(rng.random() * most_s)

    return wait


def without_ready_wait() -> type[ExpertFetcher]:
    class Mutant(HostFetcher):
        def wait_ready(self, slots, stream):
            return []

    return Mutant


def without_released_wait() -> type[ExpertFetcher]:
    class Mutant(HostFetcher):
        def _wait_released(self, slot, stream):
            pass

    return Mutant


@pytest.mark.parametrize("miss_policy", ["cpu", "fetch"])
@pytest.mark.parametrize(
    ("n_indexes", "n_ways", "policy", "quota", "n_streams"),
    [
        (3, 2, "LRU", 64, 1),
        (3, 1, "FIFO", 64, 1),
        (2, 4, "LFU", 1, 2),
        (3, 8, "RANDOM", 64, 2),
        (1, 3, "LFRU", 64, 1),
    ],
)
def test_outputs_stay_right_under_random_delays(
    n_indexes, n_ways, policy, quota, n_streams, miss_policy
):
    rng = random.Random(n_indexes)
    run = Run(
        before_copy=jitter(rng, 0.0005),
        before_compute=jitter(rng, 0.0005),
        n_indexes=n_indexes,
        n_ways=n_ways,
        policy=policy,
        quota=quota,
        n_streams=n_streams,
        miss_policy=miss_policy,
    )
    assert run.steps(200) == 0
    assert run.fetcher.copies > 0
    if miss_policy == "cpu" and quota > 1:
        assert run.cache.hits > 0


@pytest.mark.parametrize("miss_policy", ["cpu", "fetch"])
def test_failing_copies_cost_time_not_correctness(capsys, miss_policy):
    rng = random.Random(5)

    def fails_often(slot: int) -> None:
        if rng.random() < 0.3:
            raise OSError("injected")

    run = Run(before_copy=fails_often, miss_policy=miss_policy)
    assert run.steps(200) == 0
    assert run.accelerator.failed_copies > 20
    assert run.fetcher.copies > 20
    warnings = capsys.readouterr().err.strip().splitlines()
    assert len(warnings) == 1
    assert "injected" in warnings[0]


NO_ROOM = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
]


@pytest.mark.parametrize("error", NO_ROOM, ids=["torch", "alloc", "handle", "cudnn", "triton"])
@pytest.mark.parametrize("n_tokens", [1, 400])
def test_a_gpu_without_room_in_the_middle_of_a_layer_is_one_sentence(n_tokens, error):
    full = threading.Event()

    def no_room(n_pairs: int) -> None:
        if full.is_set():
            raise error

    run = Run(before_compute=no_room, miss_policy="fetch")
    run.steps_without_close(10)
    full.set()
    with torch.no_grad(), pytest.raises(UserError) as raised:
        run.model(torch.zeros(1, n_tokens, dtype=torch.int64))
    message = str(raised.value)
    assert "\n" not in message
    assert f"for {n_tokens} tokens, found none left ({error}): use fewer" in message
    full.clear()
    run.steps_without_close(10)  # nothing was left half done
    run.accelerator.close()
    assert run.model.wrong_layers == 0


@pytest.mark.parametrize("what", ["nothing", "copies"])
@pytest.mark.parametrize("n_tokens", [1, 400])
def test_what_is_kept_of_a_layer_until_the_pass_ends_holds_none_of_its_tensors(what, n_tokens):
    """Launches are kept for their times, with the errors of the copies that they needed."""

    def fails(_: int) -> None:
        raise OSError("injected")

    run = Run(miss_policy="fetch", before_copy=fails if what == "copies" else None)
    run.dispatcher.recorder = Recorder()
    real, kept = run.dispatcher.run, []

    def watching(layer: int, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        of_layer = hidden.clone()
        alive = weakref.ref(of_layer)
        out = real(layer, of_layer, index, weights)
        del of_layer
        kept.append(alive() is not None)
        return out

    run.dispatcher.run = watching
    gc.disable()  # else it may happen to come by
    try:
        with torch.no_grad():
            run.model(torch.zeros(1, n_tokens, dtype=torch.int64))
    finally:
        gc.enable()
        run.accelerator.close()
    assert run.model.wrong_layers == 0
    assert kept == [False] * N_LAYERS


def test_the_run_ends_with_copies_in_flight():
    run = Run(before_copy=lambda slot: time.sleep(0.02))
    assert run.steps(3) == 0
    assert run.fetcher.in_flight > 0


@pytest.mark.parametrize("miss_policy", ["cpu", "fetch"])
def test_memory_that_is_not_pinned_is_copied_only_where_a_layer_waits_for_it(
    monkeypatch, miss_policy
):
    """From pageable memory a copy would hold this thread up before the CPU's experts start."""
    run = Run(miss_policy=miss_policy)
    monkeypatch.setattr(run.store, "is_pinned", lambda layer: layer == 0)
    run.gpu.device = torch.device("cuda")  # what the choice goes by
    run.steps_without_close(40)
    run.fetcher.drain()
    held = {
        layer
        for layer in range(N_LAYERS)
        if any(run.cache.slot_of(layer, expert) is not None for expert in range(N_EXPERTS))
    }
    run.accelerator.close()
    assert held == ({0} if miss_policy == "cpu" else {0, 1, 2})
    assert run.model.wrong_layers == 0


@pytest.mark.parametrize("where", ["admitted", "issued", "launched"])
def test_a_ctrl_c_leaves_no_slot_in_flight_and_no_wrong_layer(monkeypatch, where, capsys):
    run = Run(before_compute=lambda n_pairs: time.sleep(0.001))
    run.steps_without_close(5)
    # Between the directory and the copy; between the copy and its note; the same of a launch.
    owner, name = {
        "admitted": (run.accelerator, "fetch"),
        "issued": (run.fetcher, "_enqueue"),
        "launched": (run.fetcher, "mark_released"),
    }[where]
    real = getattr(run.fetcher if where != "admitted" else run.accelerator, name)

    def interrupted(*arguments):
        if where != "admitted":
            real(*arguments)
        monkeypatch.setattr(owner, name, real)
        raise KeyboardInterrupt

    for _ in range(8):
        monkeypatch.setattr(owner, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            run.steps_without_close(40)
    run.steps_without_close(20)
    with run.accelerator.lending_slots():  # every copy has been heard of
        pass
    in_flight, ready = run.cache.in_flight(), run.cache.ready(0)
    run.steps_without_close(20)
    run.accelerator.close()
    assert not in_flight and ready
    assert run.model.wrong_layers == 0
    assert capsys.readouterr().err == ""


def test_after_a_ctrl_c_another_thread_has_its_turn(monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    run = Run()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run.accelerator, "fetch", interrupted)
        run.steps_without_close(1)
    other = threading.Thread(target=run.steps_without_close, args=(20,), daemon=True)
    other.start()
    other.join(timeout=20)
    assert not other.is_alive()
    run.accelerator.close()
    assert run.model.wrong_layers == 0


def test_a_pass_waits_while_a_calibration_leaves_the_experts_out():
    """Else another thread's pass would take the zeros for its own."""
    run = Run()
    other = threading.Thread(target=run.steps_without_close, args=(5,), daemon=True)
    with run.dispatcher.experts_left_out():
        other.start()
        other.join(timeout=0.2)
        assert other.is_alive()
    other.join(timeout=20)
    assert not other.is_alive()
    run.accelerator.close()
    assert run.model.wrong_layers == 0


def test_a_model_that_nobody_closed_leaves_no_thread():
    before = set(threading.enumerate())
    run = Run()
    run.steps_without_close(3)
    started = set(threading.enumerate()) - before
    assert len(started) == 2
    del run
    gc.collect()
    for thread in started:
        thread.join(timeout=20)
        assert not thread.is_alive()


def test_a_prompts_copies_count_those_already_queued():
    """The warm-up of one layer stands before what the next layer would copy."""
    gate = threading.Event()
    run = Run(before_copy=lambda slot: gate.wait(), n_ways=4)
    run.accelerator.costs = CostModel(
        cpu=SideCost(0, 100, 25),
        gpu=SideCost(0, 1, 0.01),
        copy_call_us=0,
        copy_gbps=LAYOUT.block_bytes / 150e3,  # 150 us, a little more than the CPU takes
        copy_gbps_shared=LAYOUT.block_bytes / 150e3,
        cpu_shared_factor=1,
        block_bytes=LAYOUT.block_bytes,
        dense_us_per_layer=0,
    )
    seen = []
    split = CostModel.split

    def watched(self, held, missed, backlog_us=0.0):
        seen.append((backlog_us, run.fetcher.in_flight))
        return split(self, held, missed, backlog_us=1e9)  # all on the CPU: nothing waits

    CostModel.split, original = watched, split
    try:
        with torch.no_grad():
            run.model(torch.zeros(1, 5, dtype=torch.int64))
    finally:
        CostModel.split = original
    gate.set()
    run.accelerator.close()
    assert [in_flight for _, in_flight in seen] == [0, 4, 8]
    assert [backlog_us for backlog_us, _ in seen] == pytest.approx([0, 600, 1200])
    assert run.model.wrong_layers == 0


def fetched_by(run: Run, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layer of each copy that is begun from now on."""
    layers: list[int] = []
    fetch = run.accelerator.fetch
    monkeypatch.setattr(run.accelerator, "fetch", lambda *a: layers.append(a[0]) or fetch(*a))
    return layers


def arriving_one_by_one(layer: int, experts: Sequence[int]) -> Iterator[Sequence[int]]:
    """As from a disk: nothing is there at first."""
    yield ()
    for expert in experts:
        yield (expert,)


def test_experts_that_arrive_one_by_one_have_one_share_of_the_quota(monkeypatch):
    run = Run(n_indexes=2, quota=2)
    monkeypatch.setattr(run.store, "arriving", arriving_one_by_one)
    layers = fetched_by(run, monkeypatch)
    for _ in range(8):
        layers.clear()
        with torch.no_grad():
            run.model(torch.zeros(1, 1, dtype=torch.int64))
        assert layers.count(0) <= 1
    run.accelerator.close()
    assert run.fetcher.begun >= 8


def test_guesses_are_fetched_after_the_layers_own_misses(monkeypatch):
    gate = threading.Event()
    run = Run(before_copy=lambda slot: gate.wait(), n_ways=N_EXPERTS)
    run.accelerator.routers = [lambda hidden: torch.tensor([[6, 7]])] * N_LAYERS
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(run.store, "arriving", arriving_one_by_one)
        layers = fetched_by(run, patch)
        run.model(torch.zeros(1, 1, dtype=torch.int64))
    gate.set()
    assert layers[:TOP_K] == [0] * TOP_K
    run.steps_without_close(90)
    run.fetcher.drain()
    guessed, misses = [], run.cache.misses
    monkeypatch.setattr(run.accelerator, "fetch_ahead", lambda *a: guessed.append(a[0]))
    run.steps_without_close(1)
    with torch.no_grad():
        run.model(torch.zeros(1, 1, dtype=torch.int64))
    run.accelerator.close()
    assert run.cache.misses == misses  # and where a layer misses nothing, at once
    assert guessed == [1, 2]


def test_one_trial_at_a_time_gets_the_steps():
    """Two that switched together would each find what both do."""
    run = Run(miss_policy="auto")
    first, second = run.accelerator.trial, Trial()
    run.store.trial = second
    ways = []
    with torch.no_grad():
        for _ in range(2 * TRIAL_STEPS):
            ways.append((first.is_first, second.is_first))
            run.model(torch.zeros(1, 1, dtype=torch.int64))
    run.accelerator.close()
    during, after = ways[:TRIAL_STEPS], ways[TRIAL_STEPS:]
    assert {way for way, _ in during} == {way for _, way in after} == {False, True}
    assert {way for _, way in during} == {False}
    assert len({way for way, _ in after}) == 1
    assert first.is_decided and second.is_decided


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
@pytest.mark.parametrize(("n_past", "is_decode"), [(0, False), (3, True)])
def test_a_prompt_of_one_token_is_a_prompt(name, n_past, is_decode):
    class Past:
        def get_seq_length(self) -> int:
            return n_past

    run = Run()
    one_token = {"input_ids": torch.zeros(1, 1, dtype=torch.int64), name: Past()}
    run.dispatcher.begin_pass((), one_token)
    assert run.dispatcher._decode == is_decode
    run.accelerator.close()


@pytest.mark.parametrize("n_tokens", [1, 6])
def test_a_decode_step_hands_a_layer_to_the_host_once(monkeypatch, n_tokens):
    run = Run(n_ways=2)
    run.steps_without_close(20)
    handoff, moves, hits = run.dispatcher._handoff, [], run.cache.hits
    to_host = handoff.to_host
    monkeypatch.setattr(handoff, "to_host", lambda *a: moves.append(a) or to_host(*a))
    with torch.no_grad():
        for _ in range(10):
            run.model(torch.zeros(n_tokens, 1, dtype=torch.int64))
    run.accelerator.close()
    assert run.cache.hits > hits
    assert len(moves) == 10 * N_LAYERS
    assert run.model.wrong_layers == 0


@pytest.mark.parametrize("n_tokens", [5, 400])
def test_a_prompt_is_sorted_by_expert_once_a_layer(monkeypatch, n_tokens):
    """Every expert is waited for, by a launch of its own; none looks at all pairs again."""
    sorts = []
    argsort = torch.argsort
    monkeypatch.setattr(torch, "argsort", lambda *a, **k: sorts.append(a) or argsort(*a, **k))
    run = Run(n_ways=2, miss_policy="fetch")
    by_pair = run.gpu.launch
    monkeypatch.setattr(run.gpu, "launch", lambda *a, **k: pytest.fail("a table for an expert"))
    with torch.no_grad():
        run.model(torch.zeros(1, n_tokens, dtype=torch.int64))
        assert len(sorts) == N_LAYERS
        assert run.fetcher.in_flight > 0
        monkeypatch.setattr(run.gpu, "launch", by_pair)
        run.model(torch.zeros(1, n_tokens, dtype=torch.int64))  # some are there now
    run.accelerator.close()
    assert run.model.wrong_layers == 0


@pytest.mark.parametrize("mutation", [without_ready_wait, without_released_wait])
def test_the_comparison_notices_a_missing_wait(mutation):
    """Misses that wait for their copies put both orders to use at every step."""
    run = Run(
        mutation(),
        before_copy=lambda slot: time.sleep(0.001 if mutation is without_ready_wait else 0),
        before_compute=lambda n: time.sleep(0.001 if mutation is without_released_wait else 0),
        n_ways=1,
        miss_policy="fetch",
    )
    assert run.steps(40) > 0


@pytest.mark.parametrize("miss_policy", ["cpu", pytest.param("fetch", marks=pytest.mark.nightly)])
def test_soak_of_ten_thousand_steps(miss_policy):
    rng = random.Random(11)
    run = Run(
        before_copy=jitter(rng, 0.0003),
        before_compute=jitter(rng, 0.0003),
        miss_policy=miss_policy,
        n_streams=2,
    )
    assert run.steps(10_000) == 0
    assert run.fetcher.copies > 5_000


# --- on a GPU -------------------------------------------------------------------------------------


class TestCuda:
    pytestmark = CUDA

    @pytest.mark.parametrize("miss_policy", ["cpu", "fetch"])
    @pytest.mark.parametrize(("n_indexes", "n_ways"), [(3, 2), (3, 1), (2, 4), (3, 8)])
    def test_outputs_stay_right(self, n_indexes, n_ways, miss_policy):
        run = Run(n_indexes=n_indexes, n_ways=n_ways, miss_policy=miss_policy, device="cuda")
        run.steps_without_close(200)
        with torch.no_grad():
            for n_tokens in (400, 1):
                run.model(torch.zeros(1, n_tokens, dtype=torch.int64))
        run.accelerator.close()
        assert run.model.wrong_layers == 0
        assert run.fetcher.copies > 0
        run.store.close()

    def test_a_decode_step_is_one_copy_each_way_a_layer(self):
        run = Run(n_ways=2, device="cuda")
        run.steps_without_close(20)
        run.fetcher.drain()
        hidden = torch.randn(1, HIDDEN, device="cuda")
        index = torch.tensor([[2, 3]], device="cuda")
        weights = torch.rand(1, TOP_K, device="cuda")
        run.dispatcher._decode, run.accelerator._quota_left = True, 0
        torch.cuda.synchronize()
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile, torch.no_grad():
            for experts in run.model.layers:
                experts(hidden, index, weights)
            torch.cuda.synchronize()
        copies = [event.name for event in profile.events() if event.name.startswith("Memcpy")]
        assert sum("DtoH" in name for name in copies) == N_LAYERS
        assert sum("HtoD" in name for name in copies) <= N_LAYERS
        run.accelerator.close()
        run.store.close()
