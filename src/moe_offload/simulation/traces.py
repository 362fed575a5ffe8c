"""Routing traces: which experts each token chose in each layer, in memory and written to files.

A reader hands on one `RoutingPass` after the other, and a replay takes them so. A trace that is
gone through again and again is held as `Routing`: two bytes for each chosen expert, a layer's one
behind the other, so that the next use of an expert, which Belady's optimum asks for, is a search
through bytes. In tuples each would take some 20.
"""

from __future__ import annotations

import json
import struct
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Phase = Literal["prefill", "decode"]
Ids = tuple[tuple[tuple[int, ...], ...], ...]
Waited = tuple[tuple[int, ...], ...]

NEVER = 1 << 60
N_IDS = 1 << 16  # ids of two bytes


@dataclass(frozen=True)
class RoutingPass:
    """One forward pass: `ids[layer][token][k]`, empty where a prefill's routing is not known.

    `waited[layer]` are the experts that a prompt copied to the GPU to be computed there; empty
    where none was, or where the trace does not say.
    """

    phase: Phase
    ids: Ids
    prompt: int = 0
    waited: Waited = ()


def distinct_experts(tokens: Sequence[Sequence[int]]) -> list[int]:
    """The experts of a layer in order of first choice: token by token, then by rank."""
    if len(tokens) == 1:
        return list(tokens[0])
    return list(dict.fromkeys(chain.from_iterable(tokens)))


class Routing:
    """Passes of one model, in two bytes for each chosen expert.

    Every token has the same top-k, a decode pass its tokens in every layer, all passes that hold
    ids the same layers; of a prompt a last layer may hold fewer tokens. `highest` is the highest
    id, -1 without any.
    """

    def __init__(self, passes: Iterable[RoutingPass]) -> None:
        self.top_k = 0
        self.highest = -1
        self._format = ""  # of a token's ids
        self._decode: list[bytearray] = []  # [layer]: uint16 ids by token, then by rank
        self._prefill: list[bytearray] = []
        self._n_decoded = array("q")  # tokens up to the end of each pass
        self._numbers = array("q")  # the prompt that each pass belongs to
        # By pass: where in each layer of `_prefill` a prompt's tokens lie, and what it waited for.
        self._prompts: dict[int, tuple[list[tuple[int, int]], Waited]] = {}
        for one in passes:
            self._append(one)

    def __len__(self) -> int:
        return len(self._numbers)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Routing) and vars(self) == vars(other)

    def __iter__(self) -> Iterator[RoutingPass]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, index: int) -> RoutingPass:
        index = range(len(self))[index]
        number = self._numbers[index]
        if index in self._prompts:
            spans, waited = self._prompts[index]
            ids = tuple(self._tokens(*one) for one in zip(self._prefill, spans, strict=False))
            return RoutingPass("prefill", ids, number, waited)
        span = (self._n_decoded[index - 1] if index else 0, self._n_decoded[index])
        return RoutingPass("decode", tuple(self._tokens(of, span) for of in self._decode), number)

    @property
    def n_decoded(self) -> int:
        """The decoded tokens of all passes."""
        return self._n_decoded[-1] if self._n_decoded else 0

    def decoded(self, layer: int) -> npt.NDArray[np.uint16]:
        """A layer's decoded ids [tokens, k]; of the routing's own memory."""
        return self._array(self._decode[layer])

    def prompted(self, layer: int) -> npt.NDArray[np.uint16]:
        """The same of its prompts' ids."""
        return self._array(self._prefill[layer])

    def next_use(self, layer: int, expert: int, place: int) -> int:
        """The first place of `expert` in a layer's decoded ids from `place` on, or `NEVER`.

        Places count ids: each decoded token has top-k of them, in every layer.
        """
        ids, needle = self._decode[layer], array("H", [expert]).tobytes()
        found = ids.find(needle, 2 * place)
        while found >= 0 and found % 2:  # the halves of two ids
            found = ids.find(needle, found + 1)
        return NEVER if found < 0 else found // 2

    def _append(self, one: RoutingPass) -> None:
        if one.ids and not self.top_k:
            self.top_k = len(one.ids[0][0])
            self._format = f"{self.top_k}H"
            self._decode = [bytearray() for _ in one.ids]
            self._prefill = [bytearray() for _ in one.ids]
        decode = one.phase == "decode"
        assert len(one.ids) == len(self._decode) or not (decode or one.ids), len(one.ids)
        n_tokens = self.n_decoded
        spans = []
        for layer, tokens in enumerate(one.ids):
            ids = list(chain.from_iterable(tokens))
            assert len(ids) == len(tokens) * self.top_k, (ids, self.top_k)
            self.highest = max(self.highest, *ids)
            store = self._decode[layer] if decode else self._prefill[layer]
            first = len(store) // (2 * self.top_k)
            spans.append((first, first + len(tokens)))
            store += array("H", ids).tobytes()
        if decode:
            assert len(set(spans)) == 1, spans
            n_tokens = spans[0][1]
        else:
            self._prompts[len(self)] = (spans, one.waited)
        self._n_decoded.append(n_tokens)
        self._numbers.append(one.prompt)

    def _tokens(self, ids: bytearray, span: tuple[int, int]) -> tuple[tuple[int, ...], ...]:
        first, end = (2 * self.top_k * token for token in span)
        return tuple(struct.iter_unpack(self._format, ids[first:end]))

    def _array(self, ids: bytearray) -> npt.NDArray[np.uint16]:
        return np.frombuffer(ids, np.uint16).reshape(-1, self.top_k)


@dataclass(frozen=True)
class TraceInfo:
    """What a trace says about itself.

    `n_experts` is None where only the ids show it; `synthetic` marks routing that no model chose;
    `notes` are sentences for the reader, such as a header that disagrees with its rows.
    """

    model: str
    n_layers: int
    top_k: int
    n_experts: int | None
    synthetic: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Trace:
    """A whole trace in memory; `info.n_experts` is always known here."""

    info: TraceInfo
    passes: Routing = field(repr=False)

    @property
    def n_layers(self) -> int:
        return self.info.n_layers

    @property
    def n_experts(self) -> int:
        assert self.info.n_experts is not None
        return self.info.n_experts

    @cached_property
    def n_chosen(self) -> int:
        """The experts of every decode pass and layer, each once however many tokens chose it."""
        decoded = (one.ids for one in self.passes if one.phase == "decode")
        return sum(len(distinct_experts(tokens)) for ids in decoded for tokens in ids)


def trace_lines(info: TraceInfo, passes: Iterable[RoutingPass]) -> Iterator[str]:
    """The lines of a trace's JSON file."""
    yield json.dumps({"routing_trace": 1, **asdict(info)}) + "\n"
    for one in passes:
        fields: dict[str, Any] = {"phase": one.phase, "ids": one.ids, "prompt": one.prompt}
        if one.waited:
            fields["waited"] = one.waited
        yield json.dumps(fields, separators=(",", ":")) + "\n"
