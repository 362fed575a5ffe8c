"""The generation loop: prefill, then decode one token per step until every prompt has stopped."""

from __future__ import annotations

import inspect
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from textwrap import shorten
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

from moe_offload.errors import UserError
from moe_offload.model.kv_cache import make_cache

_LOWEST_TEMPERATURE = 1e-30  # below, fp32 may take it for zero
StopReason = Literal["eos", "length", "context", "stop", "interrupted"]


@dataclass
class Generated:
    """What one prompt produced; times in seconds, on one clock from the batch's start.

    `prefill_s` is the prompt's evaluation up to its first token (TTFT, shared by the batch);
    `token_times_s[i]` is the duration of the step that produced token `i`.
    """

    prompt: int
    n_prompt_tokens: int
    ids: list[int] = field(default_factory=list)
    prefill_s: float = 0.0
    token_times_s: list[float] = field(default_factory=list)
    stop: StopReason = "interrupted"


@dataclass(frozen=True)
class Sampler:
    """Chooses the next token: greedy at temperature 0, else drawn by its probability.

    It is drawn from the `top_k` likeliest (0: all), of them from the nucleus of mass `top_p`, and
    from those of at least `min_p` times the largest probability. Before all that, the scores of
    tokens that the text has already are divided by `repetition_penalty`, negative ones multiplied.
    Each of the four is transformers' own of that name.

    Each prompt draws from a generator of its own, seeded by `seed` and its number, so that its
    sample depends neither on the prompts beside it nor on those before.
    """

    temperature: float
    top_p: float
    seed: int
    device: torch.device
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def generator(self, prompt: int) -> torch.Generator | None:
        """Prompt number `prompt`'s own stream of random numbers; None where nothing is drawn."""
        if self.temperature == 0:
            return None
        seed = random.Random(f"{self.seed} {prompt}").getrandbits(63)
        return torch.Generator(self.device).manual_seed(seed)

    def choose(
        self,
        logits: Tensor,
        generators: Sequence[torch.Generator | None],
        texts: Sequence[Sequence[int]] = (),
    ) -> Tensor:
        """int64 [B] from logits [B, vocabulary], row by row with its generator.

        `texts` are each row's tokens so far, which only the repetition penalty needs.
        """
        if self.repetition_penalty != 1:
            logits = self._penalized(logits, texts)
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        # less the largest first: a tiny temperature would make an infinity of it
        logits = logits.float() - logits.amax(dim=-1, keepdim=True).float()
        logits = logits / max(self.temperature, _LOWEST_TEMPERATURE)
        if 0 < self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k, dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < least, -math.inf)
        probabilities = torch.softmax(logits, dim=-1)
        order = None
        if self.top_p < 1:
            probabilities, order = probabilities.sort(dim=-1, descending=True)
            outside = probabilities.cumsum(dim=-1) - probabilities >= self.top_p
            probabilities = probabilities.masked_fill(outside, 0.0)
        if self.min_p > 0:
            least = self.min_p * probabilities.amax(dim=-1, keepdim=True)
            probabilities = probabilities.masked_fill(probabilities < least, 0.0)
        drawn = torch.cat(
            [
                torch.multinomial(row, 1, generator=generator)
                for row, generator in zip(probabilities, generators, strict=True)
            ]
        )
        return drawn if order is None else order.gather(-1, drawn[:, None]).squeeze(-1)

    def _penalized(self, logits: Tensor, texts: Sequence[Sequence[int]]) -> Tensor:
        logits = logits.float().clone()
        for row, text in zip(logits, texts, strict=True):
            there = torch.tensor(sorted(set(text)), device=row.device)
            scores, penalty = row[there], self.repetition_penalty
            row[there] = torch.where(scores < 0, scores * penalty, scores / penalty)
        return logits


def make_sampler(
    temperature: float, top_p: float, seed: int, device: torch.device, **more: float
) -> Sampler:
    """`more`: the sampler's further fields."""
    return Sampler(temperature, top_p, seed, device, **more)  # type: ignore[arg-type]


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


# What a checkpoint may suggest for sampling, and what stands for nothing suggested.
_SUGGESTIONS: dict[str, tuple[object, ...]] = {
    "temperature": (None,),
    "top_p": (None, 1.0),
    "top_k": (None, 0),
    "min_p": (None, 0.0),
    "typical_p": (None, 1.0),
    "repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "bad_words_ids": (None, []),
}


def unused_suggestions(
    suggested: dict[str, Any], temperature: float, top_p: float, **more: float
) -> list[str]:
    """A line for the user where the checkpoint's generation defaults suggest other sampling.

    `more` are further settings of the run, by the checkpoint's names for them.
    """
    used: dict[str, Any] = {"temperature": temperature, "top_p": top_p} | more
    if not suggested.get("do_sample"):  # greedy: what shapes a draw has no effect
        used |= {name: suggested.get(name) for name in ("temperature", "top_p", "top_k", "min_p")}
    unused = [
        f"{name} {suggested[name]}"
        for name, nothing in _SUGGESTIONS.items()
        if suggested.get(name) not in (*nothing, used.get(name))
    ]
    if not unused:
        return []
    line = shorten(", ".join(unused), 200, placeholder=" ...")
    return [
        f"the checkpoint suggests {line}; this run has temperature {temperature:g} and top-p "
        f"{top_p:g}, and of all else what its flags say"
    ]


@torch.inference_mode()
def generate_batch(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    sampler: Sampler,
    eos_ids: frozenset[int],
    first_prompt: int = 0,
    on_pass: Callable[[Sequence[int]], None] | None = None,
    forced: Sequence[int] | None = None,
) -> Iterator[tuple[Generated, int]]:
    """Generate for a batch of prompts; yields (prompt's record, token id) as tokens appear.

    `prompts` are token ids, left-padded here to one length; prompt `i` is reported as
    `first_prompt + i`. A prompt that stops leaves the batch. `on_pass` hears, before each
    forward pass, which prompts are in it. `forced` overrides the sampled tokens (replays). A model
    that would take padding for text has its prompts one after the other where lengths differ.
    Raises UserError for a prompt longer than the model's context. The end-of-sequence token is
    counted and yielded. Records end with their `stop` reason set. Whoever iterates may set it too,
    to end a prompt by what its text says.
    """
    limit = context_length(model.config)
    for ids in prompts:
        require_fitting(ids, model.config)
    device = model.device
    active = [Generated(first_prompt + i, len(ids)) for i, ids in enumerate(prompts)]
    generators = {record.prompt: sampler.generator(record.prompt) for record in active}
    inputs, mask = _left_pad(prompts, device)
    if mask is not None and _counts_padding(model.config):
        for number, ids in enumerate(prompts, start=first_prompt):
            yield from generate_batch(
                model,
                [ids],
                max_tokens=max_tokens,
                sampler=sampler,
                eos_ids=eos_ids,
                first_prompt=number,
                on_pass=on_pass,
                forced=forced,
            )
        return
    n_past = 0
    cache = None
    if model._supports_default_dynamic_cache():  # else the model makes one of its own
        cache = make_cache(model.config, inputs.shape[1] + max_tokens)
    started = time.perf_counter()
    for step in range(max_tokens):
        if on_pass is not None:
            on_pass([record.prompt for record in active])
        positions = _positions(mask, inputs, n_past)
        logits, cache = _forward(model, inputs, mask, positions, cache)
        _require_finite(logits, active)
        texts: list[list[int]] = []
        if sampler.repetition_penalty != 1:
            texts = [[*prompts[one.prompt - first_prompt], *one.ids] for one in active]
        generators_of_rows = [generators[record.prompt] for record in active]
        tokens = sampler.choose(logits, generators_of_rows, texts)
        if forced is not None:
            tokens = torch.full_like(tokens, forced[step])
        chosen = tokens.tolist()
        now = time.perf_counter()
        keep = []
        for row, (record, token) in enumerate(zip(active, chosen, strict=True)):
            record.ids.append(token)
            record.token_times_s.append(now - started)
            if step == 0:
                record.prefill_s = now - started
            stop = _stop_reason(record, token, eos_ids, max_tokens, limit)
            if stop is None:
                keep.append(row)
            else:
                record.stop = stop
        started = now
        yield from zip(active, chosen, strict=True)
        keep = [row for row in keep if active[row].stop == "interrupted"]
        if not keep:
            return
        if len(keep) < len(active):
            rows = torch.tensor(keep, device=device)
            cache.batch_select_indices(rows)
            mask, tokens = None if mask is None else mask[rows], tokens[rows]
            active = [active[row] for row in keep]
        n_past += inputs.shape[1]
        inputs = tokens[:, None]
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(active), 1)], dim=1)


def _stop_reason(
    record: Generated, token: int, eos_ids: frozenset[int], max_tokens: int, limit: int | None
) -> StopReason | None:
    if token in eos_ids:
        return "eos"
    if len(record.ids) >= max_tokens:
        return "length"
    if limit is not None and record.n_prompt_tokens + len(record.ids) >= limit:
        return "context"
    return None


def _left_pad(
    prompts: Sequence[Sequence[int]], device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """int64 [B, S] ids, and 0 in a mask like it for padding; no mask where nothing is padded."""
    longest = max(len(ids) for ids in prompts)
    inputs = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros(len(prompts), longest, dtype=torch.int64)
    for row, ids in enumerate(prompts):
        inputs[row, longest - len(ids) :] = torch.tensor(ids, dtype=torch.int64)
        mask[row, longest - len(ids) :] = 1
    if all(len(ids) == longest for ids in prompts):  # spares every step the look at it
        return inputs.to(device), None
    return inputs.to(device), mask.to(device)


def _counts_padding(config: PretrainedConfig) -> bool:
    """Whether attention folds neighbouring tokens into one key, padding with them (DeepSeek-V4)."""
    kinds = getattr(config.get_text_config(), "layer_types", None) or []
    return any("compressed" in str(kind) for kind in kinds)


def cache_argument(model: PreTrainedModel) -> str:
    """How this release of transformers calls the KV cache: `cache` from 5.24 on."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _positions(mask: Tensor | None, inputs: Tensor, n_past: int) -> Tensor:
    """int64 like `inputs` [B, S]: each token's number in its own sequence, padding not counted."""
    if mask is not None:
        return (mask.cumsum(dim=-1) - 1).clamp(min=0)[:, -inputs.shape[1] :]
    numbers = torch.arange(n_past, n_past + inputs.shape[1], device=inputs.device)
    return numbers.expand(inputs.shape)


def _forward(
    model: PreTrainedModel,
    inputs: Tensor,
    mask: Tensor | None,
    positions: Tensor,
    cache: DynamicCache | None,
) -> tuple[Tensor, DynamicCache]:
    name = cache_argument(model)
    output: Any = model(
        input_ids=inputs,
        attention_mask=mask,
        position_ids=positions,
        use_cache=True,
        logits_to_keep=1,
        **{name: cache},
    )
    return output.logits[:, -1], output[name]


def _require_finite(logits: Tensor, active: Sequence[Generated]) -> None:
    """UserError where a row of logits [B, vocabulary] names no most probable token."""
    for record, largest in zip(active, logits.amax(dim=-1).tolist(), strict=True):
        if not math.isfinite(largest):
            raise UserError(
                f"the model's scores of token {len(record.ids) + 1} of prompt {record.prompt + 1} "
                "are not finite: its weights are damaged, or overflow in the format they are "
                "prepared in; download them again, or prepare them with --dense-dtype fp32"
            )
