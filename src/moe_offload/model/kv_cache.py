"""A KV cache whose layers keep room for the tokens to come.

transformers' `DynamicCache` concatenates: each token copies all keys and values before it, 8 MB per
layer at 2,048 tokens of Mixtral. Its layers of full attention are replaced here by ones that write
a token where it belongs. Other layers (sliding windows, states of recurrent models) stay its own.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer

_FEWEST_SPARE_TOKENS = 256
_SPARE_PART = 8  # 1/8 of the tokens held, so that copies per token stay constant


def make_cache(config: PretrainedConfig, max_tokens: int) -> DynamicCache:
    """An empty cache for the model of `config`, with no room beyond `max_tokens` per sequence."""
    cache = DynamicCache(config=config)
    for number, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[number] = RoomyLayer(max_tokens)
    return cache


class RoomyLayer(DynamicLayer):  # type: ignore[misc]  # transformers has no types
    """Keys and values [B, heads, S, D], views of memory that has room for further tokens.

    Whatever transformers assigns to `keys` or `values` (a selection of the batch, a crop) is copied
    before the next token is added, so no memory but the layer's own is written.
    """

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self._keys: _Rows | None = None
        self._values: _Rows | None = None
        super().__init__()

    @property
    def keys(self) -> Tensor | None:
        return None if self._keys is None else self._keys.held()

    @keys.setter
    def keys(self, tensor: Tensor | None) -> None:
        self._keys = None if tensor is None else _Rows(tensor)

    @property
    def values(self) -> Tensor | None:
        return None if self._values is None else self._values.held()

    @values.setter
    def values(self, tensor: Tensor | None) -> None:
        self._values = None if tensor is None else _Rows(tensor)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add the tokens of `key_states` and `value_states`; all keys and values held."""
        if self._keys is None or self._values is None:
            self.device = key_states.device
            self.is_initialized = True
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        assert self._keys is not None and self._values is not None
        self._keys.add(key_states, self.max_tokens)
        self._values.add(value_states, self.max_tokens)
        return self._keys.held(), self._values.held()

    def get_seq_length(self) -> int:
        """The tokens held."""
        return 0 if self._keys is None else self._keys.length


class _Rows:
    """Rows [B, heads, length, D] at the front of `room` [B, heads, capacity, D]."""

    def __init__(self, room: Tensor) -> None:
        self.room = room
        self.length = room.shape[2]

    def held(self) -> Tensor:
        return self.room.narrow(2, 0, self.length)

    def add(self, rows: Tensor, max_tokens: int) -> None:
        length = self.length + rows.shape[2]
        batch, heads, capacity, width = self.room.shape
        if length > capacity:
            spare = max(_FEWEST_SPARE_TOKENS, length // _SPARE_PART)
            capacity = max(length, min(length + spare, max_tokens))
            room = self.room.new_empty(batch, heads, capacity, width)
            room.narrow(2, 0, self.length).copy_(self.held())
            self.room = room
        self.room.narrow(2, self.length, rows.shape[2]).copy_(rows)
        self.length = length
