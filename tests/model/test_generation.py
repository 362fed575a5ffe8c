"""The generation loop: samples, what a model cannot take, scores that are no numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import CONFIGS, build_model, gpt_oss, mixtral, nemotron_h, phimoe
from torch import Tensor
from transformers import MinPLogitsWarper, PreTrainedModel, TopKLogitsWarper, TopPLogitsWarper

from moe_offload.config import GenerationOptions
from moe_offload.errors import UserError
from moe_offload.model.generation import (
    Generated,
    Request,
    Sampler,
    can_refill,
    context_length,
    generate,
    generate_batch,
    require_fitting,
    stop_ids,
    unused_suggestions,
)

CPU = torch.device("cpu")
PROMPTS = [[5, 9, 7, 11], [4, 8, 3], [12, 30, 9, 6, 2], [5, 9, 7, 11]]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build_model(mixtral())


def samples(
    model: PreTrainedModel, batches: list[list[int]], seed: int = 3, **settings: float
) -> dict[int, list[int]]:
    """Answers by prompt; each batch has its prompts' numbers."""
    options = GenerationOptions(10, **{"temperature": 1.0, "seed": seed, **settings})
    records: dict[int, Generated] = {}
    for batch in batches:
        requests = [Request(number, PROMPTS[number], options) for number in batch]
        for record, _ in generate(model, requests, len(batch), eos_ids=frozenset({7})):
            records[record.prompt] = record
    return {number: record.ids for number, record in records.items()}


def shares(options: GenerationOptions, logits: Tensor, n_rows: int) -> Tensor:
    """How often each token is drawn from `logits` [1, vocabulary], of `n_rows` prompts."""
    drawn = torch.cat([Sampler(options, row, CPU).choose(logits, [0]) for row in range(n_rows)])
    return drawn.bincount(minlength=logits.shape[1]) / n_rows


@pytest.mark.parametrize(
    "settings",
    [{"top_k": 5}, {"min_p": 0.2}, {"top_k": 9, "min_p": 0.1, "top_p": 0.8}, {"top_k": 99}],
    ids=str,
)
def test_draws_are_from_what_transformers_would_draw_from(settings):
    n_rows, temperature = 4000, 0.9
    logits = 2 * torch.randn(1, 40, generator=torch.Generator().manual_seed(1))
    scores = logits / temperature
    for name, warper in (
        ("top_k", TopKLogitsWarper),
        ("top_p", TopPLogitsWarper),
        ("min_p", MinPLogitsWarper),
    ):
        if name in settings:
            scores = warper(settings[name])(torch.zeros(1, 1, dtype=torch.int64), scores)
    expected = scores.softmax(dim=-1)[0]
    counts = shares(GenerationOptions(1, temperature, **settings), logits, n_rows)
    assert not counts[expected == 0].any()
    # four standard deviations of a share
    assert ((counts - expected).abs() <= 4 * (expected * (1 - expected) / n_rows).sqrt()).all()


@pytest.mark.parametrize("penalty", [0.5, 1.3, 50.0])
def test_the_repetition_penalty_is_transformers(penalty, model):
    prompt = [5, 9, 7, 11]
    options = GenerationOptions(12, repetition_penalty=penalty)
    steps = generate_batch(model, [[3], prompt], options)  # beside a shorter one
    ids = {record.prompt: record.ids for record, _ in steps}[1]
    expected = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, 4, dtype=torch.int64),
        max_new_tokens=12,
        do_sample=False,
        repetition_penalty=penalty,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert ids == expected[0, 4:].tolist()
    if penalty == 50.0:
        assert len({*prompt, *ids}) == 16  # nothing comes twice


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_a_sample_depends_on_its_seed_and_number_alone(model, top_p):
    alone = samples(model, [[0], [1], [2], [3]], top_p=top_p)
    assert samples(model, [[0, 1, 2, 3]], top_p=top_p) == alone
    assert samples(model, [[2, 3], [0, 1]], top_p=top_p) == alone
    assert alone[0] != alone[3]  # one text, two samples
    assert samples(model, [[0, 1, 2, 3]], seed=4, top_p=top_p) != alone


def test_draws_follow_the_probabilities_of_the_nucleus():
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    n_rows = 4000
    for top_p, kept in ((1.0, 4), (0.9, 3), (0.75, 2), (1e-9, 1)):
        counts = shares(GenerationOptions(1, 1.0, top_p), probabilities.log()[None], n_rows)
        expected = probabilities * (torch.arange(4) < kept)
        expected = expected / expected.sum()
        # four standard deviations of a share
        assert ((counts - expected).abs() <= 4 * (expected * (1 - expected) / n_rows).sqrt()).all()


@pytest.mark.parametrize("temperature", [1e-6, 1e-40])
def test_a_tiny_temperature_is_greedy(model, temperature):
    greedy = samples(model, [[0, 1, 2]], temperature=0.0)
    assert samples(model, [[0, 1, 2]], temperature=temperature) == greedy
    assert samples(model, [[0, 1, 2]], temperature=temperature, top_p=1e-9) == greedy


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_a_sentence(temperature, value):
    model = build_model(mixtral())
    model.lm_head.weight[3, 5] = value
    with pytest.raises(UserError, match="prompt 1 are not finite"):
        samples(model, [[0, 1]], temperature=temperature)


def test_tokens_that_are_left_out_by_minus_infinity_are_no_fault(model):
    def leave_out(_: object, __: object, output: Any) -> None:
        output.logits[..., 7:] = -torch.inf

    handle = model.register_forward_hook(leave_out)
    try:
        assert max(samples(model, [[0]])[0]) < 7
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ([5, 96], "has the token 96, but the model knows 96"),
        ([5, -1], "the model knows 96"),
        ([5] * 256, "has 256 tokens, but the model's context holds 256"),
        ([], "no tokens"),
    ],
)
def test_a_prompt_that_the_model_cannot_take_is_a_sentence(model, ids, said):
    with pytest.raises(UserError, match=said):
        require_fitting(ids, model.config)
    with pytest.raises(UserError, match=said):
        list(generate_batch(model, [[5], ids], GenerationOptions(2)))


@pytest.mark.parametrize(
    ("rope", "length"),
    [
        ({"rope_type": "default", "rope_theta": 1e4}, 64),
        ({"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}, 256),
        (
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "rope_theta": 1e4,
                "original_max_position_embeddings": 32,
            },
            128,
        ),
        ({"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}, 64),
    ],
)
def test_yarn_stretches_the_context(rope: dict[str, Any], length: int):
    config = mixtral(max_position_embeddings=64, rope_parameters=rope)
    assert context_length(config) == length


def test_stop_ids_are_tokens(model, monkeypatch):
    for configured, found in ((None, {2}), (-1, {2}), (5, {2, 5}), ([5, 96, 7], {2, 5, 7})):
        monkeypatch.setattr(model, "generation_config", SimpleNamespace(eos_token_id=configured))
        assert stop_ids(model, frozenset({2})) == found
    assert stop_ids(model, frozenset({1000})) == {5, 7}


@pytest.mark.parametrize(
    ("suggested", "named"),
    [
        ({}, None),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, None),
        ({"do_sample": False, "temperature": 0.3, "top_k": 50}, None),
        ({"do_sample": True, "temperature": 0.3, "top_k": 20}, "temperature 0.3, top_k 20;"),
        ({"repetition_penalty": 1.05, "suppress_tokens": [7]}, "1.05, suppress_tokens [7];"),
        ({"repetition_penalty": 1.0, "suppress_tokens": []}, None),
    ],
)
def test_what_a_checkpoint_suggests_in_vain_is_said(suggested, named):
    lines = unused_suggestions(suggested, GenerationOptions(1, 0.6, 0.9))
    assert len(lines) == (named is not None)
    assert named is None or named in lines[0]


def answers(
    model: PreTrainedModel,
    requests: list[Request],
    batch_size: int,
    on_pass: Callable[[Sequence[int], bool], None] | None = None,
) -> dict[int, list[int]]:
    steps = generate(model, requests, batch_size, eos_ids=frozenset({7}), on_pass=on_pass)
    return {record.prompt: record.ids for record, _ in steps}


# Lengths of prompts and of answers, so unlike that places become free at any time.
UNLIKE = [(4, 3), (9, 14), (1, 1), (30, 5), (2, 22), (17, 2), (6, 9), (3, 17), (12, 4)]


@pytest.mark.parametrize(
    ("name", "batch_size"), [*((name, 3) for name in [*CONFIGS, "nemotron_h"]), ("mixtral", 8)]
)
def test_a_place_in_a_batch_changes_no_answer(name: str, batch_size: int):
    model = build_model(nemotron_h() if name == "nemotron_h" else CONFIGS[name]())
    requests = [
        Request(n, [(11 * n + 5 * place) % 90 + 3 for place in range(length)], GenerationOptions(m))
        for n, (length, m) in enumerate(UNLIKE)
    ]
    alone = {number: ids for one in requests for number, ids in answers(model, [one], 1).items()}
    assert answers(model, requests, batch_size) == alone


@pytest.mark.parametrize("config", [mixtral, gpt_oss, nemotron_h])
def test_the_next_prompt_takes_a_place_where_the_cache_can_do_that(config):
    model = build_model(config())
    passes: list[tuple[list[int], bool]] = []
    lengths = (2, 5, 2, 2)
    requests = [Request(n, [3 + n, 9], GenerationOptions(m)) for n, m in enumerate(lengths)]
    answers(model, requests, 2, lambda numbers, evaluates: passes.append(([*numbers], evaluates)))
    taken = [([0, 1], True), ([0, 1], False), ([2], True), ([1, 2], False), ([3], True)]
    waited = [([0, 1], True), ([0, 1], False), ([1], False), ([1], False), ([1], False)]
    waited += [([2, 3], True), ([2, 3], False)]
    if can_refill(model):
        assert passes == [*taken, ([1, 3], False), ([1], False)]
    else:
        assert passes == waited
    assert can_refill(model) == (config is not nemotron_h)


def test_each_prompt_of_a_batch_has_its_own_settings(model):
    sampled = {"temperature": 1.0, "seed": 2}
    settings = [{}, sampled, {"repetition_penalty": 50.0}, {"max_tokens": 2}]
    requests = [
        Request(n, PROMPTS[n], GenerationOptions(**{"max_tokens": 10, **one}))
        for n, one in enumerate(settings)
    ]
    alone = {number: ids for one in requests for number, ids in answers(model, [one], 1).items()}
    assert answers(model, requests, 4) == alone
    assert len({tuple(ids) for ids in alone.values()}) == 4


def test_positions_that_change_a_whole_batch_are_reached_alone():
    """Beyond 64 tokens, longrope's other factors hold for every row of a batch."""
    model = build_model(phimoe())
    passes: list[list[int]] = []
    wanted = [(5, 20), (60, 20), (7, 15), (50, 10)]
    requests = [
        Request(n, [(7 * place + n) % 90 + 3 for place in range(length)], GenerationOptions(m))
        for n, (length, m) in enumerate(wanted)
    ]
    alone = {number: ids for one in requests for number, ids in answers(model, [one], 1).items()}
    together = answers(model, requests, 4, lambda numbers, _: passes.append([*numbers]))
    assert together == alone
    assert [1] in passes and [2, 3] in passes
    assert all(one == [1] for one in passes if 1 in one)
