"""The generation loop: prefill, then decode one token per step until every prompt has stopped."""

from __future__ import annotations

import inspect
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from textwrap import shorten
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    PretrainedConfig,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from moe_offload.config import GenerationOptions
from moe_offload.errors import UserError
from moe_offload.model.kv_cache import make_cache

_LOWEST_TEMPERATURE = 1e-30  # below, fp32 may take it for zero
StopReason = Literal["eos", "length", "context", "stop", "interrupted"]


@dataclass
class Generated:
    """What one prompt produced; times in seconds, on one clock from the batch's start.

    `token_times_s[i]` is the duration of the step that produced token `i`; the first is the
    prompt's evaluation (TTFT, shared by the batch).
    """

    prompt: int
    n_prompt_tokens: int
    ids: list[int] = field(default_factory=list)
    token_times_s: list[float] = field(default_factory=list)
    stop: StopReason = "interrupted"


class Sampler:
    """Chooses the next token: greedy at temperature 0, else drawn by its probability.

    What `options` leave of the probabilities is decided by transformers' own classes, in its order.
    Each prompt draws from a generator of its own, seeded by the seed and its number, so that its
    sample depends neither on the prompts beside it nor on those before.
    """

    def __init__(self, options: GenerationOptions, device: torch.device) -> None:
        self._options = options
        self._device = device
        self._generators: dict[int, torch.Generator] = {}
        self._penalty = RepetitionPenaltyLogitsProcessor(float(options.repetition_penalty))
        self._warpers = LogitsProcessorList()
        if options.top_k > 0:
            self._warpers.append(TopKLogitsWarper(options.top_k))
        if options.top_p < 1:
            self._warpers.append(TopPLogitsWarper(options.top_p))
        if options.min_p > 0:
            self._warpers.append(MinPLogitsWarper(options.min_p))

    def choose(self, logits: Tensor, texts: Mapping[int, list[int]]) -> Tensor:
        """int64 [B] from logits [B, vocabulary]; `texts` are the rows' tokens so far, by prompt."""
        logits = logits.float()
        if self._options.repetition_penalty != 1:
            longest = max(map(len, texts.values()))
            # in one length by repeating a token, which is penalised once all the same
            ids = [[*text, *text[:1] * (longest - len(text))] for text in texts.values()]
            logits = self._penalty(torch.tensor(ids, device=self._device), logits)
        if self._options.temperature == 0:
            return logits.argmax(dim=-1)
        # less the largest first: a tiny temperature would make an infinity of it
        logits = logits - logits.amax(dim=-1, keepdim=True)
        logits = logits / max(self._options.temperature, _LOWEST_TEMPERATURE)
        rows = self._warpers(None, logits).softmax(dim=-1)
        return torch.cat(
            [
                torch.multinomial(row, 1, generator=self._generator(prompt))
                for row, prompt in zip(rows, texts, strict=True)
            ]
        )

    def _generator(self, prompt: int) -> torch.Generator:
        if prompt not in self._generators:
            seed = random.Random(f"{self._options.seed} {prompt}").getrandbits(63)
            self._generators[prompt] = torch.Generator(self._device).manual_seed(seed)
        return self._generators[prompt]


def stop_ids(model: PreTrainedModel, tokenizer_eos: frozenset[int]) -> frozenset[int]:
    """Ids that end a text: the generation config's, and the tokenizer's end of sequence.

    Those that the model cannot answer, such as the -1 of some configs, are none.
    """
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = [configured] if isinstance(configured, int) else configured or []
    n_known = getattr(model.config.get_text_config(), "vocab_size", math.inf)
    return frozenset(one for one in {*ids, *tokenizer_eos} if 0 <= one < n_known)


def context_length(config: PretrainedConfig) -> int | None:
    """The most tokens the model's positions reach, or None where its config does not say.

    YaRN stretches `max_position_embeddings`, or what the model was trained with, by its factor.
    """
    text = config.get_text_config()
    length = getattr(text, "max_position_embeddings", None)
    if not length:
        return None
    rope = getattr(text, "rope_parameters", None) or {}
    for kind in [rope, *rope.values()]:  # one for all layers, or one per kind of layer
        if isinstance(kind, dict) and kind.get("rope_type") == "yarn":
            trained = kind.get("original_max_position_embeddings") or length
            length = max(length, int(trained * (kind.get("factor") or 1.0)))
    return int(length)


def require_fitting(ids: Sequence[int], config: PretrainedConfig, name: str = "the prompt") -> None:
    """UserError for a prompt that `config`'s model cannot take: too long, or of foreign tokens."""
    limit = context_length(config)
    if limit is not None and len(ids) >= limit:
        raise UserError(
            f"{name} has {len(ids)} tokens, but the model's context holds {limit}: shorten it"
        )
    if not ids:
        raise UserError(f"{name} has no tokens: give it some text")
    n_known = getattr(config.get_text_config(), "vocab_size", None)
    if n_known is not None and not 0 <= min(ids) <= max(ids) < n_known:
        raise UserError(
            f"{name} has the token {max(ids)}, but the model knows {n_known}: its tokenizer is "
            "another model's, or had tokens added; copy the model's own tokenizer files there"
        )


# What a checkpoint may suggest for sampling, and what has no effect.
_SUGGESTIONS: dict[str, Any] = {
    "temperature": None,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
    "bad_words_ids": [],
}


def unused_suggestions(suggested: dict[str, Any], options: GenerationOptions) -> list[str]:
    """A line for the user where the checkpoint's generation defaults suggest other sampling."""
    used = asdict(options)
    if not suggested.get("do_sample"):  # greedy: what shapes a draw has no effect
        used |= {name: suggested.get(name) for name in ("temperature", "top_p", "top_k", "min_p")}
    unused = [
        f"{name} {suggested[name]}"
        for name, nothing in _SUGGESTIONS.items()
        if suggested.get(name) not in (None, nothing, used.get(name))
    ]
    if not unused:
        return []
    line = shorten(", ".join(unused), 200, placeholder=" ...")
    return [
        f"the checkpoint suggests {line}; this run has temperature {options.temperature:g} and "
        f"top-p {options.top_p:g}, and of all else what its flags say"
    ]


@torch.inference_mode()
def generate_batch(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    options: GenerationOptions,
    *,
    eos_ids: frozenset[int] = frozenset(),
    first_prompt: int = 0,
    on_pass: Callable[[Sequence[int]], None] | None = None,
) -> Iterator[tuple[Generated, int]]:
    """Generate for a batch of prompts; yields (prompt's record, token id) as tokens appear.

    `prompts` are token ids, left-padded here to one length; prompt `i` is reported as
    `first_prompt + i`. A prompt that stops leaves the batch. `on_pass` hears, before each
    forward pass, which prompts are in it. A model that would take padding for text has its prompts
    one after the other where lengths differ. Raises UserError for a prompt longer than the model's
    context. The end-of-sequence token is counted and yielded. Records end with their `stop` reason
    set. Whoever iterates may set it too, to end a prompt by what its text says.
    """
    for ids in prompts:
        require_fitting(ids, model.config)
    if len(set(map(len, prompts))) > 1 and _counts_padding(model.config):
        for number, ids in enumerate(prompts, start=first_prompt):
            yield from generate_batch(
                model, [ids], options, eos_ids=eos_ids, first_prompt=number, on_pass=on_pass
            )
        return
    limit = context_length(model.config)
    sampler = Sampler(options, model.device)
    active = [Generated(number, len(ids)) for number, ids in enumerate(prompts, start=first_prompt)]
    texts = {record.prompt: list(ids) for record, ids in zip(active, prompts, strict=True)}
    inputs, mask, positions = _left_pad(prompts, model.device)
    cache_name = cache_argument(model)
    cache = None
    if model._supports_default_dynamic_cache():  # else the model makes one of its own
        cache = make_cache(model.config, inputs.shape[1] + options.max_tokens)
    started = time.perf_counter()
    while True:
        if on_pass is not None:
            on_pass([record.prompt for record in active])
        output: Any = model(
            input_ids=inputs,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **{cache_name: cache},
        )
        logits, cache = output.logits[:, -1], output[cache_name]
        _require_finite(logits, active)
        tokens = sampler.choose(logits, {one.prompt: texts[one.prompt] for one in active})
        chosen = tokens.tolist()
        now = time.perf_counter()
        for record, token in zip(active, chosen, strict=True):
            texts[record.prompt].append(token)
            record.ids.append(token)
            record.token_times_s.append(now - started)
            record.stop = _stop_reason(record, eos_ids, options.max_tokens, limit)
        started = now
        yield from zip(active, chosen, strict=True)
        keep = [row for row, record in enumerate(active) if record.stop == "interrupted"]
        if not keep:
            return
        if len(keep) < len(active):
            rows = torch.tensor(keep, device=model.device)
            cache.batch_select_indices(rows)
            mask = None if mask is None else mask[rows]
            active, tokens, positions = [active[row] for row in keep], tokens[rows], positions[rows]
        inputs, positions = tokens[:, None], positions[:, -1:] + 1
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(active), 1)], dim=1)


def _stop_reason(
    record: Generated, eos_ids: frozenset[int], max_tokens: int, limit: int | None
) -> StopReason:
    if record.ids[-1] in eos_ids:
        return "eos"
    if len(record.ids) >= max_tokens:
        return "length"
    if limit is not None and record.n_prompt_tokens + len(record.ids) >= limit:
        return "context"
    return "interrupted"


def _left_pad(
    prompts: Sequence[Sequence[int]], device: torch.device
) -> tuple[Tensor, Tensor | None, Tensor]:
    """int64 [B, S]: the ids, a mask with 0 for padding, and each token's number in its prompt.

    No mask where nothing is padded: that spares every step the look at it.
    """
    longest = max(map(len, prompts))
    padded = [[0] * (longest - len(ids)) + list(ids) for ids in prompts]
    positions = torch.arange(longest) - torch.tensor([[longest - len(ids)] for ids in prompts])
    mask = (positions >= 0).long().to(device) if (positions < 0).any() else None
    return torch.tensor(padded, device=device), mask, positions.clamp(min=0).to(device)


def _counts_padding(config: PretrainedConfig) -> bool:
    """Whether attention folds neighbouring tokens into one key, padding with them (DeepSeek-V4)."""
    kinds = getattr(config.get_text_config(), "layer_types", None) or []
    return any("compressed" in str(kind) for kind in kinds)


def cache_argument(model: PreTrainedModel) -> str:
    """How this release of transformers calls the KV cache: `cache` from 5.24 on."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _require_finite(logits: Tensor, active: Sequence[Generated]) -> None:
    """UserError where a row of logits [B, vocabulary] names no most probable token."""
    for record, largest in zip(active, logits.amax(dim=-1).tolist(), strict=True):
        if not math.isfinite(largest):
            raise UserError(
                f"the model's scores of token {len(record.ids) + 1} of prompt {record.prompt + 1} "
                "are not finite: its weights are damaged, or overflow in the format they are "
                "prepared in; download them again, or prepare them with --dense-dtype fp32"
            )
