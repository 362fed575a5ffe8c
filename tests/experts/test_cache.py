"""The cache directory against a brute-force model, and its policies against hand and dict."""

import inspect
import random
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_offload import config
from moe_offload.errors import UserError
from moe_offload.experts.cache import (
    LFRU,
    POLICIES,
    ExpertCache,
    ReplacementPolicy,
    make_policy,
)
from moe_offload.simulation.trace_files import read_trace

SHARED_TRACES = Path(__file__).resolve().parents[3] / "shared" / "traces"
N_EXPERTS = 6  # few, so that random operations meet each other


class Model:
    """Every slot a dict, every policy's rank worked out anew from the whole log of uses."""

    def __init__(self, n_indexes: int, n_ways: int, policy: str, n_slots: int) -> None:
        self.n_indexes, self.n_ways, self.policy = n_indexes, n_ways, policy
        self.slots: list[dict] = [
            {"tag": None, "state": "EMPTY", "in_use": False} for _ in range(n_slots)
        ]
        self.log: list[tuple[str, int, int]] = []  # (fill or hit, layer, expert)
        self.counters = Counter()

    def ways(self, layer: int) -> list[int]:
        return [s for s in range(len(self.slots)) if s // self.n_ways == layer]

    def find(self, layer: int, expert: int) -> int | None:
        found = [s for s, slot in enumerate(self.slots) if slot["tag"] == (layer, expert)]
        assert len(found) <= 1, "one tag in two slots"
        return found[0] if found else None

    def lookup(self, layer: int, experts: list[int]) -> list[int]:
        answer = []
        for expert in experts:
            slot = self.find(layer, expert)
            hit = slot is not None and self.slots[slot]["state"] == "READY"
            if hit:
                self.slots[slot]["in_use"] = True
                self.log.append(("hit", layer, expert))
            if layer < self.n_indexes and self.n_ways:
                self.counters["hits" if hit else "misses"] += 1
            answer.append(slot if hit else -1)
        return answer

    def admissible(self, layer: int, expert: int) -> set[int]:
        """The slots that an admission may return; empty when it must return None."""
        if not self.ways(layer) or self.find(layer, expert) is not None:
            return set()
        empty = {s for s in self.ways(layer) if self.slots[s]["state"] == "EMPTY"}
        if empty:
            return empty
        free = [
            s
            for s in self.ways(layer)
            if self.slots[s]["state"] == "READY" and not self.slots[s]["in_use"]
        ]
        if not free:
            return set()
        ranks = {s: self.rank(self.slots[s]["tag"]) for s in free}
        lowest = min(ranks.values())
        return {s for s in free if self.equal(ranks[s], lowest)}

    def rank(self, tag: tuple[int, int]) -> tuple[float, ...]:
        uses = [i for i, (_, *used) in enumerate(self.log) if tuple(used) == tag]
        fills = [i for i in uses if self.log[i][0] == "fill"]
        if self.policy == "FIFO":
            return (fills[-1],)
        if self.policy == "LRU":
            return (uses[-1],)
        if self.policy == "LFU":
            return (len(uses), uses[-1])
        if self.policy == "LFRU":
            of_index = [used for _, *used in self.log if used[0] == tag[0]]
            ages = [len(of_index) - i for i, used in enumerate(of_index) if tuple(used) == tag]
            return (sum(2.0 ** (-age / 128) for age in ages),)
        return (0,)

    def equal(self, rank: tuple[float, ...], lowest: tuple[float, ...]) -> bool:
        if self.policy == "LFRU":
            return rank[0] <= lowest[0] * (1 + 1e-9)
        return rank == lowest

    def admitted(self, layer: int, expert: int, slot: int) -> None:
        self.counters["evictions"] += self.slots[slot]["state"] == "READY"
        self.counters["admissions"] += 1
        self.slots[slot] = {"tag": (layer, expert), "state": "IN_FLIGHT", "in_use": False}
        self.log.append(("fill", layer, expert))


def check_agreement(cache: ExpertCache, model: Model) -> None:
    ready = {slot["tag"]: s for s, slot in enumerate(model.slots) if slot["state"] == "READY"}
    for layer in range(model.n_indexes + 1):
        assert cache.ready(layer) == {e: s for (index, e), s in ready.items() if index == layer}
        for expert in range(N_EXPERTS):
            assert cache.slot_of(layer, expert) == model.find(layer, expert)
    in_flight = [s for s, slot in enumerate(model.slots) if slot["state"] == "IN_FLIGHT"]
    assert cache.in_flight() == in_flight
    for name in ("hits", "misses", "admissions", "evictions"):
        assert getattr(cache, name) == model.counters[name], name
    occupied = len(ready) + len(in_flight)
    assert cache.admissions - cache.evictions - model.counters["cancellations"] == occupied


def drive(n_indexes: int, n_ways: int, n_short: int, policy: str, program: bytes) -> None:
    """Run a program of three-byte operations on the directory and the model side by side.

    The last index is short of `n_short` ways, or as many as leave it one.
    """
    n_slots = n_indexes * n_ways - min(n_short, n_ways - 1)
    ways = [min(n_ways, n_slots - n_ways * index) for index in range(n_indexes)]
    cache = ExpertCache(n_indexes, n_ways, make_policy(policy, seed=3), ways)
    model = Model(n_indexes, n_ways, policy, n_slots)
    for i in range(0, len(program), 3):
        operation, a, b = program[i : i + 3]
        layer = a % (n_indexes + 1)
        in_flight = [s for s, slot in enumerate(model.slots) if slot["state"] == "IN_FLIGHT"]
        if operation % 8 in (0, 1):
            experts = list(dict.fromkeys((b % N_EXPERTS, b // N_EXPERTS % N_EXPERTS)))
            assert cache.lookup(layer, experts) == model.lookup(layer, experts)
        elif operation % 8 in (2, 3, 4):
            expert = b % N_EXPERTS
            allowed = model.admissible(layer, expert)
            slot = cache.admit(layer, expert)
            assert slot in allowed if allowed else slot is None
            if slot is not None:
                model.admitted(layer, expert, slot)
        elif operation % 8 in (5, 6) and in_flight:
            slot = in_flight[a % len(in_flight)]
            if b % 8:
                cache.mark_ready(slot)
                model.slots[slot]["state"] = "READY"
            else:
                cache.cancel(slot)
                model.slots[slot] = {"tag": None, "state": "EMPTY", "in_use": False}
                model.counters["cancellations"] += 1
        elif operation % 8 == 7:
            cache.end_step(layer)
            for s in model.ways(layer):
                model.slots[s]["in_use"] = False
        check_agreement(cache, model)


N_OPERATIONS = 400  # per program
PROGRAMS = given(
    n_indexes=st.integers(1, 3),
    n_ways=st.integers(1, 5),
    n_short=st.integers(0, 2),
    policy=st.sampled_from(sorted(POLICIES)),
    program=st.binary(min_size=3 * N_OPERATIONS, max_size=3 * N_OPERATIONS),
)


def settings_for(n_operations: int) -> settings:
    return settings(
        max_examples=-(-n_operations // N_OPERATIONS),
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.large_base_example],
    )


@settings_for(50_000)
@PROGRAMS
def test_directory_agrees_with_the_model(n_indexes, n_ways, n_short, policy, program):
    drive(n_indexes, n_ways, n_short, policy, program)


def test_a_prompt_warms_no_more_ways_than_a_short_index_has() -> None:
    cache = ExpertCache(2, 3, make_policy("LRU"), (3, 1))
    assert [slot for _, slot in cache.warm(0, [[0, 1], [2, 3]], 64)] == [0, 1, 2]
    assert cache.warm(1, [[0, 1], [2, 3]], 64) == [(2, 3)]
    assert cache.admit(1, 5) is None


@pytest.mark.nightly
@settings_for(1_000_000)
@PROGRAMS
def test_directory_agrees_with_the_model_for_a_million_operations(
    n_indexes, n_ways, n_short, policy, program
):
    drive(n_indexes, n_ways, n_short, policy, program)


def replay(
    policy: ReplacementPolicy, n_ways: int, steps: list[list[int]], cache: ExpertCache | None = None
) -> list[int]:
    """Hits of each step on one layer, every copy complete before the next step."""
    cache = cache or ExpertCache(1, n_ways, policy)
    hits = []
    for experts in steps:
        slots = cache.lookup(0, experts)
        missed = [e for e, slot in zip(experts, slots, strict=True) if slot < 0]
        for _, slot in cache.start_fetches(0, missed, len(missed)):
            cache.mark_ready(slot)
        cache.end_step(0)
        hits.append(sum(slot >= 0 for slot in slots))
    return hits


@pytest.mark.parametrize(
    ("policy", "steps", "expected"),
    [
        # 2 evicts 0, which then evicts 1.
        ("FIFO", [0, 1, 0, 2, 0, 1], [0, 0, 1, 0, 0, 0]),
        # The use of 0 protects it: 2 evicts 1, and 1 evicts 2.
        ("LRU", [0, 1, 0, 2, 0, 1], [0, 0, 1, 0, 1, 0]),
        # Cyclic scan one longer than the index: LRU and FIFO never hit.
        ("LRU", [0, 1, 2, 0, 1, 2], [0, 0, 0, 0, 0, 0]),
        # 0 has two uses: 2 evicts 1, 1 evicts 2, 0 hits; then 1 (two uses) yields to 2.
        ("LFU", [0, 0, 1, 2, 1, 0, 2, 1], [0, 1, 0, 0, 0, 1, 0, 0]),
        # Among equal counts the older use goes.
        ("LFU", [0, 1, 2, 1], [0, 0, 0, 1]),
    ],
)
def test_hand_worked_traces(policy, steps, expected):
    assert replay(make_policy(policy), 2, [[e] for e in steps]) == expected


def test_lfru_moves_from_recency_to_frequency_with_its_half_life():
    # Uses of 0 at clocks 1, 2, 3 and of 1 at clock 4. Half-life 1: 2+4+8 = 14 < 16, so 2 evicts 0;
    # half-life 2: 1.41+2+2.83 = 6.2 > 4, so 2 evicts 1.
    steps = [[0], [0], [0], [1], [2], [0]]
    assert replay(LFRU(half_life=1), 2, steps) == [0, 1, 1, 0, 0, 0]
    assert replay(LFRU(half_life=2), 2, steps) == [0, 1, 1, 0, 0, 1]


def test_random_repeats_with_its_seed_and_spares_nobody():
    steps = [[i % 7] for i in range(400)]
    first = replay(make_policy("RANDOM", seed=1), 4, steps)
    assert first == replay(make_policy("random", seed=1), 4, steps)
    assert first != replay(make_policy("RANDOM", seed=2), 4, steps)
    victims = Counter(make_policy("RANDOM", seed=s).victim([10, 11, 12]) for s in range(300))
    assert set(victims) == {10, 11, 12} and min(victims.values()) > 60


def lru_of_dicts(n_ways: int, steps: list[list[int]]) -> list[int]:
    held: OrderedDict[int, None] = OrderedDict()
    hits = []
    for experts in steps:
        hit = [e for e in experts if e in held]
        for e in hit:
            held.move_to_end(e)
        for e in experts:
            if e not in held:
                if len(held) == n_ways:
                    held.popitem(last=False)
                held[e] = None
        hits.append(len(hit))
    return hits


def fifo_of_deques(n_ways: int, steps: list[list[int]]) -> list[int]:
    held: deque[int] = deque()
    hits = []
    for experts in steps:
        hit = [e for e in experts if e in held]
        for e in experts:
            if e not in held:
                if len(held) == n_ways:
                    held.remove(next(old for old in held if old not in experts))
                held.append(e)
        hits.append(len(hit))
    return hits


def lfu_of_counters(n_ways: int, steps: list[list[int]]) -> list[int]:
    held: set[int] = set()
    n_uses: Counter[int] = Counter()
    last: dict[int, int] = {}
    clock, hits = 0, []
    for experts in steps:
        hit = [e for e in experts if e in held]
        for e in hit + [e for e in experts if e not in held]:
            if e not in held:
                if len(held) == n_ways:
                    candidates = held - set(experts)
                    held.remove(min(candidates, key=lambda old: (n_uses[old], last[old])))
                held.add(e)
            clock += 1
            n_uses[e] += 1
            last[e] = clock
        hits.append(len(hit))
    return hits


@pytest.mark.parametrize(
    ("policy", "independent"),
    [("LRU", lru_of_dicts), ("FIFO", fifo_of_deques), ("LFU", lfu_of_counters)],
)
@pytest.mark.parametrize("n_ways", [2, 3, 5, 16])
def test_policies_agree_with_independent_implementations(
    policy: str, independent: Callable[[int, list[list[int]]], list[int]], n_ways: int
):
    rng = random.Random(n_ways)
    weights = [1 / (1 + e) for e in range(16)]
    steps = []
    for _ in range(2000):
        first, second = rng.choices(range(16), weights, k=2)
        steps.append(list(dict.fromkeys((first, second))))
    assert replay(make_policy(policy), n_ways, steps) == independent(n_ways, steps)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_step_never_evicts_what_it_uses(policy):
    cache = ExpertCache(1, 2, make_policy(policy))
    replay(cache.policy, 2, [[0, 1]], cache)
    assert cache.lookup(0, [0, 5]) == [0, -1]
    assert cache.admit(0, 5) == 1  # never slot 0: this step uses it
    assert cache.admit(0, 6) is None  # one way in use, one in flight
    assert cache.lookup(0, [5]) == [-1]  # in flight is a miss, and not admitted twice
    assert cache.admit(0, 5) is None
    cache.end_step(0)
    assert cache.admit(0, 6) == 0


def test_protected_experts_are_spared_until_the_step_ends():
    cache = ExpertCache(1, 2, make_policy("LRU"))
    assert cache.ready(0) == {}
    replay(cache.policy, 2, [[0], [1]], cache)
    assert cache.ready(0) == {0: 0, 1: 1} and cache.ready(1) == {}
    hits = cache.hits
    cache.protect(0, [0, 4])
    cache.protect(1, [0])
    assert cache.admit(0, 2) == 1  # 0 is the least recent, and protected
    assert cache.ready(0) == {0: 0}
    cache.end_step(0)
    assert cache.admit(0, 3) == 0
    assert cache.hits == hits


def test_more_experts_a_step_than_ways_is_no_error():
    hits = replay(make_policy("LRU"), 1, [[0, 1, 2], [0, 1, 2], [1, 0]])
    assert hits == [0, 1, 1]  # only the first miss gets the one way; a hit keeps it


def test_layers_beyond_n_are_neither_cached_nor_counted():
    for cache in (ExpertCache(2, 4, make_policy("LRU")), ExpertCache(0, 0, make_policy("FIFO"))):
        assert cache.lookup(2, [3, 4]) == [-1, -1]
        assert cache.admit(2, 3) is None
        assert cache.slot_of(2, 3) is None
        cache.end_step(2)
        assert (cache.hits, cache.misses) == (0, 0)
    assert ExpertCache(3, 0, make_policy("LRU")).n_slots == 0


def test_fetches_stop_at_the_quota_and_keep_their_order():
    cache = ExpertCache(1, 4, make_policy("FIFO"))
    assert cache.start_fetches(0, [7, 3, 5], 0) == []
    assert cache.start_fetches(0, [7, 3, 5], 2) == [(7, 0), (3, 1)]
    assert cache.start_fetches(0, [3, 5], 2) == [(5, 2)]  # 3 is on its way and costs nothing


def test_a_passs_fetches_are_shared_by_its_layers():
    """First come first served, the later layers of a deep model would never fetch anything."""
    cache, left, fetched = ExpertCache(4, 4, make_policy("LRU")), 6, []
    for layer in range(4):
        fetches = cache.start_fetches(layer, [0, 1, 2] if layer != 1 else [], left)
        left -= len(fetches)
        fetched.append(len(fetches))
    assert fetched == [1, 0, 2, 3] and left == 0  # 6 // 4 and what is left over goes around
    assert [cache.share(layer, 8) for layer in range(5)] == [2, 2 + 1, 4, 8, 0]


def test_a_quota_below_the_number_of_layers_serves_them_in_turn():
    n_layers, n_passes = 7, 700
    for quota in (1, 3, 6):
        cache, fetched = ExpertCache(n_layers, 4, make_policy("LRU")), [0] * n_layers
        for number in range(n_passes):
            left = quota
            for layer in range(n_layers):
                fetches = cache.start_fetches(layer, [2 * number, 2 * number + 1], left)
                left -= len(fetches)
                fetched[layer] += len(fetches)
                cache.end_step(layer)
                for _, slot in fetches:
                    cache.mark_ready(slot)
            assert left >= 0
        even = quota * n_passes / n_layers
        assert min(fetched) > even / 2 and max(fetched) < even * 2, (quota, fetched)


def test_warming_takes_the_experts_of_the_last_tokens():
    cache = ExpertCache(1, 3, make_policy("LRU"))
    fetches = cache.warm(0, [[0, 1], [2, 3], [4, 5]], 64)
    assert [expert for expert, _ in fetches] == [2, 5, 4]  # oldest wanted first, newest last
    assert (cache.hits, cache.misses) == (0, 0)
    for _, slot in fetches:
        cache.mark_ready(slot)
    # 4 is wanted again and stays; only 6 is new, and the oldest of the others goes.
    assert [expert for expert, _ in cache.warm(0, [[4, 5], [4, 6]], 64)] == [6]
    assert cache.slot_of(0, 2) is None and cache.slot_of(0, 5) is not None
    assert cache.warm(1, [[0]], 64) == [] and cache.warm(0, [[0]], 0) == []


def test_warming_within_a_quota_prefers_the_newest():
    cache = ExpertCache(1, 4, make_policy("FIFO"))
    assert [expert for expert, _ in cache.warm(0, [[0, 1], [2, 3]], 3)] == [0, 3, 2]


def test_warming_shares_the_quota_over_the_layers():
    """Phi-3.5-MoE's 16 x 8 on the default quota of 64: in each layer the last two tokens'."""
    cache, left = ExpertCache(16, 8, make_policy("LRU")), 64
    ids = [[0, 1], [2, 3], [4, 5], [6, 7]]
    for layer in range(16):
        fetches = cache.warm(layer, ids, left)
        left -= cache.warm_charge(fetches, ())
        assert [expert for expert, _ in fetches] == [5, 4, 7, 6]
    assert left == 0


@pytest.mark.parametrize(
    ("quota", "fetched"), [(1, [0, 1, 0]), (2, [0, 1, 1]), (4, [1, 2, 1]), (99, [4, 4, 4])]
)
def test_warming_never_exceeds_the_quota(quota: int, fetched: list[int]):
    cache, left, found = ExpertCache(3, 4, make_policy("FIFO")), quota, []
    for layer in range(3):
        fetches = cache.warm(layer, [[0, 1], [2, 3]], left)
        left -= cache.warm_charge(fetches, ())
        found.append(len(fetches))
    assert found == fetched and left >= 0


def test_what_one_layer_spares_the_later_ones_get():
    cache = ExpertCache(2, 4, make_policy("LRU"))
    for _, slot in cache.start_fetches(0, [0, 1, 2], 6):
        cache.mark_ready(slot)
    fetches = cache.warm(0, [[0, 1], [2, 3]], 4)
    assert [expert for expert, _ in fetches] == [3]
    assert len(cache.warm(1, [[0, 1], [2, 3]], 4 - cache.warm_charge(fetches, ()))) == 3


def test_what_the_prompt_copies_anyway_is_kept_for_free():
    cache = ExpertCache(2, 4, make_policy("LRU"))
    fetches = cache.warm(0, [[0, 1], [2, 3]], 2, waited=(9, 1, 0))
    assert [expert for expert, _ in fetches] == [1, 0, 2]  # 9 is not wanted, 3 exceeds the share
    assert cache.warm_charge(fetches, (9, 1, 0)) == 1
    assert [e for e, _ in cache.warm(1, [[0, 1], [2, 3]], 0, waited=(3,))] == [3]


@pytest.mark.parametrize("policy", POLICIES.values(), ids=lambda policy: policy.__name__)
def test_a_policy_is_one_class_of_under_thirty_lines(policy: type[ReplacementPolicy]):
    assert len(inspect.getsource(policy).rstrip().splitlines()) < 30
    assert policy.__doc__


def test_an_unknown_policy_is_a_sentence():
    with pytest.raises(UserError, match=r"FIFO, LRU, RANDOM, LFU, LFRU, found 'MRU'"):
        make_policy("MRU")


@pytest.mark.skipif(not SHARED_TRACES.is_dir(), reason="the public routing traces are not here")
def test_qwen3_hit_rate_is_the_published_one():
    trace = read_trace(SHARED_TRACES / "qwen3_30b_a3b.route.csv")
    cache = ExpertCache(trace.n_layers, 16, make_policy("LRU"))
    for one_pass in trace.passes:
        for layer, ids in enumerate(one_pass.ids):
            if one_pass.phase == "prefill":
                fetches = cache.warm(layer, ids, 10**9)
            else:
                slots = cache.lookup(layer, ids[0])
                missed = [e for e, slot in zip(ids[0], slots, strict=True) if slot < 0]
                fetches = cache.start_fetches(layer, missed, 10**9)
                cache.end_step(layer)
            for _, slot in fetches:
                cache.mark_ready(slot)
    assert 100 * cache.hits / (cache.hits + cache.misses) == pytest.approx(61, abs=1)


def test_every_policy_can_be_asked_for():
    assert tuple(POLICIES) == config.POLICIES
