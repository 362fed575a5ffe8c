"""The KV cache of the last conversation, for the request that goes on with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from transformers import PreTrainedModel

from moe_offload.model.kv_cache import RoomyLayer, make_cache

# Kinds of rotary embedding by which a token's keys do not depend on how long its text becomes.
_STEADY_ROPES: Final = ("default", "linear", "llama3", "yarn", "proportional")
_LENGTH_NUMBERS: Final = ("factor", "mscale")


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
