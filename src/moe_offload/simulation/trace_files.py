"""Reads a routing trace from a file of one of three formats, line by line into passes.

  expert_choices.csv  this tool's and the reference's: `Index`, then K ids for each layer; one row
      per decoded token (rows of one index are one batch); a prefill has no ids. The reference's
      header says 32 layers for every model: where header and rows differ, rows count.
  *.route.csv         `turn,phase,step,layer,slot,expert,...`, phase 0 prompt and 1 decode, after
      `#` comments that name the model and its experts.
  JSON lines          a run's routing.jsonl: a header object {"routing_trace": 1, "model": ...,
      "n_layers": ..., "top_k": ..., "n_experts": ..., "synthetic": ...}, then one object per
      forward pass: {"phase": "prefill" | "decode", "prompt": 0, "ids": [layer][token][k]}, and for
      a prompt that was partly computed on the GPU "waited": [layer][...], the experts copied for
      that.

Each is a generator over a `TraceReader`. Files are streamed: that holds one pass, whatever the
file's size; `read_trace` holds them all, two bytes an expert. Anything that does not fit is a
UserError with its line number, raised when that line is read and not later.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from moe_offload.errors import UserError
from moe_offload.files import from_json, require_regular
from moe_offload.simulation.traces import N_IDS, NEVER, Routing, RoutingPass, Trace, TraceInfo

_MAX_FIRST_LINE = 1 << 20  # characters: a file without an end of line is no trace


class TraceReader:
    """The passes of a trace file, by iterating over it, any number of times; one is held at a time.

    `info` is what the file has told by then. `n_experts`, where given, bounds the ids of a file
    that does not say. Raises UserError for what is no trace. Besides, it holds the current line and
    all checks of the formats.
    """

    def __init__(self, path: Path, n_experts: int | None = None) -> None:
        if n_experts is not None and not 1 <= n_experts <= N_IDS:
            raise UserError(f"expected 1 to {N_IDS} experts a layer, found {n_experts}")
        try:
            require_regular(path)  # a pipe cannot be read twice
            with path.open(encoding="utf-8") as lines:
                first = "\n"
                while first and (first.startswith("#") or not first.strip()):
                    first = lines.readline(_MAX_FIRST_LINE)
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not text"
            raise UserError(
                f"expected a routing trace at {path}, found none that can be read ({reason}): "
                "give the expert_choices.csv or routing.jsonl of a run"
            ) from None
        if first[:1] not in _FORMATS:
            raise UserError(
                f"{path}, line 1: expected a routing trace (a header that starts with Index, or "
                f"turn,phase,step, or JSON lines), found {first.strip()[:40]!r}"
            )
        self.format = _FORMATS[first[0]]
        self.path = path
        self.line_number = 0
        name = re.sub(r"\.(expert_choices|route|csv|jsonl)\b", "", path.name)
        self.info = TraceInfo(name, 0, 0, n_experts, synthetic="synthetic" in path.name)

    def __iter__(self) -> Iterator[RoutingPass]:
        return self.format(self)

    def learn(self, **facts: Any) -> None:
        self.info = replace(self.info, **facts)

    def lines(self) -> Iterator[str]:
        with self.path.open(encoding="utf-8", errors="replace") as lines:
            for self.line_number, line in enumerate(lines, 1):
                if line.strip():
                    yield line.rstrip("\r\n")

    def error(self, expected: str, found: object) -> UserError:
        return UserError(
            f"{self.path}, line {self.line_number}: expected {expected}, found {found!s:.60}; "
            "correct the trace or record it again"
        )

    def numbers(self, values: Sequence[str], least: int = 0, most: int = NEVER) -> list[int]:
        try:
            found = list(map(int, values))
        except ValueError:
            found = [-1]
        if min(found) < least or max(found) > most:
            raise self.error(f"whole numbers of {least} to {most}", values)
        return found

    def token(self, experts: Sequence[int]) -> tuple[int, ...]:
        """One token's choices, or what a layer waited for, if distinct and in range."""
        n_experts = self.info.n_experts or N_IDS
        if experts and (
            len(set(experts)) != len(experts) or not 0 <= min(experts) <= max(experts) < n_experts
        ):
            raise self.error(f"distinct expert ids of 0 to {n_experts - 1}", list(experts))
        return tuple(experts)

    def checked(self, one: RoutingPass) -> RoutingPass:
        """`one`, if its layers and its tokens are as many as those before.

        Of a prompt a last layer may have seen fewer tokens: only the last one's output is needed.
        """
        counts = [len(tokens) for tokens in one.ids]
        if not counts or min(counts) == 0 or (one.phase == "decode" and len(set(counts)) > 1):
            raise self.error("as many tokens in every layer, at least one", counts)
        if not (self.info.n_layers and self.info.top_k):
            self.learn(
                n_layers=self.info.n_layers or len(counts),
                top_k=self.info.top_k or max(1, len(one.ids[0][0])),
            )
        if len(counts) != self.info.n_layers:
            raise self.error(f"{self.info.n_layers} layers", len(counts))
        top_k = self.info.top_k
        for tokens in one.ids:
            for token in tokens:
                if len(token) != top_k:
                    raise self.error(f"{top_k} expert ids for each token", list(token))
        return one


def expert_choices(reader: TraceReader) -> Iterator[RoutingPass]:
    for (prompt, _), rows in groupby(_choices_by_row(reader), itemgetter(0)):
        ids = tuple(zip(*(tokens for _, tokens in rows), strict=True))
        yield RoutingPass("decode" if ids else "prefill", ids, prompt)


def _choices_by_row(
    reader: TraceReader,
) -> Iterator[tuple[tuple[int, str | int], list[tuple[int, ...]]]]:
    """Of each row what tells its pass from others, prompt first, and a token for each layer."""
    lines = (line for line in reader.lines() if not line.startswith("#"))
    header = next(lines).split(",")
    blocks = [name for name in header if name.startswith("Block_")]
    if not blocks or header[: 1 + len(blocks)] != ["Index", *blocks]:
        raise reader.error("the header Index,Block_0,Block_0,Block_1,...", ",".join(header))
    top_k = blocks.count(blocks[0])
    reader.learn(top_k=top_k)
    prompt = -1
    for line in lines:
        index, *cells = line.split(",")
        owner = None
        if 1 + len(cells) == len(header):  # behind the ids are columns that only this tool writes
            owner = cells[-1] if header[-1] == "Prompt" else None
            del cells[len(blocks) :]
        if not any(cells):
            (prompt,) = [prompt + 1] if owner is None else reader.numbers([owner])
            yield (prompt, reader.line_number), []
            continue
        ids = reader.numbers(cells)
        tokens = [reader.token(ids[at : at + top_k]) for at in range(0, len(ids), top_k)]
        reader.checked(RoutingPass("decode", tuple((token,) for token in tokens)))
        if len(ids) != len(blocks) and not reader.info.notes:
            note = (
                f"the header names {len(blocks) // top_k} layers and the rows hold {len(tokens)}: "
                "the rows were read"
            )
            reader.learn(notes=(note,))
        yield (max(prompt, 0), index), tokens


_ROUTE_COLUMNS = "turn,phase,step,layer,slot,expert"


def route(reader: TraceReader) -> Iterator[RoutingPass]:
    for (turn, phase, _), rows in groupby(_route_by_row(reader), itemgetter(0)):
        tokens: dict[int, list[list[int]]] = {}  # by layer
        for _, layer, slot, expert in rows:
            of_layer = tokens.setdefault(layer, [])
            if slot == 0:
                of_layer.append([])
            token = of_layer[-1] if of_layer else []
            if slot != len(token):
                raise reader.error(f"slot {len(token)} next", slot)
            token.append(expert)
            if expert in token[:-1] or expert >= (reader.info.n_experts or N_IDS):
                reader.token(token)  # raises
        ids = tuple(tuple(map(tuple, tokens[layer])) for layer in sorted(tokens))
        yield reader.checked(RoutingPass("decode" if phase else "prefill", ids, turn))


def _route_by_row(reader: TraceReader) -> Iterator[tuple[tuple[int, int, int], int, int, int]]:
    """Of each row its pass (turn, phase, and in decode the step), layer, slot and expert."""
    n_columns = 0
    for line in reader.lines():
        if line.startswith("#"):
            facts = dict(re.findall(r"(\w+)=(\S+)", line))
            if "model" in facts:
                reader.learn(model=Path(facts["model"]).stem)
            if "n_expert" in facts:
                reader.learn(n_experts=reader.numbers([facts["n_expert"]], 1, N_IDS)[0])
        elif not n_columns:
            if not line.startswith(_ROUTE_COLUMNS):
                raise reader.error(f"the columns {_ROUTE_COLUMNS},...", line)
            n_columns = line.count(",") + 1
        else:
            cells = line.split(",")
            if len(cells) != n_columns:
                raise reader.error(f"{n_columns} columns", len(cells))
            turn, phase, step, layer, slot, expert = reader.numbers(cells[:6])
            if phase > 1:
                raise reader.error("phase 0 (prompt) or 1 (decode)", phase)
            # A prompt is one pass, each of its steps a token; a decoded token is a pass.
            yield (turn, phase, step if phase else 0), layer, slot, expert


def json_lines(reader: TraceReader) -> Iterator[RoutingPass]:
    for line in reader.lines():
        try:
            one = json.loads(line)
        except (ValueError, RecursionError):
            one = None
        if not isinstance(one, dict):
            raise reader.error("a JSON object", repr(line))
        if "routing_trace" not in one:
            yield _json_pass(reader, one)
            continue
        known = asdict(reader.info) | {"notes": []}
        told = {name: one[name] for name in known.keys() & one.keys() if one[name] is not None}
        try:
            reader.info = info = from_json(TraceInfo, known | told)
        except ValueError as error:
            raise reader.error("the facts of a trace", error) from None
        reader.numbers([str(1 if info.n_experts is None else info.n_experts)], 1, N_IDS)


def _json_pass(reader: TraceReader, one: dict[str, Any]) -> RoutingPass:
    def token(experts: list[int]) -> tuple[int, ...]:
        if not all(type(expert) is int for expert in experts):
            raise TypeError
        return reader.token(experts)

    phase = one.get("phase")
    try:
        ids = tuple(tuple(map(token, layer)) for layer in one["ids"])
        waited = tuple(map(token, one.get("waited", [])))
    except (KeyError, TypeError):
        phase = None
    if phase not in ("prefill", "decode") or (waited and len(waited) != len(ids)):
        raise reader.error(
            '"phase" of prefill or decode, "ids" as [layer][token][k] and, if any, "waited" as '
            "[layer][expert]",
            one,
        )
    (prompt,) = reader.numbers([str(one.get("prompt", 0))])
    found = RoutingPass(phase, ids, prompt, waited)
    return found if phase == "prefill" and not ids else reader.checked(found)


# By the first character of a file, comments left out.
_FORMATS: dict[str, Callable[[TraceReader], Iterator[RoutingPass]]] = {
    "I": expert_choices,
    "t": route,
    "{": json_lines,
}


def read_trace(path: Path, n_experts: int | None = None) -> Trace:
    """Read a whole trace; raises UserError for a file that is missing, malformed or empty.

    A run's expert_choices.csv has no ids of prompts: its routing.jsonl, where it lies beside the
    table, is taken instead. A note of the trace says so, or why not.
    """
    reader = TraceReader(path, n_experts)
    routing = Routing(reader)
    info = reader.info
    beside = path.with_name(path.stem.replace("expert_choices", "routing") + ".jsonl")
    if reader.format is expert_choices and "expert_choices" in path.stem and beside.is_file():
        try:
            whole = TraceReader(beside, n_experts)
            with_prompts = Routing(whole)
            note = f"prompts are left out: {beside} is of another run"
            if _same_run(routing, with_prompts):
                routing, info = with_prompts, whole.info
                note = f"{beside} was read: it has the prompts' tokens too"
        except UserError as error:
            note = f"prompts are left out: {error}"
        info = replace(info, notes=(*info.notes, note))
    if not routing.n_decoded:
        raise UserError(f"{path}: expected at least one decoded token, found {len(routing)} passes")
    n_experts = info.n_experts or n_experts or routing.highest + 1
    return Trace(replace(info, n_experts=n_experts), routing)


def _same_run(choices: Routing, whole: Routing) -> bool:
    """Whether every pass of expert_choices.csv is what routing.jsonl says of it."""
    return len(choices) == len(whole) and all(
        one.phase == other.phase and (one.phase == "prefill" or one.ids == other.ids)
        for one, other in zip(choices, whole, strict=True)
    )
