"""Trace files: three formats, one meaning; everything malformed is a sentence with its line."""

import os
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from written_trace import write_trace

from moe_offload.errors import UserError
from moe_offload.experts.cache import ExpertCache, make_policy
from moe_offload.simulation.replay import replay
from moe_offload.simulation.trace_files import TraceReader, read_trace
from moe_offload.simulation.traces import Routing, RoutingPass, TraceInfo

DECODE = RoutingPass("decode", (((0, 1),), ((2, 3),)))
ROUTE = """# route_trace v1
# model=/models/tiny.gguf arch=x n_layer=2 n_expert=4 n_expert_used=2
# layer=0 expert_bytes=1000 dense_bytes=9
# layer=1 expert_bytes=2000 dense_bytes=9
turn,phase,step,layer,slot,expert,weight,residency,expert_bytes
0,0,0,0,0,3,0.5,0,1
0,0,0,0,1,1,0.5,0,1
0,0,1,0,0,2,0.5,0,1
0,0,1,0,1,0,0.5,0,1
0,0,1,1,0,0,0.5,0,1
0,0,1,1,1,1,0.5,0,1
0,1,0,0,0,0,0.5,0,1
0,1,0,0,1,1,0.5,0,1
0,1,0,1,0,2,0.5,0,1
0,1,0,1,1,3,0.5,0,1
"""
ROUTE_300 = """turn,phase,step,layer,slot,expert
0,0,0,0,0,3
0,0,0,0,1,1
0,1,0,0,0,2
0,1,0,0,1,255
0,1,1,0,0,300
0,1,1,0,1,1
"""
CHOICES = "Index,Block_0,Block_0,Block_1,Block_1\n0\n1,0,1,2,3\n2,0,2,1,3\n"
JSON = (
    '{"routing_trace": 1, "model": "tiny", "n_layers": 2, "top_k": 2, "n_experts": 4}\n'
    '{"phase": "prefill", "ids": [[[0, 1], [1, 2]], [[2, 3], [3, 1]]]}\n'
    '{"phase": "decode", "ids": [[[0, 1]], [[2, 3]]]}\n'
)


def write(folder: Path, text: str, name: str = "trace") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_expert_choices(tmp_path):
    trace = read_trace(write(tmp_path, CHOICES, "tiny.expert_choices.csv"))
    assert (trace.info.model, trace.n_layers, trace.info.top_k, trace.n_experts) == (
        "tiny", 2, 2, 4
    )  # fmt: skip
    assert trace.passes[0] == RoutingPass("prefill", ())
    assert trace.passes[1] == DECODE
    assert trace.passes[2].ids == (((0, 2),), ((1, 3),))
    assert not trace.info.notes and not trace.info.synthetic


def test_rows_win_over_the_references_header_of_32_layers(tmp_path):
    header = "Index," + ",".join(f"Block_{n},Block_{n}" for n in range(32))
    trace = read_trace(write(tmp_path, f"{header}\n0\n1" + ",4,5" * 40 + "\n"))
    assert trace.n_layers == 40
    assert "32 layers and the rows hold 40" in trace.info.notes[0]


def test_prompts_and_batches_of_our_own_choices_file(tmp_path):
    text = (
        "Index,Block_0,Block_0,Block_1,Block_1,Prompt\n"
        "0,,,,,3\n1,0,1,2,3,3\n1,4,5,6,7,4\n2,0,1,2,3,3\n"
    )
    passes = read_trace(write(tmp_path, text)).passes
    assert [one.prompt for one in passes] == [3, 3, 3]
    assert passes[1].ids == (((0, 1), (4, 5)), ((2, 3), (6, 7)))
    assert len(passes[2].ids[0]) == 1


def test_the_routing_beside_a_runs_choices_brings_the_prompts(tmp_path):
    choices = write(tmp_path, CHOICES, "expert_choices.partial.csv")
    beside = tmp_path / "routing.partial.jsonl"
    passes = [
        RoutingPass("prefill", (((4, 1), (2, 0)), ((0, 1), (3, 2))), waited=((4,), ())),
        *list(read_trace(choices).passes)[1:],
    ]
    info = TraceInfo("run", n_layers=2, top_k=2, n_experts=8)
    write_trace(beside, info, passes)
    trace = read_trace(choices)
    assert list(trace.passes) == passes and (trace.info.model, trace.n_experts) == ("run", 8)
    assert trace.info.notes == (f"{beside} was read: it has the prompts' tokens too",)
    others = passes[:2], [passes[0], passes[2], passes[1]], passes[1:], [*passes, passes[1]]
    for of_another_run in others:
        write_trace(beside, info, of_another_run)
        trace = read_trace(choices)
        assert trace.passes[0] == RoutingPass("prefill", ()) and len(trace.passes) == 3
        assert trace.info.notes == (f"prompts are left out: {beside} is of another run",)
    beside.write_text(JSON + "{oops")
    assert "prompts are left out: " in read_trace(choices).info.notes[0]
    assert "line 4: expected a JSON object" in read_trace(choices).info.notes[0]


def test_columns_behind_the_ids_are_passed_over(tmp_path):
    """As files of earlier versions have them."""
    text = "Index,Block_0,Block_0,Prefill_0\n0,,,3:1 0:2*\n1,0,1\n2,1,2\n"
    passes = read_trace(write(tmp_path, text)).passes
    assert passes[0] == RoutingPass("prefill", ())
    assert [one.ids for one in passes][1:] == [(((0, 1),),), (((1, 2),),)]


@pytest.mark.parametrize("first", ["Index,Block_0,Block_0\n1,300,1\n", ROUTE_300])
def test_an_id_of_two_bytes_beside_smaller_ones(tmp_path, first):
    """In the prompt or after it, whatever came before."""
    trace = read_trace(write(tmp_path, first))
    assert trace.n_experts == 301
    assert trace.passes[-1].ids[0][0] == (300, 1)


def test_what_cannot_be_read_twice_is_no_trace(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(UserError, match="found a folder, device or pipe"):
            TraceReader(path)


def test_any_top_k(tmp_path):
    text = "Index,Block_0,Block_0,Block_0\n1,0,1,2\n"
    assert read_trace(write(tmp_path, text)).passes[0].ids == (((0, 1, 2),),)


def test_route_csv(tmp_path):
    trace = read_trace(write(tmp_path, ROUTE))
    assert trace.info.model == "tiny"
    assert (trace.n_layers, trace.n_experts) == (2, 4)
    prompt, decode = trace.passes
    assert prompt.phase == "prefill"
    assert prompt.ids == (((3, 1), (2, 0)), ((0, 1),))  # the last layer saw the last token alone
    assert decode == DECODE
    quantised = write(tmp_path, ROUTE.replace("tiny.gguf", "tiny.Q4_K.gguf"))
    assert read_trace(quantised).info.model == "tiny.Q4_K"


def test_json_lines_round_trip(tmp_path):
    trace = read_trace(write(tmp_path, JSON))
    assert trace.passes[1] == DECODE
    write_trace(tmp_path / "copy.jsonl", trace.info, trace.passes)
    assert read_trace(tmp_path / "copy.jsonl") == trace


def test_synthetic_stays_synthetic(tmp_path):
    assert read_trace(write(tmp_path, CHOICES, "synthetic_x.expert_choices.csv")).info.synthetic
    trace = read_trace(write(tmp_path, JSON.replace('"model"', '"synthetic": true, "model"')))
    assert trace.info.synthetic


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "line 1: expected a routing trace"),
        ("hello,world\n", "line 1: expected a routing trace .* found 'hello,world'"),
        ("Index,a,b\n1,2,3\n", "line 1: expected the header Index,Block_0"),
        (CHOICES + "3,0,1,2\n", r"line 5: expected 2 expert ids for each token, found \[2\]"),
        (CHOICES + "3,0,1,2,3,1,2\n", "line 5: expected 2 layers, found 3"),
        (CHOICES + "3,0,x,2,3\n", "line 5: expected whole numbers of 0 to .*, found .*'x'"),
        (CHOICES + "3,0,-1,2,3\n", "line 5: expected whole numbers of 0 to .*, found .*'-1'"),
        (CHOICES + "3,0,65536,2,3\n", "line 5: expected distinct expert ids of 0 to 65535, found"),
        (CHOICES + "3,1,1,2,3\n", r"line 5: expected distinct expert ids of .*, found \[1, 1\]"),
        ("Index,Block_0,Block_0\n1,0,1,2\n", "line 2: expected 2 expert ids for each token"),
        ("Index,Block_0,Block_0\n0\n", "at least one decoded token"),
        (ROUTE.replace("turn,phase", "turn,faze"), "line 1: expected a routing trace|line 5"),
        (ROUTE + "0,1,1,0,0,1,0.5,0\n", "line 16: expected 9 columns, found 8"),
        (ROUTE + "0,1,1,0,0,4,0.5,0,1\n", r"line 16: .* expert ids of 0 to 3, found \[4\]"),
        (ROUTE + "0,1,1,-2,0,1,0.5,0,1\n", "line 16: .* whole numbers of .*, found .*'-2'"),
        (ROUTE + "0,2,1,0,0,1,0.5,0,1\n", "line 16: expected phase 0"),
        (ROUTE + "9" * 30 + ",1,1,0,0,1,0.5,0,1\n", "line 16: expected whole numbers of 0 to 115"),
        (ROUTE + "0,1,1,0,0," + "9" * 5000 + ",0.5,0,1\n", "line 16: expected whole numbers of"),
        (
            JSON + '{"phase": "decode", "ids": [[[0, ' + "9" * 30 + "]], [[1, 2]]]}\n",
            r"line 4: expected distinct expert ids of 0 to 3, found \[0, 9999999999",
        ),
        (
            JSON.replace('"n_experts": 4', '"n_experts": 1000000000'),
            "line 1: expected whole numbers of 1 to 65536, found",
        ),
        (JSON + "[" * 100_000 + "\n", "line 4: expected a JSON object"),
        (JSON + '{"phase": "prefill", "ids": [], "prompt": 1e40}\n', "line 4: expected whole"),
        (ROUTE + "0,1,1,0,1,1,0.5,0,1\n", "line 16: expected slot 0 next, found 1"),
        (ROUTE + "0,1,1,0,0,1,0.5,0,1\n", "line 16: expected 2 layers, found 1"),
        ('{"phase": "decode", "ids": [[[]]]}\n', "line 1: expected 1 expert ids for each token"),
        (JSON + "{oops\n", "line 4: expected a JSON object"),
        (JSON + '{"phase": "dream", "ids": []}\n', 'line 4: expected "phase" of prefill or decode'),
        (JSON + '{"phase": "decode", "ids": [[0, 1]]}\n', r'line 4: .* "ids" as \[layer\]'),
        (JSON + '{"phase": "decode", "ids": [[[0, 1]]]}\n', "line 4: expected 2 layers, found 1"),
        (JSON + '{"phase": "decode", "ids": [[[0]], [[1]]]}\n', "line 4: expected 2 expert ids"),
        (
            JSON + '{"phase": "decode", "ids": [[[0, 9]], [[1, 2]]]}\n',
            "line 4: .* to 3, found .0, 9",
        ),
        (
            JSON + '{"phase": "decode", "ids": [[[0, 1]], []]}\n',
            r"line 4: expected as many tokens in every layer, at least one, found \[1, 0\]",
        ),
        (
            JSON + '{"phase": "decode", "ids": [[[0, 1]], [[0, 1], [1, 2]]]}\n',
            r"line 4: expected as many tokens .* found \[1, 2\]",
        ),
        (JSON + '{"phase": "prefill", "ids": [[[0, 1]], []]}\n', "line 4: expected as many tokens"),
        (JSON.replace('"model"', '"notes": 5, "model"'), "line 1: .* found TraceInfo.notes"),
        (
            JSON.replace('"n_experts": 4', '"n_experts": -3'),
            "line 1: expected whole numbers of 1 to 65536, found",
        ),
        (
            JSON + '{"phase": "decode", "ids": [[["a", "b"]], [[1, 2]]]}\n',
            'line 4: expected "phase" of .* "ids" as',
        ),
        *(
            (
                JSON
                + '{"phase": "prefill", "ids": [[[0, 1]], [[2, 3]]], "waited": '
                + waited
                + "}\n",
                r'line 4: expected "phase" .* "waited" as \[layer\]\[expert\]',
            )
            for waited in ("[[0.5], []]", "[[], [1.0]]", "[[true], []]", '["0", []]', "[0, 1]", "7")
        ),
    ],
)
def test_malformed_files_are_a_sentence_with_the_line(tmp_path, text, sentence):
    with pytest.raises(UserError, match=sentence):
        read_trace(write(tmp_path, text))


def test_a_known_number_of_experts_bounds_the_ids(tmp_path):
    path = write(tmp_path, CHOICES)
    assert read_trace(path, n_experts=8).n_experts == 8
    with pytest.raises(UserError, match=r"line 3: .* expert ids of 0 to 2, found \[2, 3\]"):
        read_trace(path, n_experts=3)


@pytest.mark.parametrize("n_experts", [0, -1, 65537, 10**30])
def test_a_number_of_experts_that_no_model_has_is_a_sentence(tmp_path, n_experts):
    with pytest.raises(UserError, match="expected 1 to 65536 experts a layer, found"):
        read_trace(write(tmp_path, CHOICES), n_experts)


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(UserError, match="found none that can be read"):
        read_trace(tmp_path / "nothing.csv")
    (tmp_path / "binary").write_bytes(bytes(range(128, 256)))
    with pytest.raises(UserError, match="found none that can be read"):
        read_trace(tmp_path / "binary")


def long_choices(folder: Path, n_tokens: int, last: str = "") -> Path:
    """32 layers, top-2 of 8; `last` is one more line."""
    path = folder / "long.expert_choices.csv"
    header = "Index," + ",".join(f"Block_{n},Block_{n}" for n in range(32))
    with path.open("w") as lines:
        lines.write(header + "\n0\n")
        for t in range(n_tokens):
            row = ",".join(f"{(t + n) % 8},{(t * n + n + 1 + (t + n) % 7) % 8}" for n in range(32))
            row = re.sub(r"(\d),\1", r"\1,8", row)
            lines.write(f"{t + 1},{row}\n")
        lines.write(last)
    return path


def peak_bytes(work: Callable[[], object]) -> int:
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_reading_streams(tmp_path):
    path = long_choices(tmp_path, 4000)
    reader = TraceReader(path)
    assert sum(1 for _ in reader) == 4001
    assert peak_bytes(lambda: sum(1 for _ in reader)) < path.stat().st_size / 5


def test_a_replay_streams(tmp_path):
    path = long_choices(tmp_path, 4000)
    expected = replay(read_trace(path).passes, ExpertCache(4, 3, make_policy("LRU")))
    results = []

    def streamed() -> None:
        results.append(replay(TraceReader(path), ExpertCache(4, 3, make_policy("LRU"))))

    assert peak_bytes(streamed) < path.stat().st_size / 5
    assert results == [expected] and expected.decode.hits > 0


def test_many_ids_are_held_in_two_bytes_each(tmp_path):
    path = long_choices(tmp_path, 4000)
    held = []
    # Two bytes for an id, what a growing array has to spare, two numbers for a pass, and one line.
    assert peak_bytes(lambda: held.append(read_trace(path))) < (1.5 * 2 * 64 + 24) * 4000
    assert len(held[0].passes) == 4001 and held[0].passes == Routing(TraceReader(path))


def test_a_mistake_ends_the_reading_at_its_line(tmp_path):
    """Nothing behind the line is read, and nothing before it is held."""
    path = long_choices(tmp_path, 2000)
    good = path.read_text()
    lines = (tmp_path / "lines.csv").open("w+")
    lines.write(good[: len(good) // 2].rsplit("\n", 1)[0] + "\n7,oops\n")
    n_lines = 1 + good[: len(good) // 2].count("\n")
    lines.write("neither this\n" * 5)
    lines.close()
    reader = iter(TraceReader(tmp_path / "lines.csv"))

    def read() -> None:
        with pytest.raises(UserError, match=f"line {n_lines}: expected whole numbers"):
            for _ in reader:
                pass

    assert peak_bytes(read) < path.stat().st_size / 5


def test_a_file_of_one_endless_line_is_refused_at_once(tmp_path):
    (tmp_path / "line").write_text("x" * 4_000_000)

    def read() -> None:
        with pytest.raises(UserError, match="line 1: expected a routing trace"):
            TraceReader(tmp_path / "line")

    assert peak_bytes(read) < 3_000_000
