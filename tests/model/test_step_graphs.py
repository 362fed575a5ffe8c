"""Recorded decode steps on a pretended GPU, whose graphs are acted out on host tensors."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from against_transformers import greedy, prepared
from host_graph import HostGraph
from pretended_gpu import pretended_gpu
from pretended_kernels import PretendedKernels, pretend_kernels
from tiny_models import CONFIGS, build_model, nemotron_h, write_hub

from moe_offload.checkpoint.prepared import read_manifest
from moe_offload.config import CacheOptions, GenerationOptions, ModelOptions
from moe_offload.engine import engine as engine_module
from moe_offload.engine import probes
from moe_offload.engine.calibration import Calibration
from moe_offload.engine.check import check_engine
from moe_offload.engine.engine import Engine
from moe_offload.engine.loading import load_engine
from moe_offload.experts.recorded import RecordedStep
from moe_offload.experts.recorder import Recorder
from moe_offload.model import graph_recorder, graphed_step, step_graphs
from moe_offload.model.generation import Request, cache_argument, generate
from moe_offload.model.kv_cache import PrefixCache, make_cache
from moe_offload.model.loader import PreparedModel

FIRST, SECOND = [5, 17, 40, 8, 22, 71], [9, 33, 12]
N_TOKENS = 8
CUDA = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here"),
]
# Texts of 14 tokens outgrow the window, and the short texts of this rotary embedding.
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_mscale": 1.1, "long_mscale": 1.3}
LONG |= {"short_factor": [1.0] * 4, "long_factor": [1.0, 1.3, 2.5, 4.0]}
CHANGES = {
    "gpt_oss": {"sliding_window": 5},
    "phimoe": {"rope_parameters": {**LONG, "original_max_position_embeddings": 10}},
}


@pytest.fixture(autouse=True)
def _short_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "_STEP_BUDGET_S", 0.01)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _folder("mixtral", tmp_path_factory.mktemp("step-graphs"))


def _folder(name: str, root: Path) -> Path:
    write_hub(build_model(CONFIGS[name](**CHANGES.get(name, {}))), root / name)
    return prepared(root / name, root / f"{name}-fp32", "--hf", "--expert-dtype", "fp32")


def load(
    folder: Path, device: str = "cuda", say: Any = None, cache: Any = None, **options: Any
) -> Engine:
    return load_engine(
        PreparedModel(read_manifest(folder)),
        ModelOptions(folder, device=device, **options),
        CacheOptions(**{"n_indexes": 2, "n_ways": 2, "policy": "LRU"} | (cache or {})),
        Recorder(),
        say=say,
    )


def on_cpu(folder: Path, *batches: list[list[int]]) -> list[list[list[int]]]:
    with load(folder, "cpu") as engine:
        return [greedy(engine.model, batch, N_TOKENS) for batch in batches]


def steps(engine: Engine, text: list[int], n: int) -> None:
    """`n` steps behind a prompt, each from a token of its own."""
    name, cache = cache_argument(engine.model), make_cache(engine.model.config, 100)
    for step in range(n + 1):
        ids = text if step == 0 else [(7 * step) % 90]
        n_held = cache.get_seq_length()
        engine.model(
            input_ids=torch.tensor([ids], device=engine.device),
            position_ids=torch.arange(n_held, n_held + len(ids), device=engine.device)[None],
            use_cache=True, **{name: cache},
        )  # fmt: skip


def graph_notes(engine: Engine) -> list[str]:
    return [note for note in engine.notes if "CUDA graphs" in note]


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss", "phimoe"])
def test_replayed_steps_give_the_same_text(name, tmp_path, monkeypatch):
    """Of several prompts and batches: each has its own positions, mask and keys.

    gpt-oss has windows beside full attention, and no attention of torch's; Phi-3.5-MoE asks how
    long the text is, by which it turns queries and keys, so that texts of a batch go one by one.
    """
    folder = _folder(name, tmp_path)
    batches = [FIRST], [SECOND], [FIRST, SECOND], [FIRST]
    expected = on_cpu(folder, *batches)
    with pretended_gpu(monkeypatch), load(folder) as engine:
        assert [greedy(engine.model, batch, N_TOKENS) for batch in batches] == expected
        # Each batch size is rehearsed and recorded once; one sequence, after two, once more.
        n_texts, n_sizes = (5, 1) if name == "phimoe" else (4, 3)
        n_steps = n_texts * (N_TOKENS - 1)
        assert engine.graphs.replayed == n_steps - n_sizes * 2
        assert graph_notes(engine) == []
        recorder = engine.dispatcher.recorder
        passes = recorder.pass_table()
        assert len(recorder.layer_table()) == len(passes) * engine.store.n_layers
        assert passes["decode"].sum() == n_steps


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mixtral", {}),
        ("qwen3_moe", {}),
        ("deepseek_v3", {"n_indexes": 0, "n_ways": 0}),
        ("mixtral", {"n_ways": 1, "miss_policy": "fetch"}),
        ("mixtral", {"n_indexes": 1}),
    ],
)
def test_recorded_experts_do_what_others_do(name, options, tmp_path, monkeypatch):
    """The same text, hits, copies and bytes: with misses, without, waited for, not cached."""
    folder = _folder(name, tmp_path)
    batches = [FIRST], [SECOND], [FIRST, SECOND], [FIRST]
    expected = on_cpu(folder, *batches)
    tables = []
    with pretended_gpu(monkeypatch) as seen:
        pretend_kernels(monkeypatch, seen)
        for is_recorded in (True, False):
            with load(folder, cache=options) as engine:
                engine.graphs.records_experts = is_recorded
                assert [greedy(engine.model, batch, N_TOKENS) for batch in batches] == expected
                assert (engine.graphs._recorded.memory is not None) == is_recorded
                assert engine.graphs.replayed > 2 * N_TOKENS
                assert graph_notes(engine) == []
                assert engine.dispatcher.recorded is None
                table = engine.dispatcher.recorder.layer_table()
                counted = [n for n in table.dtype.names if not n.endswith("_us")]
                tables.append(table[counted])
                assert (table["gpu_us"] > 0).any() == (engine.accelerator is not None)
    assert (tables[0] == tables[1]).all()
    assert options.get("n_ways") == 0 or tables[0]["hits"].sum() > 0


def test_a_replayed_step_sends_nothing_but_experts_and_waits_once_a_layer(folder, monkeypatch):
    """And starts no copy into a slot that hits may still be computed from."""
    with pretended_gpu(monkeypatch) as seen:
        pretend_kernels(monkeypatch, seen)
        with load(folder) as engine:
            accelerator, dispatcher = engine.accelerator, engine.dispatcher
            run, replay, fetch = dispatcher.run, accelerator.gpu.replay, accelerator.fetcher.fetch
            reading: set[int] = set()
            n_fetched = n_hit = 0

            def watched(*call: Any) -> Any:
                if dispatcher.recorded is None:  # the prompt, the rehearsal
                    return run(*call)
                seen.clear()
                out = run(*call)
                assert (seen.waits, seen.to_host) == (["stream"], [])
                others = [n for n in seen.to_gpu if n != engine.store.layouts[0].block_bytes]
                assert others == []
                return out

            def noted(*call: Any) -> Any:
                nonlocal n_hit
                reading.update(dispatcher.recorded.memory.slots.tolist())
                n_hit += 1
                return replay(*call)

            def waited(step: RecordedStep) -> None:
                begin(step)
                reading.clear()  # the stream has been waited for

            def checked(slot: int, source: torch.Tensor) -> None:
                nonlocal n_fetched
                assert slot not in reading
                n_fetched += 1
                fetch(slot, source)

            begin = RecordedStep.begin
            monkeypatch.setattr(RecordedStep, "begin", waited)
            monkeypatch.setattr(accelerator.gpu, "replay", noted)
            monkeypatch.setattr(accelerator.fetcher, "fetch", checked)
            before = engine.graphs.replayed
            dispatcher.run = watched
            with torch.inference_mode():
                steps(engine, SECOND, 40)
            assert engine.graphs.replayed - before > 30
            assert n_hit > 10 and n_fetched > 10


def test_recorded_experts_follow_a_forced_routing(folder, monkeypatch):
    class Forced:
        def begin_pass(self, decode: bool, n_tokens: int) -> None:
            self.n = 0 if not hasattr(self, "n") else self.n + 1

        def choose(self, layer: int, index: Any, weights: Any) -> tuple[Any, Any]:
            ids = (torch.arange(index.numel()) + layer + self.n).reshape(index.shape) % 4
            return ids.to(index.device), torch.full_like(weights, 0.25)

    def text(device: str) -> list[list[int]]:
        with load(folder, device) as engine:
            engine.dispatcher.forced_routing = Forced()
            found = greedy(engine.model, [FIRST], 2 * N_TOKENS)
            if device == "cuda":
                assert engine.graphs._recorded.memory is not None
                assert engine.graphs.replayed == 2 * N_TOKENS - 3
            return found

    expected = text("cpu")
    with pretended_gpu(monkeypatch) as seen:
        pretend_kernels(monkeypatch, seen)
        assert text("cuda") == expected


def test_experts_that_cannot_be_recorded_are_launched_between_graphs(folder, monkeypatch):
    def refused(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such node")

    expected = on_cpu(folder, [FIRST], [SECOND])
    with pretended_gpu(monkeypatch) as seen:
        pretend_kernels(monkeypatch, seen)
        monkeypatch.setattr(PretendedKernels, "grouped_by", refused)
        with load(folder) as engine:
            texts = [greedy(engine.model, [text], N_TOKENS) for text in (FIRST, SECOND)]
            assert texts == expected
            assert graph_notes(engine) == ["experts are not recorded as CUDA graphs: no such node"]
            assert engine.graphs._recorded.memory is None
            assert engine.graphs.replayed > N_TOKENS


@pytest.mark.parametrize("n_replays", [1, 2, 6])
def test_a_graph_that_finds_no_room_when_first_replayed_is_done_without(
    n_replays, folder, monkeypatch
):
    """A layer's routing, its hits, the next one's sum."""
    expected = on_cpu(folder, [FIRST], [SECOND])
    replay, calls = HostGraph.replay, []

    def fails_once(graph: HostGraph) -> None:
        calls.append(graph)
        if len(calls) == n_replays:
            raise RuntimeError("CUDA out of memory")
        replay(graph)

    with pretended_gpu(monkeypatch) as seen:
        pretend_kernels(monkeypatch, seen)
        monkeypatch.setattr(HostGraph, "replay", fails_once)
        with load(folder) as engine:
            calls.clear()  # a calibration's
            texts = [greedy(engine.model, [text], N_TOKENS) for text in (FIRST, SECOND)]
            assert texts == expected
            (note,) = graph_notes(engine)
            assert note == "experts are not recorded as CUDA graphs: CUDA out of memory"
            assert engine.graphs.replayed > N_TOKENS


def test_what_a_broken_off_step_has_begun_ends_before_its_memory_is_anothers(folder, monkeypatch):
    """Hits read their slots from it: anything else there would be an address."""
    with pretended_gpu(monkeypatch) as seen:
        pretend_kernels(monkeypatch, seen)
        with load(folder) as engine, torch.inference_mode():
            steps(engine, FIRST, 4)
            assert engine.graphs._recorded.memory is not None

            def interrupted(*_: Any) -> None:
                seen.waits.clear()
                raise KeyboardInterrupt

            monkeypatch.setattr(RecordedStep, "combine", interrupted)
            with pytest.raises(KeyboardInterrupt):
                steps(engine, FIRST, 4)
            assert seen.waits == ["stream"] and engine.graphs._recorded is None


def test_another_cache_is_served_by_graphs_of_its_own(folder, monkeypatch):
    """The old ones read slots that are gone."""
    expected = on_cpu(folder, [FIRST], [FIRST])
    with pretended_gpu(monkeypatch) as seen:
        pretend_kernels(monkeypatch, seen)
        with load(folder) as engine:
            texts = [greedy(engine.model, [FIRST], N_TOKENS)]
            old, allocate = weakref.ref(engine.accelerator.gpu), engine._slots

            def alone(n_slots: int) -> Any:
                assert old() is None  # else there may be no room for both
                return allocate(n_slots)

            engine._slots = alone
            engine.use_cache(CacheOptions(n_indexes=2, n_ways=1, policy="FIFO"))
            texts.append(greedy(engine.model, [FIRST], N_TOKENS))
            assert texts == expected
            engine.use_cache(CacheOptions())
            assert [greedy(engine.model, [FIRST], N_TOKENS)] == expected[:1]
            assert engine.graphs.replayed > 0


def test_what_is_known_to_have_no_graphs_stays_eager_and_a_note_says_why(tmp_path, monkeypatch):
    """A model with recurrent states."""
    write_hub(build_model(nemotron_h()), tmp_path / "hub")
    folder = prepared(tmp_path / "hub", tmp_path / "prepared", "--hf")
    expected = on_cpu(folder, [FIRST])
    with pretended_gpu(monkeypatch), load(folder) as engine:
        (note,) = graph_notes(engine)
        assert "keep keys of all tokens or of a window's" in note
        assert [greedy(engine.model, [FIRST], N_TOKENS)] == expected
        assert engine.graphs.replayed == 0


def test_what_a_rehearsal_finds_stays_eager_and_is_said(folder, monkeypatch):
    """A model that asks the device outside of any part; the rehearsal is not counted."""
    expected = on_cpu(folder, [FIRST], [SECOND])
    said: list[str] = []
    with pretended_gpu(monkeypatch), load(folder, say=said.append) as engine:
        body = engine.model.model
        forward = body.forward

        def asking(**inputs: Any) -> Any:
            assert inputs["input_ids"].max() < 1000
            return forward(**inputs)

        body.forward = asking
        assert [greedy(engine.model, [text], N_TOKENS) for text in (FIRST, SECOND)] == expected
        (note,) = graph_notes(engine)
        assert "the host would wait" in note and note in said
        assert engine.graphs.replayed == 0
        recorder = engine.dispatcher.recorder
        assert len(recorder.layer_table()) == 2 * N_TOKENS * engine.store.n_layers


def test_what_only_static_keys_break_stays_eager(folder, monkeypatch):
    def update(*_: Any, **__: Any) -> None:
        raise TypeError("no such keyword")

    expected = on_cpu(folder, [FIRST])
    monkeypatch.setattr(graphed_step._StaticLayer, "update", update)
    with pretended_gpu(monkeypatch), load(folder) as engine:
        assert [greedy(engine.model, [FIRST], N_TOKENS)] == expected
        assert graph_notes(engine) == [
            "decode steps are not recorded as CUDA graphs: no such keyword"
        ]


@pytest.mark.parametrize(
    ("owner", "name"), [(step_graphs, "GraphedStep"), (graphed_step.GraphedStep, "_take_in")]
)
def test_without_room_for_what_graphs_read_steps_stay_eager(owner, name, folder, monkeypatch):
    """For their inputs, or for the keys."""

    def none_left(*_: Any, **__: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    expected = on_cpu(folder, [FIRST])
    monkeypatch.setattr(owner, name, none_left)
    with pretended_gpu(monkeypatch), load(folder) as engine:
        assert [greedy(engine.model, [FIRST], N_TOKENS)] == expected
        assert graph_notes(engine) == [
            "decode steps are not recorded as CUDA graphs: CUDA out of memory"
        ]


@pytest.mark.parametrize("error", [graphed_step.NotRecordedError, KeyboardInterrupt])
def test_what_follows_a_failed_recording_waits_for_its_work(error, monkeypatch):
    """It was launched on another stream, and the memory it uses is free for the next."""
    waits: list[tuple[str, str]] = []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: Any) -> None:
            waits.append((self.name, other.name))

    with pretended_gpu(monkeypatch):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream("before"))
        device = torch.device("cuda", 0)
        with pytest.raises(error), graph_recorder.working_in(Stream("recorded"), device):
            raise error
    assert waits == [("recorded", "before"), ("before", "recorded")]


def test_graphs_take_no_more_room_for_keys_than_was_reserved(folder, monkeypatch):
    """A cache's own, once more; a text beyond it is no business of theirs."""
    room = 10
    with pretended_gpu(monkeypatch), load(folder) as engine, torch.inference_mode():
        name, cache = cache_argument(engine.model), make_cache(engine.model.config, room)
        for n_held in range(room + 3):
            engine.model(
                input_ids=torch.tensor([[5]], device=engine.device),
                position_ids=torch.tensor([[n_held]], device=engine.device),
                use_cache=True, **{name: cache},
            )  # fmt: skip
            if n_held == room - 1:
                assert engine.graphs._recorded.capacity == room
        assert cache.get_seq_length() == room + 3
        assert engine.graphs.replayed == room - 1 - 2  # a prompt, a rehearsal and a recording
        assert graph_notes(engine) == []


def test_a_text_outgrows_its_graphs_and_they_are_recorded_anew(folder, monkeypatch):
    monkeypatch.setattr(graphed_step, "_FEWEST_KEYS", 8)
    monkeypatch.setattr(graphed_step, "_SPARE_KEYS", 4)
    n_tokens = 30
    with load(folder, "cpu") as engine:
        expected = greedy(engine.model, [FIRST], n_tokens)
    with pretended_gpu(monkeypatch), load(folder) as engine:
        assert greedy(engine.model, [FIRST], n_tokens) == expected
        # 16 keys serve the steps behind 6 to 15 tokens, 32 those behind 16 to 31, then 64.
        assert engine.graphs.replayed == 29 - 3 * 2


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_prompts_take_turns_in_a_batch(name, tmp_path, monkeypatch):
    """Rows come, go and are aligned anew: what was recorded has to follow the cache."""
    folder = _folder(name, tmp_path)
    texts = [FIRST, SECOND, [7, 7, 50, 3], FIRST[::-1]]

    def answers(device: str) -> list[list[int]]:
        requests = [
            Request(number, ids, GenerationOptions(max_tokens=5 + 3 * number))
            for number, ids in enumerate(texts)
        ]
        with load(folder, device) as engine:
            found = {one.prompt: one.ids for one, _ in generate(engine.model, requests, 2)}
            assert device == "cpu" or engine.graphs.replayed > 5
        return [found[number] for number in range(len(texts))]

    expected = answers("cpu")
    with pretended_gpu(monkeypatch):
        assert answers("cuda") == expected


def test_conversations_in_turn_keep_their_keys(folder, monkeypatch):
    """Both lie where the graphs read in turn, whose memory the other's steps write."""

    def turns(device: str) -> list[list[int]]:
        with load(folder, device) as engine, torch.inference_mode():
            name = cache_argument(engine.model)
            caches = [make_cache(engine.model.config, 100) for _ in range(2)]
            texts = [list(FIRST), list(SECOND)]
            for number in (0, 1, 0, 1, 0):
                text, cache = texts[number], caches[number]
                for step in range(5):
                    n_held = cache.get_seq_length()
                    ids = torch.tensor([text[n_held:]], device=engine.device)
                    places = torch.arange(n_held, len(text), device=engine.device)[None]
                    output = engine.model(
                        input_ids=ids, position_ids=places, use_cache=True, **{name: cache}
                    )
                    text.append(int(output.logits[0, -1].argmax()))
                    if step == 4 and number == 0:  # another wording of the last two tokens
                        cache.crop(-2)
                        text[-3:] = [11, 12, 13]
            assert device == "cpu" or engine.graphs.replayed > 8
        return texts

    expected = turns("cpu")
    with pretended_gpu(monkeypatch):
        assert turns("cuda") == expected


@pytest.mark.parametrize("again", [FIRST, FIRST[:3]])
def test_a_conversation_begun_again_keeps_the_keys_that_it_shares(again, folder, monkeypatch):
    """All but its last token are held, where the graphs read: that token alone is evaluated."""

    def answers(device: str) -> list[list[int]]:
        found = []
        with load(folder, device) as engine, torch.inference_mode():
            lent = PrefixCache(engine.model, 100)
            for prompt in (FIRST, again):
                text = list(prompt)
                cache, n_held = lent.take(text)
                while len(text) < len(prompt) + N_TOKENS:
                    output = engine.model(
                        input_ids=torch.tensor([text[n_held:]], device=engine.device),
                        position_ids=torch.arange(n_held, len(text), device=engine.device)[None],
                        use_cache=True, **{cache_argument(engine.model): cache},
                    )  # fmt: skip
                    n_held = len(text)
                    text.append(int(output.logits[0, -1].argmax()))
                lent.keep(cache, text)
                found.append(text)
            assert device == "cpu" or engine.graphs.replayed == 2 * N_TOKENS - 3
        return found

    expected = answers("cpu")
    with pretended_gpu(monkeypatch):
        assert answers("cuda") == expected


def test_an_answers_scores_are_not_written_by_the_next_step(folder, monkeypatch):
    with pretended_gpu(monkeypatch), load(folder) as engine, torch.inference_mode():
        name, outputs = cache_argument(engine.model), []
        cache = make_cache(engine.model.config, 100)
        eager = engine.graphs._eager

        def with_routers(**inputs: Any) -> Any:
            output = eager(**inputs)
            output.aux_loss, output.router_logits = output.logits.sum(), (2 * output.logits,)
            return output

        engine.graphs._eager = with_routers
        for n_held, ids in enumerate(([5], [6], [7], [8], [9])):
            output = engine.model(
                input_ids=torch.tensor([ids], device=engine.device),
                position_ids=torch.tensor([[n_held]], device=engine.device),
                use_cache=True, **{name: cache},
            )  # fmt: skip
            scores = output.logits, output.aux_loss, *output.router_logits
            outputs += [(one, one.clone()) for one in scores]
            assert output[name] is cache
        assert engine.graphs.replayed == 2
        assert all(torch.equal(kept, then) for kept, then in outputs)


def test_an_error_of_the_experts_is_raised_and_ends_no_recording(folder, monkeypatch):
    expected = on_cpu(folder, [SECOND])
    with pretended_gpu(monkeypatch), load(folder) as engine:
        run, calls = engine.dispatcher.run, []

        def fails_once(layer, *routing):
            calls.append(layer)
            if len(calls) == 6:  # behind a prompt and a rehearsal: in what is to be recorded
                raise RuntimeError("the experts failed")
            return run(layer, *routing)

        engine.dispatcher.run = fails_once
        with pytest.raises(RuntimeError, match="the experts failed"):
            greedy(engine.model, [FIRST], N_TOKENS)
        assert graph_notes(engine) == []
        assert [greedy(engine.model, [SECOND], N_TOKENS)] == expected
        assert engine.graphs.replayed == N_TOKENS - 3


def test_a_calibration_times_replayed_steps_and_keeps_none_of_them(folder, monkeypatch):
    """And leaves no mark of them: a layer's spans are those of the text's own graphs."""
    expected = on_cpu(folder, [FIRST])
    with pretended_gpu(monkeypatch), load(folder) as engine:
        for _ in range(6):
            engine.decode_step()
        assert engine.graphs.replayed == 6 - 3  # a prompt, a rehearsal, a recording
        layers = []
        engine.dispatcher.on_layer.append(lambda: layers.append(engine.dispatcher._next_layer))
        engine.decode_step()
        assert layers == list(range(engine.store.n_layers))
        assert [greedy(engine.model, [FIRST], N_TOKENS)] == expected
        engine.calibrate(again=True)
        assert engine.graphs.replayed == 0 and engine.graphs._recorded is None
        assert graph_notes(engine) == []


def test_a_calibrations_text_begins_anew_where_it_is_full(folder, monkeypatch):
    monkeypatch.setattr(engine_module, "_STEPS_TOKENS", 5)
    with pretended_gpu(monkeypatch), load(folder) as engine:
        for _ in range(12):
            engine.decode_step()
        assert engine.graphs.replayed == 12 - 3 - 2  # three prompts


def test_costs_with_and_without_graphs_are_kept_apart(folder, monkeypatch):
    shapes: list[dict[str, Any]] = []
    costs = Calibration.costs

    def noted(self: Calibration, *args: Any) -> Any:
        shapes.append(self._shape())
        return costs(self, *args)

    monkeypatch.setattr(Calibration, "costs", noted)
    with pretended_gpu(monkeypatch):
        for setting in ("auto", "off"):
            load(folder, cuda_graphs=setting).close()
    assert [shape.pop("cuda_graphs") for shape in shapes] == [True, False]
    assert shapes[0] == shapes[1]


def test_transformers_own_generate_is_served_and_goes_on_with_a_text(folder, monkeypatch):
    """It keeps no gradients, in another mode than graphs write in: what they wrote it may read."""

    def turns(device: str) -> list[int]:
        with load(folder, device) as engine:
            cache = {cache_argument(engine.model): make_cache(engine.model.config, 60)}
            text = list(FIRST)
            for _ in range(3):
                ids = torch.tensor([text], device=engine.device)
                made = engine.model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False,
                    eos_token_id=None, pad_token_id=0, **cache,
                )  # fmt: skip
                text = [*made[0].tolist(), *SECOND]
            assert device == "cpu" or engine.graphs.replayed == 3 * 5 - 2
        return text

    expected = turns("cpu")
    with pretended_gpu(monkeypatch):
        assert turns("cuda") == expected


def test_the_check_is_of_replayed_steps(folder, monkeypatch):
    with pretended_gpu(monkeypatch), load(folder) as engine:
        found = check_engine(engine, [FIRST, SECOND], N_TOKENS)
        assert found.is_right, list(found.lines())
        n_steps = 2 * (N_TOKENS - 1)
        line = f"CUDA graphs: {n_steps - 2} of {n_steps} decode steps were replayed"
        assert line in found.lines()
        run = engine.dispatcher.run

        def wrong_if_replayed(*routing: Any) -> Any:
            return run(*routing) * (1 + (engine.graphs.replayed > n_steps))

        engine.dispatcher.run = wrong_if_replayed
        found = check_engine(engine, [FIRST, SECOND], N_TOKENS)
        assert [one.layer for one in found.wrong_layers] == list(range(engine.store.n_layers))


def test_graphs_are_off_when_asked_and_where_there_is_no_gpu(folder, monkeypatch):
    with load(folder, "cpu") as engine:
        assert engine.graphs is None
        kv_bytes = engine.kv_bytes
    with pretended_gpu(monkeypatch):
        with load(folder, cuda_graphs="off") as engine:
            assert engine.graphs is None and engine.kv_bytes == kv_bytes
        with load(folder) as engine:  # a prompt's keys beside those that graphs read
            assert engine.kv_bytes == 2 * kv_bytes


def test_what_is_no_tensor_is_stale_in_an_acted_graph():
    """What these tests rest on: the acted graph is as strict as CUDA's."""
    place, step, out = torch.zeros(1), 1, torch.zeros(1)
    graph = HostGraph()
    graph.capture_begin()
    total = place + step
    out.add_(total)
    graph.capture_end()
    assert total.isnan() and out == 0
    place.fill_(5)
    step = 7
    graph.replay()
    assert (total, out) == (6, 6)
    graph.replay()
    assert (total, out) == (6, 12)
    with pytest.raises(RuntimeError, match="capturing"):
        HostGraph().capture_begin()
        try:
            place.item()
        finally:
            torch.utils._python_dispatch._pop_mode()


class TestCuda:
    pytestmark = CUDA

    @pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "phimoe"])
    def test_replayed_steps_give_the_cpus_text(self, name, tmp_path):
        """Of windows that are outgrown, and of a module that runs between two graphs."""
        folder = _folder(name, tmp_path)
        batches = [FIRST], [SECOND], [FIRST, SECOND]
        expected = on_cpu(folder, *batches)
        with load(folder) as engine:
            assert [greedy(engine.model, batch, N_TOKENS) for batch in batches] == expected
            assert engine.graphs.replayed > N_TOKENS
            assert graph_notes(engine) == []
