"""What happened in a run: one event per MoE layer, kept on the hot path and read after it.

Appending does no I/O and never waits for a device. Between two layers the CPU's caches hold
weights and every line of Python is slow, so a layer only leaves something that can tell its event
there (`at_end`). When the pass has ended, on the device too, the events are asked for and packed:
116 bytes, expert ids two bytes each. A night of prompts (a million layer events) stays under 150 MB
and leaves the garbage collector nothing to walk.

`NvtxRanges` shows the same spans to Nsight Systems.
"""

from __future__ import annotations

import struct
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from types import ModuleType
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import nvtx

Phase = Literal["prefill", "decode"]
Table = npt.NDArray[Any]


class LayerEvent(NamedTuple):
    """One MoE layer of one forward pass. A field's name ends in its unit; the others count.

    `ids` is [T][K] and `n_hits_of_token` [T], or None where the layer is not cached; padding is no
    token and left out. `hits` and `misses` count (token, expert) pairs: together T * K on a cached
    layer. `fetches` are the copies to the accelerator that the layer started.

    `host_hits` and `host_misses` are experts that were in host memory when the layer asked for them
    and those that had to come from disk; both are 0 where all experts are in memory.

    `attention`, `router`, `plan`, `cpu`, `copy_wait` and `combine` are disjoint spans, in this
    order; with what a pass spends outside its layers they add up to its duration. So does
    `disk_wait`, time stood still for the disk between parts of `cpu`. `router` includes the copy of
    routing and hidden state to the host, `copy_wait` is time stood still for an expert's copy
    beyond what the CPU's experts hide, `combine` what the accelerator still needed after that, up
    to the layer's sum. `gpu` is the accelerator's own time for the layer's experts, beside the
    others. `plan` and `cpu` are by the host's clock. So are the others, unless there is a GPU:
    then they are by its own, for the host only launches what it does (`device_clock.py`).

    `cpu_bytes` and `gpu_bytes` are the expert bytes that each side read (each expert once);
    `waited_bytes` is the part of `gpu_bytes` that was no hit: the layer waited for its copy.
    `disk_bytes` arrived from disk since the layer before.
    `waited` are the experts that a prompt copied to be computed there. `pass_index` is the
    recorder's.
    """

    layer: int
    ids: Sequence[Sequence[int]]
    n_hits_of_token: Sequence[int] | None
    hits: int = 0
    misses: int = 0
    fetches: int = 0
    evictions: int = 0
    host_hits: int = 0
    host_misses: int = 0
    attention_us: float = 0.0
    router_us: float = 0.0
    plan_us: float = 0.0
    cpu_us: float = 0.0
    gpu_us: float = 0.0
    copy_wait_us: float = 0.0
    combine_us: float = 0.0
    disk_wait_us: float = 0.0
    cpu_bytes: int = 0
    gpu_bytes: int = 0
    waited_bytes: int = 0
    fetch_bytes: int = 0
    disk_bytes: int = 0
    waited: tuple[int, ...] = ()
    pass_index: int = 0


DURATIONS = tuple(name for name in LayerEvent._fields if name.endswith("_us"))
BYTES = tuple(name for name in LayerEvent._fields if name.endswith("_bytes"))
_SHAPE = ("pass_index", "layer", "n_tokens", "top_k", "cached")
_COUNTS = ("hits", "misses", "fetches", "evictions", "host_hits", "host_misses")
_PACKED = slice(3, -2)  # all but the layer, the lists and the pass
assert tuple(LayerEvent._fields)[_PACKED] == (*_COUNTS, *DURATIONS, *BYTES)

LAYER_DTYPE = np.dtype(
    [(name, "<i4") for name in (*_SHAPE, *_COUNTS)]
    + [(name, "<f4") for name in DURATIONS]
    + [(name, "<i8") for name in BYTES]
)
_LAYER_ROW = struct.Struct(f"<{len(_SHAPE + _COUNTS)}i{len(DURATIONS)}f{len(BYTES)}q")
_CHUNK_ROWS = 4096  # read so many at a time: as Python objects a row takes 700 bytes

PASS_DTYPE = np.dtype(
    [
        ("decode", "?"),
        ("n_tokens", "<i8"),
        ("prompt", "<i8"),
        ("duration_s", "<f8"),
        ("n_sequences", "<i8"),
        ("unix_s", "<f8"),
    ]
)
TOKEN_DTYPE = np.dtype(
    [("pass_index", "<i8"), ("prompt", "<i8"), ("time_s", "<f8"), ("unix_s", "<f8")]
)


class Recorder:
    """Append-only record of one run. Written by the inference thread alone, read after the run."""

    enabled = True

    def __init__(self) -> None:
        self._passes: list[tuple[bool, int, int, float, int, float]] = []
        self._tokens: list[tuple[int, int, float, float]] = []
        self._layers = bytearray()
        self._ids = array("h")
        self._n_hits_of_token = array("h")
        self._waited: dict[int, int] = {}  # row -> a bit per expert
        self._at_end: list[Callable[[], LayerEvent]] = []
        self._begun = (-1, 0, 0, 0)  # the pass begun last; rows, ids, hits before it
        self._pass = (False, 0, 0, 0)  # what it is

    @property
    def _is_open(self) -> bool:
        """Whether the pass begun last has not ended."""
        return self._begun[0] == len(self._passes)

    def begin_pass(self, phase: Phase, n_tokens: int, prompt: int, n_sequences: int = 1) -> None:
        """A forward pass over `n_tokens` tokens of `n_sequences` starts.

        `prompt` is the (first) prompt's number.
        """
        if self._is_open:  # it never ended: an error, a Ctrl-C
            _, n_rows, n_ids, n_hits = self._begun
            self._at_end.clear()
            del self._layers[n_rows * _LAYER_ROW.size :]
            del self._ids[n_ids:]
            del self._n_hits_of_token[n_hits:]
            self._waited = {row: bits for row, bits in self._waited.items() if row < n_rows}
        n_rows = len(self._layers) // _LAYER_ROW.size
        self._begun = (len(self._passes), n_rows, len(self._ids), len(self._n_hits_of_token))
        self._pass = (phase == "decode", n_tokens, prompt, n_sequences)

    def at_end(self, event: Callable[[], LayerEvent]) -> None:
        """Record what `event` tells when the pass has ended; they are asked in their order."""
        self._at_end.append(event)

    def layer(self, event: LayerEvent) -> None:
        """One MoE layer of the pass begun last is done."""
        ids, hits_of_token = event.ids, event.n_hits_of_token
        if event.waited:
            row = len(self._layers) // _LAYER_ROW.size
            self._waited[row] = sum(1 << expert for expert in event.waited)
        n_tokens = len(ids)
        self._ids.extend(ids[0] if n_tokens == 1 else chain.from_iterable(ids))
        if hits_of_token is not None:
            self._n_hits_of_token.extend(hits_of_token)
        top_k = len(ids[0]) if n_tokens else 0
        shape = (len(self._passes), event.layer, n_tokens, top_k, hits_of_token is not None)
        self._layers += _LAYER_ROW.pack(*shape, *tuple(event)[_PACKED])

    def end_pass(self, duration_s: float, unix_s: float | None = None) -> None:
        """The pass begun last is done, by default now; `duration_s` is its wall-clock time."""
        assert self._is_open, "end_pass without begin_pass"
        decode, n_tokens, prompt, n_sequences = self._pass
        now_s = time.time() if unix_s is None else unix_s
        for event in self._at_end:
            self.layer(event())
        self._at_end.clear()
        # Only this makes the pass one: a Ctrl-C before it leaves the others as they were.
        self._passes.append((decode, n_tokens, prompt, duration_s, n_sequences, now_s))

    def token(self, prompt: int, time_s: float, unix_s: float) -> None:
        """The last pass gave `prompt` a token, `time_s` after its previous one or, for the first
        token of a prompt, after its request (that is its TTFT).

        In a batched pass the calls come in the order of the pass's rows.
        """
        last_pass = len(self._passes) - (not self._is_open)
        self._tokens.append((last_pass, prompt, time_s, unix_s))

    # Reading. A pass that never ended (an interrupted run) is left out with its layers.

    def pass_table(self) -> Table:
        """One row per finished forward pass, PASS_DTYPE."""
        return np.array(self._passes, dtype=PASS_DTYPE)

    def token_table(self) -> Table:
        """One row per generated token, TOKEN_DTYPE.

        Where `token` was never called, as under a bare `generate()`, every sequence of every pass
        gave one: a decode pass takes the time since the pass before it had ended.
        """
        return np.array(self._tokens or self._tokens_of_passes(), dtype=TOKEN_DTYPE)

    def _tokens_of_passes(self) -> list[tuple[int, int, float, float]]:
        tokens: list[tuple[int, int, float, float]] = []
        chunks_s = before_s = 0.0
        for index, one in enumerate(self._passes):
            decode, _, prompt, duration_s, n_sequences, now_s = one
            time_s = now_s - before_s if decode and index else duration_s
            before_s = now_s
            following = self._passes[index + 1] if index + 1 < len(self._passes) else None
            if not decode:
                time_s, chunks_s = time_s + chunks_s, 0.0
                if following is not None and not following[0] and following[2] == prompt:
                    chunks_s = time_s  # the prompt goes on in the next pass
                    continue
            tokens += [(index, prompt + row, time_s, now_s) for row in range(n_sequences)]
        return tokens

    def layer_table(self) -> Table:
        """One row per MoE layer of a finished pass, LAYER_DTYPE."""
        rows = np.frombuffer(self._layers, dtype=LAYER_DTYPE)
        return rows[: int(np.searchsorted(rows["pass_index"], len(self._passes)))].copy()

    def expert_ids(self) -> npt.NDArray[np.int16]:
        """The ids of all layer events, end to end: T * K of each row of `layer_table`."""
        return self._of_finished(self._ids, "top_k")

    def hits_of_tokens(self) -> npt.NDArray[np.int16]:
        """`n_hits_of_token` of all cached layer events, end to end: T of each cached row."""
        return self._of_finished(self._n_hits_of_token, "cached")

    def _of_finished(self, numbers: array[int], per_token: str) -> npt.NDArray[np.int16]:
        """The part of `numbers` in finished passes, by how many a row has `per_token`."""
        rows = self.layer_table()
        n_finished = int((rows["n_tokens"].astype(np.int64) * rows[per_token]).sum())
        return np.frombuffer(numbers.tobytes(), dtype=np.int16)[:n_finished]

    def layer_events(self) -> Iterator[LayerEvent]:
        """The layer events of all finished passes, one typed tuple each."""
        table, all_ids, all_hits = self.layer_table(), self.expert_ids(), self.hits_of_tokens()
        id_end = hits_end = 0
        for first in range(0, len(table), _CHUNK_ROWS):
            for number, row in enumerate(table[first : first + _CHUNK_ROWS].tolist(), first):
                pass_index, layer, n_tokens, top_k, cached, *rest = row
                id_start, id_end = id_end, id_end + n_tokens * top_k
                ids = all_ids[id_start:id_end].reshape(n_tokens, top_k).tolist()
                n_hits_of_token = None
                if cached:
                    hits_start, hits_end = hits_end, hits_end + n_tokens
                    n_hits_of_token = all_hits[hits_start:hits_end].tolist()
                bits = self._waited.get(number, 0)
                waited = tuple(e for e in range(bits.bit_length()) if bits >> e & 1)
                yield LayerEvent._make((layer, ids, n_hits_of_token, *rest, waited, pass_index))


class NullRecorder(Recorder):
    """The recorder of `--no-record`: passes and tokens for the printed totals, no layer events."""

    enabled = False

    def layer(self, event: LayerEvent) -> None:
        """Nothing is kept."""


_OFF: AbstractContextManager[None] = nullcontext()


class NvtxRanges:
    """Named ranges on the calling thread when `enabled`; else every call returns at once.

    `library` is the nvtx module or a stand-in.
    """

    def __init__(self, enabled: bool, library: ModuleType | Any = nvtx) -> None:
        self.enabled = enabled
        self._library: Any = library
        self._n_open = 0

    def begin_pass(self, phase: str) -> None:
        """A forward pass of `phase` starts; it lasts until end_pass()."""
        if self.enabled:
            self.end_pass()  # one that an error cut short
            self._library.push_range(phase)
            self._n_open = 1

    def part(self, layer: int, part: str) -> None:
        """The next part of the pass starts, such as `layer 3 router`; the one before it ends."""
        if self.enabled and self._n_open:
            if self._n_open == 2:
                self._library.pop_range()
            self._library.push_range(f"layer {layer} {part}")
            self._n_open = 2

    def end_pass(self) -> None:
        """The forward pass begun last is done, and its last part."""
        while self._n_open:
            self._library.pop_range()
            self._n_open -= 1

    def layer(self, layer: int, part: str) -> AbstractContextManager[Any]:
        """A range inside a part, such as `layer 3 launch`."""
        if not self.enabled:
            return _OFF
        annotation: AbstractContextManager[Any] = self._library.annotate(f"layer {layer} {part}")
        return annotation
