"""The generation loop: each step evaluates prompts that found a place, or adds a token to each row.

A prompt that stops leaves its place to the next that waits, so no batch waits for its longest.
"""

from __future__ import annotations

import inspect
import math
import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from textwrap import shorten
from typing import Any, Literal

import torch
from torch import Tensor, nn
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
from moe_offload.model.kv_cache import can_join, join, make_cache

_LOWEST_TEMPERATURE = 1e-30  # below, fp32 may take it for zero
StopReason = Literal["eos", "length", "context", "stop", "interrupted"]


@dataclass(frozen=True)
class Request:
    """The token ids of a prompt, the number that it is reported by, and how it is answered."""

    number: int
    ids: Sequence[int]
    options: GenerationOptions


@dataclass
class Generated:
    """What one prompt produced.

    `token_times_s[i]` is the duration, s, of the step that produced token `i`; the first is the
    prompt's evaluation (TTFT, shared by those evaluated with it). Steps that evaluate other prompts
    meanwhile are in neither.
    """

    prompt: int
    n_prompt_tokens: int
    ids: list[int] = field(default_factory=list)
    token_times_s: list[float] = field(default_factory=list)
    stop: StopReason = "interrupted"


class Sampler:
    """Chooses a prompt's next token: greedy at temperature 0, else drawn by its probability.

    What `options` leave of the probabilities is decided by transformers' own classes, in its order.
    The generator is the prompt's own, seeded by the seed and its number, so that its sample depends
    neither on the prompts beside it nor on those before.
    """

    def __init__(self, options: GenerationOptions, number: int, device: torch.device) -> None:
        self._options = options
        self._generator: torch.Generator | None = None
        if options.temperature > 0:
            seed = random.Random(f"{options.seed} {number}").getrandbits(63)
            self._generator = torch.Generator(device).manual_seed(seed)
        self._penalty = RepetitionPenaltyLogitsProcessor(float(options.repetition_penalty))
        self._warpers = LogitsProcessorList()
        if options.top_k > 0:
            self._warpers.append(TopKLogitsWarper(options.top_k))
        if options.top_p < 1:
            self._warpers.append(TopPLogitsWarper(options.top_p))
        if options.min_p > 0:
            self._warpers.append(MinPLogitsWarper(options.min_p))

    def choose(self, logits: Tensor, text: Sequence[int]) -> Tensor:
        """int64 [1] from logits [1, vocabulary]; `text` are the prompt's tokens so far."""
        logits = logits.float()
        if self._options.repetition_penalty != 1:
            logits = self._penalty(torch.tensor([text], device=logits.device), logits)
        if self._options.temperature == 0:
            return logits.argmax(dim=-1)
        # less the largest first: a tiny temperature would make an infinity of it
        logits = logits - logits.amax(dim=-1, keepdim=True)
        logits = logits / max(self._options.temperature, _LOWEST_TEMPERATURE)
        probabilities = self._warpers(None, logits).softmax(dim=-1)
        return torch.multinomial(probabilities[0], 1, generator=self._generator)


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


def generate_batch(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    options: GenerationOptions,
    *,
    eos_ids: frozenset[int] = frozenset(),
    first_prompt: int = 0,
) -> Iterator[tuple[Generated, int]]:
    """`generate` for prompts of the same settings, all at once, numbered from `first_prompt`."""
    requests = [Request(number, ids, options) for number, ids in enumerate(prompts, first_prompt)]
    yield from generate(model, requests, len(requests), eos_ids=eos_ids)


@dataclass
class _Row:
    """A prompt that has a place in the batch, and its tokens so far."""

    request: Request
    record: Generated
    sampler: Sampler
    text: list[int]


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    requests: Sequence[Request],
    batch_size: int,
    *,
    eos_ids: frozenset[int] = frozenset(),
    on_pass: Callable[[Sequence[int], bool], None] | None = None,
) -> Iterator[tuple[Generated, int]]:
    """Answer all `requests`, `batch_size` at a time; yields (record, token id) as tokens appear.

    The next prompt in order takes the place of one that stops, where the model's cache can do that
    (`can_refill`); it is evaluated by itself, then decoded with the others. `on_pass` hears, before
    each forward pass, which prompts are in it and whether they are evaluated. Raises UserError for
    a prompt longer than the model's context. The end-of-sequence token is counted and yielded.
    Records end with their `stop` reason set. Whoever iterates may set it too, to end a prompt by
    what its text says.
    """
    for one in requests:
        require_fitting(one.ids, model.config)
    limit = context_length(model.config)
    longest = max((len(one.ids) + one.options.max_tokens for one in requests), default=0)
    cache_name, refilled = cache_argument(model), can_refill(model)
    waiting = deque(requests)
    rows: list[_Row] = []
    cache: Any = None
    width = 0  # the tokens of a row in the cache, with its padding: all of its text but the last
    started = time.perf_counter()
    while waiting or rows:
        n_free = batch_size - len(rows) if refilled or not rows else 0
        newcomers = _newcomers(model, waiting, rows, n_free)
        if newcomers:
            in_pass, n_last = newcomers, max(len(row.text) for row in newcomers)
            pass_cache, pass_width = None, n_last
            if model._supports_default_dynamic_cache():  # else the model makes one of its own
                pass_cache = make_cache(model.config, longest)
        else:
            in_pass, n_last, pass_cache, pass_width = rows, 1, cache, width + 1
        if on_pass is not None:
            on_pass([row.record.prompt for row in in_pass], bool(newcomers))
        texts = [row.text for row in in_pass]
        inputs, mask, positions = _left_pad(texts, pass_width, n_last, model.device)
        output: Any = model(
            input_ids=inputs,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **{cache_name: pass_cache},
        )
        logits, pass_cache = output.logits[:, -1], output[cache_name]
        _require_finite(logits, [row.record for row in in_pass])
        each = zip(in_pass, logits.split(1), strict=True)
        chosen = torch.cat([row.sampler.choose(one, row.text) for row, one in each]).tolist()
        now = time.perf_counter()
        for row, token in zip(in_pass, chosen, strict=True):
            row.text.append(token)
            row.record.ids.append(token)
            row.record.token_times_s.append(now - started)
            row.record.stop = _stop_reason(row, eos_ids, limit)
        started = now
        for row, token in zip(in_pass, chosen, strict=True):
            yield row.record, token
        keep = [n for n, row in enumerate(in_pass) if row.record.stop == "interrupted"]
        if 0 < len(keep) < len(in_pass):
            # not batch_select_indices, which layers of recurrent states do not have
            pass_cache.reorder_cache(torch.tensor(keep, device=model.device))
        kept = [in_pass[n] for n in keep]
        if not newcomers or not rows:
            rows, cache, width = kept, pass_cache, pass_width
        elif kept:
            rows = rows + kept
            width = max(len(row.text) for row in rows) - 1
            join(cache, pass_cache, width)


def can_refill(model: PreTrainedModel) -> bool:
    """Whether a prompt can take a place in a batch that is being decoded."""
    return model._supports_default_dynamic_cache() and can_join(make_cache(model.config, 1))


def _newcomers(
    model: PreTrainedModel, waiting: deque[Request], rows: Sequence[_Row], n_free: int
) -> list[_Row]:
    """The next of those that wait, for at most `n_free` places beside `rows`."""
    equal = _counts_padding(model.config)
    found: list[_Row] = []
    while waiting and len(found) < n_free:
        beside = [row.request for row in (*rows, *found)]
        if beside and _needs_batch_of_its_own(model.config, beside[0], waiting[0]):
            break
        if equal and found and len(found[0].text) != len(waiting[0].ids):
            break
        one = waiting.popleft()
        sampler = Sampler(one.options, one.number, model.device)
        found.append(_Row(one, Generated(one.number, len(one.ids)), sampler, list(one.ids)))
    return found


def _needs_batch_of_its_own(config: PretrainedConfig, *requests: Request) -> bool:
    """Whether one of `requests` may reach positions that change the embedding of all in its batch.

    That is longrope's: beyond `original_max_position_embeddings` other factors hold (Phi-3.5-MoE).
    """
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return False
    trained = rope.get("original_max_position_embeddings") or text.max_position_embeddings
    return any(len(one.ids) + one.options.max_tokens > trained for one in requests)


def _stop_reason(row: _Row, eos_ids: frozenset[int], limit: int | None) -> StopReason:
    if row.text[-1] in eos_ids:
        return "eos"
    if len(row.record.ids) >= row.request.options.max_tokens:
        return "length"
    if limit is not None and len(row.text) >= limit:
        return "context"
    return "interrupted"


def _left_pad(
    texts: Sequence[Sequence[int]], width: int, n_last: int, device: torch.device
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The last `n_last` tokens of texts that are padded on the left to `width`.

    int64: the ids [B, n_last], a mask [B, width] with 0 for padding, and the tokens' numbers in
    their text [B, n_last]. No mask where nothing is padded: that spares every step the look at it.
    """
    ids = [[0] * (n_last - len(text)) + list(text[-n_last:]) for text in texts]
    places = torch.arange(width) - torch.tensor([[width - len(text)] for text in texts])
    mask = (places >= 0).long().to(device) if places[:, 0].min() < 0 else None
    positions = places[:, -n_last:].clamp(min=0)
    return torch.tensor(ids, device=device), mask, positions.to(device)


def _counts_padding(config: PretrainedConfig) -> bool:
    """Whether attention folds neighbouring tokens into one key, padding with them (DeepSeek-V4)."""
    kinds = getattr(config.get_text_config(), "layer_types", None) or []
    return any("compressed" in str(kind) for kind in kinds)


def cache_argument(model: nn.Module) -> str:
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
