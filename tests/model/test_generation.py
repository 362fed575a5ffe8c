"""The generation loop: samples, what a model cannot take, scores that are no numbers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import build_model, mixtral
from torch import Tensor
from transformers import MinPLogitsWarper, PreTrainedModel, TopKLogitsWarper, TopPLogitsWarper

from moe_offload.config import GenerationOptions
from moe_offload.errors import UserError
from moe_offload.model.generation import (
    Generated,
    Sampler,
    context_length,
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
    """Answers by prompt; each batch has its prompts' numbers, which follow each other."""
    options = GenerationOptions(10, **{"temperature": 1.0, "seed": seed, **settings})
    records: dict[int, Generated] = {}
    for batch in batches:
        for record, _ in generate_batch(
            model,
            [PROMPTS[number] for number in batch],
            options,
            eos_ids=frozenset({7}),
            first_prompt=batch[0],
        ):
            records[record.prompt] = record
    return {number: record.ids for number, record in records.items()}


def shares(options: GenerationOptions, logits: Tensor, n_rows: int) -> Tensor:
    """How often each token is drawn from `logits` [1, vocabulary], of `n_rows` prompts."""
    texts = {row: [0] for row in range(n_rows)}
    drawn = Sampler(options, CPU).choose(logits.expand(n_rows, -1), texts)
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
