"""The cache of the last conversation: what is shared is lent, what is not is evaluated."""

from __future__ import annotations

import pytest
import torch
from tiny_models import CONFIGS, build_model

from moe_offload.model.generation import cache_argument
from moe_offload.model.prefix import PrefixCache

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
