"""Routing traces: which experts each token chose in each layer, in memory and written to files.

Routing in one byte an expert, two where there are more than 256: gigabyte traces in memory.

One `RoutingPass` in tuples takes some 20 bytes for each chosen expert. Here the ids of a layer lie
one behind the other, so that the next use of an expert, which Belady's optimum asks for, is a
search through bytes.
"""

from __future__ import annotations

import json
import sys
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from moe_offload.errors import UserError

Phase = Literal["prefill", "decode"]
Ids = tuple[tuple[tuple[int, ...], ...], ...]
Seen = tuple[tuple[int, int], ...]

NEVER = 1 << 60
N_IDS = 1 << 16  # ids of two bytes
MAX_TUPLE_IDS = 1 << 20  # some 20 MB in tuples


@dataclass(frozen=True)
class RoutingPass:
    """One forward pass: `ids[layer][token][k]`, empty where a prefill's routing is not known.

    `waited[layer]` are the experts that a prompt copied to the GPU to be computed there; empty
    where none was, or where the trace does not say. `seen[layer]` is what is known of a prompt
    whose tokens are not: (expert, number of tokens), the last token's experts first.
    """

    phase: Phase
    ids: Ids
    prompt: int = 0
    waited: tuple[tuple[int, ...], ...] = ()
    seen: tuple[Seen, ...] = ()

    def last_choices(self) -> Ids:
        """`ids`, or tokens of one expert each that leave a cache the same: those of `seen`."""
        return self.ids or tuple(tuple((e,) for e, _ in reversed(layer)) for layer in self.seen)


class PackedRouting:
    """Passes of one model, appended in order and iterated any number of times.

    Every token has the same top-k; a decode pass has its tokens in every layer, all passes that
    hold ids the same layers; ids are below `N_IDS`. `n_ids` counts ids, `n_decoded` decoded tokens.
    """

    def __init__(self, passes: Iterable[RoutingPass] = ()) -> None:
        self.n_ids = 0
        self.n_decoded = 0
        self.highest = -1
        self._width = 1  # bytes of an id
        self._top_k = 0
        self._decode: list[bytearray] = []  # [layer]: ids by token, then by rank
        self._prefill: list[bytearray] = []
        self._n_tokens = array("i")  # of each pass; -1: a prompt
        self._numbers = array("q")  # the prompt that each pass belongs to
        # Of each prompt's pass: its tokens in each layer, what it waited for, what is seen of it.
        self._prompts: list[
            tuple[tuple[int, ...], tuple[tuple[int, ...], ...], tuple[Seen, ...]]
        ] = []
        for one in passes:
            self.append(one)

    def __len__(self) -> int:
        return len(self._n_tokens)

    def append(self, one: RoutingPass) -> None:
        """Add the next pass."""
        counts = tuple(map(len, one.ids))
        decode = one.phase == "decode"
        if counts and not self._decode:
            self._top_k = len(one.ids[0][0])
            self._decode = [bytearray() for _ in counts]
            self._prefill = [bytearray() for _ in counts]
        assert not decode or len(set(counts)) == 1, counts
        assert len(counts) in (0, len(self._decode)), (len(counts), len(self._decode))
        for layer, tokens in enumerate(one.ids):
            ids = tokens[0] if len(tokens) == 1 else [e for token in tokens for e in token]
            assert len(ids) == len(tokens) * self._top_k, (ids, self._top_k)
            highest = max(ids)
            self.highest = max(self.highest, highest)
            if highest > 255 and self._width == 1:
                self._widen()
            store = self._decode[layer] if decode else self._prefill[layer]
            store.extend(ids if self._width == 1 else array("H", ids).tobytes())
            self.n_ids += len(ids)
        self._n_tokens.append(counts[0] if decode else -1)
        self._numbers.append(one.prompt)
        if decode:
            self.n_decoded += counts[0]
        else:
            self._prompts.append((counts, one.waited, one.seen))
            of_seen = (expert for layer in one.seen for expert, _ in layer)
            self.highest = max(self.highest, max(of_seen, default=-1))

    def __iter__(self) -> Iterator[RoutingPass]:
        k, width = self._top_k, self._width
        at = 0  # in bytes, of every layer's decode
        starts = [0] * len(self._prefill)
        prompts = iter(self._prompts)
        for n_tokens, number in zip(self._n_tokens, self._numbers, strict=True):
            if n_tokens < 0:
                counts, waited, seen = next(prompts)
                ids = []
                for layer, n in enumerate(counts):
                    end = starts[layer] + n * k * width
                    ids.append(self._tokens(self._prefill[layer][starts[layer] : end]))
                    starts[layer] = end
                yield RoutingPass("prefill", tuple(ids), number, waited, seen)
                continue
            end = at + n_tokens * k * width
            if n_tokens == width == 1:
                decoded: Ids = tuple((tuple(store[at:end]),) for store in self._decode)
            else:
                decoded = tuple(self._tokens(store[at:end]) for store in self._decode)
            at = end
            yield RoutingPass("decode", decoded, number)

    def next_use(self, layer: int, expert: int, place: int) -> int:
        """The first place of `expert` in a layer's decoded ids from `place` on, or `NEVER`.

        Places count ids: each decoded token has top-k of them, in every layer.
        """
        ids = self._decode[layer]
        if self._width == 1:
            found = ids.find(expert, place)
            return found if found >= 0 else NEVER
        needle = expert.to_bytes(2, sys.byteorder)
        found = ids.find(needle, 2 * place)
        while found >= 0 and found % 2:  # the halves of two ids
            found = ids.find(needle, found + 1)
        return found // 2 if found >= 0 else NEVER

    def decoded_bytes(self, layer: int) -> tuple[bytearray, int]:
        """A layer's decoded ids, [token][k], as unsigned integers, and the bytes of each."""
        return self._decode[layer], self._width

    def prompt_bytes(self, layer: int) -> tuple[bytearray, int]:
        """The same of its prompts' ids."""
        return self._prefill[layer], self._width

    def _tokens(self, flat: bytearray) -> tuple[tuple[int, ...], ...]:
        ids = tuple(flat) if self._width == 1 else tuple(memoryview(flat).cast("H"))
        k = self._top_k
        return tuple(ids[start : start + k] for start in range(0, len(ids), k))

    def _widen(self) -> None:
        self._width = 2
        for stores in (self._decode, self._prefill):
            for layer, ids in enumerate(stores):
                stores[layer] = bytearray(array("H", list(ids)).tobytes())


Passes = tuple[RoutingPass, ...] | PackedRouting


def packed(passes: Iterable[RoutingPass]) -> PackedRouting:
    """The same passes, packed."""
    return passes if isinstance(passes, PackedRouting) else PackedRouting(passes)


def collected(passes: Iterable[RoutingPass]) -> Passes:
    """Passes to be iterated again and again: as tuples, which is faster, or packed where many."""
    kept = packed(passes)
    return kept if kept.n_ids > MAX_TUPLE_IDS else tuple(kept)


__all__ = ["RoutingPass", "Trace", "TraceInfo", "trace_lines", "write_trace"]


@dataclass(frozen=True)
class TraceInfo:
    """What a trace says about itself.

    `n_experts` is None where only the ids show it; `synthetic` marks routing that no model chose;
    `notes` are sentences for the reader, such as a header that disagrees with its rows;
    `expert_bytes` is the mean size of an expert where the file tells it.
    """

    model: str
    n_layers: int
    top_k: int
    n_experts: int | None
    synthetic: bool = False
    notes: tuple[str, ...] = ()
    expert_bytes: int | None = None


@dataclass(frozen=True)
class Trace:
    """A whole trace in memory; `info.n_experts` is always known here."""

    info: TraceInfo
    passes: Passes = field(repr=False)

    @cached_property
    def packed(self) -> PackedRouting:
        """The passes, packed, for what looks ahead in them."""
        return packed(self.passes)

    @property
    def n_layers(self) -> int:
        return self.info.n_layers

    @property
    def n_experts(self) -> int:
        assert self.info.n_experts is not None
        return self.info.n_experts


def write_trace(path: Path, info: TraceInfo, passes: Iterable[RoutingPass]) -> None:
    """Write a trace as JSON lines; raises UserError where the file cannot be written."""
    try:
        with path.open("w", encoding="utf-8") as lines:
            lines.writelines(trace_lines(info, passes))
    except OSError as error:
        raise UserError(
            f"expected to write a trace to {path}, found no place for it ({error.strerror}); "
            "choose another"
        ) from None


def trace_lines(info: TraceInfo, passes: Iterable[RoutingPass]) -> Iterator[str]:
    """The lines of a trace's JSON file."""
    yield json.dumps({"routing_trace": 1, **asdict(info)}) + "\n"
    for one in passes:
        fields: dict[str, Any] = {"phase": one.phase, "ids": one.ids, "prompt": one.prompt}
        if one.waited:
            fields["waited"] = one.waited
        if one.seen:
            fields["seen"] = one.seen
        yield json.dumps(fields, separators=(",", ":")) + "\n"
