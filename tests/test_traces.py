"""Trace files: three formats, one meaning; everything malformed is a sentence with its line."""

import tracemalloc
from pathlib import Path

import pytest

from errors import UserError
from traces import RoutingPass, TraceReader, read_trace, write_trace

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


def test_any_top_k(tmp_path):
    text = "Index,Block_0,Block_0,Block_0\n1,0,1,2\n"
    assert read_trace(write(tmp_path, text)).passes[0].ids == (((0, 1, 2),),)


def test_route_csv(tmp_path):
    trace = read_trace(write(tmp_path, ROUTE))
    assert trace.info.model == "tiny"
    assert (trace.n_layers, trace.n_experts, trace.info.expert_bytes) == (2, 4, 1500)
    prompt, decode = trace.passes
    assert prompt.phase == "prefill"
    assert prompt.ids == (((3, 1), (2, 0)), ((0, 1),))  # the last layer saw the last token alone
    assert decode == DECODE


def test_json_lines_round_trip(tmp_path):
    trace = read_trace(write(tmp_path, JSON))
    assert trace.passes[1] == DECODE
    write_trace(tmp_path / "copy.jsonl", trace.info, trace.passes)
    assert read_trace(tmp_path / "copy.jsonl") == trace


def test_a_trace_that_cannot_be_written_is_a_sentence(tmp_path):
    trace = read_trace(write(tmp_path, JSON))
    with pytest.raises(UserError, match="expected to write a trace to"):
        write_trace(tmp_path / "nowhere" / "copy.jsonl", trace.info, trace.passes)


def test_choices_that_come_again_are_held_once(tmp_path):
    trace = read_trace(write(tmp_path, CHOICES + "3,0,1,2,3\n4,0,1,2,3\n"))
    third, fourth = trace.passes[-2:]
    assert third.ids[0] is fourth.ids[0] and third.ids[0] == ((0, 1),)


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
        (CHOICES + "3,0,1,2\n", "line 5: expected 4 expert ids like the rows before, found 3"),
        (CHOICES + "3,0,1,2,3,1,2\n", "line 5: expected 4 expert ids .* found 6"),
        (CHOICES + "3,0,x,2,3\n", "line 5: expected a whole number as an expert id, found 'x'"),
        (CHOICES + "3,0,-1,2,3\n", "line 5: expected an expert id of 0 or more, found -1"),
        (
            CHOICES + "3,1,1,2,3\n",
            r"line 5: expected distinct experts of one token, found \[1, 1\]",
        ),
        ("Index,Block_0,Block_0\n1,0,1,2\n", "line 2: expected 2 expert ids for each layer"),
        ("Index,Block_0,Block_0\n0\n", "at least one decoded token"),
        (ROUTE.replace("turn,phase", "turn,faze"), "line 1: expected a routing trace|line 5"),
        (ROUTE + "0,1,1,0,0,1,0.5,0\n", "line 16: expected 9 columns, found 8"),
        (ROUTE + "0,1,1,0,0,4,0.5,0,1\n", "line 16: expected an expert id of 0 to 3, found 4"),
        (ROUTE + "0,1,1,2,0,1,0.5,0,1\n", "line 16: expected a layer of 0 to 1, as the comment"),
        (ROUTE + "0,2,1,0,0,1,0.5,0,1\n", "line 16: expected phase 0"),
        (ROUTE + "0,1,1,0,1,1,0.5,0,1\n", "line 16: expected slot 0 next, found 1"),
        (ROUTE + "0,1,1,0,0,1,0.5,0,1\n", "line 16: expected 2 layers in the pass before, found 1"),
        (JSON + "{oops\n", "line 4: expected a JSON object"),
        (JSON + '{"phase": "dream", "ids": []}\n', 'line 4: expected "phase" of prefill or decode'),
        (JSON + '{"phase": "decode", "ids": [[0, 1]]}\n', r"line 4: expected ids as \[layer\]"),
        (JSON + '{"phase": "decode", "ids": [[[0, 1]]]}\n', "line 4: expected 2 layers, found 1"),
        (JSON + '{"phase": "decode", "ids": [[[0]], [[1]]]}\n', "line 4: expected 2 expert ids"),
        (JSON + '{"phase": "decode", "ids": [[[0, 9]], [[1, 2]]]}\n', "line 4: .* 0 to 3, found 9"),
        (
            JSON + '{"phase": "decode", "ids": [[[0, 1]], []]}\n',
            r"line 4: expected as many tokens in every layer, at least one, found \[1, 0\]",
        ),
        (
            JSON + '{"phase": "decode", "ids": [[[0, 1]], [[0, 1], [1, 2]]]}\n',
            r"line 4: expected as many tokens .* found \[1, 2\]",
        ),
        (JSON + '{"phase": "prefill", "ids": [[[0, 1]], []]}\n', "line 4: expected as many tokens"),
        (JSON.replace('"model"', '"notes": 5, "model"'), "line 1: expected notes as a list"),
        (JSON.replace('"n_experts": 4', '"n_experts": -3'), "line 1: expected n_experts of at"),
        (
            JSON + '{"phase": "decode", "ids": [[["a", "b"]], [[1, 2]]]}\n',
            "line 4: expected ids as",
        ),
        *(
            (
                JSON
                + '{"phase": "prefill", "ids": [[[0, 1]], [[2, 3]]], "waited": '
                + waited
                + "}\n",
                r"line 4: expected waited as \[layer\]\[expert\]",
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
    with pytest.raises(UserError, match="line 3: expected an expert id of 0 to 2, found 3"):
        read_trace(path, n_experts=3)


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(UserError, match="found none that can be read"):
        read_trace(tmp_path / "nothing.csv")
    (tmp_path / "binary").write_bytes(bytes(range(128, 256)))
    with pytest.raises(UserError, match="found none that can be read"):
        read_trace(tmp_path / "binary")


def test_reading_streams(tmp_path):
    path = tmp_path / "long.expert_choices.csv"
    row = ",".join(str((n * 3) % 8) for n in range(1, 65))
    header = "Index," + ",".join(f"Block_{n},Block_{n}" for n in range(32))
    with path.open("w") as lines:
        lines.write(header + "\n0\n")
        lines.writelines(f"{n},{row}\n" for n in range(1, 8001))
    size = path.stat().st_size
    reader = TraceReader(path)
    tracemalloc.start()
    assert sum(1 for _ in reader) == 8001
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < size / 5, "the whole file was held in memory"
