"""Reads a routing trace from a file, in whichever of `trace_formats` it is.

Files are streamed: `TraceReader` holds one pass, whatever the file's size; `read_trace` holds
them all, one byte an expert where they are many. Anything that does not fit is a UserError with
its line number, raised when that line is read and not later.

The three formats of a routing trace, each read line by line into passes:

  expert_choices.csv  this tool's and the reference's: `Index`, then K ids for each layer; one row
      per decoded token (rows of one index are one batch), a prefill has no ids. Ours says
      in columns after the reference's, `Prefill_0` and on, what each layer of a prompt chose
      (`prompt_cells`). The reference's header says 32 layers for every model: where header and rows
      differ, rows count.
  *.route.csv         `turn,phase,step,layer,slot,expert,...`, phase 0 prompt and 1 decode, after
      `#` comments that name the model, its layers and its experts.
  JSON lines          a header object {"routing_trace": 1, "model": ..., "n_layers": ..., "top_k":
      ..., "n_experts": ..., "synthetic": ...}, then one object per forward pass:
      {"phase": "prefill" | "decode", "prompt": 0, "ids": [layer][token][k]}, and for a prompt
      that was partly computed on the GPU "waited": [layer][...], the experts copied for that.

Anything that does not fit is a UserError with its line number, raised when that line is read.

What a prompt chose in one layer, as a cell of expert_choices.csv: `5:12* 3:7`.

Each expert that the prompt chose once, those of its last token first and then back, with the
number of its tokens that chose it; `*` marks an expert that the prompt copied to the GPU to compute
it there. That is all that the cache learns of a prompt, in a fraction of the prompt's own size.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe_offload.errors import UserError
from moe_offload.simulation.traces import (
    N_IDS,
    Ids,
    PackedRouting,
    Phase,
    RoutingPass,
    Seen,
    Trace,
    TraceInfo,
    collected,
)

_ENTRY = re.compile(r"(\d+):([1-9]\d*)(\*?)")


def prompt_cell(seen: Iterable[tuple[int, int]], waited: Collection[int]) -> str:
    """The cell of (expert, number of tokens) pairs, the last token's first."""
    return " ".join(f"{expert}:{n}{'*' * (expert in waited)}" for expert, n in seen)


def read_prompt_cell(cell: str) -> tuple[tuple[tuple[int, int], ...], tuple[int, ...]]:
    """The (expert, number of tokens) pairs and the copied experts; ValueError with a bad entry."""
    seen, waited = [], []
    for entry in cell.split():
        match = _ENTRY.fullmatch(entry)
        if match is None:
            raise ValueError(entry)
        seen.append((int(match[1]), int(match[2])))
        if match[3]:
            waited.append(int(match[1]))
    return tuple(seen), tuple(waited)


class TraceFormat:
    """What the three formats share: the current line number, and checks that name it."""

    def __init__(self, path: Path, n_experts: int | None) -> None:
        self.path = path
        self.line_number = 0
        self.n_experts = n_experts
        self.model = re.sub(r"\.(expert_choices|route|csv|jsonl)\b", "", path.name)
        self.synthetic = "synthetic" in path.name
        self.notes: tuple[str, ...] = ()
        self.n_layers = 0
        self.top_k = 0
        self.expert_bytes: list[int] = []

    def passes(self) -> Iterator[RoutingPass]:
        raise AssertionError("each format reads its own passes")

    def info(self) -> TraceInfo:
        n_bytes = self.expert_bytes
        return TraceInfo(
            self.model,
            self.n_layers,
            self.top_k,
            self.n_experts,
            self.synthetic,
            self.notes,
            sum(n_bytes) // len(n_bytes) if n_bytes else None,
        )

    def lines(self) -> Iterator[str]:
        with self.path.open(encoding="utf-8", errors="replace") as lines:
            for self.line_number, line in enumerate(lines, 1):
                if line.strip():
                    yield line.rstrip("\r\n")

    def error(self, expected: str, found: object) -> UserError:
        return UserError(
            f"{self.path}, line {self.line_number}: expected {expected}, found {found}; "
            "correct the trace or record it again"
        )

    def token(self, experts: Iterable[int]) -> tuple[int, ...]:
        """One token's choices, checked: distinct and in range."""
        ids = tuple(experts)
        if len(set(ids)) != len(ids):
            raise self.error("distinct experts of one token", list(ids))
        for expert in ids:
            if expert < 0 or expert >= (self.n_experts or N_IDS):
                limit = "0 or more" if expert < 0 else f"0 to {(self.n_experts or N_IDS) - 1}"
                raise self.error(f"an expert id of {limit}", expert)
        return ids

    def check_tokens(self, phase: Phase, ids: Ids) -> None:
        """Every layer has a token; of a decoded pass, as many as the others.

        Of a prompt a last layer may have seen fewer: only the last token's output is needed.
        """
        counts = [len(tokens) for tokens in ids]
        if not ids or min(counts) == 0 or (phase == "decode" and min(counts) != max(counts)):
            raise self.error("as many tokens in every layer, at least one", counts)

    def integer(self, text: str, what: str) -> int:
        try:
            return int(text)
        except ValueError:
            raise self.error(f"a whole number as {what}", repr(text)) from None


class ExpertChoices(TraceFormat):
    def passes(self) -> Iterator[RoutingPass]:
        lines = (line for line in self.lines() if not line.startswith("#"))
        header = next(lines).split(",")
        blocks = [name for name in header[1:] if name.startswith("Block_")]
        others = header[1 + len(blocks) :]
        n_prefill = sum(name.startswith("Prefill_") for name in others)
        others = others[n_prefill:]
        if not blocks or header[0] != "Index" or any(o.startswith("Block_") for o in others):
            raise self.error("the header Index,Block_0,Block_0,Block_1,...", ",".join(header)[:60])
        self.top_k = blocks.count(blocks[0])
        width = 0
        prompt = -1
        batch: list[list[tuple[int, ...]]] = []
        index = ""
        for line in lines:
            cells = line.split(",")
            owner = cells.pop() if others and len(cells) == len(header) else None
            of_prompt = cells[1 + len(blocks) :] if n_prefill else []
            if n_prefill and len(cells) >= len(header) - len(others):
                del cells[1 + len(blocks) :]
            if not any(cells[1:]):
                if batch:
                    yield self._decode(batch, prompt)
                    batch = []
                prompt = prompt + 1 if owner is None else self.integer(owner, others[-1])
                yield self._prefill(of_prompt, prompt)
                continue
            if not width:
                width = len(cells)
                self._set_layers(width, len(blocks))
            if len(cells) != width:
                raise self.error(f"{width - 1} expert ids like the rows before", len(cells) - 1)
            if batch and cells[0] != index:
                yield self._decode(batch, prompt)
                batch = []
            index = cells[0]
            batch.append(self._token_of_layers(cells[1:]))
        if batch:
            yield self._decode(batch, prompt)

    def _prefill(self, cells: list[str], prompt: int) -> RoutingPass:
        if not any(cells):
            return RoutingPass("prefill", (), prompt)
        try:
            layers = [read_prompt_cell(cell) for cell in cells]
        except ValueError as error:
            raise self.error("a prompt's experts as expert:tokens", repr(str(error))) from None
        for seen, _ in layers:
            self.token(expert for expert, _ in seen)
        waited = tuple(copied for _, copied in layers)
        seen_of_layer = tuple(seen for seen, _ in layers)
        return RoutingPass("prefill", (), prompt, waited if any(waited) else (), seen_of_layer)

    def _set_layers(self, width: int, n_header_ids: int) -> None:
        self.n_layers, rest = divmod(width - 1, self.top_k)
        if rest:
            raise self.error(f"{self.top_k} expert ids for each layer, as the header", width - 1)
        if width - 1 != n_header_ids:
            self.notes = (
                f"the header names {n_header_ids // self.top_k} layers and the rows hold "
                f"{self.n_layers}: the rows were read",
            )

    def _token_of_layers(self, cells: list[str]) -> list[tuple[int, ...]]:
        ids = [self.integer(cell, "an expert id") for cell in cells]
        starts = range(0, len(ids), self.top_k)
        return [self.token(ids[start : start + self.top_k]) for start in starts]

    def _decode(self, batch: list[list[tuple[int, ...]]], prompt: int) -> RoutingPass:
        ids = tuple(zip(*batch, strict=True))
        return RoutingPass("decode", ids, max(prompt, 0))


class Route(TraceFormat):
    COLUMNS = "turn,phase,step,layer,slot,expert"

    def passes(self) -> Iterator[RoutingPass]:
        current: tuple[int, ...] = ()
        tokens: dict[int, list[list[int]]] = {}
        n_declared = 0
        header_seen = False
        for line in self.lines():
            if line.startswith("#"):
                facts = dict(re.findall(r"(\w+)=(\S+)", line))
                self.model = Path(facts.get("model", self.model)).stem
                n_declared = self.integer(facts.get("n_layer", str(n_declared)), "n_layer")
                if "expert_bytes" in facts:
                    n_bytes = self.integer(facts["expert_bytes"], "expert_bytes")
                    self.expert_bytes.append(n_bytes)
                if "n_expert" in facts:
                    self.n_experts = self.integer(facts["n_expert"], "n_expert")
                continue
            if not header_seen:
                if not line.startswith(self.COLUMNS):
                    raise self.error(f"the columns {self.COLUMNS},...", line[:60])
                header_seen, n_columns = True, line.count(",") + 1
                continue
            cells = line.split(",")
            if len(cells) != n_columns:
                raise self.error(f"{n_columns} columns", len(cells))
            try:
                turn, phase, step, layer, slot, expert = map(int, cells[:6])
            except ValueError:
                for cell, name in zip(cells, self.COLUMNS.split(","), strict=False):
                    self.integer(cell, name)  # raises for the one that is none
                raise
            if phase not in (0, 1):
                raise self.error("phase 0 (prompt) or 1 (decode)", phase)
            if layer < 0 or (n_declared and layer >= n_declared):
                raise self.error(f"a layer of 0 to {n_declared - 1}, as the comment says", layer)
            # A prompt is one pass, each of its steps a token; a decoded token is a pass.
            key = (turn, phase, step if phase else 0)
            if key != current:
                if current:
                    yield self._pass(current, tokens)
                current, tokens = key, {}
            of_layer = tokens.setdefault(layer, [])
            if slot == 0:
                of_layer.append([])
            if not of_layer or slot != len(of_layer[-1]):
                raise self.error(f"slot {len(of_layer[-1]) if of_layer else 0} next", slot)
            token = of_layer[-1]
            token.append(expert)
            if expert in token[:-1] or not 0 <= expert < (self.n_experts or N_IDS):
                self.token(token)  # raises
        if current:
            yield self._pass(current, tokens)

    def _pass(self, key: tuple[int, ...], tokens: dict[int, list[list[int]]]) -> RoutingPass:
        layers = sorted(tokens)
        self.top_k = self.top_k or len(tokens[layers[0]][0])
        self.n_layers = self.n_layers or len(layers)
        if len(layers) != self.n_layers:
            raise self.error(f"{self.n_layers} layers in the pass before", len(layers))
        for of_layer in tokens.values():
            for token in of_layer:
                if len(token) != self.top_k:
                    raise self.error(f"{self.top_k} slots for each token before", len(token))
        ids = tuple(tuple(tuple(token) for token in tokens[layer]) for layer in layers)
        phase: Phase = "decode" if key[1] else "prefill"
        self.check_tokens(phase, ids)
        return RoutingPass(phase, ids, key[0])


class JsonLines(TraceFormat):
    def passes(self) -> Iterator[RoutingPass]:
        for line in self.lines():
            try:
                one = json.loads(line)
            except ValueError as error:
                raise self.error("a JSON object", f"{line[:40]!r} ({error})") from None
            if not isinstance(one, dict):
                raise self.error("a JSON object", line[:40])
            if "routing_trace" in one:
                self._set_facts(one)
            else:
                yield self._pass(one)

    def _set_facts(self, facts: dict[str, Any]) -> None:
        self.model = str(facts.get("model", self.model))
        self.synthetic = bool(facts.get("synthetic", self.synthetic))
        notes = facts.get("notes", [])
        if not isinstance(notes, list):
            raise self.error("notes as a list of sentences", repr(notes)[:40])
        self.notes = tuple(map(str, notes))
        if facts.get("expert_bytes") is not None:
            self.expert_bytes = [self.integer(str(facts["expert_bytes"]), "expert_bytes")]
        for name in ("n_layers", "top_k", "n_experts"):
            value = facts.get(name)
            if value is not None:
                number = self.integer(str(value), name)
                if number < 1:
                    raise self.error(f"{name} of at least 1", number)
                setattr(self, name, number)

    def _pass(self, one: dict[str, Any]) -> RoutingPass:
        phase, ids = one.get("phase"), one.get("ids")
        if phase not in ("prefill", "decode") or not isinstance(ids, list):
            raise self.error('"phase" of prefill or decode, and "ids"', str(one)[:60])
        try:
            checked = tuple(tuple(self.token(token) for token in layer) for layer in ids)
        except TypeError:
            raise self.error("ids as [layer][token][k]", str(ids)[:60]) from None
        if phase == "decode" or checked:
            self.n_layers = self.n_layers or len(checked)
            if len(checked) != self.n_layers:
                raise self.error(f"{self.n_layers} layers", len(checked))
            self.check_tokens(phase, checked)
            for layer in checked:
                for token in layer:
                    self.top_k = self.top_k or len(token)
                    if len(token) != self.top_k or not all(isinstance(e, int) for e in token):
                        raise self.error(f"{self.top_k} expert ids for each token", token)
        prompt = self.integer(str(one.get("prompt", 0)), "prompt")
        seen = self._seen(one)
        n_layers = len(checked) or len(seen)
        return RoutingPass(phase, checked, prompt, self._waited(one, n_layers), seen)

    def _seen(self, one: dict[str, Any]) -> tuple[Seen, ...]:
        try:
            seen = tuple(tuple((e, n) for e, n in layer) for layer in one.get("seen", []))
            if not all(type(x) is int for layer in seen for pair in layer for x in pair):
                raise TypeError
        except (TypeError, ValueError):
            raise self.error("seen as [layer][[expert, tokens]]", str(one["seen"])[:60]) from None
        for layer in seen:
            self.token(expert for expert, _ in layer)
        return seen

    def _waited(self, one: dict[str, Any], n_layers: int) -> tuple[tuple[int, ...], ...]:
        waited = one.get("waited", [])
        try:
            numbers = [expert for layer in waited for expert in layer]
            if not all(type(expert) is int for expert in numbers):
                raise TypeError
            checked = tuple(self.token(layer) for layer in waited)
        except TypeError:
            raise self.error("waited as [layer][expert]", str(waited)[:60]) from None
        if checked and len(checked) != n_layers:
            raise self.error(f"waited for {n_layers} layers", len(checked))
        return checked


_MAX_FIRST_LINE = 1 << 20  # characters: a file without an end of line is no trace


class TraceReader:
    """Iterates over the passes of a trace file, any number of times.

    `info` is known at once: the file is read up to its first pass that holds ids. `n_experts`,
    where given, bounds the ids of a file that does not say.
    """

    def __init__(self, path: Path, n_experts: int | None = None) -> None:
        self.path = path
        self._n_experts = n_experts
        try:
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
        kinds: dict[str, type[TraceFormat]] = {"{": JsonLines, "I": ExpertChoices, "t": Route}
        kind = kinds.get(first[:1])
        if kind is None:
            raise UserError(
                f"{path}, line 1: expected a routing trace (a header that starts with Index, or "
                f"turn,phase,step, or JSON lines), found {first.strip()[:40]!r}"
            )
        self._kind = kind
        reading = self._read()
        for one in reading.passes():
            if one.ids:
                break
        self.info = reading.info()

    def __iter__(self) -> Iterator[RoutingPass]:
        return self._read().passes()

    def _read(self) -> TraceFormat:
        return self._kind(self.path, self._n_experts)


def read_trace(path: Path, n_experts: int | None = None) -> Trace:
    """Read a whole trace; raises UserError for a file that is missing, malformed or empty.

    The file is read once, line by line. What is held takes one byte for each id (two with more
    than 256 experts), or tuples while that is little.
    """
    reader = TraceReader(path, n_experts)
    routing = PackedRouting(reader)
    if not routing.n_decoded:
        raise UserError(f"{path}: expected at least one decoded token, found {len(routing)} passes")
    known = reader.info.n_experts or n_experts
    info = replace(reader.info, n_experts=known or routing.highest + 1)
    return Trace(info, collected(routing))
