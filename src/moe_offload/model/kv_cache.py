"""A KV cache whose layers keep room for the tokens to come.

transformers' `DynamicCache` concatenates: each token copies all keys and values before it, 8 MB per
layer at 2,048 tokens of Mixtral. Its layers of full attention are replaced here by ones that write
a token where it belongs, and those of sliding windows by ones that may lie in memory of somebody
else. Other layers (chunks, states of recurrent models) stay its own.

`PrefixCache` keeps the cache of the last conversation for the request that goes on with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

_FEWEST_SPARE_TOKENS = 256
_SPARE_PART = 8  # 1/8 of the tokens held, so that copies per token stay constant
# Kinds of rotary embedding by which a token's keys do not depend on how long its text becomes.
_STEADY_ROPES: Final = ("default", "linear", "llama3", "yarn", "proportional")
_LENGTH_NUMBERS: Final = ("factor", "mscale")


def make_cache(config: PretrainedConfig, max_tokens: int) -> DynamicCache:
    """An empty cache for the model of `config`, with no room beyond `max_tokens` per sequence."""
    cache = DynamicCache(config=config)
    in_chunks = getattr(config.get_text_config(), "attention_chunk_size", None) is not None
    for number, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[number] = RoomyLayer(max_tokens)
        elif type(layer) is DynamicSlidingWindowLayer and not in_chunks:
            cache.layers[number] = WindowLayer(max_tokens, layer.sliding_window)
    return cache


def can_join(cache: DynamicCache) -> bool:
    """Whether `join` knows all layers: those of full attention and of sliding windows."""
    known = RoomyLayer, WindowLayer, DynamicSlidingWindowLayer
    return all(type(layer) in known for layer in cache.layers)


def join(cache: DynamicCache, other: DynamicCache, width: int) -> None:
    """Add the rows of `other` to those of `cache`, all padded or cropped on the left to `width`.

    What is padded is zero, which attention has to mask; what is cropped has to be padding.
    """
    for layer, added in zip(cache.layers, other.layers, strict=True):
        if not layer.is_initialized:  # it shares another's keys
            continue
        held = width
        if layer.is_sliding:
            layer.cumulative_length = width
            held = min(width, layer.sliding_window - 1)
        layer.keys = _joined(layer.keys, added.keys, held)
        layer.values = _joined(layer.values, added.values, held)
        if isinstance(layer, RoomyLayer):  # else all layers would be held twice for a moment
            layer.release()


def _joined(rows: Tensor, added: Tensor, width: int) -> Tensor:
    """[B + A, heads, width, D] of [B, heads, S, D] and [A, heads, R, D], their ends aligned."""
    batch, heads, _, size = rows.shape
    joined = rows.new_zeros(batch + len(added), heads, width, size)
    for start, part in ((0, rows), (batch, added)):
        part = part[:, :, -width:]
        joined[start : start + len(part), :, width - part.shape[2] :] = part
    return joined


@dataclass
class Extent:
    """How many tokens the layers of a cache hold that lie in memory of somebody else.

    `is_whole` until one of the layers has left it.
    """

    n_tokens: int
    is_whole: bool = True


class _MovableLayer(DynamicLayer):  # type: ignore[misc]  # transformers has no types
    """Keys and values [B, heads, S, D] that may move into memory that another fills.

    They leave it with the first thing that is assigned. A token's place there is its position, or,
    where that is too short for them all, what is left of it divided by the memory's length.
    """

    is_initialized: bool
    _extent: Extent | None = None
    most_held: int | None = None  # of the last tokens

    @property
    def keys(self) -> Tensor:
        keys: Tensor = self._keys
        return keys if self._extent is None else self._held(keys, self._extent.n_tokens)

    @keys.setter
    def keys(self, keys: Tensor) -> None:
        self._leave()
        self._keys = keys

    @property
    def values(self) -> Tensor:
        values: Tensor = self._values
        return values if self._extent is None else self._held(values, self._extent.n_tokens)

    @values.setter
    def values(self, values: Tensor) -> None:
        self._leave()
        self._values = values

    def move_to(self, keys: Tensor, values: Tensor, extent: Extent) -> None:
        """Hold the tokens in `keys` and `values` [B, heads, capacity, D] from now on.

        Whoever writes further ones there counts them in `extent`. Where there is none it is zero:
        it is masked, but a NaN would come through.
        """
        end, n_held = extent.n_tokens, self.keys.shape[2]
        places = torch.arange(end - n_held, end, device=keys.device) % keys.shape[2]
        for theirs, ours in ((keys, self.keys), (values, self.values)):
            theirs.zero_().index_copy_(2, places, ours)
        self._leave()
        self.release()
        self._keys, self._values, self._extent = keys, values, extent

    def release(self) -> None:
        """Give up the memory of the keys and values that were here before the present ones."""

    def _held(self, memory: Tensor, n_tokens: int) -> Tensor:
        n_held = n_tokens if self.most_held is None else min(n_tokens, self.most_held)
        capacity = memory.shape[2]
        if n_tokens > capacity:
            memory, n_tokens = memory.roll(-n_tokens, 2), capacity
        return memory[:, :, n_tokens - n_held : n_tokens]

    def _leave(self) -> None:
        if self._extent is not None:
            keys, values = self.keys, self.values
            self._extent.is_whole, self._extent = False, None
            self._keys, self._values = keys, values


class WindowLayer(_MovableLayer, DynamicSlidingWindowLayer):  # type: ignore[misc]
    """transformers' own layer of the last tokens, which may lie elsewhere."""

    def __init__(self, max_tokens: int, sliding_window: int) -> None:
        super().__init__(sliding_window)
        self.max_tokens = max_tokens
        self.most_held = sliding_window - 1

    @property
    def cumulative_length(self) -> int:
        """How many tokens there have been."""
        return self._n_tokens if self._extent is None else self._extent.n_tokens

    @cumulative_length.setter
    def cumulative_length(self, n_tokens: int) -> None:
        self._leave()
        self._n_tokens = n_tokens

    def _leave(self) -> None:
        if self._extent is not None:
            self._n_tokens = self._extent.n_tokens
        super()._leave()


class RoomyLayer(_MovableLayer):
    """Keys and values [B, heads, S, D], views of memory that has room for further tokens.

    Whatever transformers assigns to `keys` or `values` (a selection of the batch, a crop) is copied
    before the next token is added, so no memory but the layer's own is written.
    """

    def __init__(self, max_tokens: int) -> None:
        super().__init__()
        self.max_tokens = max_tokens
        self._rooms = _Room(max_tokens), _Room(max_tokens)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add the tokens of `key_states` and `value_states`; all keys and values held."""
        if not self.is_initialized:
            self.device = key_states.device
            self.is_initialized = True
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        keys, values = self._rooms
        self.keys = keys.add(self.keys, key_states)
        self.values = values.add(self.values, value_states)
        return self.keys, self.values

    def can_extend(self, like: Tensor) -> bool:
        """Whether there are tokens, in memory of the layer's own, of as many sequences and of the
        dtype and device of `like` [B, ...]."""
        if not self.is_initialized or self._extent is not None:
            return False
        keys = self._keys
        alike = keys.dtype == like.dtype and keys.device == like.device
        return alike and keys.shape[0] == like.shape[0]

    def extend(self, n_tokens: int) -> None:
        """Hold `n_tokens` more, whose keys and values the caller writes at once, at the end."""
        keys, values = self._rooms
        self.keys = keys.extend(self.keys, n_tokens)
        self.values = values.extend(self.values, n_tokens)

    def release(self) -> None:
        self._rooms = _Room(self.max_tokens), _Room(self.max_tokens)


class _Room:
    """Memory [B, heads, capacity, D] whose front is the rows that it gave last."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._memory: Tensor | None = None
        self._given: Tensor | None = None

    def add(self, held: Tensor, rows: Tensor) -> Tensor:
        """`held` [B, heads, S, D] and `rows` behind it, without a copy of what was given last."""
        n_added = rows.shape[2]
        given = self.extend(held, n_added)
        given.narrow(2, held.shape[2], n_added).copy_(rows)
        return given

    def extend(self, held: Tensor, n_added: int) -> Tensor:
        """`held` and room for `n_added` rows behind it, in which there is anything."""
        batch, heads, n_held, width = held.shape
        length = n_held + n_added
        if self._memory is None or held is not self._given or length > self._memory.shape[2]:
            spare = max(_FEWEST_SPARE_TOKENS, length // _SPARE_PART)
            capacity = max(length, min(length + spare, self._max_tokens))
            self._memory = held.new_empty(batch, heads, capacity, width)
            self._memory[:, :, :n_held] = held
        self._given = self._memory.narrow(2, 0, length)
        return self._given


class PrefixCache:
    """Lends the model's KV cache to one generation at a time, at most `max_tokens` long.

    A cache is handed out with the tokens that it holds already: those that the last text it was
    kept with and the new one begin with. It is empty where they begin with nothing in common, and
    for models whose layers cannot forget a text's end: sliding windows, recurrent states, rotary
    embeddings that change with the length.
    """

    def __init__(self, model: PreTrainedModel, max_tokens: int) -> None:
        self._model = model
        self._max_tokens = max_tokens
        self._ids: Sequence[int] = ()
        self._cache: Any = None

    def take(self, ids: Sequence[int]) -> tuple[Any, int]:
        """The cache for a text that begins with `ids`, and how many of them it holds.

        None where the model makes a cache of its own. At least one token is left to evaluate. What
        was taken is nobody's until it is kept: an evaluation that fails leaves it half written.
        """
        cache, held, self._cache, self._ids = self._cache, self._ids, None, ()
        if cache is not None:
            n_shared = _n_common(held, ids[:-1])
            cache.crop(n_shared - len(held))  # negative: so many tokens fewer
            if n_shared:
                return cache, n_shared
        if not self._model._supports_default_dynamic_cache():
            return None, 0
        return make_cache(self._model.config, self._max_tokens), 0

    def keep(self, cache: Any, ids: Sequence[int]) -> None:
        """`cache` came back from a generation whose text is `ids`; it holds all but the last."""
        if cache is not None and _can_crop(self._model, cache):
            self._cache, self._ids = cache, list(ids[: cache.get_seq_length()])


def _can_crop(model: PreTrainedModel, cache: Any) -> bool:
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    ropes = [one for one in (rope, *rope.values()) if isinstance(one, dict)]
    return all(map(_is_steady, ropes)) and all(type(one) is RoomyLayer for one in cache.layers)


def _is_steady(rope: dict[str, Any]) -> bool:
    kind = rope.get("rope_type")
    if kind == "longrope":  # one set of numbers for short texts, one for long ones
        pairs = [(rope.get(f"short_{name}"), rope.get(f"long_{name}")) for name in _LENGTH_NUMBERS]
        return all(short == long for short, long in pairs)
    return kind is None or kind in _STEADY_ROPES


def _n_common(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = zip(first, second, strict=False)
    return next(
        (n for n, (one, other) in enumerate(pairs) if one != other), min(len(first), len(second))
    )
