"""The KV cache with room against transformers' own; what of the last conversation's is lent."""

from __future__ import annotations

import random

import pytest
import torch
from against_transformers import greedy
from tiny_models import CONFIGS, build_model, gpt_oss, mixtral, nemotron_h
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from moe_offload.model import kv_cache
from moe_offload.model.generation import cache_argument
from moe_offload.model.kv_cache import (
    PrefixCache,
    RoomyLayer,
    WindowLayer,
    can_join,
    join,
    make_cache,
)

REPLACED = {DynamicLayer: RoomyLayer, DynamicSlidingWindowLayer: WindowLayer}


def tokens(seed: int, batch: int, count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(batch, 3, count, 8, generator=generator)
    return keys, torch.randn(batch, 3, count, 5, generator=generator)


@pytest.mark.parametrize("seed", range(8))
def test_holds_what_transformers_own_layer_holds(seed, monkeypatch):
    monkeypatch.setattr(kv_cache, "_FEWEST_SPARE_TOKENS", 7)
    chance = random.Random(seed)
    roomy, plain = RoomyLayer(40), DynamicLayer()
    batch = 4
    for step in range(60):
        what = chance.choice(["add"] * 6 + ["crop", "select", "reorder", "repeat", "reset"])
        if what == "add" or not plain.is_initialized:
            new = tokens(step, batch, chance.choice([1, 1, 1, 6]))
            for found, expected in zip(roomy.update(*new), plain.update(*new), strict=True):
                assert torch.equal(found, expected)
        for layer in (roomy, plain):
            if what == "crop" and plain.get_seq_length() > 3:
                layer.crop(-2)
            elif what == "select":
                layer.batch_select_indices(torch.arange(batch - 1, -1, -1)[: max(1, batch - 1)])
            elif what == "reorder" and layer.is_initialized:
                layer.reorder_cache(torch.zeros(batch, dtype=torch.int64))
            elif what == "repeat" and batch <= 4:
                layer.batch_repeat_interleave(2)
            elif what == "reset":
                layer.reset()
        if plain.is_initialized:
            batch = plain.keys.shape[0]
            assert torch.equal(roomy.keys, plain.keys) and torch.equal(roomy.values, plain.values)
        assert roomy.get_seq_length() == plain.get_seq_length()
        assert roomy.get_mask_sizes(1) == plain.get_mask_sizes(1)


def test_a_token_is_written_beside_those_before_it_and_room_ends_at_the_limit():
    layer = RoomyLayer(9)
    layer.update(*tokens(0, 2, 4))
    held = layer.keys
    before = held.clone()
    layer.update(*tokens(1, 2, 1))
    assert torch.equal(held, before)
    assert layer.keys.data_ptr() == held.data_ptr() == layer.keys.untyped_storage().data_ptr()
    assert layer.keys.untyped_storage().nbytes() == 2 * 3 * 9 * 8 * 4
    layer.update(*tokens(2, 2, 20))  # beyond what was announced: it grows as it must
    assert layer.get_seq_length() == 25
    assert torch.equal(layer.keys[:, :, :4], before)


def test_what_transformers_assigns_is_never_written():
    layer = RoomyLayer(100)
    layer.update(*tokens(0, 2, 4))
    mine = torch.zeros(2, 3, 10, 8)
    layer.keys, layer.values = mine[:, :, :4], torch.zeros(2, 3, 4, 5)
    layer.update(*tokens(1, 2, 1))
    assert not mine.any()
    layer.update(*tokens(2, 2, 1))
    assert not mine.any()


@pytest.mark.parametrize("width", [4, 7, 12])
def test_joined_rows_are_aligned_at_their_ends(width):
    """Sliding windows of 6: what lies before them is not kept."""
    config = gpt_oss(sliding_window=6, num_hidden_layers=2)
    cache, other = make_cache(config, 40), make_cache(config, 40)
    assert can_join(cache) and {layer.is_sliding for layer in cache.layers} == {True, False}
    for layer, added in zip(cache.layers, other.layers, strict=True):
        layer.update(*tokens(0, 2, 9))
        added.update(*tokens(1, 1, 4))
    join(cache, other, width)
    for layer in cache.layers:
        kept = min(width, 5) if layer.is_sliding else width
        assert layer.get_seq_length() == width
        for joined, old, new in zip(
            (layer.keys, layer.values), tokens(0, 2, 9), tokens(1, 1, 4), strict=True
        ):
            assert joined.shape[:3] == (3, 3, kept)
            assert torch.equal(joined[:2, :, -min(kept, 9) :], old[:, :, -kept:])
            assert torch.equal(joined[2:, :, -min(kept, 4) :], new[:, :, -kept:])
            assert not joined[2:, :, : max(kept - 4, 0)].any()
        before = layer.keys.clone()
        assert torch.equal(layer.update(*tokens(2, 3, 1))[0][:, :, :-1], before)


@pytest.mark.parametrize("config", [gpt_oss, nemotron_h, mixtral])
def test_only_layers_of_full_attention_and_of_windows_are_replaced(config):
    ours, theirs = make_cache(config(), 10), DynamicCache(config=config())
    for layer, own in zip(ours.layers, theirs.layers, strict=True):
        assert type(layer) is REPLACED.get(type(own), type(own))


@pytest.mark.parametrize("name", CONFIGS)
def test_generation_is_the_same_with_and_without_padding_and_room(name):
    model = build_model(CONFIGS[name]())
    prompts = [[5, 9, 7, 11], [4, 8, 3, 6], [3, 12, 9]]

    def reference(prompt: list[int]) -> list[int]:
        chosen: list[int] = []
        cache = {cache_argument(model): DynamicCache(config=model.config)}
        inputs = torch.tensor([prompt])
        with torch.inference_mode():
            for _ in range(12):
                logits = model(input_ids=inputs, use_cache=True, **cache).logits
                chosen.append(int(logits[0, -1].argmax()))
                inputs = torch.tensor([chosen[-1:]])
        return chosen

    expected = [reference(prompt) for prompt in prompts]
    assert [greedy(model, [prompt], 12)[0] for prompt in prompts] == expected
    assert greedy(model, prompts[:2], 12) == expected[:2]  # one length: no mask
    assert greedy(model, prompts, 12) == expected


SETTINGS = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
FIRST = [5, 9, 33, 71, 8]


def answers(name: str, prompts: list[list[int]]) -> list[tuple[int, list[int], list[int]]]:
    """For each prompt in turn: tokens that were lent, its text, and its text without any cache."""
    model = build_model(CONFIGS[name]())
    prefixes = PrefixCache(model, 64)
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        cache, n_held = prefixes.take(prompt)
        lent = {} if cache is None else {cache_argument(model): cache}
        text = model.generate(ids, attention_mask=torch.ones_like(ids), **SETTINGS, **lent)
        prefixes.keep(cache, text[0].tolist())
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), **SETTINGS)
        found.append((n_held, text[0].tolist(), alone[0].tolist()))
    return found


def test_a_conversation_that_goes_on() -> None:
    (_, first, _), *_ = answers("mixtral", [FIRST])
    prompts = [
        FIRST,
        [*first, 40, 41],  # goes on: all but the last token is there
        [*first[:7], 60],  # another answer to the same beginning
        [*first[:7], 60],  # the same again: its last token is evaluated
        [1, 2, 3],  # another conversation
        FIRST[:2],  # and one that is over before it begins
    ]
    found = answers("mixtral", prompts)
    assert [n_held for n_held, _, _ in found] == [0, len(first) - 1, 7, 7, 0, 0]
    for _, text, alone in found:
        assert text == alone


def test_what_failed_is_not_lent_again() -> None:
    model = build_model(CONFIGS["mixtral"]())
    prefixes = PrefixCache(model, 64)
    cache, _ = prefixes.take(FIRST)
    ids = torch.tensor([FIRST])
    text = model.generate(ids, **SETTINGS, **{cache_argument(model): cache})[0].tolist()
    prefixes.keep(cache, text)
    assert prefixes.take(text)[1] == len(text) - 1
    assert prefixes.take(text)[1] == 0


@pytest.mark.parametrize("name", ["phimoe", "gpt_oss"])
def test_models_that_cannot_forget_evaluate_all(name: str) -> None:
    """Rotary factors that depend on the length; sliding windows."""
    for n_held, text, alone in answers(name, [FIRST, [*FIRST, 40, 41]]):
        assert n_held == 0
        assert text == alone


def test_rotary_factors_that_are_the_same_for_every_length_are_lent() -> None:
    """A GGUF file's own divisors, which `longrope` expresses; another scale would not be."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "factor": 1.0,
        "short_factor": [1.0, 1.05, 1.1, 1.2],
        "long_factor": [1.0, 1.05, 1.1, 1.2],
        "original_max_position_embeddings": 8,
    }
    for more, n_expected in (({}, len(FIRST) + 5), ({"short_mscale": 1.0, "long_mscale": 1.1}, 0)):
        model = build_model(CONFIGS["mixtral"](rope_parameters=rope | more, head_dim=8))
        prefixes = PrefixCache(model, 64)
        ids = torch.tensor([FIRST])
        cache, _ = prefixes.take(FIRST)
        text = model.generate(ids, **SETTINGS, **{cache_argument(model): cache})[0].tolist()
        prefixes.keep(cache, text)
        goes_on = [*text, 40, 41]
        cache, n_held = prefixes.take(goes_on)
        assert n_held == n_expected
        ids, lent = torch.tensor([goes_on]), {cache_argument(model): cache}
        with_it = model.generate(ids, **SETTINGS, **lent)
        assert torch.equal(with_it, model.generate(ids, **SETTINGS))
