"""Reads a routing trace from a file of one of three formats, line by line into passes.

  expert_choices.csv  this tool's and the reference's: `Index`, then K ids for each layer; one row
      per decoded token (rows of one index are one batch); a prefill has no ids. The reference's
      header says 32 layers for every model: where header and rows differ, rows count.
  *.route.csv         `turn,phase,step,layer,slot,expert,...`, phase 0 prompt and 1 decode, after
      `#` comments that name the model, its layers and its experts.
  JSON lines          a run's routing.jsonl: a header object {"routing_trace": 1, "model": ...,
      "n_layers": ..., "top_k": ..., "n_experts": ..., "synthetic": ...}, then one object per
      forward pass: {"phase": "prefill" | "decode", "prompt": 0, "ids": [layer][token][k]}, and for
      a prompt that was partly computed on the GPU "waited": [layer][...], the experts copied for
      that.

Files are streamed: `TraceReader` holds one pass, whatever the file's size; `read_trace` holds them
all, a byte an expert. Anything that does not fit is a UserError with its line number, raised when
that line is read and not later.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from moe_offload.errors import UserError
from moe_offload.simulation.traces import N_IDS, Phase, Routing, RoutingPass, Trace, TraceInfo

_MAX_FIRST_LINE = 1 << 20  # characters: a file without an end of line is no trace


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
            f"{self.path}, line {self.line_number}: expected {expected}, found {found!s:.60}; "
            "correct the trace or record it again"
        )

    def token(self, experts: Iterable[int]) -> tuple[int, ...]:
        """One token's choices, checked: distinct and in range."""
        ids = tuple(experts)
        limit = self.n_experts or N_IDS
        if len(set(ids)) != len(ids):
            raise self.error("distinct experts of one token", list(ids))
        if ids and not 0 <= min(ids) <= max(ids) < limit:
            wrong = next(expert for expert in ids if not 0 <= expert < limit)
            raise self.error(f"an expert id of 0 to {limit - 1}", wrong)
        return ids

    def checked(self, one: RoutingPass) -> RoutingPass:
        """`one`, if its layers and its tokens are as many as those before.

        Of a prompt a last layer may have seen fewer tokens: only the last one's output is needed.
        """
        counts = [len(tokens) for tokens in one.ids]
        self.n_layers = self.n_layers or len(counts)
        if len(counts) != self.n_layers:
            raise self.error(f"{self.n_layers} layers", len(counts))
        if not counts or min(counts) == 0 or (one.phase == "decode" and len(set(counts)) > 1):
            raise self.error("as many tokens in every layer, at least one", counts)
        self.top_k = self.top_k or len(one.ids[0][0])
        for tokens in one.ids:
            for token in tokens:
                if len(token) != self.top_k:
                    raise self.error(f"{self.top_k} expert ids for each token", list(token))
        return one

    def integer(self, text: object, what: str, least: int = 0, most: int = 1 << 60) -> int:
        try:
            number = int(str(text))
        except ValueError:
            raise self.error(f"a whole number as {what}", repr(text)) from None
        if not least <= number <= most:
            raise self.error(f"{what} of {least} to {most}", number)
        return number


class ExpertChoices(TraceFormat):
    def passes(self) -> Iterator[RoutingPass]:
        lines = (line for line in self.lines() if not line.startswith("#"))
        header = next(lines).split(",")
        blocks = [name for name in header if name.startswith("Block_")]
        further = header[1 + len(blocks) :]  # columns that only this tool writes
        if not blocks or header[: 1 + len(blocks)] != ["Index", *blocks]:
            raise self.error("the header Index,Block_0,Block_0,Block_1,...", ",".join(header))
        self.top_k = blocks.count(blocks[0])
        width = 0
        prompt = -1
        batch: list[list[tuple[int, ...]]] = []
        index = ""
        for line in lines:
            first, *cells = line.split(",")
            owner = None
            if further and len(cells) + 1 == len(header):
                owner = cells[-1] if further[-1] == "Prompt" else None
                del cells[len(blocks) :]
            is_prefill = not any(cells)
            if batch and (is_prefill or first != index):
                yield self._decode(batch, prompt)
                batch = []
            if is_prefill:
                prompt = prompt + 1 if owner is None else self.integer(owner, "Prompt")
                yield RoutingPass("prefill", (), prompt)
                continue
            if not width:
                width = len(cells)
                self._set_layers(width, len(blocks))
            if len(cells) != width:
                raise self.error(f"{width} expert ids like the rows before", len(cells))
            index = first
            batch.append(self._token_of_layers(cells))
        if batch:
            yield self._decode(batch, prompt)

    def _set_layers(self, width: int, n_header_ids: int) -> None:
        self.n_layers, rest = divmod(width, self.top_k)
        if rest:
            raise self.error(f"{self.top_k} expert ids for each layer, as the header", width)
        if width != n_header_ids:
            self.notes = (
                f"the header names {n_header_ids // self.top_k} layers and the rows hold "
                f"{self.n_layers}: the rows were read",
            )

    def _token_of_layers(self, cells: list[str]) -> list[tuple[int, ...]]:
        try:
            ids = list(map(int, cells))
        except ValueError:
            ids = [self.integer(cell, "an expert id") for cell in cells]  # raises for the one
        return [self.token(ids[at : at + self.top_k]) for at in range(0, len(ids), self.top_k)]

    def _decode(self, batch: list[list[tuple[int, ...]]], prompt: int) -> RoutingPass:
        return RoutingPass("decode", tuple(zip(*batch, strict=True)), max(prompt, 0))


class Route(TraceFormat):
    COLUMNS = "turn,phase,step,layer,slot,expert"

    def passes(self) -> Iterator[RoutingPass]:
        current: tuple[int, ...] = ()
        tokens: dict[int, list[list[int]]] = {}
        n_declared = n_columns = 0
        for line in self.lines():
            if line.startswith("#"):
                facts = dict(re.findall(r"(\w+)=(\S+)", line))
                self.model = Path(facts.get("model", self.model)).stem
                if "n_layer" in facts:
                    n_declared = self.integer(facts["n_layer"], "n_layer")
                if "expert_bytes" in facts:
                    self.expert_bytes.append(self.integer(facts["expert_bytes"], "expert_bytes"))
                if "n_expert" in facts:
                    self.n_experts = self.integer(facts["n_expert"], "n_expert", 1, N_IDS)
                continue
            if not n_columns:
                if not line.startswith(self.COLUMNS):
                    raise self.error(f"the columns {self.COLUMNS},...", line)
                n_columns = line.count(",") + 1
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
                self.integer(turn, "turn")
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
        ids = tuple(tuple(map(tuple, tokens[layer])) for layer in sorted(tokens))
        return self.checked(RoutingPass("decode" if key[1] else "prefill", ids, key[0]))


class JsonLines(TraceFormat):
    def passes(self) -> Iterator[RoutingPass]:
        for line in self.lines():
            try:
                one = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise self.error("a JSON object", f"{line[:40]!r} ({error})") from None
            if not isinstance(one, dict):
                raise self.error("a JSON object", line)
            if "routing_trace" in one:
                self._set_facts(one)
            else:
                yield self._pass(one)

    def _set_facts(self, facts: dict[str, Any]) -> None:
        self.model = str(facts.get("model", self.model))
        self.synthetic = bool(facts.get("synthetic", self.synthetic))
        notes = facts.get("notes", [])
        if not isinstance(notes, list):
            raise self.error("notes as a list of sentences", repr(notes))
        self.notes = tuple(map(str, notes))
        if facts.get("expert_bytes") is not None:
            self.expert_bytes = [self.integer(facts["expert_bytes"], "expert_bytes")]
        for name in ("n_layers", "top_k", "n_experts"):
            if facts.get(name) is not None:
                setattr(self, name, self.integer(facts[name], name, 1, N_IDS))

    def _pass(self, one: dict[str, Any]) -> RoutingPass:
        phase: Phase | None = one.get("phase")
        if phase not in ("prefill", "decode") or not isinstance(one.get("ids"), list):
            raise self.error('"phase" of prefill or decode, and "ids"', one)
        try:
            ids = tuple(tuple(map(self._ids, layer)) for layer in one["ids"])
        except TypeError:
            raise self.error("ids as [layer][token][k], whole numbers", one["ids"]) from None
        try:
            waited = tuple(map(self._ids, one.get("waited", [])))
        except TypeError:
            raise self.error("waited as [layer][expert]", one["waited"]) from None
        if waited and len(waited) != len(ids):
            raise self.error(f"waited for {len(ids)} layers", len(waited))
        found = RoutingPass(phase, ids, self.integer(one.get("prompt", 0), "prompt"), waited)
        return found if phase == "prefill" and not ids else self.checked(found)

    def _ids(self, experts: list[int]) -> tuple[int, ...]:
        if not all(type(expert) is int for expert in experts):
            raise TypeError
        return self.token(experts)


class TraceReader:
    """Iterates over the passes of a trace file, any number of times.

    `info` is known at once: the file is read up to its first pass that holds ids. `n_experts`,
    where given, bounds the ids of a file that does not say.
    """

    def __init__(self, path: Path, n_experts: int | None = None) -> None:
        self.path = path
        self.n_experts = n_experts
        if n_experts is not None and not 1 <= n_experts <= N_IDS:
            raise UserError(f"expected 1 to {N_IDS} experts a layer, found {n_experts}")
        try:
            if path.exists() and not path.is_file():  # a pipe cannot be read twice
                raise OSError(0, "not a regular file")
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
        if first[:1] not in kinds:
            raise UserError(
                f"{path}, line 1: expected a routing trace (a header that starts with Index, or "
                f"turn,phase,step, or JSON lines), found {first.strip()[:40]!r}"
            )
        self._kind = kinds[first[0]]
        reading = self._read()
        for one in reading.passes():
            if one.ids:
                break
        self.info = reading.info()

    @property
    def leaves_prompts_out(self) -> bool:
        """Whether the file's format has no place for the ids of prompts."""
        return self._kind is ExpertChoices

    def __iter__(self) -> Iterator[RoutingPass]:
        return self._read().passes()

    def _read(self) -> TraceFormat:
        return self._kind(self.path, self.n_experts)


def read_trace(path: Path, n_experts: int | None = None) -> Trace:
    """Read a whole trace; raises UserError for a file that is missing, malformed or empty.

    A run's expert_choices.csv has no ids of prompts: its routing.jsonl, where it lies beside the
    table, is taken instead. A note of the trace says so, or why not.
    """
    reader = TraceReader(path, n_experts)
    routing, info = _routing_beside(reader) or (Routing(reader), reader.info)
    if not routing.n_decoded:
        raise UserError(f"{path}: expected at least one decoded token, found {len(routing)} passes")
    n_experts = info.n_experts or n_experts or routing.highest + 1
    return Trace(replace(info, n_experts=n_experts), routing)


def _routing_beside(choices: TraceReader) -> tuple[Routing, TraceInfo] | None:
    """What routing.jsonl beside an expert_choices.csv holds, prompts and all."""
    path = choices.path
    beside = path.with_name(path.stem.replace("expert_choices", "routing") + ".jsonl")
    if not (choices.leaves_prompts_out and "expert_choices" in path.stem and beside.is_file()):
        return None
    try:
        whole = TraceReader(beside, choices.n_experts)
        routing = Routing(whole)
    except UserError as error:
        return Routing(choices), _noted(choices.info, f"prompts are left out: {error}")
    if all(_same_step(*both) for both in zip_longest(choices, routing)):
        return routing, _noted(whole.info, f"{beside} was read: it has the prompts' tokens too")
    note = f"prompts are left out: {beside} is of another run"
    return Routing(choices), _noted(choices.info, note)


def _same_step(one: RoutingPass | None, other: RoutingPass | None) -> bool:
    """Whether a row of expert_choices.csv is what routing.jsonl says of that pass."""
    if one is None or other is None or one.phase != other.phase:
        return False
    return one.phase == "prefill" or one.ids == other.ids


def _noted(info: TraceInfo, note: str) -> TraceInfo:
    return replace(info, notes=(*info.notes, note))
